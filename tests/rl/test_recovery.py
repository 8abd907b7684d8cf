"""Recovery: the share of a teacher's lead, its errors, and when there is none to speak of."""

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest

from aprium.base.config import from_dict
from aprium.base.errors import CheckpointError
from aprium.rl import recovery as module
from aprium.rl.evaluate import Accuracy
from aprium.rl.lineage import NodeState, RoundsConfig, write_state
from aprium.rl.recovery import (
    Recovery,
    baseline_of,
    evaluate,
    is_scored,
    learners,
    lines,
    over_seeds,
    recovery,
    table,
    teachers_of,
)
from tests.rl.test_lineage import recipe


def play(rng: random.Random, count: int, *shares: float) -> list[list[float]]:
    """Let models with these shares of right answers play `count` tasks, hard ones hard for all."""
    levels = [rng.random() for _ in range(count)]
    return [[float(level < share) for level in levels] for share in shares]


def test_the_share_of_the_lead_and_its_error() -> None:
    student, baseline, teacher = play(random.Random(0), 4000, 0.5, 0.2, 0.6)
    found = recovery(student, baseline, teacher)
    assert found is not None and found.seed_error is None
    means = [sum(x) / len(x) for x in (student, baseline, teacher)]
    assert found.value == pytest.approx((means[0] - means[1]) / (means[2] - means[1]))
    assert abs(found.value - 0.75) < 3 * found.item_error


def test_the_error_is_that_of_drawing_the_tasks_again() -> None:
    rng = random.Random(1)
    values, errors = [], []
    for _ in range(400):
        found = recovery(*play(rng, 150, 0.5, 0.2, 0.6))
        assert found is not None
        values.append(found.value)
        errors.append(found.item_error)
    mean = sum(values) / len(values)
    spread = math.sqrt(sum((v - mean) ** 2 for v in values) / (len(values) - 1))
    assert sum(errors) / len(errors) == pytest.approx(spread, rel=0.1)


def test_where_the_teacher_is_not_ahead_there_is_no_figure() -> None:
    student, baseline, teacher = play(random.Random(0), 40, 0.5, 0.5, 0.5)
    assert recovery(student, baseline, teacher) is None
    assert recovery(*play(random.Random(0), 400, 0.3, 0.5, 0.2)) is None
    assert recovery([1.0], [0.0], [1.0]) is None  # one task says nothing
    # More than all of it, and less than nothing, are figures like others.
    over, under = (recovery(*play(random.Random(0), 400, s, 0.3, 0.6)) for s in (0.9, 0.1))
    assert over is not None and over.value > 1.5 and under is not None and under.value < -0.3


def test_seeds_have_an_error_of_their_own() -> None:
    found = [Recovery(value=v, item_error=0.03) for v in (0.5, 0.7, 0.9)]
    mean = over_seeds([*found, None])
    assert mean is not None and mean.value == pytest.approx(0.7)
    assert mean.item_error == pytest.approx(0.03 / math.sqrt(3))
    assert mean.seed_error == pytest.approx(0.2 / math.sqrt(3))
    assert over_seeds([None, None]) is None


NODES = {
    "rlvr": {"kind": "rl"},
    "adder": {"kind": "rl", "parent": "rlvr"},
    "warm": {"kind": "warmup", "parent": "rlvr", "teachers": {"add": "adder"}, "rollouts": 1},
    "one": {"kind": "mopd", "parent": "warm", "teachers": {"add": "adder"}, "default": "self"},
    "better": {"kind": "rl", "parent": "one"},
    "two": {"kind": "mopd", "parent": "one", "teachers": {"add": "better"}, "default": "self"},
}


def test_who_is_compared_with_whom() -> None:
    found = recipe(NODES)
    assert baseline_of(found) == "rlvr"  # before the warm-up
    assert teachers_of(found) == {"add": "better"}  # the last one, and none is oneself
    assert learners(found) == ("warm", "one", "two")
    assert baseline_of(recipe(NODES, baseline="one")) == "one"
    assert baseline_of(recipe({"one": {"kind": "mopd", "default": "self"}})) == "start"


def write(config: RoundsConfig, name: str, seed: int, rewards: dict[str, list[float]]) -> None:
    place = config.place(name, seed)
    state = NodeState(
        name=name, kind="rl", seed=seed, digest="d", run="r", status="done", checkpoint="m"
    )
    write_state(place, state)
    rows = {
        domain: {
            "accuracy": sum(found) / len(found), "standard_error": 0.1, "items": len(found),
            "tokens": 1.0, "errors": 0, "rewards": found,
        }
        for domain, found in rewards.items()
    }  # fmt: skip
    scores = {"digest": module._settings(config), "domains": rows}
    (place / "scores.json").write_text(json.dumps(scores))


