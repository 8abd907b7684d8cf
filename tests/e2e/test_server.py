"""A server process told to stop, one whose engine fails, and readers that are slow or gone."""

import contextlib
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import openai
import pytest

from tests.e2e.conftest import serving, started

LONG: dict[str, Any] = {"prompt": "number", "temperature": 0, "ignore_eos": True}
# An engine whose steps take a while, and fail when a file says so.
SLOW = """
import sys, time, pathlib
from aprium.engine.runner import Runner
run = Runner.run
def slow(self, plan):
    time.sleep(0.02)
    if pathlib.Path(sys.argv[1]).exists():
        raise ArithmeticError("a wire is loose")
    return run(self, plan)
Runner.run = slow
from aprium.cli import main
sys.exit(main(["serve", "pico", "--port", "0", "--max-model-len", "8K", *sys.argv[2:]]))
"""


@contextlib.contextmanager
def slow_server(tmp_path: Path, *flags: str) -> Iterator[tuple[str, subprocess.Popen[bytes], Path]]:
    """Run such a server; gives its address, the process, and the file that makes it fail."""
    trigger, log = tmp_path / "fail", tmp_path / "log"
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, "-c", SLOW, str(trigger), *flags],
            stdout=file,
            stderr=file,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
    try:
        yield started(process, log), process, trigger
    finally:
        process.kill()
        process.wait()


