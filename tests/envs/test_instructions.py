"""Every constraint holds for a text that keeps to it and fails for ones that do not."""

import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aprium.envs.instructions import (
    CONSTRAINTS,
    InstructionFollowing,
    _grade,
    paragraphs_of,
    sentences_of,
    words_of,
)
from aprium.envs.task import say

CASES = {
    "words_at_least": ({"n": 3}, ["a b c", "it's well-known here."], ["a b", "a, b -- !"]),
    "words_at_most": ({"n": 6}, ["one two three four five."], ["a b c d e f g", "too short"]),
    "sentences": ({"n": 2}, ["One. Two!", 'He said "no." Then left.'], ["One.", "A. B. C."]),
    "paragraphs": ({"n": 2}, ["a\n\nb", "a\n \n\nb"], ["a\nb", "a\n\nb\n\nc"]),
    "bullets": ({"n": 2}, ["- a\n- b"], ["- a", "Hi\n- a\n- b", "- a\n- b\n- c", "-a\n-b"]),
    "numbered": ({"n": 2}, ["1. a\n2. b"], ["1. a\n3. b", "1. a", "1. a\n2. b\n3. c", "1.a\n2.b"]),
    "json": (
        {"keys": ["a", "b"]},
        ['{"a": 1, "b": []}'],
        ['{"b": 1, "a": 2}', '{"a": 1}', "[]", 'Here: {"a": 1, "b": 2}', "{"],
    ),
    "title": ({}, ["<<My Song>>\ntext"], ["<My>", "<<>>", "text <<My Song>>"]),
    "quoted": ({}, ['"all of it"'], ['"half" of it', '"', '""']),
    "first_word": ({"word": "river"}, ["River runs", '"river" it is'], ["The river", ""]),
    "ending": ({"text": "The end."}, ["So. The end."], ["The end. So.", "The end"]),
    "postscript": ({}, ["Text\nP.S. Hi"], ["P.S. Hi\nText", "Text P.S. Hi", "Text\nP.S."]),
    "keyword": ({"word": "river", "n": 2}, ["River, river!"], ["river rivers", "river " * 3]),
    "all_keywords": ({"words": ["a", "b"]}, ["B and A"], ["a only", "ab"]),
    "forbidden": ({"words": ["the", "of"]}, ["Other offers"], ["The one", "one OF two"]),
    "no_commas": ({}, ["a b"], ["a, b"]),
    "no_letter": ({"letter": "z"}, ["abc"], ["a Zoo"]),
    "lowercase": ({}, ["abc 1!"], ["Abc"]),
    "uppercase": ({}, ["ABC 1!"], ["ABc"]),
    "highlights": ({"n": 1}, ["so *very* good", "**bold** and *one*"], ["so **very**", "*a* *b*"]),
    "placeholders": ({"n": 1}, ["Dear [name]"], ["Dear name", "[a] [b]", "[]"]),
}


def test_there_are_cases_for_all() -> None:
    assert CASES.keys() == CONSTRAINTS.keys() and len(CASES) >= 15


@pytest.mark.parametrize("name", CONSTRAINTS)
def test_constraints_hold_and_fail(name: str) -> None:
    values, kept, broken = CASES[name]
    for text in kept:
        assert CONSTRAINTS[name].holds(text, values), text
    for text in broken:
        assert not CONSTRAINTS[name].holds(text, values), text
    drawn = CONSTRAINTS[name].draw(random.Random(0))
    assert drawn.keys() == values.keys() and CONSTRAINTS[name].phrase(drawn)


@given(st.text(max_size=200))
def test_no_text_breaks_a_checker(text: str) -> None:
    for name, constraint in CONSTRAINTS.items():
        assert constraint.holds(text, CASES[name][0]) in (True, False)
    assert len(sentences_of(text)) <= max(1, len(words_of(text)))
    assert sum(len(words_of(p)) for p in paragraphs_of(text)) == len(words_of(text))


def test_all_demands_must_hold_and_all_kinds_come() -> None:
    family = InstructionFollowing(most=6)
    tasks = [family.draw(random.Random(i)) for i in range(300)]
    kinds = Counter(name for task in tasks for name, _ in task.data["constraints"])
    assert kinds.keys() == CONSTRAINTS.keys()
    task = next(t for t in tasks if len(t.data["constraints"]) >= 4)
    grade = _grade(task, task.solution[0])
    assert grade["reward"] == 1.0 and len(grade) == 1 + len(task.data["constraints"])
    assert _grade(task, say("")) == dict.fromkeys(grade, 0.0)
    only = InstructionFollowing(kinds=("no_commas", "lowercase")).draw(random.Random(0))
    assert {name for name, _ in only.data["constraints"]} <= {"no_commas", "lowercase"}
