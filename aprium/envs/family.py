"""A family of tasks: drawn, split by what is asked, checked on known answers, guessed by constants.

A checker that was never tried on answers of known worth is a reward to be hacked, so every family
brings wrong answers beside its solutions, and `validate` grades both.
"""

import asyncio
import importlib
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from aprium.base.errors import TaskError
from aprium.base.records import Message
from aprium.envs.env import Env, Step, replay
from aprium.envs.task import Task, say

_MAX_DRAWS = 2000
_FULL = 0.999
_CONSTANTS = ("0", "1", "2", "10", "yes", "no", "Yes", "No", "True", "False", "A", "B", "C", "[]")


class Family(Protocol):
    """Tasks of one kind. A family is a frozen dataclass, its fields the difficulty."""

    @property
    def domain(self) -> str:
        """Its name: what `Task.domain` of its tasks says."""
        ...

    def draw(self, rng: random.Random) -> Task:
        """Make a task, the same from the same generator in any process."""
        ...

    def start(self, task: Task) -> Env:
        """Return an environment to play `task` in, once."""
        ...

    def wrong(self, task: Task) -> Sequence[tuple[Message, ...]]:
        """Return turns that are known not to solve `task`, some of them nearly right."""
        ...


def take(family: Family, index: int, *, seed: int = 0, held_out: bool = False) -> Task:
    """Return task `index` of one side of the split: of those to train on, or held out.

    The sides never share an item, whatever the seeds. Raises TaskError where a side is empty.
    """
    rng = random.Random(f"{seed} {family.domain} {index}")
    for _ in range(_MAX_DRAWS):
        task = family.draw(rng)
        if task.held_out == held_out:
            return task
    side = "held out" if held_out else "to train on"
    raise TaskError(
        f"none of {_MAX_DRAWS} tasks of {family.domain} is one {side}: make its parameters wider"
    )


def distinct(
    family: Family, count: int, *, seed: int = 0, held_out: bool = False, skip: int = 0
) -> list[Task]:
    """Return `count` tasks of one side, no two alike, after `skip` draws.

    Raises TaskError when the family repeats itself before there are so many.
    """
    found: dict[str, Task] = {}
    for index in range(skip, skip + 20 * count + 100):
        task = take(family, index, seed=seed, held_out=held_out)
        found.setdefault(task.id, task)
        if len(found) >= count:
            return list(found.values())
    raise TaskError(
        f"{family.domain} has only some {len(found)} tasks on this side: ask for fewer than {count}"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Validation:
    """What grading known answers found: counts, and ids of tasks that were graded wrongly.

    `unsolved` tasks have no solution to grade.
    """

    tasks: int
    wrong_tried: int
    unsolved: int
    gold_failed: tuple[str, ...]
    wrong_passed: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Whether all solutions got 1 and all wrong answers 0."""
        return not self.gold_failed and not self.wrong_passed


async def validate_tasks(family: Family, tasks: Sequence[Task]) -> Validation:
    """Grade the solutions and known-wrong answers of `tasks`."""
    gold_failed, wrong_passed, tried = [], [], 0
    for task in tasks:
        if task.solution:
            step = await replay(family.start(task), task.solution)
            if not (step.done and step.reward >= _FULL):
                gold_failed.append(task.id)
        for turns in family.wrong(task):
            tried += 1
            if (await replay(family.start(task), turns)).reward > 0:
                wrong_passed.append(f"{task.id} ({(turns[-1].content or '')[:60]!r})")
    return Validation(
        tasks=len(tasks),
        wrong_tried=tried,
        unsolved=sum(not task.solution for task in tasks),
        gold_failed=tuple(gold_failed),
        wrong_passed=tuple(wrong_passed),
    )


def validate(family: Family, *, count: int = 16, seed: int = 0) -> Validation:
    """Draw tasks and grade their solutions and known-wrong answers; see `Validation`."""
    tasks = [take(family, index, seed=seed) for index in range(count)]
    return asyncio.run(validate_tasks(family, tasks))


def constant_baseline(
    family: Family, *, count: int = 40, seed: int = 0, more: Sequence[str] = ()
) -> tuple[str, float]:
    """Return the constant answer that earns most, and its mean reward over `count` tasks.

    Tried are a few usual constants, `more`, and the commonest solutions of other tasks. A score is
    worth something only above this.
    """
    tasks = [take(family, index, seed=seed) for index in range(count)]
    other = [take(family, index, seed=seed) for index in range(count, 2 * count)]
    common = Counter(t.solution[0].content or "" for t in other if len(t.solution) == 1)
    texts = dict.fromkeys([*_CONSTANTS, *more, *(text for text, _ in common.most_common(5))])

    async def mean(text: str) -> float:
        steps: list[Step] = [await replay(family.start(task), [say(text)]) for task in tasks]
        return sum(step.reward for step in steps) / count

    scores = {text: asyncio.run(mean(text)) for text in texts}
    best = max(scores, key=lambda text: scores[text])
    return best, scores[best]


def optional(module: str, extra: str = "envs") -> Any:
    """Import a package of an extra; raises TaskError that says how to get it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise TaskError(
            f"{module} is not installed ({error}): pip install 'aprium[{extra}]'"
        ) from error
