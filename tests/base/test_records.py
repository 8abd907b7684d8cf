"""Records of episodes: plain values, streams that run in parallel, errors that stop."""

import dataclasses
import json
from typing import Any

import pytest

from aprium.base.records import Group, Trajectory

GOOD: dict[str, Any] = {
    "task": "t",
    "domain": "d",
    "tokens": (1, 2, 3),
    "sampled": (False, True, True),
    "logprobs": (0.0, -1.0, -2.0),
    "weight_spans": ((0, 1), (1, 1)),
}


def test_a_trajectory_is_plain_values() -> None:
    one = Trajectory(**GOOD, reward=1.0, parts={"correct": 1.0})
    plain = json.loads(json.dumps(dataclasses.asdict(Group(task="t", trajectories=(one,)))))
    assert plain["trajectories"][0]["sampled"] == [False, True, True]
    assert plain["trajectories"][0]["weight_spans"] == [[0, 1], [1, 1]]


@pytest.mark.parametrize(
    "wrong",
    [
        {"sampled": (False, True)},
        {"logprobs": ()},
        {"weight_spans": ((0, 1),)},
        {"stop": "error"},
        {"stop": "deadline"},
        {"error": "broken"},
    ],
)
def test_what_does_not_fit_together_is_caught(wrong: dict[str, Any]) -> None:
    with pytest.raises(AssertionError):
        Trajectory(**{**GOOD, **wrong})


def test_a_group_has_one_task() -> None:
    with pytest.raises(AssertionError):
        Group(task="other", trajectories=(Trajectory(**GOOD),))
