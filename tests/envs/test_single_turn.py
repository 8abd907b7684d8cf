"""Graders of choices, refusals, retrieval and exercises; and where an answer stands in a reply."""

import random

import pytest

from aprium.base.records import Message
from aprium.envs import abstention, choice, retrieval
from aprium.envs.abstention import Abstention
from aprium.envs.answer import final_answer, last_boxed
from aprium.envs.choice import QUESTIONS, MultipleChoice
from aprium.envs.exercise import is_held_out
from aprium.envs.exercises import Exercises
from aprium.envs.families import draw
from aprium.envs.retrieval import KINDS, Retrieval
from aprium.envs.task import Task, say


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"So \boxed{1} or \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        (r"\boxed{never closed", r"\boxed{never closed"),
        ("<answer>a</answer> <answer> b\nc </answer>", "b\nc"),
        ("Answer: 1\nmore\n**Answer:** 2", "2"),
        ("The final answer is: 7", "7"),
        ("just 7", "just 7"),
        ("", ""),
    ],
)
def test_where_the_answer_is(text: str, answer: str) -> None:
    assert final_answer(say(text)) == answer
    assert final_answer(Message(role="assistant", reasoning=text)) == ""
    assert last_boxed("none") is None


@pytest.mark.parametrize(
    ("text", "reward"),
    [
        ("Answer: B", 1), ("(b)", 1), ("Answer: **B**", 1), ("Answer: B) two", 1), ("two", 1),
        ("Answer: A", 0), ("A and B", 0), ("Answer: B or A", 0), ("B A", 0), ("not two", 0),
    ],
)  # fmt: skip
def test_letters(text: str, reward: float) -> None:
    task = Task(
        domain="c", key="k", messages=(), data={"letter": "B", "options": ["one", "two", "three"]}
    )
    assert choice._grade(task, say(text)) == reward


@pytest.mark.parametrize("kind", QUESTIONS)
def test_options_differ_and_letters_are_even(kind: str) -> None:
    family = MultipleChoice(kinds=(kind,), options=4)
    letters = []
    for seed in range(200):
        task = family.draw(random.Random(seed))
        assert len(set(task.data["options"])) == 4
        letters.append(task.data["letter"])
    assert all(25 < letters.count(letter) < 80 for letter in "ABCD")


def test_refusals() -> None:
    family = Abstention(needless=0.25, penalty=0.5)
    values = ["Lima", "Oslo"]

    def reward(answer: str, text: str) -> float:
        data = {"answer": answer, "values": values}
        return family._grade(Task(domain="a", key="k", messages=(), data=data), say(text))["reward"]

    assert reward("Lima", "Answer: Lima.") == 1.0
    assert reward("Lima", "Answer: Oslo") == reward("", "Answer: Oslo") == -0.5
    for refusal in ("I don't know", "I do not know.", "It is not given.", "That is unknown"):
        assert reward("Lima", f"Answer: {refusal}") == 0.25
        assert reward("", f"Answer: {refusal}") == 1.0
    assert reward("", "Answer: I do not know, perhaps Oslo") == -0.5
    assert abstention._DECLINES.search("I know") is None


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("words", [200, 3000])
def test_contexts_have_their_length_and_their_needles(kind: str, words: int) -> None:
    task = Retrieval(kinds=(kind,), words=words).draw(random.Random(words))
    text = task.messages[0].content or ""
    assert 0.7 * words < len(text.split()) < 1.4 * words + 60
    assert all(value in text for value in task.data["values"])
    assert retrieval._grade(task, task.solution[0]) == {"reward": 1.0, "recall": 1.0}
    some = say(f"Answer: {task.data['values'][0]}")
    expected = {1: (1.0, 1.0), 4: (0.0, 0.25), 5: (0.0, 0.2)}[len(task.data["values"])]
    assert tuple(retrieval._grade(task, some).values()) == expected


def test_needles_stand_everywhere() -> None:
    places = []
    for seed in range(60):
        task = Retrieval(kinds=("single",), words=400).draw(random.Random(seed))
        text = task.messages[0].content or ""
        places.append(text.index(task.data["values"][0]) / len(text))
    assert min(places) < 0.2 and max(places) > 0.75


def test_exercises_are_held_out_as_data_holds_them_out() -> None:
    family = Exercises(families=("add",))
    for seed in range(40):
        task = family.draw(random.Random(seed))
        assert task.held_out == is_held_out(task.key) and task.key.startswith("add ")
    drawn = draw("add", random.Random(0), ["a"] * 10, held_out=True)
    assert is_held_out(f"{drawn.family} {drawn.key}")
