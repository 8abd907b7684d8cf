"""Streams as they go over the wire: comments while there is nothing to say, and their end."""

import asyncio
import json
from typing import Any

import pytest

from aprium.serve.app import create_app
from aprium.serve.service import ServeConfig
from aprium.serve.transport import KEEP_ALIVE, EventStream
from tests.serve.conftest import FakeEngine

MESSAGES = [{"role": "user", "content": "x"}]
ROUTES = {
    "/v1/completions": {"prompt": "x"},
    "/v1/chat/completions": {"messages": MESSAGES},
    "/v1/responses": {"input": "x", "store": False},
    "/v1/messages": {"messages": MESSAGES, "max_tokens": 9, "model": "toy"},
}


def scope_of(path: str) -> dict[str, Any]:
    return {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.4"},
        "http_version": "1.1",
        "method": "POST",
        "path": path,
        "query_string": b"",
        "headers": [(b"content-type", b"application/json")],
    }


def sent_by(engine: FakeEngine, path: str, comments: int | None, **options: Any) -> list[bytes]:
    """Return the parts of a stream, up to so many comments (None: all), then go away."""
    app = create_app(engine, ServeConfig(names=("toy",), **options))  # type: ignore[arg-type]
    body = json.dumps({**ROUTES[path], "stream": True}).encode()

    async def talk() -> list[bytes]:
        parts: list[bytes] = []
        enough = asyncio.Event()
        inbox: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        inbox.put_nowait({"type": "http.request", "body": body, "more_body": False})

        async def send(message: Any) -> None:
            if message["type"] == "http.response.body":
                parts.append(message["body"])
            if parts.count(KEEP_ALIVE) == comments:
                enough.set()

        task = asyncio.create_task(app(scope_of(path), inbox.get, send))  # type: ignore[arg-type]
        if comments is not None:
            await asyncio.wait_for(enough.wait(), 20)
            inbox.put_nowait({"type": "http.disconnect"})
        await asyncio.wait_for(task, 20)
        return parts

    return asyncio.run(talk())


@pytest.mark.parametrize("path", ROUTES)
def test_a_silent_stream_sends_comments(engine: FakeEngine, path: str) -> None:
    engine.hang = True
    parts = sent_by(engine, path, 3, keep_alive_s=0.02)
    assert parts.count(KEEP_ALIVE) == 3 and parts[-1] == KEEP_ALIVE
    assert all(part.endswith(b"\n\n") for part in parts)  # never within an event
    assert (engine.running, engine.stopped) == (0, 1)


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize("keep_alive_s", [0.0, 30.0])
def test_a_stream_that_talks_sends_none(engine: FakeEngine, path: str, keep_alive_s: float) -> None:
    parts = sent_by(engine, path, None, keep_alive_s=keep_alive_s)
    assert KEEP_ALIVE not in parts and parts[-1] == b"" and len(parts) > 3


def test_nothing_follows_the_end_and_events_put_comments_off() -> None:
    async def source() -> Any:
        for delay in (0.0, 0.01, 0.01, 0.01, 0.12, 0.0):
            await asyncio.sleep(delay)
            yield b"data: 1\n\n"

    async def talk() -> tuple[list[Any], int]:
        sent, ended = [], []

        async def send(message: Any) -> None:
            sent.append(message)

        stream = EventStream(source(), lambda: ended.append(1), 0.05)
        await stream(scope_of("/"), asyncio.Event().wait, send)  # type: ignore[arg-type]
        await asyncio.sleep(0.15)
        return sent, len(ended)

    sent, ended = asyncio.run(talk())
    bodies = [message.get("body") for message in sent]
    assert bodies[0] is None and bodies[1:5] == [b"data: 1\n\n"] * 4
    assert 1 <= bodies.count(KEEP_ALIVE) <= 2 and bodies[-3:] == [*[b"data: 1\n\n"] * 2, b""]
    assert not sent[-1]["more_body"] and ended == 1


def test_a_slow_source_and_a_lost_connection_leave_no_task() -> None:
    async def source() -> Any:
        yield b"data: 1\n\n"
        await asyncio.sleep(60)

    async def talk() -> int:
        async def send(message: Any) -> None:
            if message.get("body") == b"data: 1\n\n":
                raise OSError("connection lost")

        stream = EventStream(source(), lambda: None, 0.01)
        await asyncio.wait_for(
            stream(scope_of("/"), asyncio.Event().wait, send),  # type: ignore[arg-type]
            5,
        )
        return len(asyncio.all_tasks())

    assert asyncio.run(talk()) == 1
