"""Families of verifiable tasks that a model of a few million parameters can learn.

Each family is a function from a random generator to an `Exercise`. Solutions are worked in small
steps, each of which needs only what stands close by (letters with their numbers, digits with
carries), because that is what lets a small model get them right. Every family has questions in
words and in a short form; both ask for the same items, so one split holds for both. The caller
gives the words (lower-case letters only) that the families about words draw from.
"""

import json
import random
from collections.abc import Callable, Sequence

from aprium.base.errors import DataError
from aprium.base.records import ToolCall
from aprium.envs.exercise import Exercise

_PHRASES: dict[str, tuple[str, ...]] = {
    "reverse": (
        "Spell the word {} backwards.",
        "Reverse the word {}.",
        "What is {} spelled backwards?",
        "Write {} backwards.",
    ),
    "spell": ("Spell the word {}.", "How do you spell {}?", "Spell {} letter by letter."),
    "length": ("How many letters are in {}?", "How many letters does the word {} have?"),
    "count": ("How many times does {1} occur in {0}?", "How many {1}s are in the word {0}?"),
    "first": ("What is the first letter of {}?", "Which letter does {} start with?"),
    "last": ("What is the last letter of {}?", "Which letter does {} end with?"),
    "upper": ("Write {} in capital letters.", "Put {} in upper case."),
    "add": ("What is {} + {}?", "Add {} and {}.", "How much is {} plus {}?"),
    "subtract": ("What is {} - {}?", "Subtract: {} - {}.", "How much is {} minus {}?"),
    "multiply": ("What is {} times {}?", "Multiply {} by {}.", "How much is {} x {}?"),
    "compare": ("Which is larger, {} or {}?", "Which number is bigger: {} or {}?"),
    "largest": ("What is the largest of {}?", "Find the biggest number: {}."),
    "smallest": ("What is the smallest of {}?", "Find the smallest number: {}."),
    "sort": ("Sort these numbers: {}.", "Put in order: {}.", "Sort {} from small to large."),
    "repeat": ("Repeat: {}", "Say this: {}", "Repeat these words: {}"),
    "words": ("Reverse the order of these words: {}.", "Write the words in reverse: {}."),
    "caesar": ("Shift each letter of {} by {}.", "Encode {} with a Caesar shift of {}."),
    "next": ("Which number comes after {}?", "What is the next number after {}?"),
    "even": ("Is {} even or odd?", "Is the number {} odd or even?"),
    "weather": ("What is the weather in {}?", "How is the weather in {} today?", "Weather in {}?"),
}
_SHORT: dict[str, tuple[str, ...]] = {
    "reverse": ("reverse: {}", "reverse {}"),
    "spell": ("spell: {}", "spell {}"),
    "length": ("length: {}", "length of {}"),
    "count": ("count {1}: {0}", "count {1} in {0}"),
    "first": ("first: {}", "first letter: {}"),
    "last": ("last: {}", "last letter: {}"),
    "upper": ("upper: {}", "uppercase: {}"),
    "add": ("{}+{}=", "{}+{}", "{} + {} ="),
    "subtract": ("{}-{}=", "{}-{}", "{} - {} ="),
    "multiply": ("{}*{}=", "{}x{}=", "{} x {} ="),
    "compare": ("larger: {}, {}", "max({}, {})"),
    "largest": ("largest: {}", "max: {}"),
    "smallest": ("smallest: {}", "min: {}"),
    "sort": ("sort: {}", "sort {}"),
    "repeat": ("repeat: {}", "say: {}"),
    "words": ("reverse words: {}", "backwards: {}"),
    "caesar": ("caesar {1}: {0}", "shift {1}: {0}"),
    "next": ("next: {}", "after {}"),
    "even": ("even or odd: {}", "odd or even: {}"),
    "weather": ("weather: {}", "weather {}"),
}
_SHORT_SHARE = 0.3
_CITIES = (
    "Paris", "Rome", "Oslo", "Tokyo", "Cairo", "Lima", "Berlin", "Madrid", "Delhi", "Boston",
    "Vienna", "Prague", "Dublin", "Athens", "Sydney", "Toronto", "Seoul", "Lisbon", "Zurich",
)  # fmt: skip
WEATHER_TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get the weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "description": "The city."}},
            "required": ["city"],
        },
    },
}


