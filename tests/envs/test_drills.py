"""Drills: answers found anew from the question, lengths as asked, a split that holds."""

import itertools
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aprium.base.errors import TaskError
from aprium.envs.drills import KINDS, Drills
from aprium.envs.family import constant_baseline, distinct, validate


def solve(kind: str, asked: str) -> str:
    """Answer a question from its words alone, as somebody would who only read it."""
    words = asked.split()
    last = words[-1]
    match kind:
        case "reverse":
            return "".join(last[-i - 1] for i in range(len(last)))
        case "sort":
            return "".join(digit * last.count(digit) for digit in "0123456789")
        case "rotate":
            by = int(last)
            return "".join(words[0][(i + by) % len(words[0])] for i in range(len(words[0])))
        case "swap":
            places = [i ^ 1 if i ^ 1 < len(last) else i for i in range(len(last))]
            return "".join(last[place] for place in places)
        case "merge":
            return "".join(itertools.chain.from_iterable(zip(*words, strict=True)))
        case "unique":
            return "".join(c for i, c in enumerate(last) if c not in last[:i])
        case "drop":
            return "".join(c for c in last if c != words[0])
        case "every":
            return "".join(c for i, c in enumerate(last) if i % 2 == 0)
        case "replace":
            return "".join(words[2] if c == words[0] else c for c in last)
        case "higher":
            pairs = zip(*words, strict=True)
            return "".join(a if int(a) >= int(b) else b for a, b in pairs)
        case "nines":
            return str(10 ** len(last) - 1 - int(last)).zfill(len(last))
        case "running":
            return "".join(str(sum(map(int, last[: i + 1])))[-1] for i in range(len(last)))
        case "gaps":
            return "".join(str(abs(int(a) - int(b))) for a, b in itertools.pairwise(last))
        case "add":
            return str(sum(map(int, last.split("+"))))
        case "largest":
            return str(max(map(int, words)))
        case "lookup":
            table = dict(pair.split("=") for pair in words[0].rstrip(";").split(","))
            return ",".join(table[letter] for letter in last.split(","))
        case "shift":
            *letters, _, by = words
            return " ".join(chr((ord(c) - 97 + int(by)) % 26 + 97) for c in letters)
        case "alphabet":
            return " ".join(sorted(words))
        case "consonants":
            return " ".join(c for c in words if c not in "aeiou")
    raise AssertionError(f"no solver for {kind}: write one")


@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_those_of_another_solver(kind: str) -> None:
    family = Drills(kind=kind, least=3, most=8)
    rng = random.Random(kind)
    for _ in range(300):
        task = family.draw(rng)
        name, asked = (task.messages[0].content or "").split(": ", 1)
        answer = solve(kind, asked)
        assert (name, task.data["answer"]) == (kind, answer) and answer
        assert task.solution[0].content == answer


@pytest.mark.parametrize("kind", KINDS)
def test_known_answers_are_graded_and_constants_earn_little(kind: str) -> None:
    family = Drills(kind=kind)
    found = validate(family, count=30)
    assert found.ok and found.wrong_tried == 120
    assert constant_baseline(family, count=60)[1] <= 0.1


@given(st.sampled_from(sorted(set(KINDS) - {"add", "largest", "lookup"})), st.data())
def test_lengths_are_within_bounds(kind: str, data: st.DataObject) -> None:
    least = data.draw(st.integers(2, 12))
    most = data.draw(st.integers(least, 12))
    task = Drills(kind=kind, least=least, most=most).draw(random.Random(data.draw(st.integers())))
    asked = (task.messages[0].content or "").split(": ", 1)[1].replace(" by", "").split()
    spaced = kind in ("shift", "alphabet", "consonants")
    length = len(asked) - (kind == "shift") if spaced else max(map(len, asked))
    assert least <= length <= most


def test_a_thousand_held_out_items_share_nothing_with_the_training_side() -> None:
    family = Drills(kind="reverse", least=4, most=5)
    tested = {task.key for task in distinct(family, 1000, held_out=True)}
    trained = {task.key for task in distinct(family, 1000, seed=3)}
    assert len(tested) == 1000 and not tested & trained


@pytest.mark.parametrize(
    ("options", "named"),
    [({"kind": "juggle"}, "juggle"), ({"least": 1}, "from 1"), ({"least": 5, "most": 4}, "to 4")],
)
def test_what_cannot_be_is_refused(options: dict, named: str) -> None:
    with pytest.raises(TaskError, match=named):
        Drills(**options)
