"""Who may come in: a bounded queue, places for each key, and how long the others have to wait.

Whatever is let in is counted before anything else is done for it, in the one thread of the event
loop, so two requests never pass on one free place. A refusal says when to come back, from how long
requests took lately and how many are before it.
"""

import time
from collections import Counter
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING

from aprium.base.errors import OverloadError

if TYPE_CHECKING:
    from aprium.engine.client import AsyncEngine
    from aprium.serve.tracing import RequestSpan

_WEIGHT = 0.1  # of the latest request, in averages
_LONGEST_S = 3600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """How much may wait; None is no limit.

    `queued_requests` and `queued_tokens` (of their prompts) bound what waits for a place in the
    engine, `requests_per_key` what each key has under way.
    """

    queued_requests: int | None = None
    queued_tokens: int | None = None
    requests_per_key: int | None = None


@dataclass(eq=False, slots=True, kw_only=True)
class Ticket:
    """The place of one request, from when it is let in to `release`.

    In a `with` statement it is released at the end, unless it was `handed` on. `span`, if there are
    traces, ends with it.
    """

    admission: "Admission"
    share: str
    sequences: int
    tokens: int = 0
    begun_s: float = field(default_factory=time.perf_counter)
    started: bool = False
    handed: bool = False
    released: bool = False
    span: "RequestSpan | None" = None

    def start(self) -> None:
        """Note that it waits no longer."""
        self.started = True

    def release(self) -> None:
        """Give the place back; a second time does nothing."""
        self.admission.leave(self)

    def __enter__(self) -> "Ticket":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is not None and self.span is not None:
            self.span.failed(error)
        if error is not None or not self.handed:
            self.release()


class Admission:
    """The requests that are in the server; `closing` turns new ones away."""

    def __init__(self, engine: "AsyncEngine", limits: Limits) -> None:
        self._engine, self.limits = engine, limits
        self._tickets: set[Ticket] = set()
        self._by_share: Counter[str] = Counter()
        self._sequences = 0
        self._service_s = 0.0  # average time from start to end
        self.closing = False
        self.refused: Counter[str] = Counter()

    @property
    def num_requests(self) -> int:
        """Requests under way."""
        return len(self._tickets)

    @property
    def num_queued(self) -> int:
        """Sequences that have no place in the engine."""
        return max(self._sequences - self._seats(), 0)

    @property
    def num_queued_tokens(self) -> int:
        """Tokens of prompts that wait, where anybody has to."""
        if not self.num_queued:
            return 0
        return sum(t.tokens for t in self._tickets if not t.started)

    def enter(self, share: str, sequences: int = 1) -> Ticket:
        """Let a request of `share` in; raises OverloadError where there is no place for it."""
        if self.closing:
            self._refuse("closing", "the server is shutting down: ask another one, or again later")
        most = self.limits.requests_per_key
        if most is not None and self._by_share[share] >= most:
            self._refuse(
                "key", f"this key has {most} requests under way, which is its limit: wait for one"
            )
        queued = self.limits.queued_requests
        if queued is not None and self._sequences - self._seats() >= queued:
            self._refuse("queue", f"{self.num_queued} requests are waiting already: come back")
        ticket = Ticket(admission=self, share=share, sequences=sequences)
        self._tickets.add(ticket)
        self._by_share[share] += 1
        self._sequences += sequences
        return ticket

    def add_tokens(self, ticket: Ticket, count: int) -> None:
        """Count the tokens of a prompt; raises OverloadError where too many wait."""
        limit = self.limits.queued_tokens
        waiting = self.num_queued_tokens
        if limit is not None and self.num_queued and waiting + count > limit:
            self._refuse("queue", f"prompts of {waiting} tokens are waiting already: come back")
        ticket.tokens += count

    def leave(self, ticket: Ticket) -> None:
        """Take a request out, and learn from it how long they take."""
        if ticket.released:
            return
        ticket.released = True
        if ticket.span is not None:
            ticket.span.end()
        self._tickets.discard(ticket)
        self._sequences -= ticket.sequences
        self._by_share[ticket.share] -= 1
        if not self._by_share[ticket.share]:
            del self._by_share[ticket.share]

    def learn(self, service_s: float) -> None:
        """Note how long a request took from its first step to its end."""
        before = self._service_s
        self._service_s = before + _WEIGHT * (service_s - before) if before else service_s

    def predict_wait_s(self) -> float:
        """Return in how many seconds a newcomer is likely to have a place."""
        seats = max(self._seats(), 1)
        ahead = self._sequences - seats + 1
        return min(max(ahead, 0) * self._service_s / seats, _LONGEST_S)

    def _seats(self) -> int:
        """Return how many sequences the engine has room for, as far as it knows."""
        stats = self._engine.stats()
        full = stats.num_waiting > 0  # of memory, if not of sequences
        return max(stats.num_running, 1) if full else self._engine.config.max_num_seqs

    def _refuse(self, reason: str, message: str) -> None:
        self.refused[reason] += 1
        wait = self.predict_wait_s()
        if reason == "key":
            wait = self._service_s
        assert reason in ("queue", "key", "closing")
        raise OverloadError(message, reason, max(wait, 1.0))
