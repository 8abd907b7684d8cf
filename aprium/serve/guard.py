"""What stands before every route: keys, hosts, sizes and depths, request ids, one line of log each.

Runs before anything of a request is read. Everything but a few routes of liveness wants a key
where there are keys; routes that change the engine want a key of their own, always.
"""

import json
import re
import time
import uuid
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from aprium.base.log import get_logger
from aprium.serve.keys import Keys, key_of, share_of
from aprium.serve.pages import PATHS
from aprium.serve.transport import error_response

if TYPE_CHECKING:
    from aprium.serve.service import ServeConfig

OPEN_PATHS = ("/health", "/ping", "/ready", "/version", *PATHS)  # these answer without a key
CONTROL_PATHS = (
    "/pause", "/resume", "/is_paused", "/update_weights", "/reset_prefix_cache", "/finish_thinking",
)  # fmt: skip
_QUIET = (*OPEN_PATHS, "/metrics", "/load")  # asked every few seconds, by machines
# A string that is never closed ends with the text: every match goes on, so the time is linear.
_STRING = re.compile(rb'"(?:[^"\\]+|\\.)*+(?:"|\\?\Z)', re.DOTALL)
_PAIR = re.compile(rb"\[\]|\{\}")
_BRACKETS = re.compile(rb"[^\[\]{}]+")
_REQUEST_ID = re.compile(r"[A-Za-z0-9_.:-]{1,128}")
_HAS_BODY = ("POST", "PUT", "PATCH", "DELETE")

logger = get_logger("request")


class Guard:
    """The outermost part of an application."""

    def __init__(self, app: ASGIApp, config: "ServeConfig") -> None:
        self._app = app
        self._config = config
        self._keys = Keys(config.api_keys)
        self._control = Keys(config.control_keys)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Check and pass on one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        request_id = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        facts: dict[str, Any] = {"status": 0}
        scope.setdefault("state", {})["facts"] = facts
        begun = time.perf_counter()

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                facts["status"] = message["status"]
                added = MutableHeaders(scope=message)
                added["x-request-id"] = added["request-id"] = request_id
            await send(message)

        try:
            refusal = self._refuse(scope, headers)
            if refusal is None:
                checked = await self._read(scope, headers, receive)
                if callable(checked):
                    await self._app(scope, checked, answer)
                    return
                refusal = checked
            status, message, more = refusal
            response = error_response(scope["path"], status, message, headers=more)
            await response(scope, receive, answer)
        finally:
            self._log(scope, headers, request_id, facts, time.perf_counter() - begun)

    def _log(
        self,
        scope: Scope,
        headers: Headers,
        request_id: str,
        facts: dict[str, Any],
        seconds: float,
    ) -> None:
        """Write the line of one request, as JSON; of what was said nothing is in it."""
        if not self._config.log_requests or (scope["path"] in _QUIET and facts["status"] < 400):
            return
        line = {"id": request_id, "method": scope["method"], "path": scope["path"], **facts}
        line |= {"seconds": round(seconds, 4), "key": share_of(headers)[:8] or None}
        logger.info("%s", json.dumps(line))

    def _refuse(
        self, scope: Scope, headers: Headers
    ) -> tuple[int, str, dict[str, str] | None] | None:
        """Return status, message and headers for a request that may not come in."""
        path, hosts = scope["path"], self._config.allowed_hosts
        if hosts and _host(headers.get("host", "")) not in hosts:
            return 403, (
                f"the host {headers.get('host')!r} is not one of this server: name it with "
                "--allowed-hosts, or set --api-key"
            ), None  # fmt: skip
        if path in CONTROL_PATHS:
            return self._refuse_control(key_of(headers))
        if not self._keys or path in OPEN_PATHS:
            return None
        key = key_of(headers)
        if self._keys.admits(key) or self._control.admits(key):
            return None
        message = "the API key is missing or wrong: send 'Authorization: Bearer KEY'"
        return 401, message, {"WWW-Authenticate": "Bearer"}

    def _refuse_control(self, key: str) -> tuple[int, str, dict[str, str] | None] | None:
        if self._control.admits(key):
            return None
        if not self._control:
            return 403, "there is no key for control: start the server with --control-key", None
        message = "the control key is missing or wrong: send 'Authorization: Bearer KEY'"
        return 401, message, {"WWW-Authenticate": "Bearer"}

    async def _read(
        self, scope: Scope, headers: Headers, receive: Receive
    ) -> Receive | tuple[int, str, None]:
        """Read the body; return what gives it once more, or why it is not taken."""
        limit = self._config.max_body_bytes
        too_big = 413, f"the body is larger than {limit} bytes: shorten the prompt", None
        length = headers.get("content-length", "")
        if length.isdecimal() and (len(length) > 15 or int(length) > limit):
            return too_big
        if scope["method"] not in _HAS_BODY:
            return receive
        messages: list[Message] = []
        size, more = 0, True
        while more:
            message = await receive()
            messages.append(message)
            size += len(message.get("body", b""))
            more = message.get("more_body", False)
            if size > limit:
                return too_big
        depth = self._config.max_json_depth
        if is_deep([message.get("body", b"") for message in messages], depth):
            return 400, f"the body is nested more than {depth} deep: flatten it", None
        messages.reverse()

        async def again() -> Message:
            return messages.pop() if messages else await receive()

        return again


def is_deep(parts: Sequence[bytes], limit: int) -> bool:
    """Say whether JSON in `parts` is nested more than `limit` deep; what is no JSON may be.

    Works on whole texts in C, taking off the innermost level each time, since nobody may keep the
    event loop with millions of brackets.
    """
    if sum(part.count(b"[") + part.count(b"{") for part in parts) <= limit:
        return False
    brackets = _BRACKETS.sub(b"", _STRING.sub(b"", b"".join(parts)))
    for _ in range(limit):
        if not brackets:
            return False
        brackets = _PAIR.sub(b"", brackets)
    return bool(brackets)


def _host(value: str) -> str:
    """Return a Host header without its port, in lower case."""
    if value.startswith("["):
        return value.partition("]")[0].removeprefix("[").lower()
    return value.partition(":")[0].lower()
