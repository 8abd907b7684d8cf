"""One node of a run of rounds: its own recipe put together, and run in its directory.

A node's recipe is that of `aprium sft` or `aprium rl`, with what the graph knows filled in: where
it starts, what its domains are, who teaches them. Everything that a node does leaves files, so that
doing it again does only what is missing.
"""

import asyncio
import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aprium.base.config import from_dict, to_dict
from aprium.base.errors import ApriumError, CheckpointError, ConfigError
from aprium.base.log import get_logger
from aprium.checkpoint.hub import resolve
from aprium.checkpoint.load import read_plan
from aprium.data.sources import SourceConfig
from aprium.quantize.merge import merge as merge_adapter
from aprium.rl import demonstrations, loop
from aprium.rl.lineage import SOLUTIONS, RoundsConfig, digest, read_state
from aprium.rl.loop import RlConfig
from aprium.rl.rollout import DomainConfig, RolloutConfig
from aprium.rl.support import Support, choose_form, score_support
from aprium.rl.teachers import SELF, RemoteConfig, TeacherConfig, TeachersConfig
from aprium.train import sft
from aprium.train.merge import merge as average
from aprium.train.pretrain import write_json
from aprium.train.sft import SftConfig

log = get_logger("rl")
# Tasks that are not the first of reinforcement learning with the same seed.
_DEMONSTRATED, _MEASURED = 10_000, 20_000
_GIVEN = ("output", "checkpoint", "domains")  # of a node's own recipe, by the graph
# What is looked into before the recipe is read as a whole; a table after the one it is in.
_TABLES = ("trainer", "rollout", "data", "credit", "teachers", "loss", "loss.policy")


@dataclass(frozen=True, kw_only=True)
class Located:
    """Where a model is: a checkpoint, which may be `base` with an `adapter`, or a server."""

    checkpoint: str = ""
    base: str | None = None
    adapter: Path | None = None
    remote: RemoteConfig | None = None

    def as_teacher(self, name: str) -> TeacherConfig:
        """Return it as a teacher: as an adapter where it is one, so that bases are shared."""
        if self.remote is not None:
            return TeacherConfig(name=name, remote=self.remote)
        if self.adapter is not None:
            return TeacherConfig(name=name, checkpoint=self.base, adapter=self.adapter)
        return TeacherConfig(name=name, checkpoint=self.checkpoint)


@dataclass(frozen=True, kw_only=True)
class Made:
    """What a node made: a checkpoint, also as `adapter` over `base`; `note` is to be shown."""

    checkpoint: Path
    base: str | None = None
    adapter: Path | None = None
    note: str | None = None


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A node of `recipe` for one of its seeds."""

    recipe: RoundsConfig
    name: str
    seed: int

    @property
    def place(self) -> Path:
        """Its directory."""
        return self.recipe.place(self.name, self.seed)

    def locate(self, source: str) -> Located:
        """Return where a node, checkpoint or server is; raises CheckpointError if not done yet."""
        recipe = self.recipe
        if source in recipe.remotes:
            return Located(remote=recipe.remotes[source])
        if source not in recipe.nodes:
            return Located(checkpoint=source)
        state = read_state(recipe.place(source, self.seed))
        if state is None or state.status != "done" or state.checkpoint is None:
            raise CheckpointError(f"node {self.name!r} needs {source!r}, which is not done")
        adapter = Path(state.adapter) if state.adapter is not None else None
        return Located(checkpoint=state.checkpoint, base=state.base, adapter=adapter)

    def start(self) -> str:
        """Return the checkpoint that the node starts from."""
        return self.locate(self.recipe.nodes[self.name].parent or self.recipe.checkpoint).checkpoint

    def rollout(self) -> RolloutConfig:
        """Return how it plays tasks."""
        return dataclasses.replace(self.recipe.rollout, seed=self.seed)

    def routes(self) -> dict[str, str]:
        """Return the name of each domain's teacher, as teachers are named in its recipe."""
        return self.recipe.teachers_of(self.name)

    def teachers(self, options: Mapping[str, Any]) -> TeachersConfig:
        """Return all its teachers, with the given `options` of them."""
        names = sorted({name for name in self.routes().values() if name != SELF})
        listed = tuple(self.locate(name).as_teacher(name) for name in names)
        return from_dict(TeachersConfig, {"teachers": listed, **options}, where="teachers")


