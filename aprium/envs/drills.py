"""Drills: short questions about strings of digits and letters, each kind a small skill of its own.

They are what a model of a few million parameters learns in minutes, told in a few tokens and
answered in a few, without worked steps: many skills can be taught, measured on a thousand held-out
items each, and distilled into one model within an hour on a CPU core. `least` and `most` bound the
length of the strings, which is the difficulty. Digits and spaced letters are tokens of their own in
most tokenizers, so that what is asked does not hang on how a word is cut.
"""

import itertools
import random
import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from aprium.base.errors import TaskError
from aprium.base.records import Message
from aprium.envs.env import Env, SingleTurn
from aprium.envs.exercise import Exercise, verify
from aprium.envs.task import Task, say

_LETTERS = string.ascii_lowercase
_VOWELS = "aeiou"
_LONGEST = 12

# A kind takes a generator and a length, and makes what is asked behind its name, and the answer.
Kind = Callable[[random.Random, int], tuple[str, str]]


def _digits(rng: random.Random, length: int) -> str:
    return "".join(rng.choices(string.digits, k=length))


def _number(rng: random.Random, length: int) -> int:
    return rng.randrange(10 ** (length - 1), 10**length)


def _reverse(rng: random.Random, length: int) -> tuple[str, str]:
    digits = _digits(rng, length)
    return digits, digits[::-1]


def _sort(rng: random.Random, length: int) -> tuple[str, str]:
    digits = _digits(rng, length)
    return digits, "".join(sorted(digits))


def _rotate(rng: random.Random, length: int) -> tuple[str, str]:
    digits, by = _digits(rng, length), rng.randint(1, length - 1)
    return f"{digits} by {by}", digits[by:] + digits[:by]


def _swap(rng: random.Random, length: int) -> tuple[str, str]:
    """Exchange the digits of every pair; the last of an odd number stays."""
    digits = _digits(rng, length)
    pairs = (digits[i : i + 2] for i in range(0, length, 2))
    return digits, "".join(pair[::-1] for pair in pairs)


def _merge(rng: random.Random, length: int) -> tuple[str, str]:
    """Take digits of two strings in turns."""
    a, b = _digits(rng, length), _digits(rng, length)
    return f"{a} {b}", "".join(x + y for x, y in zip(a, b, strict=True))


def _unique(rng: random.Random, length: int) -> tuple[str, str]:
    """Keep the first of equal digits."""
    digits = "".join(rng.choices(rng.sample(string.digits, max(2, length - 2)), k=length))
    return digits, "".join(dict.fromkeys(digits))


