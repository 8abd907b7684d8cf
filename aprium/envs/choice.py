"""Multiple choice: options under letters, one of them right, and near misses beside it.

Questions are made from facts that are computed, so that there is no end of them and none is quoted.
"""

import calendar
import random
import re
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date, timedelta

from aprium.base.errors import TaskError
from aprium.base.records import Message
from aprium.envs.answer import final_answer
from aprium.envs.env import Env, SingleTurn
from aprium.envs.task import Task, say

_LETTER = re.compile(r"\W*(?:option\s+)?([A-Z])\W*", re.IGNORECASE)
# A question, the right option, and wrong ones from near to far.
Question = tuple[str, str, list[str]]


def _weekday(rng: random.Random) -> Question:
    day = date(2000, 1, 1) + timedelta(days=rng.randrange(20_000))
    names = list(calendar.day_name)
    right = names[day.weekday()]
    return f"Which day of the week is {day.isoformat()}?", right, [n for n in names if n != right]


def _product(rng: random.Random) -> Question:
    a, b = rng.randint(11, 99), rng.randint(11, 99)
    near = {a * b + d for d in (10, -10, a, -a, b, -b, 1, -1, 100, -100)} - {a * b}
    return f"What is {a} times {b}?", str(a * b), [str(n) for n in sorted(near)]


def _sorted_word(rng: random.Random) -> Question:
    words = ["".join(rng.choices(string.ascii_lowercase, k=5)) for _ in range(9)]
    words = sorted(set(words))
    shown = rng.sample(words, len(words))
    place = rng.randrange(1, len(words) - 1)
    question = f"In alphabetical order, which word is number {place + 1}: {', '.join(shown)}?"
    return question, words[place], [w for w in words if w != words[place]]


def _binary(rng: random.Random) -> Question:
    number = rng.randint(17, 500)
    near = {number + d for d in (1, -1, 2, -2, 4, -4, 8, -8, 16, -16)}
    return (
        f"What is {number} in binary?",
        f"{number:b}",
        [f"{n:b}" for n in sorted(near) if n > 0],
    )


def _implies(rng: random.Random) -> Question:
    a, b, c, d = rng.sample(("blips", "dorks", "wugs", "tams", "fleps", "zorns"), 4)
    question = f"All {a} are {b}. No {b} are {c}. Some {d} are {a}. Which must be true?"
    right = rng.choice([f"No {a} are {c}.", f"Some {d} are {b}.", f"Some {d} are not {c}."])
    wrong = [f"All {b} are {a}.", f"All {d} are {a}.", f"Some {c} are {a}.", f"No {d} are {b}."]
    wrong += [f"All {d} are {b}.", f"Some {c} are {b}.", f"All {c} are {d}.", f"All {b} are {d}."]
    return question, right, wrong


QUESTIONS: dict[str, Callable[[random.Random], Question]] = {
    "weekday": _weekday,
    "product": _product,
    "alphabet": _sorted_word,
    "binary": _binary,
    "syllogism": _implies,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class MultipleChoice:
    """Questions of `kinds` (empty for all) with `options` options."""

    kinds: tuple[str, ...] = ()
    options: int = 4
    domain: str = "choice"

    def __post_init__(self) -> None:
        """Check names and ranges."""
        for kind in self.kinds:
            if kind not in QUESTIONS:
                raise TaskError(f"no kind of question {kind!r}: choose of {', '.join(QUESTIONS)}")
        if not 2 <= self.options <= 7:
            raise TaskError(f"options is {self.options}: it must be 2 to 7")

    def draw(self, rng: random.Random) -> Task:
        """Make a question."""
        question, right, wrong = QUESTIONS[rng.choice(self.kinds or tuple(QUESTIONS))](rng)
        shown = rng.sample([right, *rng.sample(wrong, self.options - 1)], self.options)
        letters = string.ascii_uppercase[: self.options]
        rows = "\n".join(f"{a}) {text}" for a, text in zip(letters, shown, strict=True))
        letter = letters[shown.index(right)]
        text = f"{question}\n{rows}\nEnd with 'Answer: ' and the letter."
        return Task(
            domain=self.domain,
            key=question,
            messages=(say(text, role="user"),),
            data={"letter": letter, "options": shown},
            solution=(say(f"Answer: {letter}"),),
        )

    def start(self, task: Task) -> Env:
        """Return the environment of one question."""
        return SingleTurn(task, _grade)

    def wrong(self, task: Task) -> Sequence[tuple[Message, ...]]:
        """Return nothing, every other letter, all letters, and a letter in passing."""
        letter, count = task.data["letter"], len(task.data["options"])
        letters = string.ascii_uppercase[:count]
        texts = ["", f"Answer: {' '.join(letters)}", f"It could be {letter} or not."]
        texts += [f"Answer: {other}" for other in letters if other != letter]
        return [(say(text),) for text in texts]


def _grade(task: Task, reply: Message) -> float:
    answer = final_answer(reply)
    match = _LETTER.fullmatch(answer)
    if match:
        return float(match[1].upper() == task.data["letter"])
    # The letter with its option, or the option word for word.
    options = task.data["options"]
    right = options[string.ascii_uppercase.index(task.data["letter"])]
    plain = re.sub(rf"^\W*{task.data['letter']}\W+", "", answer)
    return float(plain.strip(" .") == right.strip(" ."))
