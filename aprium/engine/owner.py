"""The thread that owns an engine: takes orders, runs steps, hands out deltas.

An `Engine` belongs to one thread; everybody else talks to it through this. The thread sleeps on a
condition while there is nothing to do. An unexpected exception fails every request with its cause
and stops the thread: a half-updated state must not serve anybody.
"""

import contextlib
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple, TypeVar

from aprium.base.errors import ApriumError, EngineError
from aprium.base.log import get_logger
from aprium.base.records import Delta, Request
from aprium.engine.engine import Engine

# Receives, in the owner's thread, the deltas of one step for one submission, or why there will be
# no more. Must be quick and must not raise.
Sink = Callable[[list[Delta] | EngineError], None]
T = TypeVar("T")


class _Call(NamedTuple):
    """A function to be called with the engine, and where its result goes."""

    function: Callable[[Engine], Any]
    future: "Future[Any]"


class Owner:
    """The owner thread of `engine`; `failed` is why it stopped, once it has failed."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.failed: EngineError | None = None
        self._changed = threading.Condition()
        self._closing = False
        self._orders: list[tuple[Request, Sink] | _Call | str] = []
        self._sinks: dict[str, Sink] = {}
        self._thread = threading.Thread(target=self._run, name="aprium-engine", daemon=True)
        self._thread.start()

    def check(self, request: Request) -> None:
        """Raise RequestError when `request` can never be served, EngineError after the end."""
        self._check_running()
        self.engine.check(request)

    def submit(self, requests: Sequence[Request], sink: Sink) -> None:
        """Queue `requests`, which have passed `check`, together; their deltas go to `sink`.

        Raises EngineError when the engine has stopped.
        """
        with self._changed:
            self._check_running()
            self._orders += ((request, sink) for request in requests)
            self._changed.notify()

    def abort(self, request_ids: Iterable[str]) -> None:
        """Drop requests; one that is still listened to gets a last delta with finish "abort"."""
        with self._changed:
            self._orders += request_ids
            self._changed.notify()

    def call(self, function: Callable[[Engine], T]) -> "Future[T]":
        """Let the thread call `function` with the engine between two steps.

        The future gets what it returns, or the ApriumError that it raises; anything else that it
        raises is a failure of the engine. Raises EngineError when the engine has stopped.
        """
        future: Future[T] = Future()
        with self._changed:
            self._check_running()
            self._orders.append(_Call(function, future))
            self._changed.notify()
        return future

    def close(self) -> None:
        """Stop after the step in progress; unfinished requests fail. Waits for the thread."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        # A garbage collection in the thread itself may be what closes it.
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _check_running(self) -> None:
        if self.failed is not None:
            # A new one for each caller: an exception collects the traceback of who raises it.
            raise EngineError(str(self.failed)) from self.failed.__cause__
        if self._closing:
            raise EngineError("the engine was closed")

    def _run(self) -> None:
        cause = EngineError("the engine was closed")
        try:
            while self._take_orders():
                if self.engine.has_work:  # not while it is paused
                    self._deliver(self.engine.step())
            self.engine.close()
        except Exception as error:
            get_logger("engine").exception("the engine has failed")
            cause = EngineError(f"the engine has failed: {type(error).__name__}: {error}")
            cause.__cause__ = error
            with contextlib.suppress(Exception):  # what is to be written may still be whole
                self.engine.close()
        with self._changed:
            if cause.__cause__ is not None:
                self.failed = cause
            orders, self._orders = self._orders, []
            waiting = [order[1] for order in orders if type(order) is tuple]
            sinks = dict.fromkeys([*self._sinks.values(), *waiting])
            self._sinks = {}
        for sink in sinks:
            sink(cause)
        for order in orders:
            if isinstance(order, _Call) and order.future.set_running_or_notify_cancel():
                order.future.set_exception(cause)

    def _take_orders(self) -> bool:
        """Sleep until there is something to do, carry out orders; False when it is time to stop."""
        with self._changed:
            while not (self._orders or self._closing or self.engine.has_work):
                self._changed.wait()
            if self._closing:
                return False
            orders, self._orders = self._orders, []
            # All of them at once: should carrying one out fail, every caller is to be told.
            self._sinks |= {order[0].id: order[1] for order in orders if type(order) is tuple}
        for order in orders:
            if isinstance(order, str):
                last = self.engine.abort(order)
                self._deliver([last] if last is not None else [])
            elif isinstance(order, _Call):
                self._call(order)
            else:
                self.engine.add(order[0])
        return True

    def _call(self, order: _Call) -> None:
        if not order.future.set_running_or_notify_cancel():
            return
        try:
            result = order.function(self.engine)
        except BaseException as error:
            order.future.set_exception(error)
            if not isinstance(error, ApriumError):
                raise
        else:
            order.future.set_result(result)

    def _deliver(self, deltas: list[Delta]) -> None:
        batches: dict[Sink, list[Delta]] = {}
        for delta in deltas:
            done = delta.finish is not None
            sink = self._sinks.pop(delta.id) if done else self._sinks[delta.id]
            batches.setdefault(sink, []).append(delta)
        for sink, batch in batches.items():
            sink(batch)
