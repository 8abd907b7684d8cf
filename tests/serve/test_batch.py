"""Batch files: answered, gone on with, and refused before anything is loaded."""

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from aprium.base.errors import DataError
from aprium.serve.app import create_app
from aprium.serve.batch import read_items, run_batch
from aprium.serve.service import ServeConfig
from tests.serve.conftest import FakeEngine


def line(id: str, url: str = "/v1/chat/completions", **body: Any) -> str:
    if "chat" in url:
        body = {"messages": [{"role": "user", "content": "hi"}], **body}
    return json.dumps({"custom_id": id, "method": "POST", "url": url, "body": body})


def run(engine: FakeEngine, source: Path, target: Path) -> Any:
    app = create_app(engine, ServeConfig(names=("toy",)))  # type: ignore[arg-type]
    return asyncio.run(run_batch(app, source, target, 3))


def answers(target: Path) -> dict[str, dict[str, Any]]:
    rows = [json.loads(text) for text in target.read_text().splitlines()]
    assert len({row["custom_id"] for row in rows}) == len(rows)
    return {row["custom_id"]: row for row in rows}


def test_every_line_is_answered_once(engine: FakeEngine, tmp_path: Path) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    lines = [
        *(line(f"c{i}") for i in range(8)),
        line("e", "/v1/embeddings", input="x"),
        line("m", "/v1/messages", messages=[{"role": "user", "content": "x"}], max_tokens=9),
        line("bad", temperature=-1),
    ]
    source.write_text("\n".join(lines) + "\n\n")
    report = run(engine, source, target)
    assert (report.answered, report.failed, report.done_before) == (10, 1, 0)
    found = answers(target)
    assert len(found) == 11
    assert found["c3"]["response"]["body"]["object"] == "chat.completion"
    assert found["e"]["response"]["body"]["data"][0]["embedding"]
    assert found["m"]["response"]["body"]["type"] == "message"
    assert found["bad"]["response"]["status_code"] == 400
    assert "temperature is -1" in found["bad"]["error"]["message"]

    # A run that was cut off in the middle of a line.
    kept = target.read_text().splitlines(keepends=True)
    target.write_text("".join(kept[:4]) + kept[4][:20])
    engine.calls.clear()
    report = run(engine, source, target)
    assert report.done_before == 4 and report.answered + report.failed == 7
    assert set(answers(target)) == set(found)
    assert run(engine, source, target).done_before == 11


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "line 1 is not a JSON object"),
        (line("a") + "\n" + line("a"), "line 2: custom_id is 'a'"),
        (line(""), "custom_id"),
        (line("a", "/v1/models"), "POST to one of"),
        (line("a", stream=True), "without stream"),
        ("[" * 100_000, "not a JSON object"),
    ],
)
def test_what_is_no_batch(tmp_path: Path, text: str, words: str) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text(text)
    with pytest.raises(DataError, match=words):
        read_items(source)
    with pytest.raises(DataError, match="cannot be read"):
        read_items(tmp_path / "gone")
