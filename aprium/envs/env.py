"""Environments and episodes: a task is shown, a policy answers, the environment grades.

An environment sees messages and a policy sees tokens; `run_episode` stands between them. Whatever
goes wrong in an episode, in the policy or in the environment, is a trajectory with `error`: a run
over thousands of tasks must neither end nor hang because of one.
"""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

from aprium.base.errors import RequestError, TaskError
from aprium.base.log import get_logger
from aprium.base.policy import Policy
from aprium.base.records import Group, Message, SamplingParams, Trajectory
from aprium.envs.defects import find_defects
from aprium.envs.dialogue import ChatFormat, Dialogue
from aprium.envs.task import Task

log = get_logger("envs")
Admit = Callable[[], contextlib.AbstractAsyncContextManager[None]]
Stop = Literal["done", "turns", "tokens", "deadline", "error"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """What an environment answers to a turn: more messages, or the end with a reward.

    `reward` and `parts` of all steps of an episode add up. `defects` name what was wrong with the
    turn (see `aprium.envs.defects`) beyond what can be seen without the environment.
    """

    messages: tuple[Message, ...] = ()
    done: bool = False
    reward: float = 0.0
    parts: Mapping[str, float] = field(default_factory=dict)
    defects: tuple[str, ...] = ()


class Env(Protocol):
    """One episode of one task; used once."""

    @property
    def task(self) -> Task:
        """The task that is played."""
        ...

    async def reset(self) -> tuple[Message, ...]:
        """Begin, and return the messages to show first."""
        ...

    async def step(self, reply: Message) -> Step:
        """Take the policy's turn."""
        ...


class AskedOnce:
    """The part of an environment that asks its task, and refuses to do so again."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self._begun = False

    async def reset(self) -> tuple[Message, ...]:
        """Return what is asked; raises TaskError when it was asked before."""
        if self._begun:
            raise TaskError(f"the environment of {self.task.id} was used: make another one")
        self._begun = True
        return self.task.messages


class SingleTurn(AskedOnce):
    """The environment of a question: the first reply is graded, and that is the end.

    `grade` takes task and reply and returns a reward, or parts of which "reward" is one. It runs in
    a thread of its own and keeps its own time.
    """

    def __init__(
        self, task: Task, grade: Callable[[Task, Message], float | Mapping[str, float]]
    ) -> None:
        super().__init__(task)
        self._grade = grade

    async def step(self, reply: Message) -> Step:
        """Grade the reply."""
        found = await asyncio.to_thread(self._grade, self.task, reply)
        parts = dict(found) if isinstance(found, Mapping) else {"reward": float(found)}
        reward = parts.pop("reward")
        return Step(done=True, reward=reward, parts=parts or {"correct": reward})


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Where an episode ends: tokens in all, turns of the policy, and seconds of being played."""

    max_tokens: int = 32_768
    max_turns: int = 32
    deadline_s: float = 600.0

    def __post_init__(self) -> None:
        """Check ranges."""
        for name in ("max_tokens", "max_turns", "deadline_s"):
            if getattr(self, name) <= 0:
                raise TaskError(f"{name} is {getattr(self, name)}: it must be above 0")


async def run_episode(
    env: Env,
    policy: Policy,
    chat: ChatFormat,
    params: SamplingParams | None = None,
    limits: Limits | None = None,
    admit: Admit | None = None,
) -> Trajectory:
    """Let `policy` play `env` to its end or a limit and return what happened.

    `params` are those of each turn; its `max_tokens` bounds a turn (None: by `limits` alone). A
    turn that is cut by its bound or the budget is not graded. `admit` gives a turn its place; the
    seconds that it waits for one do not count. Never raises but for cancellation.
    """
    episode = _Episode(env, policy, chat, params or SamplingParams(max_tokens=None), admit)
    limits = limits or Limits()
    error, clock = None, asyncio.timeout(limits.deadline_s)
    stop: Stop = "error"
    try:
        async with clock:
            stop = await episode.play(limits, clock)
    except Exception as caught:
        late = isinstance(caught, TimeoutError) and clock.expired()
        stop = "deadline" if late else "error"
        error = (
            f"not done in {limits.deadline_s:g} s" if late else f"{type(caught).__name__}: {caught}"
        )
        log.debug("%s: %s", env.task.id, error, exc_info=not late)
    return episode.trajectory(stop, error)


async def run_group(
    make: Callable[[], Env],
    policy: Policy,
    chat: ChatFormat,
    params: SamplingParams | None = None,
    limits: Limits | None = None,
    *,
    size: int,
) -> Group:
    """Play `size` episodes of one task side by side; `make` gives a fresh environment for each.

    With a seed in `params`, episode `i` has that seed plus `i`.
    """
    params = params or SamplingParams(max_tokens=None)
    envs = [make() for _ in range(size)]
    seeds = [None if params.seed is None else params.seed + i for i in range(size)]
    episodes = [
        run_episode(env, policy, chat, replace(params, seed=seed), limits)
        for env, seed in zip(envs, seeds, strict=True)
    ]
    return Group(task=envs[0].task.id, trajectories=tuple(await asyncio.gather(*episodes)))


class _Episode:
    """An episode while it runs."""

    def __init__(
        self,
        env: Env,
        policy: Policy,
        chat: ChatFormat,
        params: SamplingParams,
        admit: Admit | None,
    ) -> None:
        self._env, self._policy, self._params, self._admit = env, policy, params, admit
        self._dialogue = Dialogue(chat, env.task.tools)
        self._reward = 0.0
        self._parts: dict[str, float] = {}
        self._defects: list[tuple[int, int, str]] = []
        self._num_turns = 0

    async def play(self, limits: Limits, clock: asyncio.Timeout) -> Stop:
        """Take turns until the end and say what ended it."""
        messages = await self._env.reset()
        while True:
            if self._num_turns == limits.max_turns:
                return "turns"
            self._dialogue.show(messages)
            room = limits.max_tokens - len(self._dialogue.tokens)
            if room <= 0:
                return "tokens"
            most = min(room, self._params.max_tokens or room)
            try:
                async with self._placed(clock):
                    completion = await self._policy.complete(
                        self._dialogue.tokens, replace(self._params, max_tokens=most)
                    )
            except RequestError as error:
                raise RequestError(f"turn {self._num_turns + 1}: {error}") from error
            self._num_turns += 1
            begin = len(self._dialogue.tokens)
            reply = self._dialogue.hear(completion)
            if completion.finish == "length":
                return "tokens"
            if completion.finish != "stop":
                raise TaskError(f"the policy gave up: finish is {completion.finish!r}")
            step = await self._env.step(reply)
            wrong = dict.fromkeys((*find_defects(reply), *step.defects))
            self._defects += [(begin, len(self._dialogue.tokens), name) for name in wrong]
            self._reward += step.reward
            for name, value in step.parts.items():
                self._parts[name] = self._parts.get(name, 0.0) + value
            if step.done:
                return "done"
            messages = step.messages

    @contextlib.asynccontextmanager
    async def _placed(self, clock: asyncio.Timeout) -> AsyncIterator[None]:
        """Have a place for a turn, and let the clock stand while it is waited for."""
        end = clock.when()
        if self._admit is None or end is None:
            yield
            return
        loop = asyncio.get_running_loop()
        left = end - loop.time()
        clock.reschedule(None)
        async with self._admit():
            clock.reschedule(loop.time() + left)
            yield

    def trajectory(self, stop: Stop, error: str | None) -> Trajectory:
        """Return what happened so far as a record."""
        dialogue = self._dialogue
        return Trajectory(
            task=self._env.task.id,
            domain=self._env.task.domain,
            tokens=tuple(dialogue.tokens),
            sampled=tuple(dialogue.sampled),
            logprobs=tuple(dialogue.logprobs),
            reward=0.0 if error else self._reward,
            parts=dict(self._parts),
            stop=stop,
            error=error,
            weight_spans=tuple(dialogue.weight_spans),
            num_turns=self._num_turns,
            defects=tuple(self._defects),
        )


async def replay(env: Env, turns: Sequence[Message], max_turns: int = 64) -> Step:
    """Let fixed `turns` play `env`, without tokens; return the sum of its steps.

    What is not done when they run out has `done` False. Raises what the environment raises.
    """
    await env.reset()
    total: dict[str, Any] = {"reward": 0.0, "parts": {}, "done": False}
    for turn in turns[:max_turns]:
        step = await env.step(turn)
        total["reward"] += step.reward
        for name, value in step.parts.items():
            total["parts"][name] = total["parts"].get(name, 0.0) + value
        if step.done:
            total["done"] = True
            break
    return Step(**total)
