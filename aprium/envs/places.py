"""Places to be served at: turns of many episodes wait for one while their clocks stand still.

An engine serves so many sequences at a time. What waits in its queue would use up an episode's
seconds without having been played; what waits for a place here does not.
"""

import asyncio
import contextlib
import heapq
import itertools
from collections.abc import AsyncIterator


class Places:
    """`count` places; belongs to one event loop. Lower `priority` goes first, of equals in turn."""

    def __init__(self, count: int) -> None:
        self._free = count
        self._waiting: list[tuple[int, int, asyncio.Future[None]]] = []
        self._order = itertools.count()

    @contextlib.asynccontextmanager
    async def taken(self, *, priority: int = 0) -> AsyncIterator[None]:
        """Wait for a place, and have it until the end of the block."""
        if self._free:
            self._free -= 1
        else:
            future = asyncio.get_running_loop().create_future()
            heapq.heappush(self._waiting, (priority, next(self._order), future))
            try:
                await future
            except asyncio.CancelledError:
                if future.done() and not future.cancelled():  # it was given at the same moment
                    self._give()
                raise
        try:
            yield
        finally:
            self._give()

    def _give(self) -> None:
        while self._waiting:
            _, _, future = heapq.heappop(self._waiting)
            if not future.done():  # else it was cancelled
                future.set_result(None)
                return
        self._free += 1