def _drop(rng: random.Random, length: int) -> tuple[str, str]:
    """Leave one digit out; some other is always left."""
    few = rng.sample(string.digits, max(3, length // 2))
    digits = few[0] + few[1] + "".join(rng.choices(few, k=length - 2))
    shuffled = "".join(rng.sample(digits, length))
    return f"{few[0]} in {shuffled}", shuffled.replace(few[0], "")


def _every(rng: random.Random, length: int) -> tuple[str, str]:
    """Take every second digit, from the first."""
    digits = _digits(rng, length)
    return digits, digits[::2]


def _replace(rng: random.Random, length: int) -> tuple[str, str]:
    """Write another digit in the place of one that is there."""
    digits = _digits(rng, length)
    old, new = rng.choice(digits), rng.choice(string.digits)
    return f"{old} by {new} in {digits}", digits.replace(old, new)


def _higher(rng: random.Random, length: int) -> tuple[str, str]:
    """Take the higher of the two digits at each place of two strings."""
    a, b = _digits(rng, length), _digits(rng, length)
    return f"{a} {b}", "".join(map(max, zip(a, b, strict=True)))


def _nines(rng: random.Random, length: int) -> tuple[str, str]:
    """Say what each digit lacks to nine."""
    digits = _digits(rng, length)
    return digits, "".join(str(9 - int(digit)) for digit in digits)


def _running(rng: random.Random, length: int) -> tuple[str, str]:
    """Add up the digits so far, and keep the last digit of each sum."""
    digits, total, sums = _digits(rng, length), 0, ""
    for digit in digits:
        total = (total + int(digit)) % 10
        sums += str(total)
    return digits, sums


def _gaps(rng: random.Random, length: int) -> tuple[str, str]:
    """Say how far each digit lies from the next."""
    digits = _digits(rng, length)
    return digits, "".join(str(abs(int(a) - int(b))) for a, b in itertools.pairwise(digits))


def _add(rng: random.Random, length: int) -> tuple[str, str]:
    # The larger first, so that no sum is asked on both sides of the split.
    b, a = sorted((_number(rng, length), _number(rng, length)))
    return f"{a}+{b}", str(a + b)


def _largest(rng: random.Random, length: int) -> tuple[str, str]:
    numbers = rng.sample(range(100, 1000), length)
    return " ".join(map(str, numbers)), str(max(numbers))


def _lookup(rng: random.Random, length: int) -> tuple[str, str]:
    """Give the numbers that belong to two of the letters."""
    letters = rng.sample(_LETTERS, length)
    table = {letter: _number(rng, 2) for letter in letters}
    asked = rng.sample(letters, 2)
    shown = ",".join(f"{letter}={number}" for letter, number in table.items())
    return f"{shown}; {','.join(asked)}", ",".join(str(table[letter]) for letter in asked)


def _shift(rng: random.Random, length: int) -> tuple[str, str]:
    letters, by = rng.choices(_LETTERS, k=length), rng.randint(1, 3)
    moved = (_LETTERS[(_LETTERS.index(letter) + by) % len(_LETTERS)] for letter in letters)
    return f"{' '.join(letters)} by {by}", " ".join(moved)


def _alphabet(rng: random.Random, length: int) -> tuple[str, str]:
    letters = rng.sample(_LETTERS, length)
    return " ".join(letters), " ".join(sorted(letters))


def _consonants(rng: random.Random, length: int) -> tuple[str, str]:
    """Leave the vowels out; there is always a consonant, and nearly half are vowels."""
    others = [letter for letter in _LETTERS if letter not in _VOWELS]
    letters = [rng.choice(others if rng.random() < 0.55 else _VOWELS) for _ in range(length)]
    letters[rng.randrange(length)] = rng.choice(others)
    return " ".join(letters), " ".join(letter for letter in letters if letter in others)


KINDS: dict[str, Kind] = {
    "reverse": _reverse,
    "sort": _sort,
    "rotate": _rotate,
    "swap": _swap,
    "merge": _merge,
    "unique": _unique,
    "drop": _drop,
    "every": _every,
    "replace": _replace,
    "higher": _higher,
    "nines": _nines,
    "running": _running,
    "gaps": _gaps,
    "add": _add,
    "largest": _largest,
    "lookup": _lookup,
    "shift": _shift,
    "alphabet": _alphabet,
    "consonants": _consonants,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Drills:
    """Questions of one `kind` about strings of `least` to `most` digits, letters or entries."""

    kind: str = "reverse"
    least: int = 4
    most: int = 6
    domain: str = "drills"

    def __post_init__(self) -> None:
        """Check name and range."""
        if self.kind not in KINDS:
            raise TaskError(f"no kind of drill {self.kind!r}: choose of {', '.join(KINDS)}")
        if not 2 <= self.least <= self.most <= _LONGEST:
            raise TaskError(
                f"lengths from {self.least} to {self.most} cannot be: give least and most with "
                f"2 <= least <= most <= {_LONGEST}"
            )

    def draw(self, rng: random.Random) -> Task:
        """Make a question."""
        asked, answer = KINDS[self.kind](rng, rng.randint(self.least, self.most))
        return Task(
            domain=self.domain,
            key=f"{self.kind} {asked}",
            messages=(say(f"{self.kind}: {asked}", role="user"),),
            data={"answer": answer},
            solution=(say(answer),),
        )

    def start(self, task: Task) -> Env:
        """Return the environment of one question."""
        return SingleTurn(task, _grade)

    def wrong(self, task: Task) -> Sequence[tuple[Message, ...]]:
        """Return nothing, the answer cut short or twice, and the answer in a sentence."""
        answer = task.data["answer"]
        return [(say(text),) for text in ("", answer[:-1], answer * 2, f"It is {answer}")]


def _grade(task: Task, reply: Message) -> float:
    answer = task.data["answer"]
    exercise = Exercise(family="drills", key=task.key, question="", answer=answer)
    return float(verify(exercise, reply.content or "", reply.tool_calls))
