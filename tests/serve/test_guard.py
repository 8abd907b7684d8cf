"""Who and what is turned away before any route, and what is logged."""

import json
import logging
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.testclient import TestClient

from aprium.serve.guard import CONTROL_PATHS, OPEN_PATHS, is_deep
from tests.serve.conftest import FakeEngine
from tests.serve.test_app import USER, failure

Make = Callable[..., TestClient]


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def test_every_route_but_liveness_wants_a_key(make_client: Make) -> None:
    client = make_client(api_keys=("secret", "other"))
    seen = 0
    for path, methods in (
        client.get("/openapi.json", headers=bearer("other")).json()["paths"].items()
    ):
        for method in methods:
            response = client.request(method.upper(), path)
            if path in OPEN_PATHS:
                assert response.status_code == 200
            elif path in CONTROL_PATHS:
                assert response.status_code == 403
            else:
                assert response.status_code == 401, path
                assert response.headers["www-authenticate"] == "Bearer"
            seen += 1
    assert seen > 25
    assert client.get("/openapi.json").status_code == 401
    for headers in (bearer("secret"), bearer("other"), {"x-api-key": "secret"}):
        assert client.get("/v1/models", headers=headers).status_code == 200
    for headers in (bearer(""), bearer("secre"), {"authorization": "secret"}, {"x-api-key": ""}):
        failure(client.get("/v1/models", headers=headers), 401)


def test_control_wants_its_own_key(make_client: Make, engine: FakeEngine) -> None:
    engine.inner = engine
    open_client = make_client()
    for path in CONTROL_PATHS:
        assert "--control-key" in failure(open_client.post(path), 403)["message"]
    client = make_client(api_keys=("user",), control_keys=("root",))
    failure(client.post("/pause", headers=bearer("user")), 401)
    assert client.get("/ready", headers=bearer("user")).status_code == 200
    assert client.post("/pause", headers=bearer("root")).json() == {"is_paused": True}
    assert engine.paused
    assert "paused" in failure(client.get("/ready"), 503)["message"]
    assert client.get("/is_paused", headers=bearer("root")).json() == {"is_paused": True}
    assert client.post("/resume", headers=bearer("root")).json() == {"is_paused": False}
    assert client.get("/v1/models", headers=bearer("root")).status_code == 200


def test_hosts(make_client: Make) -> None:
    client = make_client(allowed_hosts=("localhost", "::1"))
    for host in ("localhost", "LOCALHOST:80", "[::1]:80"):
        assert client.get("/v1/models", headers={"host": host}).status_code == 200
    for host in ("evil.example", "localhost.evil.example", "", "[::2]"):
        assert "--allowed-hosts" in failure(
            client.get("/v1/models", headers={"host": host}), 403
        )["message"]  # fmt: skip


def test_other_origins_are_not_told_anything_unless_named(make_client: Make) -> None:
    origin = {"origin": "https://page.example"}
    response = make_client().get("/v1/models", headers=origin)
    assert "access-control-allow-origin" not in response.headers
    client = make_client(allowed_origins=("https://page.example",), api_keys=("k",))
    ask = {**origin, "access-control-request-method": "POST"}
    preflight = client.options("/v1/chat/completions", headers=ask)
    assert preflight.headers["access-control-allow-origin"] == "https://page.example"
    refused = client.get("/v1/models", headers=origin)
    assert refused.status_code == 401
    assert refused.headers["access-control-allow-origin"] == "https://page.example"


def test_a_page_cannot_post_a_form(client: TestClient) -> None:
    """Of what a page may send elsewhere without asking first, nothing is taken."""
    body = json.dumps({"messages": USER})
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data"):
        headers = {"content-type": kind}
        failure(client.post("/v1/chat/completions", content=body, headers=headers), 400)


def nested(depth: int) -> bytes:
    return b'{"x":' * (depth // 2) + b"[" * (depth - depth // 2) + b"]" * (depth - depth // 2) + (
        b"}" * (depth // 2)
    )  # fmt: skip


def test_depth(make_client: Make) -> None:
    assert not is_deep([nested(64)], 64)
    assert is_deep([nested(65)], 64)
    assert is_deep([nested(65)[:40], nested(65)[40:]], 64)
    assert not is_deep([json.dumps({"text": "[" * 1000 + '"\\'}).encode()], 8)
    assert not is_deep([b"[" + b"[1,{}]," * 5000 + b"0]"], 3)
    client = make_client(max_json_depth=5)
    headers = {"content-type": "application/json"}
    body = b'{"messages":[{"role":"user","content":"x"}],"metadata":' + nested(4) + b"}"
    path = "/v1/chat/completions"
    assert client.post(path, content=body, headers=headers).status_code == 200
    deep = failure(client.post(path, content=nested(9), headers=headers), 400)
    assert "more than 5 deep" in deep["message"]


def depth_of(value: Any) -> int:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return isinstance(value, dict | list) + max(map(depth_of, inner), default=0)


VALUES: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.integers() | st.text(st.sampled_from('[]{}"\\ab\n')),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
)


@given(VALUES, st.integers(0, 6))
def test_depth_is_that_of_the_value(value: Any, limit: int) -> None:
    assert is_deep([json.dumps(value).encode()], limit) == (depth_of(value) > limit)


@pytest.mark.parametrize("unit", [b'\\"', b'"', b'"\\', b"[]", b"{}[", b"\\"])
def test_depth_takes_linear_time(unit: bytes) -> None:
    """A time that grows with the square would be minutes here."""
    is_deep([b"[" * 100 + b'"' + unit * 1_000_000], 64)


def test_request_ids_and_the_line_of_a_request(
    make_client: Make, engine: FakeEngine, caplog: pytest.LogCaptureFixture
) -> None:
    logging.getLogger("aprium").propagate = True
    client = make_client(api_keys=("secret",))
    engine.script = "private words"
    with caplog.at_level(logging.INFO, "aprium.request"):
        headers = {**bearer("secret"), "x-request-id": "mine-1"}
        said = [{"role": "user", "content": "nobody knows"}]
        reply = client.post("/v1/chat/completions", json={"messages": said}, headers=headers)
        assert reply.headers["x-request-id"] == "mine-1"
        client.get("/health")
        odd = client.get("/nowhere", headers={**bearer("secret"), "x-request-id": "a b\t"})
        assert odd.headers["x-request-id"] not in ("a b\t", "")
    # Other tests may have let more than one handler see a record.
    lines = dict.fromkeys(record.message for record in caplog.records)
    first, second = (json.loads(line) for line in lines)
    assert (first["id"], first["path"], first["status"]) == ("mine-1", "/v1/chat/completions", 200)
    assert first["request"] == reply.json()["id"]
    assert first["prompt_tokens"] == reply.json()["usage"]["prompt_tokens"]
    assert first["finish"] == ["stop"]
    assert second["status"] == 404
    for record in caplog.records:
        assert not any(word in record.message for word in ("private", "nobody", "secret"))


def test_no_lines_where_they_are_not_wanted(
    make_client: Make, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, "aprium.request"):
        make_client(log_requests=False).get("/v1/models")
    assert not caplog.records
