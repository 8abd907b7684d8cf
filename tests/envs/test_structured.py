"""Documents that parse and are right, and the many that are nearly so."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aprium.envs.structured import FORMATS, StructuredOutput, _grade
from aprium.envs.task import Task, say

VALUE = {
    "items": [
        {"name": "lamp", "count": 1, "price": 2.5, "in_stock": True, "tags": ["new", "blue"]},
        {"name": 'rug, "Nova"', "count": 0, "price": 10.0, "in_stock": False, "tags": []},
    ]
}


def task_of(name: str) -> Task:
    return Task(domain="s", key="k", messages=(), data={"format": name, "value": VALUE})


def reward(name: str, text: str) -> float:
    return _grade(task_of(name), say(text))["reward"]


@pytest.mark.parametrize("name", FORMATS)
def test_writing_and_reading_agree(name: str) -> None:
    text = FORMATS[name].write(VALUE)
    assert FORMATS[name].read(text) == VALUE
    assert reward(name, text) == reward(name, f"```{name}\n{text}\n```") == 1.0
    assert reward(name, f"Sure!\n```{name}\n{text}\n```") == 0.0
    others = {other for other in FORMATS if other != name and reward(other, text)}
    assert others <= ({"yaml"} if name == "json" else set())  # JSON is YAML


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("json", '"count": 1', '"count": "1"'),
        ("json", '"count": 1', '"count": 1.5'),
        ("json", '"count": 1', '"count": true'),
        ("json", '"count": 1', '"count": 1, "count": 1'),
        ("json", '"price": 2.5', '"price": NaN'),
        ("json", '"count": 1', '"count": 1, "more": 2'),
        ("json", "}", ""),
        ("yaml", "count: 1", "count: '1'"),
        ("yaml", "count: 1", "count: 1\n  count: 1"),
        ("yaml", "in_stock: true", "in_stock: 'yes'"),
        ("yaml", "name: lamp", "name: &a lamp"),
        ("toml", "count = 1", "count = 1\ncount = 1"),
        ("toml", "[[items]]", "[items]"),
        ("csv", "true", "True"),
        ("csv", "lamp,1", "lamp,1,1"),
        ("csv", "name,count", "count,name"),
        ("csv", "new;blue", "blue;new"),
    ],
)
def test_near_misses(name: str, old: str, new: str) -> None:
    text = FORMATS[name].write(VALUE)
    assert old in text and reward(name, text.replace(old, new, 1)) == 0.0


def test_bombs_are_turned_away() -> None:
    laughs = "a: &a [x, x]\nb: &b [*a, *a]\nitems: [*b, *b]"
    assert _grade(task_of("yaml"), say(laughs))["parses"] == 0.0
    assert reward("json", "[" * 40_000) == reward("yaml", "[" * 40_000) == 0.0
    assert reward("json", " " * 60_000 + FORMATS["json"].write(VALUE)) == 1.0
    assert reward("json", FORMATS["json"].write(VALUE)[:-1] + " " * 60_000 + "}") == 0.0


@given(st.text(max_size=100), st.sampled_from(sorted(FORMATS)))
def test_no_text_breaks_a_reader(text: str, name: str) -> None:
    assert reward(name, text) == 0.0


def test_formats_can_be_chosen() -> None:
    family = StructuredOutput(formats=("csv",), items=1)
    task = family.draw(random.Random(0))
    assert task.data["format"] == "csv" and len(task.data["value"]["items"]) == 1
