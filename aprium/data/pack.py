"""Best-fit packing: samples into packs of at most a budget of tokens, none split, packs shuffled.

Some packs stay open. A sample goes where it leaves the least room and where there is not the same
one already; when it fits nowhere, the fullest pack is closed and a new one opened. Closed packs
wait among a few others, and one of these at random is given out. The state holds addresses of
samples, not their tokens. Source: docs/training.md (length-aware best fit).
"""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from aprium.base.errors import DataError
from aprium.base.records import Sample

NUM_OPEN = 8
Address = tuple[int, ...]


@dataclass
class _Pack:
    samples: list[Sample] = field(default_factory=list)
    addresses: list[Address] = field(default_factory=list)
    contents: set[int] = field(default_factory=set)  # hashes of the samples' tokens
    size: int = 0

    def add(self, sample: Sample, address: Address) -> None:
        self.samples.append(sample)
        self.addresses.append(address)
        self.contents.add(hash(sample.tokens))
        self.size += len(sample.tokens)


class Packer:
    """Packs being filled; `add` returns a pack when one is given out.

    Up to `num_open` packs are open, and `num_waiting` closed ones wait to be shuffled.
    """

    def __init__(
        self, budget: int, num_open: int = NUM_OPEN, num_waiting: int = 0, seed: int = 0
    ) -> None:
        self.budget, self.num_open, self.num_waiting = budget, num_open, num_waiting
        self._seed, self._given = seed, 0
        self._open: list[_Pack] = []
        self._waiting: list[_Pack] = []

    def add(self, sample: Sample, address: Address = ()) -> list[Sample] | None:
        """Place `sample`, which can be read again by `address`; return the pack given out, if any.

        Raises DataError when the sample alone is over the budget.
        """
        self._place(sample, address)
        return self._give() if len(self._waiting) > self.num_waiting else None

    def _place(self, sample: Sample, address: Address) -> None:
        size, content = len(sample.tokens), hash(sample.tokens)
        if size > self.budget:
            raise DataError(
                f"a sample of {size} tokens does not fit the budget of {self.budget}: raise "
                "tokens_per_step or lower max_length"
            )
        fitting = [
            pack
            for pack in self._open
            if pack.size + size <= self.budget and content not in pack.contents
        ]
        if fitting:
            max(fitting, key=lambda pack: pack.size).add(sample, address)
            return
        if len(self._open) >= self.num_open:
            fullest = max(self._open, key=lambda pack: pack.size)
            self._open.remove(fullest)
            self._waiting.append(fullest)
        self._open.append(_Pack())
        self._open[-1].add(sample, address)

    def _give(self) -> list[Sample]:
        place = random.Random(f"{self._seed} {self._given}").randrange(len(self._waiting))
        self._given += 1
        return self._waiting.pop(place).samples

    def flush(self) -> Iterator[list[Sample]]:
        """Give out what is left: the packs that wait, then those still open."""
        self._waiting += self._open
        self._open = []
        while self._waiting:
            yield self._give()

    def state_dict(self) -> dict[str, Any]:
        """Return the packs at hand as plain values: addresses of their samples."""
        return {
            "given": self._given,
            "open": [[list(a) for a in pack.addresses] for pack in self._open],
            "waiting": [[list(a) for a in pack.addresses] for pack in self._waiting],
        }

    def load_state_dict(self, state: dict[str, Any], fetch: Callable[[Address], Sample]) -> None:
        """Continue with packs that `state_dict` returned; `fetch` reads a sample by its address.

        Packs over the budget, of a run whose budget was larger, are packed anew.
        """

        def read(addresses: list[list[int]]) -> _Pack:
            pack = _Pack()
            for address in map(tuple, addresses):
                pack.add(fetch(address), address)
            return pack

        self._given = state["given"]
        self._open = [read(addresses) for addresses in state["open"]]
        self._waiting = [read(addresses) for addresses in state["waiting"]]
        over = [pack for pack in (*self._waiting, *self._open) if pack.size > self.budget]
        self._open, self._waiting = (
            [pack for pack in packs if pack.size <= self.budget]
            for packs in (self._open, self._waiting)
        )
        for pack in over:
            for sample, address in zip(pack.samples, pack.addresses, strict=True):
                self._place(sample, address)
