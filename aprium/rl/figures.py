"""The figures of played groups: rewards, lengths, ages and waiting, between two lines of a log."""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from aprium.base.records import Trajectory
from aprium.rl.pipeline import Played


class Tally:
    """Groups that were trained on since the figures were last taken."""

    def __init__(self) -> None:
        self._played: list[Played] = []
        self._waited_s = 0.0

    def add(self, played: Sequence[Played], waited_s: float) -> None:
        """Note a batch, for which the trainer waited so many seconds."""
        self._played += played
        self._waited_s += waited_s

    def take(self) -> dict[str, Any]:
        """Return the figures, and begin anew; none where nothing was played.

        `reward` is the mean over episodes that did not fail, `rewards` by domain; `lengths` are
        sampled tokens an episode; `age` is that of the oldest token of a group, on average and at
        most; `useless` the share of groups without samples. What credit counts is given an episode.
        """
        played, waited_s = self._played, self._waited_s
        self._played, self._waited_s = [], 0.0
        if not played:
            return {}
        episodes = [t for one in played for t in one.group.trajectories]
        done = [t for t in episodes if t.error is None]
        domains: dict[str, list[Trajectory]] = {}
        for trajectory in done:
            domains.setdefault(trajectory.domain, []).append(trajectory)
        counted = Counter[str]()
        for one in played:
            counted.update(one.learnt.figures)
        ages = [one.age for one in played]
        return {
            "reward": _mean(t.reward for t in done),
            "rewards": {n: _mean(t.reward for t in ts) for n, ts in sorted(domains.items())},
            "length": _mean(sum(t.sampled) for t in done),
            "lengths": {n: _mean(sum(t.sampled) for t in ts) for n, ts in sorted(domains.items())},
            "failed": 1 - len(done) / max(len(episodes), 1),
            "cut": _mean(t.stop in ("tokens", "turns") for t in done),
            "age": _mean(ages),
            "age_max": max(ages),
            "useless": _mean(not one.learnt.samples for one in played),
            "waited_s": waited_s,
            "credit": {name: value / len(episodes) for name, value in sorted(counted.items())},
        }


def _mean(values: Iterable[float]) -> float:
    found = list(values)
    return math.fsum(found) / max(len(found), 1)
