"""Whatever comes over the wire: the server stays up, and pools return to where they were."""

import contextlib
import json
import os
import random
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from tests.e2e.conftest import serving
from tests.e2e.test_server import get, post

LONG: dict[str, Any] = {"prompt": "number", "ignore_eos": True, "stream": True, "max_tokens": 300}
CHAT: dict[str, Any] = {
    "messages": [{"role": "user", "content": "Tell me a story."}],
    "stream": True,
    "max_tokens": 300,
    "ignore_eos": True,
}
ROUTES: dict[str, dict[str, Any]] = {
    "/v1/completions": LONG,
    "/v1/chat/completions": CHAT,
    "/v1/messages": CHAT,
    "/v1/responses": {"input": "Tell me a story.", "stream": True, "max_output_tokens": 300},
}


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    log = tmp_path_factory.mktemp("log") / "server.log"
    flags = ("--max-model-len", "1K", "--max-num-seqs", "8", "--no-enable-prefix-caching")
    with serving(Path("pico"), log, *flags) as found:
        yield found
        assert "Traceback" not in log.read_text()


def connect(address: str) -> socket.socket:
    parts = urlsplit(address)
    return socket.create_connection((parts.hostname, parts.port), timeout=30)


def raw(address: str, path: str, body: bytes, *headers: str) -> bytes:
    lines = [f"POST {path} HTTP/1.1", f"Host: {urlsplit(address).netloc}", *headers]
    lines.append("Content-Type: application/json")
    if not any(line.lower().startswith(("content-length", "transfer")) for line in headers):
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def read_all(connection: socket.socket) -> bytes:
    found = b""
    with contextlib.suppress(ConnectionError, TimeoutError):
        while part := connection.recv(65536):
            found += part
            if b"\r\n\r\n" in found and b"Content-Length" not in found.title():
                continue
    return found


def pools(address: str) -> dict[str, int]:
    load = json.loads(get(address, "/load")[1])
    names = ("num_running", "num_waiting", "pages_free", "slots_free")
    return {name: load["engine"][name] for name in names} | {"load": load["server_load"]}


def settled(address: str, before: dict[str, int]) -> None:
    """Wait until everything is as it was."""
    for _ in range(300):
        if pools(address) == before:
            return
        time.sleep(0.05)
    assert pools(address) == before


@pytest.mark.parametrize("path", ROUTES)
def test_a_client_that_leaves_at_each_chunk(address: str, path: str) -> None:
    before = pools(address)
    body = json.dumps(ROUTES[path]).encode()
    for chunks in range(12):
        connection = connect(address)
        connection.sendall(raw(address, path, body))
        for _ in range(chunks):
            if not connection.recv(200):  # the whole answer
                assert chunks > 4
                break
        if chunks % 2:  # with a reset rather than an orderly end
            linger = b"\x01\x00\x00\x00\x00\x00\x00\x00"
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        connection.close()
    settled(address, before)


def test_bodies_that_never_end_or_are_too_big(address: str) -> None:
    before = pools(address)
    huge = connect(address)
    huge.sendall(raw(address, "/v1/completions", b"", f"Content-Length: {1 << 30}"))
    assert b" 413 " in huge.recv(4096)
    huge.close()
    creeping = connect(address)
    creeping.sendall(raw(address, "/v1/completions", b"", "Transfer-Encoding: chunked"))
    part = b"x" * (1 << 20)
    answer = b""
    with contextlib.suppress(ConnectionError):
        for _ in range(80):
            creeping.sendall(f"{len(part):x}\r\n".encode() + part + b"\r\n")
        answer = creeping.recv(4096)
    assert not answer or b" 413 " in answer
    creeping.close()
    half = connect(address)
    half.sendall(raw(address, "/v1/completions", b'{"prompt": "x', "Content-Length: 100"))
    half.shutdown(socket.SHUT_WR)
    read_all(half)
    half.close()
    settled(address, before)


def test_headers_without_end(address: str) -> None:
    before = pools(address)
    many = [f"x-{i}: {'y' * 40}" for i in range(10_000)]
    connection = connect(address)
    with contextlib.suppress(ConnectionError):
        connection.sendall(raw(address, "/v1/completions", b"{}", *many))
        found = connection.recv(4096)
        assert b" 400 " in found or b" 431 " in found
    connection.close()
    nonsense = connect(address)
    nonsense.sendall(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(range(256)))
    assert b" 400 " in nonsense.recv(4096)
    nonsense.close()
    settled(address, before)


@pytest.mark.parametrize("path", [*ROUTES, "/v1/embeddings", "/tokenize", "/v1/sessions"])
@pytest.mark.parametrize(
    "body",
    [
        b"\xff\xfe\x00", b'{"prompt": "\xc3\x28"}', b"[" * 200_000, b'{"a":' * 50_000, b"null",
        b'{"input": "\\ud800", "prompt": "\\ud800", "messages": [{"role": "user", "content": '
        b'"\\ud800"}], "max_tokens": 3}',
        b'{"input": 1e999, "prompt": NaN, "messages": []}',
    ],
)  # fmt: skip
def test_bodies_that_are_none(address: str, path: str, body: bytes) -> None:
    connection = connect(address)
    connection.sendall(raw(address, path, body, "Connection: close"))
    found = read_all(connection)
    status = int(found.split(b" ", 2)[1])
    assert status in (200, 400), found
    connection.close()


def test_random_aborts(address: str) -> None:
    before = pools(address)
    rng = random.Random(5)

    def one(seed: int) -> None:
        own = random.Random(seed)
        path = own.choice(sorted(ROUTES))
        body = ROUTES[path] | {"stream": own.random() < 0.5, "n": own.choice([1, 3])}
        if "input" in body or "messages" in path:
            del body["n"]
        with contextlib.suppress(ConnectionError, TimeoutError):
            connection = connect(address)
            connection.sendall(raw(address, path, json.dumps(body).encode()))
            connection.settimeout(own.random() / 4)
            with contextlib.suppress(TimeoutError):
                while own.random() < 0.9 and connection.recv(300):
                    pass
            connection.close()

    for _ in range(6):
        threads = [threading.Thread(target=one, args=(rng.getrandbits(30),)) for _ in range(12)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    settled(address, before)
    assert post(address, **LONG | {"stream": False, "max_tokens": 2})[0] == 200


@pytest.mark.slow
def test_schemathesis(tmp_path: Path) -> None:
    """All checks but the one that what fits the document is accepted: it cannot say it all."""
    flags = ("--max-model-len", "1K", "--api-key", "k", "--control-key", "k")
    with serving(Path("pico"), tmp_path / "log", *flags) as address:
        command = [
            *(str(Path(sys.executable).with_name("schemathesis")), "run"),
            *(f"{address}/openapi.json", "-H", "Authorization: Bearer k", "--checks", "all"),
            *("--exclude-checks", "positive_data_acceptance", "--warnings", "off"),
            *("--max-time", "240", "--seed", "1", "-n", "50"),
        ]
        run = subprocess.run(command, capture_output=True, text=True, env=dict(os.environ))
        assert run.returncode == 0, run.stdout
