"""Files of requests, in the form of OpenAI's batches: one JSON object a line, answered a line each.

    {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": {...}}

The requests go through the server's own application in this process, so they mean what they mean
over HTTP. Answers are written as they come; those that a file has already are not asked for again,
so a run that was stopped goes on with the same command.
"""

import asyncio
import dataclasses
import json
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import httpx2

from aprium.base.errors import DataError
from aprium.serve.app import create_app
from aprium.serve.launch import make_engine

URLS = (
    "/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses", "/v1/messages",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """One line of a batch."""

    custom_id: str
    url: str
    body: dict[str, Any]


@dataclass(slots=True, kw_only=True)
class Report:
    """What became of a batch."""

    done_before: int = 0
    answered: int = 0
    failed: int = 0


def read_items(path: Path) -> list[Item]:
    """Read a batch; raises DataError naming the line that is wrong."""
    items: list[Item] = []
    seen: set[str] = set()
    for number, data in _lines(path):
        where = f"{path}, line {number}"
        if data is None:
            raise DataError(f"{where} is not a JSON object")
        id, url, body = data.get("custom_id"), data.get("url"), data.get("body")
        if not isinstance(id, str) or not id or id in seen:
            raise DataError(f"{where}: custom_id is {id!r}: give each line a name of its own")
        if url not in URLS or data.get("method", "POST") != "POST":
            raise DataError(f"{where}: url is {url!r}: POST to one of {', '.join(URLS)}")
        if not isinstance(body, dict) or body.get("stream"):
            raise DataError(f"{where}: body must be an object, without stream")
        seen.add(id)
        items.append(Item(custom_id=id, url=url, body=body))
    return items


def read_done(path: Path) -> set[str]:
    """Return the names of what a file of answers has; cuts off a line that was not finished."""
    if not path.exists():
        return set()
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if whole != data:
        path.write_bytes(whole)
    found = (row for _, row in _lines(path) if row is not None)
    return {row["custom_id"] for row in found if isinstance(row.get("custom_id"), str)}


async def run_batch(app: Any, source: Path, target: Path, concurrency: int = 64) -> Report:
    """Answer the requests of `source` into `target`, up to `concurrency` at a time."""
    items, done = read_items(source), read_done(target)
    report = Report(done_before=sum(item.custom_id in done for item in items))
    waiting = iter([item for item in items if item.custom_id not in done])
    transport = httpx2.ASGITransport(app=app, raise_app_exceptions=False)
    with target.open("a", encoding="utf-8") as file:
        async with httpx2.AsyncClient(
            transport=transport, base_url="http://localhost", timeout=None
        ) as client:

            async def work() -> None:
                for item in waiting:
                    await _answer(client, item, file, report)

            await asyncio.gather(*(work() for _ in range(concurrency)))
    return report


def run(model: str, flags: Mapping[str, Any], source: Path, target: Path) -> Report:
    """Load `model` as `aprium serve` does and answer a batch; `flags` are the values by name.

    Raises DataError before the model is loaded where a line is wrong.
    """
    read_items(source)
    engine, config = make_engine(model, flags)
    config = dataclasses.replace(config, api_keys=(), allowed_hosts=(), log_requests=False)

    async def work() -> Report:
        app = create_app(engine, config)
        try:
            return await run_batch(app, source, target, 2 * engine.config.max_num_seqs)
        finally:
            await app.state.service.close()

    return asyncio.run(work())


async def _answer(client: httpx2.AsyncClient, item: Item, file: TextIO, report: Report) -> None:
    """Ask for one answer and write it down."""
    response = await client.post(item.url, json=item.body)
    body = response.json()
    ok = response.status_code == 200
    line = {
        "id": f"batch_req_{uuid.uuid4().hex}",
        "custom_id": item.custom_id,
        "response": {
            "status_code": response.status_code,
            "request_id": response.headers.get("x-request-id"),
            "body": body,
        },
        "error": None if ok else body.get("error"),
    }
    file.write(json.dumps(line, ensure_ascii=False) + "\n")
    file.flush()
    report.answered += ok
    report.failed += not ok


def _lines(path: Path) -> Iterator[tuple[int, dict[str, Any] | None]]:
    """Yield number and object of each line that is not empty; None for what is no object."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            data = json.loads(line)
        except (ValueError, RecursionError):
            data = None
        yield number, data if isinstance(data, dict) else None
