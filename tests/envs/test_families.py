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
        sums = [int(step.split("=")[1]) for step in task.reasoning.split(", ")]
        assert int("".join([str(sums[-1]), *(str(s % 10) for s in sums[-2::-1])])) == a + b
        task = draw("multiply", rng, WORDS, held_out=False)
        assert task.reasoning.split("=")[-1] == task.answer


def test_too_few_words_are_refused() -> None:
    word = draw("spell", random.Random(0), WORDS, held_out=False).key
    with pytest.raises(DataError, match="family 'spell' is one held out"):
        draw("spell", random.Random(0), [word], held_out=True)
