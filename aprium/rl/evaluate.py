"""Accuracy on held-out tasks by domain, with its standard error, beside the best constant answer.

Every task is a different one and played once. What fails or ends at a limit earns nothing. A score
is worth something only above what one constant answer earns (`constant_baseline`).
"""

import asyncio
import functools
import math
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from aprium.base.errors import ConfigError
from aprium.base.policy import Policy
from aprium.base.records import SamplingParams, Trajectory
from aprium.checkpoint.hub import resolve
from aprium.engine.client import AsyncEngine
from aprium.engine.config import EngineConfig
from aprium.engine.policy import EnginePolicy
from aprium.envs.dialogue import ChatFormat
from aprium.envs.env import Limits, run_episode
from aprium.envs.family import constant_baseline, distinct
from aprium.envs.places import Places
from aprium.envs.task import Task
from aprium.rl.rollout import DomainConfig


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Which held-out tasks are played, and how.

    `items` of each domain every `every` steps (0: only before the first and after the last), with
    `temperature` (0: greedy). At the end constant answers are tried on `constants` tasks (0: on
    none). `seed` is of the tasks and of sampling. At most `concurrency` episodes are under way.
    """

    items: int = 200
    every: int = 0
    constants: int = 100
    temperature: float = 0.0
    max_tokens: int = 256
    episode_tokens: int = 1024
    max_turns: int = 16
    deadline_s: float = 600.0
    seed: int = 0
    concurrency: int = 512

    def __post_init__(self) -> None:
        """Check ranges."""
        for name in ("items", "max_tokens", "episode_tokens", "max_turns", "concurrency"):
            if getattr(self, name) < 1:
                raise ConfigError(f"evaluate.{name} is {getattr(self, name)}: it must be positive")
        for name in ("every", "constants", "temperature"):
            if getattr(self, name) < 0:
                raise ConfigError(f"evaluate.{name} is {getattr(self, name)}: it must be >= 0")


@dataclass(frozen=True, kw_only=True)
class Accuracy:
    """What `items` episodes earned on average; `tokens` were sampled in each, `errors` failed.

    `rewards` are what each earned, in the order of the tasks, which is that of their settings.
    """

    accuracy: float
    standard_error: float
    items: int
    tokens: float
    errors: int
    rewards: tuple[float, ...] = ()


class Evaluation:
    """The held-out tasks of `domains`, drawn once; raises TaskError where there are too few."""

    def __init__(self, domains: Sequence[DomainConfig], config: EvaluateConfig) -> None:
        self._config = config
        self._played = []  # domain, family, task, seed
        for domain in domains:
            family = domain.make()
            for task in distinct(family, config.items, seed=config.seed, held_out=True):
                self._played.append((domain, family, task))

    async def __call__(
        self, policy: Policy, chat: ChatFormat, places: Places | None = None
    ) -> dict[str, Accuracy]:
        """Play all tasks, and return the accuracy of each domain by name.

        `policy` has so many `places` (None: enough), of which an evaluation has the next.
        """
        config = self._config
        under_way = asyncio.Semaphore(config.concurrency)
        admit = functools.partial(places.taken, priority=-1) if places is not None else None
        limits = Limits(
            max_tokens=config.episode_tokens,
            max_turns=config.max_turns,
            deadline_s=config.deadline_s,
        )
        params = SamplingParams(max_tokens=config.max_tokens, temperature=config.temperature)

        async def play(domain: DomainConfig, family: Any, task: Task) -> Trajectory:
            seed = random.Random(f"{config.seed} {task.id}").getrandbits(48)
            most = domain.max_tokens or config.max_tokens
            async with under_way:
                played = await run_episode(
                    family.start(task),
                    policy,
                    domain.chat(chat),
                    replace(params, seed=seed, max_tokens=most),
                    limits,
                    admit,
                )
            return replace(played, domain=domain.name)  # whatever its family calls its tasks

        found: dict[str, list[Trajectory]] = {}
        for trajectory in await asyncio.gather(*(play(*one) for one in self._played)):
            found.setdefault(trajectory.domain, []).append(trajectory)
        return {name: _accuracy(trajectories) for name, trajectories in found.items()}


def _accuracy(trajectories: Sequence[Trajectory]) -> Accuracy:
    rewards, count = [t.reward for t in trajectories], len(trajectories)
    mean = math.fsum(rewards) / count
    variance = math.fsum((r - mean) ** 2 for r in rewards) / max(count - 1, 1)
    return Accuracy(
        accuracy=mean,
        standard_error=math.sqrt(variance / count),
        items=count,
        tokens=sum(sum(t.sampled) for t in trajectories) / count,
        errors=sum(t.error is not None for t in trajectories),
        rewards=tuple(rewards),
    )


def evaluate_checkpoint(
    checkpoint: str | Path,
    domains: Sequence[DomainConfig],
    config: EvaluateConfig,
    *,
    max_num_seqs: int = 128,
) -> dict[str, Accuracy]:
    """Return the accuracy of a checkpoint on held-out tasks of each domain; not from a coroutine.

    Raises CheckpointError, TaskError.
    """
    evaluation = Evaluation(domains, config)
    path = resolve(checkpoint)
    engine = AsyncEngine(
        EngineConfig(
            model=str(path),
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=2048,
            max_model_len=config.episode_tokens,
        )
    )

    async def evaluate() -> dict[str, Accuracy]:
        try:
            places = Places(max_num_seqs)
            return await evaluation(EnginePolicy(engine), chat_format(engine), places)
        finally:
            await engine.close()

    return asyncio.run(evaluate())


def chat_format(engine: AsyncEngine) -> ChatFormat:
    """Return how conversations with the model of `engine` are written; raises ConfigError."""
    if engine.tokenizer is None or engine.template is None:
        raise ConfigError(
            f"{engine.config.model} has no tokenizer files or no chat template: episodes are "
            "conversations, use a checkpoint that has both"
        )
    return ChatFormat(tokenizer=engine.tokenizer, template=engine.template)


def constant_baselines(
    domains: Sequence[DomainConfig], items: int = 100
) -> dict[str, dict[str, Any]]:
    """Return for each domain the constant answer that earns most and what it earns on average.

    Not from a coroutine.
    """
    found = {}
    for domain in domains:
        answer, reward = constant_baseline(domain.make(), count=items)
        found[domain.name] = {"answer": answer, "accuracy": reward}
    return found


def as_figures(accuracies: dict[str, Accuracy]) -> dict[str, Any]:
    """Return accuracies as plain values, with the mean over domains first."""
    mean = math.fsum(one.accuracy for one in accuracies.values()) / max(len(accuracies), 1)
    rows = {name: asdict(one) for name, one in accuracies.items()}
    for row in rows.values():
        del row["rewards"]
    return {"accuracy": mean, "domains": rows}
