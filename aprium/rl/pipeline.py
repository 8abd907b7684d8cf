"""The pipeline: groups are played, scored and credited side by side, and become batches in time.

Generation goes on while the trainer works, so weights are up to `max_age` steps older than those
they train. How many items are under way is bounded such that every one can be trained on before it
is too old: a step takes what must be used soonest, and waits only for what could not be used any
more after it. With `max_age` 0 nothing is under way while the trainer works, and what comes out
does not depend on time. What the stages do is the caller's; this knows no model, and the books are
the ledger's (see `rl/ledger.py`).
"""

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from aprium.base.errors import ConfigError, DataError
from aprium.base.log import get_logger
from aprium.base.records import Group, Sample
from aprium.rl.ledger import Entry, Item, Ledger, Scores

log = get_logger("rl")
_MOST_USELESS = 16  # times the groups of a step that may give nothing before a run is given up


class Learnt(Protocol):
    """What credit makes of a group: samples, none where there is nothing to learn, and figures."""

    @property
    def samples(self) -> Sequence[Sample]:
        """What is trained on."""
        ...

    @property
    def figures(self) -> Mapping[str, float]:
        """What is to be known of the group."""
        ...


@dataclass(frozen=True, kw_only=True)
class Stages:
    """What the pipeline does with an item, each an async callable.

    `generate` plays a group, `score` asks teachers (None: there are none), `credit` makes samples.
    What any of them raises ends the run.
    """

    generate: Callable[[Item], Awaitable[Group]]
    credit: Callable[[Group, Scores], Awaitable[Learnt]]
    score: Callable[[Group], Awaitable[Scores]] | None = None


@dataclass(frozen=True, kw_only=True)
class PipelineConfig:
    """How many groups a step has, and how old they may be.

    `groups_per_step` groups make a batch, of those with something to learn if `refill` (dynamic
    sampling). Tokens were written under weights of at most `max_age` steps ago; with 0 generation
    and training take turns and a run is reproducible bit for bit. At most `max_groups` are played
    and `max_scoring` scored at a time (None: as many as the age allows); an item is drawn when
    there is a place for it to be played, so that its weights are as new as can be.
    """

    groups_per_step: int = 32
    max_age: int = 0
    refill: bool = False
    max_groups: int | None = None
    max_scoring: int | None = None

    def __post_init__(self) -> None:
        """Check ranges."""
        for name, least in (("groups_per_step", 1), ("max_age", 0)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} is {getattr(self, name)}: it must be at least {least}")
        for name in ("max_groups", "max_scoring"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} is {value}: it must be at least 1")


@dataclass(frozen=True, kw_only=True)
class Played:
    """One group of a batch: its item, what was played, and what credit made of it.

    `age` is by how many steps the weights that wrote its oldest token are older than the step's.
    """

    item: Item
    group: Group
    learnt: Learnt
    age: int


@dataclass(eq=False)
class _Work:
    """An item under way."""

    entry: Entry
    learnt: Learnt | None = None
    task: "asyncio.Task[None] | None" = field(default=None, repr=False)

    @property
    def number(self) -> int:
        return self.entry.item.number

    @property
    def version(self) -> int:
        """Of the weights that wrote the oldest token; while it is played, at least this."""
        group = self.entry.group
        spans = [s for t in group.trajectories for s in t.weight_spans[:1]] if group else []
        return min((version for version, _ in spans), default=self.entry.version)


