"""What every route sends: JSON, errors of one form, events, and streams that end with their reader.

Every error is JSON, of OpenAI's form or, on Anthropic's routes, of theirs; inside a stream that
has begun it is an event. A client that goes away stops what runs for it, whether it streams or
waits.
"""

import asyncio
import contextlib
import math
import time
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping
from http import HTTPStatus
from typing import Any, TypeVar

import pydantic
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from aprium.base.errors import (
    EngineError,
    OverloadError,
    RequestError,
    SessionError,
    TemplateError,
)
from aprium.base.log import get_logger
from aprium.serve.events import anthropic_error_body, dump, error_body
from aprium.serve.wire import describe_invalid

ANTHROPIC_PATH = "/v1/messages"
KEEP_ALIVE = b": keep-alive\n\n"  # a comment, which readers of events pass over
T = TypeVar("T")


class Json(JSONResponse):
    """JSON that can always be sent: a lone surrogate, echoed from a request, becomes `?`."""

    def render(self, content: Any) -> bytes:
        """Return the body."""
        return dump(content)


def error_response(
    path: str,
    status: int,
    message: str,
    param: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> Response:
    """Return an error in the form of the route at `path`."""
    anthropic = path == ANTHROPIC_PATH or path.startswith(ANTHROPIC_PATH + "/")
    form = anthropic_error_body if anthropic else error_body
    return Json(form(status, message, param), status_code=status, headers=headers)


def explain(error: Exception) -> tuple[int, str, str | None]:
    """Return status, message and parameter for an error; logs the unexpected ones."""
    if isinstance(error, RequestError):
        return 400, str(error), error.param
    if isinstance(error, TemplateError):
        return 400, str(error), "messages"
    if isinstance(error, SessionError):
        status = {"unknown": 404, "busy": 409, "file": 400, "full": 503}[error.reason]
        return status, str(error), "session"
    if isinstance(error, OverloadError):
        return 429 if error.reason == "key" else 503, str(error), None
    if isinstance(error, EngineError):
        return 503, str(error), None
    if isinstance(error, HTTPException):
        return error.status_code, str(error.detail), None
    get_logger("serve").error("a request has failed", exc_info=error)
    return 500, f"the server has failed ({type(error).__name__}); its log says more", None


async def on_error(request: Request, error: Exception) -> Response:
    """Answer with an error that a handler raised."""
    headers = None
    if isinstance(error, OverloadError):
        headers = {"Retry-After": str(max(math.ceil(error.retry_s), 1))}
    return error_response(request.url.path, *explain(error), headers=headers)


async def on_invalid(request: Request, error: Exception) -> Response:
    """Answer a body that has not the form of the route."""
    assert isinstance(error, RequestValidationError | pydantic.ValidationError)
    message, param = describe_invalid(error.errors())
    return error_response(request.url.path, 400, message, param)


async def on_http(request: Request, error: Exception) -> Response:
    """Answer what no route takes."""
    assert isinstance(error, HTTPException)
    message = str(error.detail)
    if error.status_code == 404 and message == HTTPStatus.NOT_FOUND.phrase:
        message = f"there is no route {request.url.path}"
    headers = dict(error.headers or {})
    if error.status_code == 405:
        headers["Allow"] = allowed = ", ".join(_methods(request))
        message = f"{request.url.path} does not take {request.method}: use {allowed}"
    return error_response(request.url.path, error.status_code, message, headers=headers)


def _methods(request: Request) -> list[str]:
    """Return what the path of a request takes; the framework names one route's methods only."""
    found: set[str] = set()
    for route in request.app.routes:
        if isinstance(route, Route) and route.path_regex.match(request.url.path):
            found |= route.methods or set()
    return sorted(found)


async def until_gone(work: Coroutine[Any, Any, T], receive: Receive) -> T:
    """Run `work`, cancelling it when the client disconnects; raises ClientDisconnect then."""

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    tasks = worker, watcher = asyncio.create_task(work), asyncio.create_task(watch())
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if worker.done():
            return worker.result()
        raise ClientDisconnect
    finally:
        worker.cancel()
        watcher.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class EventStream(StreamingResponse):
    """A stream of events that ends, and stops its source, when the client goes away.

    After `keep_alive_s` seconds without an event (0: never) a comment is sent, lest anybody on the
    way take the connection for dead. `on_end` is called at the end in any case, even where nothing
    could be sent.
    """

    def __init__(
        self,
        content: AsyncGenerator[bytes, None],
        on_end: Callable[[], None],
        keep_alive_s: float = 0.0,
    ) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(content, headers=headers, media_type="text/event-stream")
        self._source, self._on_end = content, on_end
        self._keep_alive_s, self._sent_s = keep_alive_s, 0.0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events."""
        try:
            with contextlib.suppress(ClientDisconnect, OSError):
                async with contextlib.aclosing(self._source):
                    await until_gone(self.stream_response(send), receive)
        finally:
            self._on_end()

    async def stream_response(self, send: Send) -> None:
        """Send the head, the events with comments where they are long in coming, and the end."""
        head = {"status": self.status_code, "headers": self.raw_headers}
        await send({"type": "http.response.start", **head})
        self._sent_s = time.monotonic()
        comments = asyncio.create_task(self._keep_alive(send)) if self._keep_alive_s else None
        try:
            async for chunk in self._source:
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
                self._sent_s = time.monotonic()
        finally:
            if comments is not None:  # before the end, after which nothing may be sent
                comments.cancel()
                await asyncio.gather(comments, return_exceptions=True)
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _keep_alive(self, send: Send) -> None:
        """Send a comment whenever nothing was sent for a while; for ever."""
        while True:
            left = self._sent_s + self._keep_alive_s - time.monotonic()
            if left > 0:
                await asyncio.sleep(left)
                continue
            await send({"type": "http.response.body", "body": KEEP_ALIVE, "more_body": True})
            self._sent_s = time.monotonic()