def _task(
    rng: random.Random, family: str, values: tuple[object, ...], answer: object, reasoning: str = ""
) -> Exercise:
    short, question = _ask(rng, family, values)
    return Exercise(
        family=family,
        key=" ".join(map(str, values)),
        question=question,
        short=short,
        answer=str(answer),
        reasoning=reasoning,
    )


def _ask(rng: random.Random, family: str, values: tuple[object, ...]) -> tuple[bool, str]:
    """Return whether the question is in the short form, and the question."""
    short = rng.random() < _SHORT_SHARE
    return short, rng.choice((_SHORT if short else _PHRASES)[family]).format(*values)


def _letters(word: str) -> str:
    return " ".join(word)


def _numbered(word: str) -> list[str]:
    """Return a word's letters behind their numbers: to look one up is to continue its number."""
    return [f"{i}{letter}" for i, letter in enumerate(word, 1)]


def _reverse(rng: random.Random, words: Sequence[str]) -> Exercise:
    word = rng.choice(words)
    letters = _numbered(word)
    steps = f"{''.join(letters)}|{''.join(reversed(letters))}"
    return _task(rng, "reverse", (word,), word[::-1], steps)


def _spell(rng: random.Random, words: Sequence[str]) -> Exercise:
    word = rng.choice(words)
    return _task(rng, "spell", (word,), _letters(word))


def _length(rng: random.Random, words: Sequence[str]) -> Exercise:
    word = rng.choice(words)
    return _task(rng, "length", (word,), len(word), "".join(_numbered(word)))


def _count(rng: random.Random, words: Sequence[str]) -> Exercise:
    word = rng.choice(words)
    letter = rng.choice(word)
    seen, steps = 0, []
    for one in word:
        seen += one == letter
        steps.append(f"{one}{seen}")
    return _task(rng, "count", (word, letter), seen, "".join(steps))


def _first(rng: random.Random, words: Sequence[str]) -> Exercise:
    word = rng.choice(words)
    return _task(rng, "first", (word,), word[0])


def _last(rng: random.Random, words: Sequence[str]) -> Exercise:
    word = rng.choice(words)
    return _task(rng, "last", (word,), word[-1], _letters(word))


def _upper(rng: random.Random, words: Sequence[str]) -> Exercise:
    word = rng.choice(words)
    return _task(rng, "upper", (word,), word.upper())


def _number(rng: random.Random) -> int:
    return rng.randrange(10 ** rng.choice((1, 2, 2, 3)))


def _digits(a: int, b: int) -> zip:
    """Pair the digits of two numbers from the right, the shorter filled up with zeros."""
    width = max(len(str(a)), len(str(b)))
    return zip(*(map(int, reversed(str(n).zfill(width))) for n in (a, b)), strict=True)


def _add(rng: random.Random, words: Sequence[str]) -> Exercise:
    a, b = _number(rng), _number(rng)
    return _task(rng, "add", (a, b), a + b, _sums(a, b))


def _sums(a: int, b: int) -> str:
    steps, carry = [], 0
    for x, y in _digits(a, b):
        total = x + y + carry
        steps.append(f"{x}+{y}{f'+{carry}' if carry else ''}={total}")
        carry = total // 10
    return ",".join(steps)


def _subtract(rng: random.Random, words: Sequence[str]) -> Exercise:
    a, b = sorted((_number(rng), _number(rng)), reverse=True)
    steps, borrow = [], 0
    for x, y in _digits(a, b):
        difference = x - y - borrow
        taken = f"{x}-{y}{'-1' if borrow else ''}"
        # Whether to borrow is said after the digits it depends on.
        borrow = int(difference < 0)
        steps.append(f"{taken}{'+10' if borrow else ''}={difference + 10 * borrow}")
    return _task(rng, "subtract", (a, b), a - b, ",".join(steps))


def _multiply(rng: random.Random, words: Sequence[str]) -> Exercise:
    a, b = rng.randrange(2, 100), rng.randrange(2, 10)
    tens, ones = divmod(a, 10)
    steps = f"{ones}x{b}={ones * b}"
    if tens:
        steps += f", {tens}0x{b}={tens * b}0, {tens * b}0+{ones * b}={a * b}"
    return _task(rng, "multiply", (a, b), a * b, steps)


