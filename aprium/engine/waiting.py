"""Who is next: priorities, then fair shares, then deadlines, then order of arrival.

Among requests of one priority the share (an API key, a tenant) that was served fewest tokens goes
first; a share that was away does not save up (start-time fair queueing, Goyal, Vin, Cheng 1996).
Within a share the earliest deadline goes first. A sequence that was running already goes before
those of its priority that were not, so that what it has computed is of use. No torch.
"""

import heapq
from collections.abc import Iterator

from aprium.engine.request import LiveSequence

_MOST_SHARES = 4096  # whose service is remembered while they are away

# Deadline, number of arrival, sequence.
_Entry = tuple[float, int, LiveSequence]


class Waiting:
    """The sequences that wait to run."""

    def __init__(self) -> None:
        self._preempted: list[LiveSequence] = []  # by rank
        self._fresh: dict[int, dict[str, list[_Entry]]] = {}  # by priority, by share
        self._served: dict[str, float] = {}  # tokens
        self._clock = 0.0  # what the share picked last had been served
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[LiveSequence]:
        """Yield all of them, in no particular order."""
        yield from self._preempted
        for shares in self._fresh.values():
            for entries in shares.values():
                yield from (entry[2] for entry in entries)

    def push(self, sequence: LiveSequence) -> None:
        """Add `sequence`."""
        self._count += 1
        if sequence.ticket is not None:
            self._preempted.append(sequence)
            self._preempted.sort(key=lambda s: s.rank)
            return
        entries = self._fresh.setdefault(sequence.priority, {}).setdefault(sequence.share, [])
        if not entries:
            served = self._served.get(sequence.share, 0.0)
            self._served[sequence.share] = max(served, self._clock)
        deadline = float("inf") if sequence.deadline_s is None else sequence.deadline_s
        heapq.heappush(entries, (deadline, sequence.number, sequence))

    def peek(self) -> LiveSequence | None:
        """Return the next one, None where nobody waits."""
        fresh = min(self._fresh, default=None)
        if self._preempted and (fresh is None or self._preempted[0].priority <= fresh):
            return self._preempted[0]
        if fresh is None:
            return None
        shares = self._fresh[fresh]
        first = min(shares, key=lambda share: (self._served[share], shares[share][0][1]))
        return shares[first][0][2]

    def remove(self, sequence: LiveSequence) -> None:
        """Take `sequence` out, because it runs or was given up."""
        self._count -= 1
        if sequence.ticket is not None:
            self._preempted.remove(sequence)
            return
        shares = self._fresh[sequence.priority]
        entries = shares[sequence.share]
        if entries[0][2] is sequence:
            heapq.heappop(entries)
        else:
            entries[:] = [entry for entry in entries if entry[2] is not sequence]
            heapq.heapify(entries)
        if not entries:
            del shares[sequence.share]
        if not shares:
            del self._fresh[sequence.priority]

    def start(self, sequence: LiveSequence) -> None:
        """Take `sequence` out because it runs now."""
        self.remove(sequence)
        if sequence.ticket is None:
            self._clock = max(self._clock, self._served[sequence.share])

    def serve(self, sequence: LiveSequence, num_tokens: int) -> None:
        """Count `num_tokens` computed for `sequence`."""
        self._served[sequence.share] = self._served.get(sequence.share, 0.0) + num_tokens
        if len(self._served) > _MOST_SHARES:
            waiting = {share for shares in self._fresh.values() for share in shares}
            kept = {s: n for s, n in self._served.items() if s in waiting or n > self._clock}
            self._served = kept
