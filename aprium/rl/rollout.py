"""Rollouts: items become tasks of their domains, and tasks groups of episodes.

Which task an item is, and with which seeds it is played, follows from its number alone, so a run
can be resumed anywhere and a lost episode played again. The episodes of a group begin alike: an
engine reads their first prompt once, for all of them.
"""

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from aprium.base.errors import ConfigError
from aprium.base.policy import GroupPolicy, Policy
from aprium.base.records import Completion, Group, SamplingParams
from aprium.envs.dialogue import ChatFormat
from aprium.envs.env import Limits, run_episode
from aprium.envs.family import Family, take
from aprium.envs.places import Places
from aprium.envs.registry import make
from aprium.rl.judging import GroupJudge, Heard
from aprium.rl.ledger import Item


@dataclass(frozen=True, kw_only=True)
class DomainConfig:
    """A domain: tasks of environment `family` (see `aprium env list`) with `options`.

    `weight` is its share of the items. `teacher` names who scores its episodes. `thinking` is the
    chat template's switch, and `max_tokens` bounds a turn (None: what the rollouts say).
    """

    name: str
    family: str
    options: dict[str, Any] = field(default_factory=dict)
    weight: float = 1.0
    teacher: str | None = None
    thinking: bool = True
    max_tokens: int | None = None

    def __post_init__(self) -> None:
        """Check ranges, and that there is such a family."""
        if self.weight < 0:
            raise ConfigError(f"weight of domain {self.name!r} is {self.weight}: it must be >= 0")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise ConfigError(
                f"max_tokens of domain {self.name!r} is {self.max_tokens}: it must be positive"
            )

    def make(self) -> Family:
        """Return its family of tasks; raises TaskError, ConfigError."""
        return make(self.family, {**self.options, "domain": self.name})

    def chat(self, chat: ChatFormat) -> ChatFormat:
        """Return how its dialogues are written."""
        return replace(chat, thinking=self.thinking)


@dataclass(frozen=True, kw_only=True)
class RolloutConfig:
    """How tasks are played: in groups of `group_size`, sampled with `temperature`.

    A turn has at most `max_tokens` tokens, an episode `episode_tokens` (prompts included),
    `max_turns` turns and `deadline_s` seconds, without those that turns wait for a place in an
    engine. `seed` is of tasks and of sampling. There are `pool`
    tasks of each domain, which come again and again (None: always new ones). Episodes under way
    when the weights change go on from their states, or with `recompute` from states of the new
    weights.
    """

    group_size: int = 8
    temperature: float = 1.0
    top_p: float = 1.0
    max_tokens: int = 256
    episode_tokens: int = 1024
    max_turns: int = 16
    deadline_s: float = 600.0
    seed: int = 0
    pool: int | None = None
    recompute: bool = False

    def __post_init__(self) -> None:
        """Check ranges."""
        if self.pool is not None and self.pool < 1:
            raise ConfigError(f"rollout.pool is {self.pool}: it must be positive")
        for name in ("group_size", "max_tokens", "episode_tokens", "max_turns"):
            if getattr(self, name) < 1:
                raise ConfigError(f"rollout.{name} is {getattr(self, name)}: it must be positive")
        if self.temperature <= 0:
            raise ConfigError(
                f"rollout.temperature is {self.temperature}: episodes of a group must differ, give "
                "more than 0"
            )
        if self.deadline_s <= 0:
            raise ConfigError(f"rollout.deadline_s is {self.deadline_s}: it must be above 0")

    def limits(self) -> Limits:
        """Return where an episode ends."""
        return Limits(
            max_tokens=self.episode_tokens, max_turns=self.max_turns, deadline_s=self.deadline_s
        )