def test_the_table_is_of_what_was_evaluated(tmp_path: Path) -> None:
    config = recipe(NODES, output=str(tmp_path), seeds=[0, 1])
    shares = {"rlvr": 0.2, "adder": 0.6, "warm": 0.25, "one": 0.5, "better": 0.8}
    for seed in (0, 1):
        rng = random.Random(seed)
        played = [play(rng, 300, *shares.values()) for _ in range(2)]
        for i, name in enumerate(shares):
            write(config, name, seed, {"add": played[0][i], "sort": played[1][i]})
    found = table(config)
    assert json.loads(json.dumps(found)) == found
    assert set(found["scores"]) == set(shares)  # "two" is not there yet
    assert found["scores"]["one"]["add"]["mean"] == pytest.approx(0.5, abs=0.06)
    assert found["scores"]["one"]["add"]["seeds"] == 2
    one = found["recovery"]["one"]
    assert set(one) == {"add", "all"} and one["add"] == one["all"]  # sort has no teacher
    assert one["add"]["value"] == pytest.approx(0.5, abs=0.12) and one["add"]["seed_error"] > 0
    assert found["recovery"]["two"] == {"add": None, "all": None}
    text = "\n".join(lines(found))
    shown = 100 * found["scores"]["one"]["add"]["mean"]
    assert (
        f"one: add {shown:.1f}, sort" in text and "% of the way from rlvr to the teachers" in text
    )


def test_a_teacher_that_was_not_evaluated_in_a_domain_has_no_lead_there(tmp_path: Path) -> None:
    nodes = {
        "adder": {"kind": "rl", "domains": ["add"], "evaluate": "own"},
        "one": {"kind": "mopd", "default": "adder"},
        "line": {"kind": "rl"},
    }
    config = recipe(nodes, output=str(tmp_path), baseline="line")
    student, baseline, teacher = play(random.Random(0), 300, 0.5, 0.2, 0.6)
    write(config, "adder", 0, {"add": teacher})
    write(config, "one", 0, {"add": student, "sort": student})
    write(config, "line", 0, {"add": baseline, "sort": baseline})
    found = table(config)["recovery"]["one"]
    assert found["add"]["value"] == pytest.approx(0.75, abs=0.1)
    assert found["sort"] is None and found["all"] is None


def test_scores_of_other_settings_are_not_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = recipe({"a": {"kind": "rl"}}, output=str(tmp_path))
    write(config, "a", 0, {"add": [1.0, 0.0], "sort": [1.0, 1.0]})
    assert set(table(config)["scores"]) == {"a"}
    file = config.place("a", 0) / "scores.json"
    other = recipe({"a": {"kind": "rl"}}, output=str(tmp_path), evaluate={"items": 3})
    assert is_scored(config, file) and not is_scored(other, file)
    assert table(other)["scores"] == {}
    asked: list[Any] = []
    made = Accuracy(accuracy=1.0, standard_error=0.0, items=2, tokens=3.0, errors=0, rewards=(1, 1))

    def fake(*args: Any) -> dict[str, Accuracy]:
        asked.append(args)
        return {"add": made, "sort": made}

    monkeypatch.setattr(module, "evaluate_checkpoint", fake)
    for _ in range(2):
        evaluate(other, "m", file)
    assert len(asked) == 1 and is_scored(other, file)
    assert from_dict(Accuracy, json.loads(file.read_text())["domains"]["add"]) == made
    # Of a node that asks for its own domains those are enough, for all of them they are not.
    node = {"kind": "rl", "domains": ["add"]}
    own = recipe({"a": {**node, "evaluate": "own"}}, output=str(tmp_path))
    write(own, "a", 0, {"add": [1.0, 0.0]})
    assert is_scored(own, file, "a") and set(table(own)["scores"]["a"]) == {"add"}
    assert not is_scored(recipe({"a": node}, output=str(tmp_path)), file, "a")
    evaluate(own, "m", file.with_name("other.json"), "a")
    assert [domain.name for domain in asked[-1][1]] == ["add"]
    file.write_text("{")
    with pytest.raises(CheckpointError, match=r"scores.json cannot be read .* remove it"):
        table(other)
