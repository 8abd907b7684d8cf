"""What is written on tasks for others to learn from: by a model, or their own solutions.

The tokens are those that a model chose, never decoded and encoded again. Which tasks are played
follows from a seed of their own, so that they are not the first that reinforcement learning sees.
"""

import asyncio
import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx2

from aprium.base.errors import CheckpointError, TaskError
from aprium.base.files import write_durably
from aprium.base.log import get_logger
from aprium.base.policy import Policy
from aprium.base.records import Sample, Trajectory
from aprium.checkpoint.hub import resolve
from aprium.data.conversation import Style, conversation
from aprium.engine.client import AsyncEngine
from aprium.engine.config import EngineConfig
from aprium.engine.policy import EnginePolicy
from aprium.envs.dialogue import ChatFormat
from aprium.envs.family import take
from aprium.envs.places import Places
from aprium.rl.evaluate import chat_format
from aprium.rl.ledger import Item
from aprium.rl.rollout import DomainConfig, RolloutConfig, Rollouts
from aprium.rl.teachers import RemoteConfig, RemoteTeacher
from aprium.text.chat import ChatTemplate
from aprium.text.tokenizer import Tokenizer

log = get_logger("rl")


async def play(
    policy: Policy,
    chat: ChatFormat,
    domains: Sequence[DomainConfig],
    rollout: RolloutConfig,
    count: int,
    places: Places | None = None,
) -> list[Trajectory]:
    """Let `policy`, which has so many `places`, play `count` tasks of each domain once.

    Those that failed are left out; raises TaskError where most did, or all of a domain.
    """
    rollouts = Rollouts(domains, replace(rollout, group_size=1), policy, chat, places)
    items = [
        Item(number=i * count + index, domain=domain.name, index=index)
        for i, domain in enumerate(domains)
        for index in range(count)
    ]
    groups = await asyncio.gather(*map(rollouts.play, items))
    played = [t for group in groups for t in group.trajectories]
    for domain in domains:
        mine = [t.error for t in played if t.domain == domain.name]
        if mine and None not in mine:
            raise TaskError(
                f"all {len(mine)} episodes of {domain.name!r} failed, the last with "
                f"{mine[-1]}: mend that, then give the same command again"
            )
    errors = [t.error for t in played if t.error is not None]
    if errors:
        said = f"{len(errors)} of {len(played)} episodes failed, the last with {errors[-1]}"
        if 2 * len(errors) > len(played):
            raise TaskError(f"{said}: mend that, or give them more time (rollout.deadline_s)")
        log.warning("%s: they are left out", said)
    return [t for t in played if t.error is None]


def play_checkpoint(
    checkpoint: str | Path,
    domains: Sequence[DomainConfig],
    rollout: RolloutConfig,
    count: int,
    *,
    max_num_seqs: int = 128,
) -> list[Trajectory]:
    """Let a checkpoint play (see `play`); not from a coroutine.

    Raises CheckpointError, TaskError.
    """
    config = EngineConfig(
        model=str(resolve(checkpoint)),
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=2048,
        max_model_len=rollout.episode_tokens,
    )
    engine = AsyncEngine(config)

    async def run() -> list[Trajectory]:
        try:
            policy, chat, places = EnginePolicy(engine), chat_format(engine), Places(max_num_seqs)
            return await play(policy, chat, domains, rollout, count, places)
        finally:
            await engine.close()

    return asyncio.run(run())


def play_remote(
    name: str,
    remote: RemoteConfig,
    student: str | Path,
    domains: Sequence[DomainConfig],
    rollout: RolloutConfig,
    count: int,
    *,
    transport: httpx2.AsyncBaseTransport | None = None,
) -> list[Trajectory]:
    """Let teacher `name` on a server play, in the words of the student's tokenizer and template.

    Raises ConfigError where the environment lacks its key, TaskError as `play` does.
    """
    path = resolve(student)
    chat = ChatFormat(tokenizer=Tokenizer.load(path), template=ChatTemplate.load(path))

    async def run() -> list[Trajectory]:
        teacher = RemoteTeacher(name, remote, chat.tokenizer, transport)
        try:
            places = Places(remote.concurrency)
            return await play(teacher, chat, domains, rollout, count, places)
        finally:
            await teacher.close()

    return asyncio.run(run())


def solve(student: str | Path, domain: DomainConfig, seed: int, count: int) -> list[Sample]:
    """Return `count` tasks of `domain` with their own solutions, as the student is shown them.

    Raises TaskError where a task comes without one, or asks for more than a reply.
    """
    path, family = resolve(student), domain.make()
    tokenizer, template = Tokenizer.load(path), ChatTemplate.load(path)
    found = []
    for index in range(count):
        task = take(family, index, seed=seed)
        if len(task.solution) != 1:
            raise TaskError(
                f"{task.id} has {len(task.solution)} turns as its solution: only domains whose "
                "tasks are solved in one can be learnt from solutions, name a teacher"
            )
        found += conversation(
            [*task.messages, *task.solution],
            tokenizer,
            template,
            domain.name,
            tools=task.tools,
            style=Style(thinking=domain.thinking),
        )
    return found


def write_solutions(samples: Iterable[Sample], file: Path) -> None:
    """Write samples as rows of a source of kind "samples"; raises CheckpointError."""
    _write(({"tokens": s.tokens, "weights": s.ce_weight} for s in samples), file)


def write_samples(
    trajectories: Iterable[Trajectory], file: Path, *, min_reward: float | None
) -> dict[str, Any]:
    """Write episodes as rows of a source of kind "samples", and return how many and how good.

    What the model did not write is not learnt. Raises TaskError where none has `min_reward`,
    CheckpointError where the file cannot be written.
    """
    played = list(trajectories)
    kept = [t for t in played if min_reward is None or t.reward >= min_reward]
    kept = [t for t in kept if any(t.sampled)]
    if not kept:
        raise TaskError(
            f"of {len(played)} episodes of {file.stem} that its teacher played none has a reward "
            f"of {min_reward}: play more (rollouts), or ask for less (min_reward)"
        )
    rows = [
        {"tokens": t.tokens, "weights": [float(s) for s in t.sampled], "reward": t.reward}
        for t in kept
    ]
    _write(rows, file)
    return {
        "played": len(played),
        "kept": len(kept),
        "reward": sum(t.reward for t in played) / len(played),
        "tokens": sum(sum(t.sampled) for t in kept),
    }


def _write(rows: Iterable[dict[str, Any]], file: Path) -> None:
    text = "".join(json.dumps(row) + "\n" for row in rows)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_durably(file, text.encode())
    except OSError as error:
        raise CheckpointError(f"{file} cannot be written: {error.strerror or error}") from error