def settings(recipe: RoundsConfig, name: str) -> dict[str, Any]:
    """Return the keys that a node's own recipe is given.

    Raises ConfigError for the graph's own, and where there must be a table and is none.
    """
    node = recipe.nodes[name]
    values = _merged(recipe.base.get(node.kind, {}), node.config)
    for dotted in _TABLES:
        table: Any = values
        for key in dotted.split("."):
            table = table.get(key, {})
        if not isinstance(table, Mapping):
            raise ConfigError(
                f"{dotted} of [base.{node.kind}] or nodes.{name}.config is {table!r}: it must be a "
                "table, as in { KEY = VALUE }"
            )
    given = [key for key in _GIVEN if key in values]
    given += [f"{t}.seed" for t in ("trainer", "rollout", "data") if "seed" in values.get(t, {})]
    if given:
        raise ConfigError(
            f"nodes.{name}.config sets {given[0]}, which the graph says (checkpoints and domains "
            "from its nodes, seeds from its seeds): leave it out"
        )
    return values


def _merged(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """Return `first` with the values of `second` put over it, table by table."""
    found = dict(first)
    for key, value in second.items():
        mine = found.get(key)
        both = isinstance(mine, Mapping) and isinstance(value, Mapping)
        found[key] = _merged(mine, value) if both else value  # type: ignore[arg-type]
    return found


def resolved(recipe: RoundsConfig, name: str, seed: int) -> dict[str, Any]:
    """Return everything that a node depends on beside the nodes before it, as plain values.

    Raises ConfigError for settings that cannot be, naming the node.
    """
    node, stage = recipe.nodes[name], Stage(recipe=recipe, name=name, seed=seed)
    values: dict[str, Any] = {"node": to_dict(node), "seed": seed}
    for key in ("config", "evaluate", "shares"):  # shares are in the domains and sources below
        del values["node"][key]
    if node.parent is None:
        values["start"] = recipe.checkpoint
    try:
        if node.kind in ("rl", "mopd"):
            made = rl_config(stage, Path("-"), "-", TeachersConfig())
            _check_form(stage, made)
            config = to_dict(made)
        elif node.kind in ("sft", "warmup"):
            taught = dict.fromkeys(stage.routes(), Path("-"))
            config = to_dict(sft_config(stage, Path("-"), "-", taught))
        else:
            config = {}
            if settings(recipe, name):
                raise ConfigError("kind 'merge' has no recipe of its own: leave config out")
    except ApriumError as error:
        raise ConfigError(f"nodes.{name}: {error}") from error
    values["config"] = config
    if stage.routes():
        values["rollout"], values["support"] = to_dict(stage.rollout()), to_dict(recipe.support)
        values["domains"] = [to_dict(domain) for domain in recipe.domains_of(name)]
        values["remotes"] = {
            name: to_dict(recipe.remotes[name])
            for name in stage.routes().values()
            if name in recipe.remotes
        }
    return values


def _check_form(stage: Stage, config: RlConfig) -> None:
    """Raise ConfigError where teachers on servers are asked for their whole distributions."""
    if config.loss.policy.distillation != "full" or stage.recipe.nodes[stage.name].adapt:
        return  # with `adapt` support says which form, and it is never that one
    for domain, name in stage.routes().items():
        if name in stage.recipe.remotes:
            raise ConfigError(
                f"loss.policy.distillation is 'full' and the teacher of {domain!r} is {name!r}, "
                "which is on a server: give it a checkpoint, or use 'sampled' or 'top_k'"
            )


def digest_of(
    recipe: RoundsConfig, name: str, seed: int, known: dict[tuple[str, int], str] | None = None
) -> str:
    """Return a name for a node's settings and those of all that it came from.

    `known` has those of this recipe that were made before, and is given what is made here.
    """
    known = {} if known is None else known
    if (name, seed) not in known:
        parents = [digest_of(recipe, parent, seed, known) for parent in recipe.parents(name)]
        own = recipe.seeds[0] if recipe.nodes[name].once else seed
        known[name, seed] = digest([resolved(recipe, name, own), parents])
    return known[name, seed]


def sft_config(
    stage: Stage, output: Path, checkpoint: str, samples: Mapping[str, Path]
) -> SftConfig:
    """Return the recipe of fine-tuning, with `samples` of teachers by domain beside its data."""
    values = settings(stage.recipe, stage.name)
    data = dict(values.get("data", {}))
    if not isinstance(data.get("sources", []), list | tuple):
        raise ConfigError(f"data.sources is {data['sources']!r}: it must be a list of tables")
    weights = {domain.name: domain.weight for domain in stage.recipe.domains_of(stage.name)}
    data["sources"] = [
        *data.get("sources", ()),
        *(
            SourceConfig(kind="samples", name=name, path=file, weight=weights[name])
            for name, file in samples.items()
        ),
    ]
    if samples:
        longest = data.setdefault("max_length", stage.recipe.rollout.episode_tokens)
        if not isinstance(longest, int):
            raise ConfigError(f"data.max_length is {longest!r}: it must be of type int")
        values.setdefault("tokens_per_step", max(4096, longest))
    values["data"] = {**data, "seed": stage.seed}
    values["trainer"] = {**values.get("trainer", {}), "seed": stage.seed}
    return from_dict(SftConfig, {**values, "output": output, "checkpoint": checkpoint})


def rl_config(
    stage: Stage,
    output: Path,
    checkpoint: str,
    teachers: TeachersConfig | None,
    form: str | None = None,
) -> RlConfig:
    """Return the recipe of reinforcement learning or, of a "mopd" node, of distillation.

    `form` is one of distillation that was chosen by support.
    """
    recipe, node = stage.recipe, stage.recipe.nodes[stage.name]
    values = settings(recipe, stage.name)
    own = values.get("rollout", {})
    values["rollout"] = {**to_dict(recipe.rollout), **own, "seed": stage.seed}
    values["trainer"] = {**values.get("trainer", {}), "seed": stage.seed}
    if node.kind == "mopd":
        assert teachers is not None
        # One rollout of a task is as good as several where nothing is compared within a group.
        values["rollout"]["group_size"] = own.get("group_size", 1)
        values["credit"] = {"kl_weight": 1.0, "reward_weight": 0.0, **values.get("credit", {})}
        values = _merged(values, {"loss": {"policy": {"distillation": form}}} if form else {})
        options = dict(values.get("teachers", {}))
        if values.get("loss", {}).get("policy", {}).get("distillation") == "top_k":
            options.setdefault("top", recipe.support.top)
        values["teachers"] = {**to_dict(teachers), **options}
    elif "teachers" in values:
        raise ConfigError("kind 'rl' has no teachers: leave config.teachers out")
    routes = stage.routes()
    domains = [
        dataclasses.replace(domain, teacher=routes.get(domain.name))
        for domain in recipe.domains_of(stage.name)
    ]
    config = from_dict(
        RlConfig, {**values, "domains": domains, "output": output, "checkpoint": checkpoint}
    )
    # Nodes are evaluated when they are done; a recipe may ask for more.
    return config if "evaluate" in values else dataclasses.replace(config, evaluate=None)


def run_stage(stage: Stage) -> Made | None:
    """Do what a node is there for, or what is left of it; None when asked to stop before the end.

    Raises what the stage raises.
    """
    kind = stage.recipe.nodes[stage.name].kind
    if kind == "merge":
        return _run_merge(stage)
    return _run_sft(stage) if kind in ("sft", "warmup") else _run_rl(stage)


def _run_merge(stage: Stage) -> Made:
    node = stage.recipe.nodes[stage.name]
    members = [resolve(stage.locate(name).checkpoint) for name in node.members]
    target = stage.place / "model"
    average(members, target, decay="uniform", weights=node.weights or None)
    return Made(checkpoint=target)


def _run_sft(stage: Stage) -> Made | None:
    node, start = stage.recipe.nodes[stage.name], stage.start()
    domains, note = [d for d in stage.recipe.domains_of(stage.name) if d.name in stage.routes()], ""
    if node.when == "needed":
        found = measure(stage, start)
        wanting = [d for d in domains if d.name in _wanting(stage, found)]
        if not wanting:
            return Made(checkpoint=Path(start), note="not needed: support is enough everywhere")
        note = f"needed in {', '.join(d.name for d in wanting)}"
        domains = wanting
    samples = {domain.name: _demonstrate(stage, domain, start) for domain in domains}
    config = sft_config(stage, stage.place, start, samples)
    made = sft.run_config(config)
    return _finish(stage, made, start, note or None)


def _run_rl(stage: Stage) -> Made | None:
    node, start = stage.recipe.nodes[stage.name], stage.start()
    teachers, form, notes = None, None, []
    if node.kind == "mopd":
        teachers = stage.teachers({})
        if node.adapt or stage.recipe.support.rollouts:
            found = measure(stage, start)
            wanting = _wanting(stage, found)
            if wanting:
                notes.append(f"outside its teachers' support in {', '.join(wanting)}")
                log.warning(
                    "%s: the student writes outside its teachers' support in %s: a warm-up would "
                    "help",
                    stage.name,
                    ", ".join(wanting),
                )
            if node.adapt:
                form = choose_form(found, stage.recipe.support)
                notes.append(f"form {form}")
    config = rl_config(stage, stage.place, start, teachers, form)
    return _finish(stage, loop.run_config(config), start, "; ".join(notes) or None)


def _finish(stage: Stage, made: Path | None, start: str, note: str | None) -> Made | None:
    """Make a whole checkpoint of an adapter, and keep the adapter for those that it teaches."""
    if made is None or not (made / "adapter_config.json").exists():
        return None if made is None else Made(checkpoint=made, note=note)
    base, target = resolve(start), stage.place / "model"
    merge_adapter(base, made, target, requantize=bool(read_plan(base).quant.formats))
    return Made(checkpoint=target, base=str(base), adapter=made, note=note)


def _demonstrate(stage: Stage, domain: DomainConfig, start: str) -> Path:
    """Let the teacher of `domain` play for the node, unless it did; return the file of samples."""
    file = stage.place / "rollouts" / f"{domain.name}.jsonl"
    if file.exists():
        return file
    node = stage.recipe.nodes[stage.name]
    rollout = dataclasses.replace(stage.rollout(), seed=stage.seed + _DEMONSTRATED)
    name = stage.routes()[domain.name]
    if name == SOLUTIONS:
        solved = demonstrations.solve(start, domain, rollout.seed, node.rollouts)
        demonstrations.write_solutions(solved, file)
        return file
    teacher = Located(checkpoint=start) if name == SELF else stage.locate(name)
    if teacher.remote is not None:
        remote = teacher.remote
        played = demonstrations.play_remote(name, remote, start, [domain], rollout, node.rollouts)
    else:
        played = demonstrations.play_checkpoint(
            teacher.checkpoint, [domain], rollout, node.rollouts
        )
    figures = demonstrations.write_samples(played, file, min_reward=node.min_reward)
    log.info("%s: %s played %s: %s", stage.name, name, domain.name, figures)
    return file


def measure(stage: Stage, start: str) -> dict[str, Support]:
    """Measure the support of the node's teachers on rollouts of `start`, unless that was done.

    Raises TaskError where the student played nothing in a domain, EngineError where its teacher
    scored nothing: neither says that support is enough.
    """
    file = stage.place / "support.json"
    if file.exists():
        rows = json.loads(file.read_text(encoding="utf-8"))
        if stage.routes().keys() <= rows.keys():
            return {name: from_dict(Support, row) for name, row in rows.items()}
    config = stage.recipe.support
    domains = [d for d in stage.recipe.domains_of(stage.name) if d.name in stage.routes()]
    rollout = dataclasses.replace(stage.rollout(), seed=stage.seed + _MEASURED)
    played = demonstrations.play_checkpoint(start, domains, rollout, config.rollouts)
    options = settings(stage.recipe, stage.name).get("teachers", {})
    options = {"max_model_len": rollout.episode_tokens, **options}
    found = asyncio.run(
        score_support(
            played,
            dataclasses.replace(stage.teachers(options), default=None),
            config,
            student=start,
            routes=stage.routes(),
        )
    )
    write_json(file, {name: to_dict(support) for name, support in found.items()})
    for name, one in found.items():
        log.info(
            "%s: %s: %.1f %% of tokens inside the support of %s, %.1f %% before the first outside",
            *(stage.name, name, 100 * one.inside, one.teacher, 100 * one.prefix),
        )
    return found


def _wanting(stage: Stage, found: Mapping[str, Support]) -> list[str]:
    return [name for name, one in found.items() if one.needs_warmup(stage.recipe.support)]
