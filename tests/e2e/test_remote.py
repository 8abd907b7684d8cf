"""`aprium chat --url` and `aprium run-batch` against pico."""

import io
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from aprium import cli
from tests.e2e.conftest import serving

SHORT = ["--max-tokens", "60", "--temperature", "0"]


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    log = tmp_path_factory.mktemp("log") / "server.log"
    flags = ("--max-model-len", "1K", "--api-key", "secret", "--served-model-name", "small")
    with serving(Path("pico"), log, *flags) as found:
        yield found


def lines(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[str]:
    assert cli.main(["chat", *arguments, *SHORT]) == 0
    return capsys.readouterr().out.splitlines()


def test_a_server_says_what_the_model_says(
    address: str, capsys: pytest.CaptureFixture[str]
) -> None:
    here = lines(capsys, "pico", "Who are you?")
    for url in (address, address + "/v1/"):
        there = lines(capsys, "Who are you?", "--url", url, "--api-key", "secret")
        assert there[:-1] == here[:-1]
        assert there[-1].split(",")[0] == here[-1].split(",")[0]
    named = lines(capsys, "small", "Who are you?", "--url", address, "--api-key", "secret")
    assert named[:-1] == here[:-1]


def test_a_conversation(
    address: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("Who are you?\n/thinking\nWhat is 2 + 2?\n"))
    found = lines(capsys, "--url", address, "--api-key", "secret", "--system", "Be brief.")
    assert sum("tokens/s" in line for line in found) == 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--url", "http://127.0.0.1:1", "hi there"], "does not answer"),
        (["--url", "ADDRESS", "hi there"], "401"),
        (["--url", "ADDRESS", "--api-key", "secret", "gpt", "hi"], "not served here"),
        (["--url", "localhost:8000", "hi there"], "no address"),
    ],
)
def test_what_goes_wrong(
    address: str, arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [address if word == "ADDRESS" else word for word in arguments]
    assert cli.main(["chat", *given]) == 1
    assert words in capsys.readouterr().err


def test_run_batch(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    body = {"messages": [{"role": "user", "content": "Who are you?"}], "max_tokens": 40}
    rows = [
        {"custom_id": str(i), "method": "POST", "url": "/v1/chat/completions", "body": body}
        for i in range(5)
    ]
    source.write_text("\n".join(map(json.dumps, rows)))
    command = ["run-batch", str(source), str(target), "--max_model_len", "1K"]
    assert cli.main(command) == 0
    assert "5 answered, 0 refused, 0 answered before" in capsys.readouterr().out
    assert len(target.read_text().splitlines()) == 5
    assert cli.main(command) == 0
    assert "0 answered, 0 refused, 5 answered before" in capsys.readouterr().out
    source.write_text("{")
    assert cli.main(command) == 1
    assert "line 1 is not a JSON object" in capsys.readouterr().err