def _compare(rng: random.Random, words: Sequence[str]) -> Exercise:
    a = _number(rng)
    b = abs(a + rng.randint(-50, 50)) if rng.random() < 0.5 else _number(rng)
    b = b if b != a else a + 1
    steps = []
    for x, y in reversed(list(_digits(a, b))):
        steps.append(f"{x}{'=' if x == y else '>' if x > y else '<'}{y}")
        if x != y:
            break
    return _task(rng, "compare", (a, b), max(a, b), ",".join(steps))


def _numbers(rng: random.Random, low: int, high: int) -> list[int]:
    return rng.sample(range(100), rng.randint(low, high))


def _show(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))


def _extreme(family: str, better: Callable[[int, int], int]) -> "Family":
    """Make the family that walks a list and keeps the better of two."""

    def make(rng: random.Random, words: Sequence[str]) -> Exercise:
        numbers = _numbers(rng, 3, 6)
        best, steps = numbers[0], [str(numbers[0])]
        for number in numbers[1:]:
            best = better(best, number)
            steps.append(f"{number}:{best}")
        return _task(rng, family, (_show(numbers),), best, ",".join(steps))

    return make


def _sort(rng: random.Random, words: Sequence[str]) -> Exercise:
    numbers = _numbers(rng, 3, 5)
    left, steps = list(numbers), []
    for number in sorted(numbers)[:-1]:
        left.remove(number)
        steps.append(f"{number}|{','.join(map(str, left))}")
    return _task(rng, "sort", (_show(numbers),), _show(sorted(numbers)), ";".join(steps))


def _repeat(rng: random.Random, words: Sequence[str]) -> Exercise:
    chosen = " ".join(rng.sample(list(words), rng.randint(1, 5)))
    return _task(rng, "repeat", (chosen,), chosen)


def _words(rng: random.Random, words: Sequence[str]) -> Exercise:
    chosen = rng.sample(list(words), rng.randint(3, 5))
    return _task(rng, "words", (" ".join(chosen),), " ".join(reversed(chosen)))


def _caesar(rng: random.Random, words: Sequence[str]) -> Exercise:
    word, shift = rng.choice(words), rng.randint(1, 3)
    moved = [chr((ord(c) - 97 + shift) % 26 + 97) for c in word]
    steps = ",".join(f"{c}{m}" for c, m in zip(word, moved, strict=True))
    return _task(rng, "caesar", (word, shift), "".join(moved), steps)


def _next(rng: random.Random, words: Sequence[str]) -> Exercise:
    number = _number(rng)
    return _task(rng, "next", (number,), number + 1, _sums(number, 1))


def _even(rng: random.Random, words: Sequence[str]) -> Exercise:
    number = _number(rng)
    return _task(rng, "even", (number,), "odd" if number % 2 else "even", f"{number % 10}")


def _weather(rng: random.Random, words: Sequence[str]) -> Exercise:
    # Made-up place names too, so that copying the name is learnt and not a list of cities.
    city = rng.choice(_CITIES) if rng.random() < 0.3 else rng.choice(words).capitalize()
    short, question = _ask(rng, "weather", (city,))
    return Exercise(
        family="weather",
        key=city,
        question=question,
        short=short,
        call=ToolCall(name="get_weather", arguments=json.dumps({"city": city})),
        tools=(WEATHER_TOOL,),
    )


# One task in sixteen is held out, so this many draws miss a side only where it is empty.
_MAX_DRAWS = 2000

Family = Callable[[random.Random, Sequence[str]], Exercise]
FAMILIES: dict[str, Family] = {
    "reverse": _reverse,
    "spell": _spell,
    "length": _length,
    "count": _count,
    "first": _first,
    "last": _last,
    "upper": _upper,
    "add": _add,
    "subtract": _subtract,
    "multiply": _multiply,
    "compare": _compare,
    "largest": _extreme("largest", max),
    "smallest": _extreme("smallest", min),
    "sort": _sort,
    "repeat": _repeat,
    "words": _words,
    "caesar": _caesar,
    "next": _next,
    "even": _even,
    "weather": _weather,
}


def draw(family: str, rng: random.Random, words: Sequence[str], *, held_out: bool) -> Exercise:
    """Draw tasks of `family` until one lies on the wanted side of the split.

    Raises DataError when the words are too few to give one.
    """
    for _ in range(_MAX_DRAWS):
        task = FAMILIES[family](rng, words)
        if task.held_out == held_out:
            return task
    side = "held out" if held_out else "to train on"
    raise DataError(
        f"none of {_MAX_DRAWS} tasks of family {family!r} is one {side}: give more words than "
        f"these {len(set(words))}"
    )
