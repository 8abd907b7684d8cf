"""Every family: its own solutions verify, wrong ones do not, and the split does not leak."""

import json
import random

import pytest

from aprium.base.errors import DataError
from aprium.base.records import ToolCall
from aprium.envs.exercise import verify
from aprium.envs.families import FAMILIES, draw

WORDS = "apple plum house river garden window paper stone bread music ill wonder".split()


@pytest.mark.parametrize("family", FAMILIES)
def test_gold_verifies_and_another_answer_does_not(family: str) -> None:
    rng = random.Random(family)
    for _ in range(200):
        task, other = (draw(family, rng, WORDS, held_out=False) for _ in range(2))
        if task.call is not None:
            assert verify(task, "", (task.call,))
            assert not verify(task, task.answer)
            assert not verify(task, "", (task.call, task.call))
            wrong = ToolCall(name=task.call.name, arguments=json.dumps({"city": "Nowhere"}))
            assert not verify(task, "", (wrong,))
        else:
            assert verify(task, f" {task.answer}.\n")
            assert not verify(task, task.answer + "x") and not verify(task, "")
            if task.answer.isalpha():
                assert not verify(task, task.answer.swapcase())
            if other.answer != task.answer:
                assert not verify(task, other.answer)


@pytest.mark.parametrize("family", ["add", "sort", "words", "multiply", "subtract"])
def test_split_depends_on_what_is_asked_alone(family: str) -> None:
    trained, tested = (
        {draw(family, random.Random(i), WORDS, held_out=side).key for i in range(400)}
        for side in (False, True)
    )
    assert trained and tested and not trained & tested


@pytest.mark.parametrize("family", FAMILIES)
def test_short_forms_ask_for_the_same_items(family: str) -> None:
    rng = random.Random(family)
    tasks = [draw(family, rng, WORDS, held_out=False) for _ in range(300)]
    short = {task.key: task for task in tasks if task.short}
    assert 0.15 < sum(task.short for task in tasks) / len(tasks) < 0.45
    for task in tasks:
        if not task.short and task.key in short:
            twin = short[task.key]
            assert twin.question != task.question
            assert (twin.answer, twin.reasoning, twin.call) == (
                task.answer,
                task.reasoning,
                task.call,
            )
    # A short form is shorter than any question in words about the same thing.
    longest = max(len(t.question) - len(t.key) for t in tasks if t.short)
    assert longest <= max(len(t.question) - len(t.key) for t in tasks if not t.short)


def test_answers_are_right() -> None:
    rng = random.Random(0)
    for _ in range(300):
        task = draw("add", rng, WORDS, held_out=False)
        assert int(task.answer) == sum(map(int, task.key.split()))
        task = draw("subtract", rng, WORDS, held_out=False)
        x, y = map(int, task.key.split())
        assert int(task.answer) == x - y >= 0
        task = draw("sort", rng, WORDS, held_out=False)
        assert task.answer == ", ".join(map(str, sorted(map(int, task.key.split(", ")))))
        task = draw("caesar", rng, ["xyz"], held_out=False)
        shift = int(task.key.split()[1])
        assert task.answer == "".join("xyzabc"[i + shift] for i in range(3))
        task = draw("count", rng, WORDS, held_out=False)
        word, letter = task.key.split()
        assert int(task.answer) == word.count(letter)


def test_worked_steps_end_in_the_answer() -> None:
    rng = random.Random(1)
    for _ in range(300):
        task = draw("add", rng, WORDS, held_out=False)
        a, b = map(int, task.key.split())
        sums = [int(step.split("=")[1]) for step in task.reasoning.split(",")]
        assert int("".join([str(sums[-1]), *(str(s % 10) for s in sums[-2::-1])])) == a + b
        for step in task.reasoning.split(","):
            assert _value(step.split("=")[0]) == int(step.split("=")[1])
        task = draw("subtract", rng, WORDS, held_out=False)
        for step in task.reasoning.split(","):
            assert _value(step.split("=")[0]) == int(step.split("=")[1]) in range(10)
        digits = [step.split("=")[1] for step in task.reasoning.split(",")]
        assert int("".join(reversed(digits))) == int(task.answer)
        task = draw("compare", rng, WORDS, held_out=False)
        a, b = map(int, task.key.split())
        *same, last = task.reasoning.split(",")
        assert all(step[0] == step[2] and step[1] == "=" for step in same)
        assert (last[0] > last[2]) == (last[1] == ">") == (a > b) == (int(task.answer) == a)
        task = draw("reverse", rng, WORDS, held_out=False)
        forward, backward = task.reasoning.split("|")
        assert (forward[1::2], backward[1::2]) == (task.key, task.answer)
        assert forward[::2] == backward[::2][::-1]
        task = draw("sort", rng, WORDS, held_out=False)
        least = [int(step.split("|")[0]) for step in task.reasoning.split(";")]
        assert least == sorted(map(int, task.key.split(", ")))[:-1]
        task = draw("next", rng, WORDS, held_out=False)
        assert task.reasoning.split(",")[0] == f"{task.key[-1]}+1={int(task.key[-1]) + 1}"
        task = draw("multiply", rng, WORDS, held_out=False)
        assert task.reasoning.split("=")[-1] == task.answer


def _value(terms: str) -> int:
    """Return the sum of digits joined by plus and minus."""
    return sum(map(int, terms.replace("-", "+-").split("+")))


def test_too_few_words_are_refused() -> None:
    word = draw("spell", random.Random(0), WORDS, held_out=False).key
    with pytest.raises(DataError, match="family 'spell' is one held out"):
        draw("spell", random.Random(0), [word], held_out=True)
