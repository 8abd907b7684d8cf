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
from aprium.base.policy import Policy
from aprium.base.records import Group, Sample, Trajectory
from aprium.checkpoint.hub import resolve
from aprium.data.conversation import Style, conversation
from aprium.engine.client import AsyncEngine
from aprium.engine.config import EngineConfig
from aprium.engine.policy import EnginePolicy
from aprium.envs.dialogue import ChatFormat
from aprium.envs.family import take
from aprium.rl.evaluate import chat_format
from aprium.rl.ledger import Item
from aprium.rl.rollout import DomainConfig, RolloutConfig, Rollouts
from aprium.rl.teachers import RemoteConfig, RemoteTeacher
from aprium.text.chat import ChatTemplate
from aprium.text.tokenizer import Tokenizer


async def play(
    policy: Policy,
    chat: ChatFormat,
    domains: Sequence[DomainConfig],
    rollout: RolloutConfig,
    count: int,
    *,
    concurrency: int | None = None,
) -> list[Trajectory]:
    """Let `policy` play `count` tasks of each domain once; those that failed are left out.

    At most `concurrency` episodes are under way. Raises TaskError where all of a domain failed.
    """
    rollouts = Rollouts(domains, replace(rollout, group_size=1), policy, chat)
    items = [
        Item(number=i * count + index, domain=domain.name, index=index)
        for i, domain in enumerate(domains)
        for index in range(count)
    ]
    # An episode's time runs from its beginning: none begins that would only wait.
    places = asyncio.Semaphore(concurrency or max(len(items), 1))

    async def play_one(item: Item) -> Group:
        async with places:
            return await rollouts.play(item)

    groups = await asyncio.gather(*map(play_one, items))
    found = []
    for i, domain in enumerate(domains):
        mine = [t for g in groups[i * count : (i + 1) * count] for t in g.trajectories]
        kept = [t for t in mine if t.error is None]
        if mine and not kept:
            raise TaskError(
                f"all {len(mine)} episodes of {domain.name!r} failed, the last with "
                f"{mine[-1].error}: mend that, then give the same command again"
            )
        found += kept
    return found


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
            return await play(EnginePolicy(engine), chat_format(engine), domains, rollout, count)
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
        most = remote.concurrency
        try:
            return await play(teacher, chat, domains, rollout, count, concurrency=most)
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
