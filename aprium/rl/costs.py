"""What a run of rounds would cost, in tokens, before any of it is run: node by node, at most.

Tokens, not seconds: what a token takes depends on the machine, which `aprium plan` knows about.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from aprium.rl.lineage import SOLUTIONS, RoundsConfig, read_state
from aprium.rl.rollout import DomainConfig, RolloutConfig
from aprium.rl.stages import Stage, resolved, rl_config, sft_config
from aprium.rl.teachers import TeachersConfig


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Tokens at most: written by models that play, scored by teachers, and trained on."""

    sampled: int = 0
    scored: int = 0
    trained: int = 0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(
            sampled=self.sampled + other.sampled,
            scored=self.scored + other.scored,
            trained=self.trained + other.trained,
        )


def cost(recipe: RoundsConfig, name: str, seed: int) -> Cost:
    """Return what node `name` costs at most for one seed, its evaluation included."""
    node, stage = recipe.nodes[name], Stage(recipe=recipe, name=name, seed=seed)
    taught = stage.routes()
    evaluation = recipe.evaluate
    tested = recipe.domains_of(name) if node.evaluate == "own" else recipe.domains
    turn = [domain.max_tokens or evaluation.max_tokens for domain in tested]
    found = Cost()
    if node.evaluate:
        most = (_written(t, evaluation.max_turns, evaluation.episode_tokens) for t in turn)
        found += Cost(sampled=evaluation.items * sum(most))
    rollout, support = recipe.rollout, recipe.support
    played = [d for d in recipe.domains_of(name) if d.name in taught]
    if node.when == "needed" or (node.kind == "mopd" and (node.adapt or support.rollouts)):
        # The teacher and the student itself say what they make of it.
        whole = support.rollouts * rollout.episode_tokens * len(played)
        found += Cost(sampled=support.rollouts * _play(played, rollout), scored=2 * whole)
    if node.kind in ("sft", "warmup"):
        paths = dict.fromkeys(taught, Path("-"))
        config = sft_config(stage, Path("-"), "-", paths)
        players = [d for d in played if taught[d.name] != SOLUTIONS]
        found += Cost(
            sampled=node.rollouts * _play(players, rollout),
            trained=config.trainer.steps * config.tokens_per_step,
        )
    elif node.kind in ("rl", "mopd"):
        config = rl_config(stage, Path("-"), "-", TeachersConfig())
        episodes = (
            config.trainer.steps * config.pipeline.groups_per_step * config.rollout.group_size
        )
        shares = sum(domain.weight for domain in config.domains) or 1.0
        mean = sum(
            domain.weight / shares * _play([domain], config.rollout) for domain in config.domains
        )
        whole = episodes * config.rollout.episode_tokens
        asked = node.kind == "mopd" and any(taught.values())
        found += Cost(sampled=round(episodes * mean), scored=whole if asked else 0, trained=whole)
    return found


def _play(domains: Sequence[DomainConfig], rollout: RolloutConfig) -> int:
    """Return the tokens that one episode of each domain may have a model write."""
    return sum(
        _written(domain.max_tokens or rollout.max_tokens, rollout.max_turns, rollout.episode_tokens)
        for domain in domains
    )


def _written(turn: int, turns: int, episode: int) -> int:
    return min(turn * turns, episode)


def outline(recipe: RoundsConfig, until: str | None = None) -> list[dict[str, str]]:
    """Return the nodes in order as rows of text: what they are, come from, cost, and their state.

    The last row is the sum over all seeds. Raises ConfigError for settings that cannot be.
    """
    rows, total = [], Cost()
    for name in recipe.order(until):
        node = recipe.nodes[name]
        resolved(recipe, name, recipe.seeds[0])  # what cannot be costs nothing
        one = cost(recipe, name, recipe.seeds[0])
        seeds = recipe.seeds[:1] if node.once else recipe.seeds
        for _ in seeds:
            total += one
        states = [read_state(recipe.place(name, seed)) for seed in seeds]
        done = sum(state is not None and state.status == "done" for state in states)
        parent = node.parent or recipe.checkpoint
        teachers = dict.fromkeys(recipe.teachers_of(name).values())
        taught = f"; taught by {', '.join(teachers)}" if teachers else ""
        rows.append(
            {
                "node": name,
                "kind": node.kind,
                "from": (", ".join(node.members) or parent) + taught,
                "done": f"{done} of {len(seeds)}",
                **_amounts(one),
            }
        )
    times = f"{len(recipe.seeds)} seeds" if len(recipe.seeds) > 1 else "1 seed"
    last = {"node": f"all, {times}", "kind": "", "from": "", "done": ""}
    return [*rows, last | _amounts(total)]


def _amounts(one: Cost) -> dict[str, str]:
    return {
        "sampled": f"{one.sampled:,}",
        "scored": f"{one.scored:,}",
        "trained": f"{one.trained:,}",
    }
