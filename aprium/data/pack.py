"""Packing: samples of many lengths into bins of one token budget.

Best fit in the order given: a sample goes into the fullest open bin that still has room for it.
Samples are not sorted by length first. That would fill a little better, but it would also put all
long documents into some batches and all short conversations into others, and the trainer wants
every batch to look like the mixture. A sample is never split here; sources cut long documents.
"""

from bisect import bisect_left, insort
from collections.abc import Sequence

from aprium.base.errors import DataError


def pack(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Group indices of `lengths` into bins whose lengths sum to at most `budget`.

    Every index appears in exactly one bin, in ascending order within it; bins come in the order
    they were opened. Raises DataError on a length that is not positive or exceeds `budget`.
    """
    bins: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (tokens left, bin), ascending; the tightest fit comes first
    for index, length in enumerate(lengths):
        if not 0 < length <= budget:
            raise DataError(
                f"a sample has {length} tokens: it must have 1 to {budget} to fit a batch; "
                "raise the token budget or lower max_length"
            )
        at = bisect_left(room, (length, -1))
        if at == len(room):
            bins.append([index])
            insort(room, (budget - length, len(bins) - 1))
            continue
        left, chosen = room.pop(at)
        bins[chosen].append(index)
        if left > length:
            insort(room, (left - length, chosen))
    return bins
