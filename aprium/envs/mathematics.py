r"""Mathematics with answers that are compared by meaning: 1/2 is 0.5 is \frac{1}{2}.

The comparison is math-verify's, which parses LaTeX with sympy: it runs in a sandbox, under a time
limit, since either can take for ever on what a model writes.
"""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction

from aprium.base.errors import TaskError
from aprium.base.records import Message
from aprium.envs.answer import last_boxed
from aprium.envs.env import Env, SingleTurn
from aprium.envs.family import optional
from aprium.envs.task import Task, say
from aprium.envs.worker import Worker

_INSTRUCTION = r" Put the final answer in \boxed{}."
_MAX_ANSWER = 2000
_LIMIT_S = 5.0
_worker = Worker(__name__)

# A question, and its answer in LaTeX.
Problem = tuple[str, str]


def _fraction(value: Fraction) -> str:
    if value.denominator == 1:
        return str(value.numerator)
    sign = "-" if value < 0 else ""
    return rf"{sign}\frac{{{abs(value.numerator)}}}{{{value.denominator}}}"


def _polynomial(coefficients: Sequence[int]) -> str:
    """Write a polynomial in x, coefficients from the constant up."""
    terms = []
    for power in range(len(coefficients) - 1, -1, -1):
        c = coefficients[power]
        if c == 0:
            continue
        x = "" if power == 0 else "x" if power == 1 else f"x^{power}"
        size = "" if abs(c) == 1 and x else str(abs(c))
        terms.append((" - " if c < 0 else " + ") + size + x)
    text = "".join(terms) or " + 0"
    return ("-" if text.startswith(" - ") else "") + text[3:]


def _nonzero(rng: random.Random, size: int) -> int:
    return rng.choice([n for n in range(-size, size + 1) if n])


def _linear(rng: random.Random, size: int) -> Problem:
    a, b, c = _nonzero(rng, size), rng.randint(-size, size), rng.randint(-size, size)
    question = f"Solve for x: ${_polynomial([b, a])} = {c}$."
    return question, f"x = {_fraction(Fraction(c - b, a))}"


def _quadratic(rng: random.Random, size: int) -> Problem:
    r, s = rng.sample(range(-size, size + 1), 2)
    question = f"Find all solutions of ${_polynomial([r * s, -r - s, 1])} = 0$."
    return question, rf"\{{{r}, {s}\}}"


def _fractions(rng: random.Random, size: int) -> Problem:
    a, b = (Fraction(_nonzero(rng, size), rng.randint(2, size + 2)) for _ in range(2))
    sign, value = rng.choice([("+", a + b), ("-", a - b), (r"\cdot", a * b), (r"\div", a / b)])
    return rf"Compute $({_fraction(a)}) {sign} ({_fraction(b)})$.", _fraction(value)


def _derivative(rng: random.Random, size: int) -> Problem:
    coefficients = [rng.randint(-size, size) for _ in range(rng.randint(2, 4))] + [
        rng.randint(1, size)
    ]
    slope = [power * c for power, c in enumerate(coefficients)][1:]
    return f"Differentiate ${_polynomial(coefficients)}$ with respect to x.", _polynomial(slope)


def _expand(rng: random.Random, size: int) -> Problem:
    a, b, c, d = (_nonzero(rng, size) for _ in range(4))
    question = f"Expand $({_polynomial([b, a])})({_polynomial([d, c])})$."
    return question, _polynomial([b * d, a * d + b * c, a * c])


def _root(rng: random.Random, size: int) -> Problem:
    outer, inner = rng.randint(2, size + 1), rng.choice([2, 3, 5, 6, 7, 10])
    return rf"Simplify $\sqrt{{{outer * outer * inner}}}$.", rf"{outer}\sqrt{{{inner}}}"


def _series(rng: random.Random, size: int) -> Problem:
    first, step, count = rng.randint(-size, size), _nonzero(rng, size), rng.randint(4, 4 + size)
    total = count * (2 * first + (count - 1) * step) // 2
    terms = ", ".join(str(first + i * step) for i in range(3))
    return f"What is the sum of the first {count} terms of {terms}, ...?", str(total)


