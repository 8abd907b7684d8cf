"""The HTTP server's life: signals, draining, and an end with a status that says how it went.

The first SIGTERM (or Ctrl-C) drains: new requests get 503, those under way go on for at most
`timeout_s`, then the server leaves. The second one aborts what is left: its clients are told, as
they are when the time is up. An engine that has failed ends the server with an error, after a
moment in which health checks can see it.
"""

import socket
import time
from types import FrameType

import uvicorn

from aprium.base.errors import EngineError
from aprium.base.log import get_logger
from aprium.serve.service import Service

_SEEN_S = 2.0  # how long a failed engine can be seen as one
_TELL_S = 5  # how long clients have to take their last bytes

logger = get_logger("serve")


class Server(uvicorn.Server):
    """A server for one service; `timeout_s` is how long it may drain."""

    def __init__(self, config: uvicorn.Config, service: Service, timeout_s: float) -> None:
        config.timeout_graceful_shutdown = _TELL_S
        super().__init__(config)
        self._service = service
        self._timeout_s = timeout_s
        self._signals = 0
        self._drained_by_s: float | None = None
        self._failed_s: float | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Count a signal; the loop acts on it, since a handler may not."""
        self._signals += 1
        if self._signals > 2:
            self.force_exit = self.should_exit = True

    async def on_tick(self, counter: int) -> bool:
        """Do what signals ask for; say whether to leave."""
        now = time.monotonic()
        if self._service.engine.failed is not None:
            self._failed_s = now if self._failed_s is None else self._failed_s
            self.should_exit = self.should_exit or now - self._failed_s >= _SEEN_S
        if self._signals and self._drained_by_s is None:
            count = self._service.admission.num_requests
            logger.info("shutting down: %d requests have %g s", count, self._timeout_s)
            self._service.admission.closing = True
            self._drained_by_s = now + self._timeout_s
        if self._drained_by_s is not None and not self.should_exit:
            left = self._service.admission.num_requests
            if left and (now >= self._drained_by_s or self._signals > 1):
                logger.warning("aborting %d requests", left)
                await self._service.engine.close()  # which tells each of them
            self.should_exit = not left or now >= self._drained_by_s or self._signals > 1
        return await super().on_tick(counter)

    def run(self, sockets: list[socket.socket] | None = None) -> None:
        """Serve until told to stop; raises EngineError where the engine has failed."""
        super().run(sockets)
        failed = self._service.engine.failed
        if failed is not None:
            raise EngineError(str(failed)) from failed.__cause__
