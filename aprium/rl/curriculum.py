"""A curriculum by difficulty: within each domain items drawn around a pass rate that moves down.

An item's pass rate is how often it was solved, as far as was seen in training. Items are
drawn with chances of a normal distribution over it, whose mean goes from easy to hard as training
goes on; what is always solved is left out. Domains keep fixed shares of every batch. Source: the
curriculum of Nemotron 3 Nano (docs/training.md).
"""

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from aprium.base.errors import ConfigError, DataError


@dataclass(frozen=True, kw_only=True)
class CurriculumConfig:
    """Where the mean of the pass rates begins and ends, how wide they are drawn, and over how long.

    The mean goes in a straight line from `easy` to `hard` over `steps` batches and stays there;
    `width` is the standard deviation. An item counts as having been tried `prior` times with the
    rate `prior_rate` before it was, so that the first trials do not decide alone. What was solved
    in each of at least `drop_after` trials is drawn no more.
    """

    steps: int
    easy: float = 0.9
    hard: float = 0.2
    width: float = 0.2
    prior: float = 1.0
    prior_rate: float = 0.5
    drop_after: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        """Check ranges."""
        for name in ("steps", "drop_after"):
            if getattr(self, name) < 1:
                raise ConfigError(
                    f"curriculum.{name} is {getattr(self, name)}: it must be positive"
                )
        for name in ("easy", "hard", "prior_rate"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"curriculum.{name} is {getattr(self, name)}: it must be in 0..1")
        if self.hard > self.easy:
            raise ConfigError(
                f"curriculum.easy is {self.easy} and hard {self.hard}: they are pass rates, of "
                "which the harder is the lower"
            )
        if self.width <= 0:
            raise ConfigError(f"curriculum.width is {self.width}: it must be positive")
        if self.prior <= 0:
            raise ConfigError(f"curriculum.prior is {self.prior}: it must be positive")


class Curriculum:
    """Draws items of `domains` (name -> keys of items) in batches, by `shares` of each domain.

    The draws are a function of seed, batch number and what was seen before: `state_dict` is all
    that a resumed run needs.
    """

    def __init__(
        self,
        domains: Mapping[str, Sequence[str]],
        shares: Mapping[str, float],
        config: CurriculumConfig,
    ) -> None:
        if set(domains) != set(shares):
            raise ConfigError(
                f"shares are of {', '.join(sorted(shares))} and items of "
                f"{', '.join(sorted(domains))}: give each domain both"
            )
        for name, share in shares.items():
            if not share > 0:
                raise ConfigError(f"the share of {name!r} is {share}: it must be positive")
            if not domains[name]:
                raise DataError(f"domain {name!r} has no items: leave it out or give it some")
        self._domains = {name: tuple(dict.fromkeys(domains[name])) for name in sorted(domains)}
        total = math.fsum(shares.values())
        self._shares = {name: shares[name] / total for name in self._domains}
        self._config = config
        self._batch = 0
        self._owed = dict.fromkeys(self._domains, 0.0)
        self._seen: dict[str, dict[str, list[float]]] = {name: {} for name in self._domains}

    @property
    def mean(self) -> float:
        """The pass rate that the next batch is drawn around."""
        config = self._config
        return config.easy + (config.hard - config.easy) * min(1.0, self._batch / config.steps)

    def see(self, domain: str, key: str, solved: float, trials: int = 1) -> None:
        """Take note that `key` was solved `solved` times (parts count) in `trials`."""
        if not 0 <= solved <= trials:
            raise DataError(f"{domain} {key!r}: {solved} of {trials} trials cannot be solved")
        counts = self._seen[domain].setdefault(key, [0.0, 0.0])
        counts[0] += solved
        counts[1] += trials

    def pass_rate(self, domain: str, key: str) -> float:
        """Return the rate at which `key` is solved, as far as is known."""
        solved, trials = self._seen[domain].get(key, (0.0, 0.0))
        config = self._config
        return (solved + config.prior * config.prior_rate) / (trials + config.prior)

    def is_mastered(self, domain: str, key: str) -> bool:
        """Tell whether `key` was solved in every one of enough trials."""
        solved, trials = self._seen[domain].get(key, (0.0, 0.0))
        return trials >= self._config.drop_after and solved == trials

    def next_batch(self, size: int) -> list[tuple[str, str]]:
        """Draw `size` items as (domain, key), domains mixed, no item twice where there are enough.

        A domain whose items are all mastered gives its share to the others. Raises DataError when
        nothing is left to learn.
        """
        rng = random.Random(f"{self._config.seed} {self._batch}")
        left = {
            name: [key for key in keys if not self.is_mastered(name, key)]
            for name, keys in self._domains.items()
        }
        if not any(left.values()):
            raise DataError("every item of every domain is solved each time: the run is at its end")
        drawn: list[tuple[str, str]] = []
        for name, count in self._counts(size, [n for n, keys in left.items() if keys]).items():
            drawn += [(name, key) for key in self._draw(name, left[name], count, rng)]
        rng.shuffle(drawn)
        self._batch += 1
        return drawn

    def _counts(self, size: int, names: Sequence[str]) -> dict[str, int]:
        """Return how many items each domain gives; what rounding keeps back is given later."""
        total = math.fsum(self._shares[name] for name in names)
        owed = {n: self._owed[n] + size * self._shares[n] / total for n in names}
        counts = {n: max(0, math.floor(due)) for n, due in owed.items()}
        while sum(counts.values()) > size:
            counts[max(counts, key=lambda n: counts[n] - owed[n])] -= 1
        while sum(counts.values()) < size:
            counts[max(names, key=lambda n: owed[n] - counts[n])] += 1
        self._owed |= {n: owed[n] - counts[n] for n in names}
        return counts

    def _draw(self, name: str, keys: Sequence[str], count: int, rng: random.Random) -> list[str]:
        """Draw `count` keys by their chances, each once before any comes again."""
        drawn: list[str] = []
        while len(drawn) < count:
            # The smallest of exponential variates over chances: a draw without replacement.
            order = sorted(keys, key=lambda key: self._order(name, key, rng))
            drawn += order[: count - len(drawn)]
        return drawn

    def _order(self, name: str, key: str, rng: random.Random) -> float:
        distance = (self.pass_rate(name, key) - self.mean) / self._config.width
        return math.log(rng.expovariate(1.0) or 1e-300) + distance**2 / 2

    def state_dict(self) -> dict[str, Any]:
        """Return batch number, what domains are owed and what was seen, as plain values."""
        seen = {name: {k: list(v) for k, v in of.items()} for name, of in self._seen.items()}
        return {"batch": self._batch, "owed": dict(self._owed), "seen": seen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what `state_dict` returned; raises DataError for that of other domains."""
        if set(state["seen"]) != set(self._domains):
            raise DataError(
                f"the run was started with domains {', '.join(sorted(state['seen']))} and these "
                f"are {', '.join(self._domains)}: restore them, or begin anew in another output"
            )
        self._batch = state["batch"]
        self._owed = dict(state["owed"])
        self._seen = {
            name: {k: list(v) for k, v in of.items()} for name, of in state["seen"].items()
        }