def _chance(rng: random.Random, size: int) -> Problem:
    red, blue = rng.randint(2, size + 2), rng.randint(2, size + 2)
    total = red + blue
    value = Fraction(math.comb(red, 2), math.comb(total, 2))
    question = (
        f"A bag holds {red} red and {blue} blue balls. Two are drawn without putting back. What is "
        "the probability that both are red?"
    )
    return question, _fraction(value)


def _system(rng: random.Random, size: int) -> Problem:
    x, y = rng.randint(-size, size), rng.randint(-size, size)
    a, b = _nonzero(rng, size), _nonzero(rng, size)
    c, d = _nonzero(rng, size), _nonzero(rng, size)
    while a * d == b * c:
        d = _nonzero(rng, size + 1)
    question = (
        f"Solve ${a}x + ({b})y = {a * x + b * y}$ and ${c}x + ({d})y = {c * x + d * y}$. Give "
        "the pair (x, y)."
    )
    return question, f"({x}, {y})"


PROBLEMS: dict[str, Callable[[random.Random, int], Problem]] = {
    "linear": _linear,
    "quadratic": _quadratic,
    "fractions": _fractions,
    "derivative": _derivative,
    "expand": _expand,
    "root": _root,
    "series": _series,
    "probability": _chance,
    "system": _system,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Mathematics:
    """Problems of `kinds` (empty for all), with numbers up to about `size`."""

    kinds: tuple[str, ...] = ()
    size: int = 12
    domain: str = "math"

    def __post_init__(self) -> None:
        """Check names and ranges."""
        for kind in self.kinds:
            if kind not in PROBLEMS:
                raise TaskError(f"no kind of problem {kind!r}: choose of {', '.join(PROBLEMS)}")
        if self.size < 2:
            raise TaskError(f"size is {self.size}: numbers must go up to 2 at least")

    def draw(self, rng: random.Random) -> Task:
        """Make a problem."""
        kind = rng.choice(self.kinds or tuple(PROBLEMS))
        question, answer = PROBLEMS[kind](rng, self.size)
        return Task(
            domain=self.domain,
            key=question,
            messages=(say(question + _INSTRUCTION, role="user"),),
            data={"answer": answer, "kind": kind},
            solution=(say(rf"\boxed{{{answer}}}"),),
        )

    def start(self, task: Task) -> Env:
        """Return the environment of one problem."""
        return SingleTurn(task, _grade)

    def wrong(self, task: Task) -> Sequence[tuple[Message, ...]]:
        """Return no answer, no number, the question, and the answer plus one."""
        answer = task.data["answer"]
        near = rf"\boxed{{{answer} + 1}}" if "," not in answer else r"\boxed{(101, 103)}"
        texts = ("", r"\boxed{}", r"\boxed{?}", near, f"It is not {answer}.")
        return [(say(text),) for text in texts]


def _grade(task: Task, reply: Message) -> float:
    # Prose is not searched for a number: only what is marked as the answer counts.
    answer = last_boxed(reply.content or "")
    return float(answer is not None and equivalent(task.data["answer"], answer))


def equivalent(gold: str, answer: str, *, limit_s: float = _LIMIT_S) -> bool:
    """Tell whether two answers mean the same; LaTeX or plain, with or without a box.

    What cannot be parsed, or not compared in `limit_s` seconds, is not the same. Raises TaskError
    where nothing can be compared at all.
    """
    inside = last_boxed(answer)
    answer = (answer if inside is None else inside).strip().removesuffix(".")
    answer = answer.replace("**", "^").replace("*", " ")
    if not answer or len(answer) > _MAX_ANSWER:
        return False
    try:
        return _worker.call("compare", gold, answer, limit_s=limit_s)
    except (TimeoutError, ValueError):
        return False


# What follows runs in the worker alone.


def prepare() -> None:
    """Import the package and warm its parser, which takes a second the first time."""
    compare(r"\frac{1}{2}", "0.5")


def compare(gold: str, answer: str) -> bool:
    """Tell whether two answers mean the same, with no time limit but the worker's."""
    verify = optional("math_verify")
    # A comma in a number of one part separates thousands, in a set or pair it separates parts.
    parsed = [
        verify.parse(rf"\boxed{{{text}}}", parsing_timeout=None, fallback_mode="no_fallback")
        for text in (gold, answer)
    ]
    return bool(all(parsed) and verify.verify(*parsed, timeout_seconds=None))
