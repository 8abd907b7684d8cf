"""Which item of a run is which task: in shares of the domains, or by a curriculum of difficulty.

A dealer gives the item of any number that was not given before, is told how items were solved, and
says what a resumed run needs to deal on.
"""

from collections.abc import Iterable, Mapping
from typing import Any, Protocol

from aprium.base.errors import ConfigError
from aprium.base.records import Group
from aprium.rl.curriculum import Curriculum, CurriculumConfig
from aprium.rl.ledger import Item


class Dealer(Protocol):
    """What deals items."""

    def __call__(self, number: int) -> Item:
        """Return item `number`, which is above those that were returned."""
        ...

    def see(self, played: Iterable[tuple[Item, Group]]) -> None:
        """Take note of how the items of a batch were solved."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return plain values to deal on from."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what `state_dict` returned."""
        ...


class Deal:
    """Shares of `weights`, however few items are looked at; tasks in order, of a `pool` or endless.

    Each item goes to the domain that is furthest behind its share. What an item is follows from its
    number alone.
    """

    def __init__(self, weights: Mapping[str, float], pool: int | None = None) -> None:
        self._weights, self._pool = positive(weights), pool
        self._counts = dict.fromkeys(self._weights, 0)
        self._items: list[Item] = []

    def __call__(self, number: int) -> Item:
        """Return item `number`."""
        total = sum(self._weights.values())
        while len(self._items) <= number:
            at = len(self._items)
            shares = {n: (at + 1) * w / total - self._counts[n] for n, w in self._weights.items()}
            name = max(shares, key=lambda name: shares[name])
            index = self._counts[name] if self._pool is None else self._counts[name] % self._pool
            self._items.append(Item(number=at, domain=name, index=index))
            self._counts[name] += 1
        return self._items[number]

    def see(self, played: Iterable[tuple[Item, Group]]) -> None:
        """Do nothing: what was solved changes nothing."""

    def state_dict(self) -> dict[str, Any]:
        """Return nothing: a number is enough."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue."""


class Course:
    """A curriculum over `pool` tasks of each domain, drawn `size` items at a time."""

    def __init__(
        self, weights: Mapping[str, float], pool: int, size: int, config: CurriculumConfig
    ) -> None:
        shares = positive(weights)
        keys = [str(index) for index in range(pool)]
        self._curriculum = Curriculum(dict.fromkeys(shares, keys), shares, config)
        self._size, self._drawn = size, 0
        self._items: dict[int, Item] = {}

    def __call__(self, number: int) -> Item:
        """Return item `number`; raises DataError when everything is solved each time."""
        while self._drawn <= number:
            self._items = {n: item for n, item in self._items.items() if n >= number}
            for domain, key in self._curriculum.next_batch(self._size):
                item = Item(number=self._drawn, domain=domain, index=int(key))
                self._items[item.number] = item
                self._drawn += 1
        return self._items[number]

    def see(self, played: Iterable[tuple[Item, Group]]) -> None:
        """Count what was earned of each task; failed episodes are no trials."""
        for item, group in played:
            rewards = [min(max(t.reward, 0.0), 1.0) for t in group.trajectories if t.error is None]
            if rewards:
                self._curriculum.see(item.domain, str(item.index), sum(rewards), len(rewards))

    def state_dict(self) -> dict[str, Any]:
        """Return what was seen, and how much was drawn."""
        ahead = [[n, item.domain, item.index] for n, item in self._items.items()]
        return {"seen": self._curriculum.state_dict(), "drawn": self._drawn, "ahead": ahead}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue; raises DataError for the state of other domains."""
        self._curriculum.load_state_dict(state["seen"])
        self._drawn = state["drawn"]
        self._items = {n: Item(number=n, domain=d, index=i) for n, d, i in state["ahead"]}


def positive(weights: Mapping[str, float]) -> dict[str, float]:
    """Return the weights that are not 0; raises ConfigError where there are none."""
    found = {name: weight for name, weight in weights.items() if weight > 0}
    if not found:
        raise ConfigError("no domain has a weight above 0: give one to those to train on")
    return found
