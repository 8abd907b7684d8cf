"""The exercises that pico learns from, as a family of tasks like the others."""

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

from aprium.base.errors import TaskError
from aprium.base.records import Message
from aprium.envs.env import Env, SingleTurn
from aprium.envs.exercise import Exercise, verify
from aprium.envs.families import FAMILIES
from aprium.envs.task import Task, say

# Words that exercises about words draw from; a source of data brings its own.
_WORDS = tuple(
    "apple plum house river garden window paper stone bread music silver cloud planet market "
    "winter copper violin tunnel engine basket hammer pencil island forest".split()
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Exercises:
    """Exercises of `families` (empty for all) about `words`."""

    families: tuple[str, ...] = ()
    words: tuple[str, ...] = _WORDS
    domain: str = "exercises"

    def __post_init__(self) -> None:
        """Check names and ranges."""
        for name in self.families:
            if name not in FAMILIES:
                raise TaskError(f"no family of exercises {name!r}: choose of {', '.join(FAMILIES)}")
        if len(set(self.words)) < 10:
            raise TaskError(f"{len(set(self.words))} words are too few: give at least 10")

    def draw(self, rng: random.Random) -> Task:
        """Make an exercise."""
        name = rng.choice(self.families or tuple(FAMILIES))
        exercise = FAMILIES[name](rng, self.words)
        question, solution = exercise.messages(thinking=True)
        call = exercise.call
        return Task(
            domain=self.domain,
            key=f"{exercise.family} {exercise.key}",
            messages=(question,),
            tools=exercise.tools,
            data={
                "family": name,
                "answer": exercise.answer,
                "call": None if call is None else [call.name, call.arguments],
            },
            solution=(solution,),
        )

    def start(self, task: Task) -> Env:
        """Return the environment of one exercise."""
        return SingleTurn(task, _grade)

    def wrong(self, task: Task) -> Sequence[tuple[Message, ...]]:
        """Return nothing, the answer with more behind it, and another call."""
        (gold,) = task.solution
        if not gold.tool_calls:
            return [(say(""),), (say(f"{task.data['answer']} or so"),)]
        other = replace(gold.tool_calls[0], arguments=json.dumps({"city": "Nowhere"}))
        return [(say(""),), (replace(gold, tool_calls=(other,)),)]


def _grade(task: Task, reply: Message) -> float:
    call = task.data["call"]
    if call is not None:
        return float([[c.name, c.arguments] for c in reply.tool_calls] == [call])
    exercise = Exercise(
        family=task.data["family"], key=task.key, question="", answer=task.data["answer"]
    )
    return float(verify(exercise, reply.content or "", reply.tool_calls))
