"""Answers compared by meaning, in time; and generated answers checked against sympy."""

import random
import time

import pytest
import sympy
from sympy import Rational, Symbol

from aprium.envs import sandbox
from aprium.envs.mathematics import PROBLEMS, Mathematics, _polynomial, equivalent

needs_isolation = pytest.mark.skipif(
    sandbox.why_not() is not None, reason=sandbox.why_not() or "isolated"
)


@needs_isolation
@pytest.mark.parametrize(
    ("gold", "answer", "same"),
    [
        (r"\frac{1}{2}", "0.5", True),
        (r"\frac{1}{2}", "1/2", True),
        (r"\frac{1}{2}", "2/4", True),
        (r"\frac{1}{2}", "0.51", False),
        ("x = 3", "3", True),
        ("x = 3", "x=3.", True),
        (r"\{1, 2\}", "2, 1", True),
        (r"\{1, 2\}", "x = 1 or x = 2", True),
        (r"\{1, 2\}", "1", False),
        (r"\{1, 2\}", "1, 2, 3", False),
        ("(1, 2)", "(2, 1)", False),
        (r"3\sqrt{2}", r"\sqrt{18}", True),
        (r"3\sqrt{2}", "4.24", False),
        ("6x^2 - 4", "2(3x^2-2)", True),
        ("6x^2 - 4", "6*x**2 - 4", True),
        ("6x^2 - 4", "6x^2 + 4", False),
        ("1000", "1,000", True),
        ("12", r"\boxed{12}", True),
        ("12", "", False),
        ("12", "twelve", False),
        ("12", r"\frac{", False),
        ("12", "1" * 5000, False),
    ],
)
def test_equivalence(gold: str, answer: str, same: bool) -> None:
    assert equivalent(gold, answer) is same


@needs_isolation
def test_an_answer_that_never_ends_is_wrong_in_time() -> None:
    equivalent("1", "1")
    begun = time.monotonic()
    assert not equivalent("1", "9^{9^{9^9}}", limit_s=0.5)
    assert time.monotonic() - begun < 5
    assert equivalent("1", "1")


def test_generated_answers_are_right() -> None:
    x, rng = Symbol("x"), random.Random(0)
    for _ in range(50):
        coefficients = [rng.randint(-9, 9) for _ in range(4)]
        text = _polynomial(coefficients)
        parsed = sympy.sympify(text.replace("^", "**").replace("x", "*x").replace("- *", "- 1*"
            ).replace("+ *", "+ 1*").removeprefix("*").replace("-*", "-1*"))  # fmt: skip
        assert sympy.expand(parsed - sum(c * x**p for p, c in enumerate(coefficients))) == 0
    for _ in range(30):
        question, answer = PROBLEMS["series"](rng, 9)
        count = int(question.split("first ")[1].split()[0])
        first, second, _ = (int(n) for n in question.split("of ")[-1].split(", ...")[0].split(", "))
        assert int(answer) == sum(first + i * (second - first) for i in range(count))
        question, answer = PROBLEMS["probability"](rng, 9)
        red, blue = (int(w) for w in question.split() if w.isdigit())
        value = Rational(red, red + blue) * Rational(red - 1, red + blue - 1)
        assert sympy.sympify(answer.replace(r"\frac", "").replace("}{", ")/(").replace(
            "{", "(").replace("}", ")")) == value  # fmt: skip


def test_only_a_marked_answer_counts() -> None:
    from aprium.envs.mathematics import _grade
    from aprium.envs.task import say

    task = Mathematics(kinds=("series",)).draw(random.Random(1))
    assert _grade(task, say(f"It may be {task.data['answer']}.")) == 0.0