def post(address: str, path: str = "/v1/completions", **body: Any) -> tuple[int, Any]:
    request = urllib.request.Request(
        address + path, json.dumps(body).encode(), {"content-type": "application/json"}
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def get(address: str, path: str) -> tuple[int, Any]:
    try:
        with urllib.request.urlopen(address + path, timeout=10) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


class Asking(threading.Thread):
    """A request under way; `result` is its status and body."""

    def __init__(self, address: str, **body: Any) -> None:
        super().__init__(daemon=True)
        self._address, self._body = address, body
        self.result: tuple[int, Any] = (0, "")
        self.start()

    def run(self) -> None:
        self.result = post(self._address, **self._body)

    def done(self) -> tuple[int, Any]:
        self.join(60)
        assert not self.is_alive()
        return self.result


def wait_until(address: str, count: int) -> None:
    for _ in range(200):
        if json.loads(get(address, "/load")[1])["engine"]["num_running"] >= count:
            return
        time.sleep(0.05)
    raise AssertionError("the request never ran")


def test_sigterm_drains(tmp_path: Path) -> None:
    with slow_server(tmp_path, "--shutdown-timeout", "30") as (address, process, _):
        asking = Asking(address, **LONG, max_tokens=60)
        streaming = Asking(address, **LONG, max_tokens=60, stream=True)
        wait_until(address, 2)
        process.send_signal(signal.SIGTERM)
        for _ in range(100):
            if get(address, "/ready")[0] == 503:
                break
            time.sleep(0.05)
        status, text = post(address, **LONG, max_tokens=1)
        assert status == 503 and "shutting down" in text
        assert get(address, "/health")[0] == 200
        status, text = asking.done()
        assert status == 200 and json.loads(text)["usage"]["completion_tokens"] == 60
        status, text = streaming.done()
        assert status == 200 and text.endswith("data: [DONE]\n\n") and "error" not in text
        assert process.wait(20) == 0


@pytest.mark.parametrize("again", [True, False])
def test_the_second_sigterm_or_the_time_aborts(tmp_path: Path, again: bool) -> None:
    flags = ("--shutdown-timeout", "60" if again else "1")
    with slow_server(tmp_path, *flags) as (address, process, _):
        asking = Asking(address, **LONG, max_tokens=8000)
        streaming = Asking(address, **LONG, max_tokens=8000, stream=True)
        wait_until(address, 2)
        begun = time.monotonic()
        process.send_signal(signal.SIGTERM)
        if again:
            time.sleep(0.5)
            process.send_signal(signal.SIGTERM)
        status, text = asking.done()
        assert status == 503 and "closed" in text
        assert '"code":503' in streaming.done()[1]
        assert process.wait(20) == 0
        assert time.monotonic() - begun < 15


def test_an_engine_that_fails_tells_everybody_and_ends_the_process(tmp_path: Path) -> None:
    with slow_server(tmp_path) as (address, process, trigger):
        asking = Asking(address, **LONG, max_tokens=8000)
        streaming = Asking(address, **LONG, max_tokens=8000, stream=True)
        wait_until(address, 2)
        trigger.touch()
        for status, text in (asking.done(), streaming.done()):
            assert status in (200, 503)
            assert "a wire is loose" in text and '"code":503' in text
        status, text = get(address, "/health")
        assert status == 503 and "a wire is loose" in text
        assert post(address, **LONG, max_tokens=1)[0] == 503
        assert process.wait(20) == 1
        assert "aprium: error: the engine has failed" in (tmp_path / "log").read_text()


def test_slow_readers_hold_up_nobody(checkpoint: Path, tmp_path: Path) -> None:
    """A client that asks for streams and never reads them; another is served all the same."""
    with serving(checkpoint, tmp_path / "log", "--max-model-len", "4K") as address:
        where = urlsplit(address)
        sockets = []
        body = json.dumps({**LONG, "max_tokens": 3000, "stream": True, "logprobs": 5})
        for _ in range(4):
            reader = socket.create_connection((where.hostname, where.port))
            reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            head = f"POST /v1/completions HTTP/1.1\r\nHost: {where.netloc}\r\n"
            head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
            reader.sendall((head + body).encode())
            sockets.append(reader)
        wait_until(address, 4)
        status, text = post(address, **LONG, max_tokens=40)
        assert status == 200 and json.loads(text)["usage"]["completion_tokens"] == 40
        for reader in sockets:
            reader.close()
        for _ in range(200):
            if json.loads(get(address, "/load")[1])["server_load"] == 0:
                break
            time.sleep(0.1)
        load = json.loads(get(address, "/load")[1])
        assert (load["server_load"], load["engine"]["num_running"]) == (0, 0)


def test_a_stream_that_waits_is_kept_alive(tmp_path: Path) -> None:
    """What waits in the queue, here since the engine is paused, says so; clients do not mind."""
    flags = ("--sse-keep-alive", "0.2", "--control-key", "k")
    with serving(Path("pico"), tmp_path / "log", *flags) as address:

        def control(path: str) -> None:
            headers = {"Authorization": "Bearer k", "content-type": "application/json"}
            request = urllib.request.Request(address + path, b"", headers)
            with urllib.request.urlopen(request, timeout=10) as response:
                assert response.status == 200

        control("/pause")
        raw = Asking(address, prompt="a plum", max_tokens=5, stream=True)
        found: list[str] = []

        def ask() -> None:
            with openai.OpenAI(base_url=f"{address}/v1", api_key="x", max_retries=0) as client:
                chunks = client.completions.create(
                    model="pico", prompt="a plum", max_tokens=5, stream=True, temperature=0
                )
                found.append("".join(chunk.choices[0].text for chunk in chunks))

        asking = threading.Thread(target=ask, daemon=True)
        asking.start()
        time.sleep(1.0)
        control("/resume")
        status, text = raw.done()
        assert status == 200 and text.startswith(": keep-alive\n\n: keep-alive\n\n")
        assert text.endswith("data: [DONE]\n\n")
        asking.join(30)
        assert len(found) == 1 and found[0]


def test_refusals_under_load(tmp_path: Path) -> None:
    flags = ("--max-num-seqs", "1", "--max-num-queued-reqs", "1", "--stable_prompts")
    with slow_server(tmp_path, *flags) as (address, _, _):
        first = [Asking(address, **LONG, max_tokens=100) for _ in range(2)]
        wait_until(address, 1)
        time.sleep(0.3)
        parts = urlsplit(address)
        asked = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=10)
        body = json.dumps({**LONG, "max_tokens": 1})
        asked.request("POST", "/v1/completions", body, {"content-type": "application/json"})
        response = asked.getresponse()
        assert response.status == 503
        assert int(response.headers["Retry-After"]) >= 1
        assert "waiting already" in response.read().decode()
        asked.close()
        assert [asking.done()[0] for asking in first] == [200, 200]
        metrics = get(address, "/metrics")[1]
        found = re.search(r'vllm:admission_rejections_total\{.*reason="queue".*\} (\S+)', metrics)
        assert found is not None and float(found[1]) == 1
