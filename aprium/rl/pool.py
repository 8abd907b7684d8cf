"""A pool of actors, each replaced when it is lost: who is asked, and what became of a call.

It knows no Ray but by the module that it is given (see `rl/cluster.py`).
"""

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from aprium.base.errors import ApriumError, EngineError
from aprium.base.log import get_logger

log = get_logger("rl")


class LostError(Exception):
    """The actor that was asked is not there any more."""


@dataclass(eq=False)
class Member:
    """A place in a pool, and the actor that is in it for now."""

    index: int
    actor: Any
    ready: bool = False
    busy: int = 0
    losses: int = 0  # since it last did anything


class Pool:
    """As many actors as `size`, replaced when they are lost; belongs to one event loop once opened.

    `start` begins one for a place, `prepare` makes it fit to serve, in `timeout_s`. After
    `max_losses` in a row in one place the pool has `failed`. `name` is what messages call an actor.
    """

    def __init__(
        self,
        ray: Any,
        name: str,
        size: int,
        *,
        start: Callable[[int], Any],
        prepare: Callable[[int, Any], Awaitable[None]],
        timeout_s: float,
        max_losses: int,
    ) -> None:
        self._ray, self._name, self._start, self._prepare = ray, name, start, prepare
        self._timeout_s, self._max_losses = timeout_s, max_losses
        self._changed = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self.members = [Member(index, start(index)) for index in range(size)]
        self.failed: EngineError | None = None

    async def open(self) -> None:
        """Wait until all of them can serve; raises what went wrong first."""
        try:
            await asyncio.gather(*map(self._bring, self.members))
        except (LostError, TimeoutError) as error:
            raise EngineError(f"a {self._name} could not be started: {_why(error)}") from error

    async def _bring(self, member: Member) -> None:
        """Make the actor in a place fit to serve."""
        try:
            async with asyncio.timeout(self._timeout_s):
                await self._prepare(member.index, member.actor)
        except TimeoutError as error:
            raise TimeoutError(f"it was not ready in {self._timeout_s:g} s") from error
        member.ready = True  # at once after `prepare`, which has seen the newest weights
        self._changed.set()

    async def choose(self, members: Sequence[Member]) -> Member:
        """Return the least busy of `members`, once one of them is there; raises EngineError."""
        while True:
            if self.failed is not None:
                raise EngineError(str(self.failed)) from self.failed.__cause__
            ready = [member for member in members if member.ready]
            if ready:
                return min(ready, key=lambda member: member.busy)
            self._changed.clear()
            await self._changed.wait()

    async def call(self, actor: Any, method: str, *arguments: Any) -> Any:
        """Return what a method of an actor returns; raises as `watched` does."""
        with self.watched():
            reference = getattr(actor, method).remote(*arguments)
            try:
                return await reference
            except asyncio.CancelledError:
                self._ray.cancel(reference)
                raise

    async def stream(self, actor: Any, method: str, *arguments: Any) -> AsyncGenerator[Any, None]:
        """Yield what a method of an actor yields; raises as `watched` does."""
        references, ended = None, False
        try:
            with self.watched():
                options = getattr(actor, method).options(num_returns="streaming")
                references = options.remote(*arguments)
                async for reference in references:
                    yield await reference
                ended = True
        finally:
            if references is not None and not ended:
                self._ray.cancel(references)

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Turn what Ray raises into the error that an actor raised, or LostError."""
        errors = self._ray.exceptions
        try:
            yield
        except errors.RayTaskError as error:
            cause = error.cause
            if isinstance(cause, ApriumError):
                raise cause from error
            what = f"{type(cause).__name__}: {cause}"
            raise EngineError(f"a {self._name} has failed: {what}") from error
        except errors.RayError as error:
            raise LostError(_why(error)) from error

    def lose(self, member: Member, actor: Any, error: Exception) -> None:
        """Replace `actor`, if nobody has seen yet that it is lost."""
        if member.actor is not actor or not member.ready:
            return
        member.ready, member.losses = False, member.losses + 1
        task = asyncio.create_task(self._replace(member, error))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _replace(self, member: Member, error: Exception) -> None:
        try:
            while member.losses <= self._max_losses:
                log.warning("replacing %s %d: %s", self._name, member.index, _why(error))
                self._ray.kill(member.actor)
                member.actor = self._start(member.index)
                try:
                    await self._bring(member)
                    return
                except (LostError, TimeoutError) as again:
                    member.losses, error = member.losses + 1, again
        except Exception as other:  # whatever it is, those who wait must hear of it
            error = other
        self.failed = EngineError(
            f"{self._name} {member.index} was lost {member.losses} times without having done "
            f"anything, the last time so: {_why(error)}; mend that, and the same command continues"
        )
        self.failed.__cause__ = error
        self._changed.set()

    async def close(self) -> None:
        """End all actors."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for member in self.members:
            self._ray.kill(member.actor)
            member.ready = False


def _why(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
