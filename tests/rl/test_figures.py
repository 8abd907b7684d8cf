"""Figures of played groups: means over what they are of, and nothing twice."""

from dataclasses import dataclass, field

from aprium.base.records import Group, Sample, Trajectory
from aprium.rl.figures import Tally
from aprium.rl.ledger import Item
from aprium.rl.pipeline import Played


@dataclass(frozen=True)
class Made:
    samples: tuple[Sample, ...] = ()
    figures: dict[str, float] = field(default_factory=dict)


def episode(domain: str, reward: float, length: int, stop: str = "done") -> Trajectory:
    return Trajectory(
        task="t",
        domain=domain,
        tokens=(1,) * (length + 1),
        sampled=(False,) + (True,) * length,
        logprobs=(0.0,) + (-1.0,) * length,
        reward=reward,
        stop=stop,
        error="late" if stop == "deadline" else None,
        weight_spans=((0, length),),
    )


def played(age: int, made: Made, *episodes: Trajectory) -> Played:
    group = Group(task="t", trajectories=episodes)
    return Played(item=Item(number=0, domain="d", index=0), group=group, learnt=made, age=age)


def test_figures_are_means_over_what_was_played_since() -> None:
    tally = Tally()
    assert tally.take() == {}
    useful = Made((Sample(tokens=(1,), ce_weight=(0.0,)),), {"tokens": 6.0})
    tally.add(
        [
            played(0, useful, episode("a", 1.0, 2), episode("a", 0.0, 4, "tokens")),
            played(3, Made(figures={"tokens": 2.0}), episode("b", 0.5, 3)),
        ],
        1.5,
    )
    tally.add([played(0, useful, episode("b", 0.0, 9, "deadline"))], 0.5)
    found = tally.take()
    assert found["reward"] == 0.5 and found["rewards"] == {"a": 0.5, "b": 0.5}
    assert found["length"] == 3.0 and found["lengths"] == {"a": 3.0, "b": 3.0}
    assert found["failed"] == 0.25 and found["cut"] == 1 / 3
    assert found["age"] == 1.0 and found["age_max"] == 3
    assert found["useless"] == 1 / 3 and found["waited_s"] == 2.0
    assert found["credit"] == {"tokens": 14.0 / 4}
    assert tally.take() == {}
