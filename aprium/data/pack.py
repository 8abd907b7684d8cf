"""Best-fit packing: samples into bins of at most a budget of tokens, none ever split.

A few bins stay open. A sample goes where it leaves the least room; when it fits nowhere, the
fullest bin is given out and a new one opened. Source: docs/training.md (length-aware best fit).
"""

from collections.abc import Iterator
from typing import Any

from aprium.base.errors import DataError
from aprium.base.records import Sample


class Packer:
    """Bins being filled; `add` returns a bin when one is given out."""

    def __init__(self, budget: int, num_open: int = 4) -> None:
        self.budget, self.num_open = budget, num_open
        self._bins: list[list[Sample]] = []

    def add(self, sample: Sample) -> list[Sample] | None:
        """Place `sample`; return the bin given out to make room, if any.

        Raises DataError when the sample alone is over the budget.
        """
        size = len(sample.tokens)
        if size > self.budget:
            raise DataError(
                f"a sample of {size} tokens does not fit the budget of {self.budget}: raise "
                "tokens_per_step or lower max_length"
            )
        rooms = [(self.budget - _size(b), i) for i, b in enumerate(self._bins)]
        fitting = [(room, i) for room, i in rooms if room >= size]
        if fitting:
            self._bins[min(fitting)[1]].append(sample)
            return None
        given = self._bins.pop(min(rooms)[1]) if len(self._bins) == self.num_open else None
        self._bins.append([sample])
        return given

    def flush(self) -> Iterator[list[Sample]]:
        """Give out the bins still open, fullest first."""
        self._bins.sort(key=_size, reverse=True)
        while self._bins:
            yield self._bins.pop(0)

    def state_dict(self) -> list[Any]:
        """Return the open bins as plain values."""
        return [[[s.tokens, s.ce_weight, s.domain] for s in b] for b in self._bins]

    def load_state_dict(self, state: list[Any]) -> None:
        """Continue with bins that `state_dict` returned."""
        self._bins = [
            [Sample(tokens=tuple(t), ce_weight=tuple(w), domain=d) for t, w, d in b] for b in state
        ]


def _size(samples: list[Sample]) -> int:
    return sum(len(sample.tokens) for sample in samples)