class Pipeline:
    """Batches of played groups for one step after another; belongs to one event loop.

    `draw` gives the item of a number. Entries that `ledger` has open are gone on with, recorded
    batches come again as they were.
    """

    def __init__(
        self, stages: Stages, draw: Callable[[int], Item], ledger: Ledger, config: PipelineConfig
    ) -> None:
        self._stages, self._draw, self._ledger, self._config = stages, draw, ledger, config
        self._open = {entry.item.number: _Work(entry) for entry in ledger.open_entries()}
        self._useless: list[_Work] = []  # nothing to learn: they go with the next batch
        self._version, self._room = 0, 0
        self._changed = asyncio.Event()
        self._failure: BaseException | None = None
        self._playing = 0
        self._scoring = asyncio.Semaphore(config.max_scoring or 1 << 30)

    async def next_batch(self, step: int) -> list[Played]:
        """Return the groups to train on in `step`, in the order of their numbers.

        Weights of version `step` are those that write from now on. Raises what a stage raised, and
        DataError where nothing can be learnt of many times the groups that a step has.
        """
        recorded = self._ledger.batches.get(step)
        if recorded is not None:
            return await self._again(step, recorded)
        self._version = step
        self._room = self._config.groups_per_step * (self._config.max_age + 1)
        self._admit()
        while (works := self._choose(step)) is None:
            self._changed.clear()
            await self._changed.wait()
        works = sorted((*works, *self._useless), key=lambda work: work.number)
        self._useless = []
        self._ledger.take(step, [work.number for work in works])
        for work in works:
            self._open.pop(work.number, None)  # what is useless is not there
        self._room = self._config.groups_per_step * self._config.max_age
        self._admit()
        return [_played(work, step) for work in works]

    async def close(self) -> None:
        """Stop what is under way; the ledger has it as begun."""
        tasks = [work.task for work in self._open.values() if work.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    @property
    def num_open(self) -> int:
        """How many groups are under way or wait for their step."""
        return len(self._open)

    @property
    def num_ready(self) -> int:
        """How many of them wait for their step."""
        return sum(work.learnt is not None for work in self._open.values())

    def _admit(self) -> None:
        """Begin with items: those of an earlier process, then new ones, as many as there may be."""
        most = self._config.max_groups or 1 << 30
        for work in self._open.values():
            if work.task is None and (work.entry.group is not None or self._playing < most):
                self._begin(work)
        while len(self._open) < self._room and self._playing < most:
            item = self._draw(self._ledger.num_issued)
            self._ledger.issue(item, self._version)
            work = _Work(self._ledger.entries[item.number])
            self._open[item.number] = work
            self._begin(work)

    def _begin(self, work: _Work) -> None:
        self._playing += work.entry.group is None
        work.task = asyncio.create_task(self._run(work))

    async def _run(self, work: _Work) -> None:
        """Take an item through the stages."""
        number, ledger = work.number, self._ledger
        try:
            if work.entry.group is None:
                group = await self._stages.generate(work.entry.item)
                ledger.finish(number, group)
                work.entry = ledger.entries[number]
                self._playing -= 1
                self._admit()
            await self._finish(work)
        except Exception as error:
            self._failure = self._failure or error
        self._changed.set()

    async def _finish(self, work: _Work) -> None:
        """Take what was played to its samples."""
        ledger, number, entry = self._ledger, work.number, work.entry
        group = entry.group
        assert group is not None
        if self._stages.score is not None and entry.scores is None:
            async with self._scoring:
                scores = await self._stages.score(group)
            ledger.score(number, scores)
            entry = ledger.entries[number]
        learnt = await self._stages.credit(group, entry.scores or ())
        work.entry, work.learnt = entry, learnt
        if self._config.refill and not learnt.samples:
            self._set_aside(work)

    def _set_aside(self, work: _Work) -> None:
        """Let another item take the place of one that nothing can be learnt of."""
        self._useless.append(self._open.pop(work.number))
        most = _MOST_USELESS * self._config.groups_per_step
        if len(self._useless) >= most:
            raise DataError(
                f"of {most} groups in a row there is nothing to learn: {_why(self._useless)}; give "
                "tasks that the model solves now and then, or drop no groups of equal rewards"
            )
        self._admit()

    def _choose(self, step: int) -> list[_Work] | None:
        """Return a batch, or None while something must be waited for."""
        if self._failure is not None:
            raise self._failure
        size, max_age = self._config.groups_per_step, self._config.max_age
        ready = [work for work in self._open.values() if work.learnt is not None]
        for work in ready:  # only where a run goes on with other settings
            if work.version + max_age < step:
                age = step - work.version
                self._ledger.drop(work.number, f"{age} steps old, of at most {max_age}")
                del self._open[work.number]
        self._admit()
        ready = [work for work in ready if work.number in self._open]
        ready.sort(key=lambda work: (work.version, work.number))
        chosen = ready[:size]
        left = [w for w in self._open.values() if w.learnt is None] + ready[size:]
        if len(chosen) < size or not fits(step + 1, size, [w.version + max_age for w in left]):
            waiting = any(work.learnt is None for work in self._open.values())
            if len(chosen) < size or waiting:
                return None
        if not any(work.learnt.samples for work in chosen if work.learnt is not None):
            for work in chosen:
                self._set_aside(work)
            return None
        return chosen

    async def _again(self, step: int, recorded: Sequence[int]) -> list[Played]:
        """Return a recorded batch."""
        works = [_Work(self._ledger.entries.pop(number)) for number in recorded]
        for work in works:
            assert work.entry.group is not None, "what was trained on was played"
            work.learnt = await self._stages.credit(work.entry.group, work.entry.scores or ())
        return [_played(work, step) for work in works]


def fits(step: int, size: int, last_steps: Sequence[int]) -> bool:
    """Tell whether items with these last steps can all be used, `size` a step from `step` on."""
    return all(last >= step + i // size for i, last in enumerate(sorted(last_steps)))


def _played(work: _Work, step: int) -> Played:
    entry = work.entry
    assert entry.group is not None and work.learnt is not None
    return Played(
        item=entry.item, group=entry.group, learnt=work.learnt, age=max(step - work.version, 0)
    )


def _why(works: Sequence[_Work]) -> str:
    """Say what the groups of `works` have in common."""
    groups = [work.entry.group for work in works if work.entry.group is not None]
    episodes = [t for group in groups for t in group.trajectories]
    errors = [t.error for t in episodes if t.error is not None]
    if errors and 2 * len(errors) > len(episodes):
        return f"{len(errors)} of {len(episodes)} episodes failed, the last with {errors[-1]}"
    rewards = [t.reward for t in episodes if t.error is None]
    mean = sum(rewards) / max(len(rewards), 1)
    return f"the mean reward of {len(rewards)} episodes is {mean:.3f}"