class Rollouts:
    """Plays the items of `domains` through `policy`, which has so many `places` (None: enough).

    With a `judge` the episodes of a group are compared for their rewards.
    """

    def __init__(
        self,
        domains: Sequence[DomainConfig],
        config: RolloutConfig,
        policy: Policy,
        chat: ChatFormat,
        places: Places | None = None,
        judge: GroupJudge | None = None,
    ) -> None:
        self._config, self._policy, self._judge = config, policy, judge
        self._admit = places.taken if places is not None else None
        self._domains = {domain.name: domain for domain in domains}
        if len(self._domains) < len(domains):
            raise ConfigError("two domains have one name: give each its own")
        self._families = {domain.name: domain.make() for domain in domains}
        self._chats = {domain.name: domain.chat(chat) for domain in domains}

    async def play(self, item: Item) -> Group:
        """Play the group of an item; what fails in an episode is a trajectory with an error.

        All are of the item's domain, whatever its family calls its tasks.
        """
        config, family = self._config, self._families[item.domain]
        domain = self._domains[item.domain]
        task = take(family, item.index, seed=config.seed)
        seed = random.Random(f"{config.seed} {item.number}").getrandbits(48)
        params = SamplingParams(
            max_tokens=domain.max_tokens or config.max_tokens,
            temperature=config.temperature,
            top_p=config.top_p,
        )
        chat, limits = self._chats[item.domain], config.limits()
        envs = [Heard(family.start(task)) for _ in range(config.group_size)]
        async with forked(self._policy, config.group_size, seed) as policies:
            trajectories = await asyncio.gather(
                *(
                    run_episode(
                        env, policy, chat, replace(params, seed=seed + i), limits, self._admit
                    )
                    for i, (env, policy) in enumerate(zip(envs, policies, strict=True))
                )
            )
        if self._judge is not None and self._judge.judges(domain.name):
            trajectories = await self._judge.grade(task, trajectories, envs)
        named = tuple(replace(one, domain=domain.name) for one in trajectories)
        return Group(task=task.id, trajectories=named)


@contextlib.asynccontextmanager
async def forked(policy: Policy, size: int, seed: int) -> AsyncIterator[list[Policy]]:
    """Give `size` policies to the episodes of a group, which read their first prompt once.

    Continuation i of that prompt goes to policy i. A policy that is no `GroupPolicy` is given as it
    is.
    """
    if not isinstance(policy, GroupPolicy) or size == 1:
        yield [policy] * size
        return
    root = _Root(policy, size, seed)
    try:
        yield [_Fork(root, i) for i in range(size)]
    finally:
        await root.close()


class _Root:
    """The one prompt that the episodes of a group begin with, and its continuations."""

    def __init__(self, policy: GroupPolicy, size: int, seed: int) -> None:
        self.policy, self._size, self._seed = policy, size, seed
        self._tokens: tuple[int, ...] | None = None
        self._params: SamplingParams | None = None
        self._futures: list[asyncio.Future[Completion]] = []
        self._task: asyncio.Task[None] | None = None

    async def first(self, tokens: Sequence[int], params: SamplingParams, index: int) -> Completion:
        """Return continuation `index`; the first that asks says of what."""
        params = replace(params, n=self._size, seed=self._seed)
        if self._task is None:
            self._tokens, self._params = tuple(tokens), params
            loop = asyncio.get_running_loop()
            self._futures = [loop.create_future() for _ in range(self._size)]
            self._task = asyncio.create_task(self._run(self._tokens, params))
        elif (tuple(tokens), params) != (self._tokens, self._params):
            return await self.policy.complete(tokens, replace(params, n=1, seed=self._seed + index))
        return await self._futures[index]

    async def close(self) -> None:
        """Stop what nobody waits for any more."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        for future in self._futures:
            if future.done() and not future.cancelled():
                future.exception()  # it may be that nobody asked

    async def _run(self, tokens: Sequence[int], params: SamplingParams) -> None:
        try:
            async for completion in self.policy.complete_all(tokens, params):
                if not self._futures[completion.index].done():
                    self._futures[completion.index].set_result(completion)
        except Exception as error:
            for future in self._futures:
                if not future.done():
                    future.set_exception(error)


class _Fork:
    """The policy of one episode of a group."""

    def __init__(self, root: _Root, index: int) -> None:
        self._root, self._index = root, index
        self._begun = False

    async def complete(self, tokens: Sequence[int], params: SamplingParams) -> Completion:
        """Continue `tokens`; see `Policy`."""
        if self._begun:
            return await self._root.policy.complete(tokens, params)
        self._begun = True
        return await self._root.first(tokens, params, self._index)

    async def score(self, tokens: Sequence[int]) -> list[float | None]:
        """Return the log-probability of each token given those before it; see `Policy`."""
        return await self._root.policy.score(tokens)
