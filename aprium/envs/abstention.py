"""Knowing when not to answer: some questions cannot be answered from what is given.

A small table of facts is shown. A question about it is answered, or, where the table does not say,
declined. A wrong answer costs more than a needless "I do not know", so that guessing does not pay.
"""

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

from aprium.base.errors import TaskError
from aprium.base.records import Message
from aprium.envs.answer import final_answer
from aprium.envs.env import Env, SingleTurn
from aprium.envs.task import Task, say

_DECLINES = re.compile(
    r"\bI (?:do not|don.t|cannot|can.t) (?:know|say|tell|answer|determine)"
    r"|\b(?:is|are|was) not (?:given|stated|known|mentioned|said|listed)"
    r"|\b(?:un)?known\b.{0,20}\bfrom\b|\bnot (?:enough|sufficient) information\b|\bunknown\b"
    r"|\bcannot be (?:known|determined|answered)\b",
    re.IGNORECASE,
)
_NAMES = ("Ada", "Boris", "Chen", "Dalia", "Edgar", "Farah", "Goran", "Hana", "Ivo", "Jun")
_FACTS = {
    "age": [str(n) for n in range(19, 80)],
    "city": ["Lima", "Oslo", "Cairo", "Quito", "Riga", "Turin", "Perth", "Kyoto", "Leeds"],
    "job": ["baker", "pilot", "nurse", "tailor", "judge", "miner", "florist", "welder"],
    "pet": ["a cat", "a dog", "a parrot", "a snake", "a rabbit", "a turtle"],
    "hobby": ["chess", "fishing", "knitting", "rowing", "pottery", "archery"],
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Abstention:
    """Questions about tables of `people`, the share `unanswerable` of them without an answer.

    A right answer, or a right refusal, gets 1; a needless refusal `needless`; a wrong answer 0, and
    with `penalty` that much below 0.
    """

    people: int = 5
    unanswerable: float = 0.5
    needless: float = 0.0
    penalty: float = 0.0
    domain: str = "abstention"

    def __post_init__(self) -> None:
        """Check ranges."""
        if not 2 <= self.people <= len(_NAMES):
            raise TaskError(f"people is {self.people}: it must be 2 to {len(_NAMES)}")
        for name in ("unanswerable", "needless", "penalty"):
            if not 0 <= getattr(self, name) <= 1:
                raise TaskError(f"{name} is {getattr(self, name)}: it must be in 0..1")

    def draw(self, rng: random.Random) -> Task:
        """Make a table and a question."""
        people = rng.sample(_NAMES, self.people)
        table = {name: {f: rng.choice(v) for f, v in _FACTS.items()} for name in people}
        name, fact = rng.choice(people), rng.choice(tuple(_FACTS))
        answer = table[name][fact]
        if rng.random() < self.unanswerable:
            answer = ""
            if rng.random() < 0.5:
                del table[name][fact]
            else:
                name = rng.choice([n for n in _NAMES if n not in people])
        rows = "\n".join(
            f"{n}: {', '.join(f'{f} {v}' for f, v in facts.items())}" for n, facts in table.items()
        )
        text = (
            f"{rows}\n\nWhat is the {fact} of {name}? Answer with 'Answer: ' and the value alone. "
            "If the lines above do not say, write 'Answer: I do not know'."
        )
        return Task(
            domain=self.domain,
            key=text,
            messages=(say(text, role="user"),),
            data={"answer": answer, "values": _FACTS[fact]},
            solution=(say(f"Answer: {answer or 'I do not know'}"),),
        )

    def start(self, task: Task) -> Env:
        """Return the environment of one question."""
        return SingleTurn(task, self._grade)

    def wrong(self, task: Task) -> Sequence[tuple[Message, ...]]:
        """Return nothing, a guess, every value, and an answer that is both."""
        answer, values = task.data["answer"], task.data["values"]
        guess = next(value for value in values if value != answer)
        texts = ["", f"Answer: {guess}", f"Answer: {', '.join(values)}"]
        texts += [f"Answer: I do not know, but {answer or guess}"]
        if answer and not self.needless:
            texts.append("Answer: I do not know")
        return [(say(text),) for text in texts]

    def _grade(self, task: Task, reply: Message) -> dict[str, float]:
        said, answer = final_answer(reply), task.data["answer"]
        named = [v for v in task.data["values"] if _mentions(said, v)]
        declined = bool(_DECLINES.search(said)) and not named
        if declined:
            reward = 1.0 if not answer else self.needless
        else:
            exact = said.strip(" .").casefold().removeprefix("a ")
            right = bool(answer) and exact == answer.casefold().removeprefix("a ")
            reward = 1.0 if right else -self.penalty
        return {"reward": reward, "declined": float(declined), "correct": float(reward == 1.0)}


def _mentions(text: str, value: str) -> bool:
    return re.search(rf"\b{re.escape(value)}\b", text, re.IGNORECASE) is not None
