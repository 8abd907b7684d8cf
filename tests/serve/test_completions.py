"""Vectors, times, token counts and scores of prompts in answers."""

import base64
import struct
from collections.abc import Callable
from typing import Any

import pytest
from starlette.testclient import TestClient

from aprium.serve.admission import Limits
from tests.serve.conftest import FakeEngine
from tests.serve.test_app import USER, chat, events, failure


def test_embeddings(client: TestClient, engine: FakeEngine) -> None:
    reply = client.post("/v1/embeddings", json={"input": ["a b", "c"]}).json()
    assert [d["index"] for d in reply["data"]] == [0, 1]
    assert reply["data"][0]["embedding"] == pytest.approx([0.6, 0.0, 0.8])
    count = sum(len(engine.tokenizer.encode(text)) for text in ("a b", "c"))
    assert reply["usage"] == {"prompt_tokens": count, "total_tokens": count}
    assert engine.options["pooling"] == "last"
    body = {"input": "x", "encoding_format": "base64", "normalize": False, "pooling": "mean"}
    (found,) = client.post("/v1/embeddings", json={**body, "dimensions": 3}).json()["data"]
    assert struct.unpack("<3f", base64.b64decode(found["embedding"])) == (3, 0, 4)
    assert engine.options["pooling"] == "mean"
    error = failure(client.post("/v1/embeddings", json={**body, "dimensions": 2}), 400)
    assert error["param"] == "dimensions"
    assert failure(client.post("/v1/embeddings", json={"input": []}), 400)["param"] == "input"


def test_drafts_are_counted(client: TestClient, engine: FakeEngine) -> None:
    engine.drafted = (7, 5)
    for usage in (
        chat(client)["usage"],
        client.post("/v1/completions", json={"prompt": "x"}).json()["usage"],
    ):
        details = usage["completion_tokens_details"]
        assert details["accepted_prediction_tokens"] == 5
        assert details["rejected_prediction_tokens"] == 2


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_times_on_request(client: TestClient, path: str) -> None:
    body: dict[str, Any] = {"messages": USER} if "chat" in path else {"prompt": "x"}
    assert "timings" not in client.post(path, json=body).json()
    reply = client.post(path, json={**body, "timings": True}).json()
    times, usage = reply["timings"], reply["usage"]
    assert (times["queue_ms"], times["prompt_ms"], times["predicted_ms"]) == (500, 500, 2000)
    assert times["predicted_n"] == usage["completion_tokens"]
    assert times["predicted_per_second"] == (usage["completion_tokens"] - 1) / 2
    assert times["prompt_n"] == usage["prompt_tokens"]
    chunks = events(client, path, timings=True, **body)
    assert ["timings" in chunk for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    chunks = events(client, path, timings_per_token=True, **body)
    assert sum("timings" in chunk for chunk in chunks) >= len(chunks) - 1


def test_scores_of_the_prompt(client: TestClient, engine: FakeEngine) -> None:
    rows = chat(client, prompt_logprobs=1)["prompt_logprobs"]
    ids = engine.calls[0][0]
    assert rows[0] is None and len(rows) == len(ids)
    row = rows[1][str(ids[1])]
    assert row["logprob"] == -2.0
    assert row["decoded_token"] == engine.tokenizer.decode(ids[1:2], skip_special_tokens=False)
    body = {"prompt": [20, 21], "prompt_logprobs": 0}
    (choice,) = client.post("/v1/completions", json=body).json()["choices"]
    assert choice["prompt_logprobs"][1] == {
        "21": {"logprob": -2.0, "rank": None, "decoded_token": engine.tokenizer.decode([21])}
    }
    response = client.post("/v1/completions", json={**body, "stream": True})
    assert failure(response, 400)["param"] == "prompt_logprobs"


def test_biases(client: TestClient, engine: FakeEngine) -> None:
    chat(client, logit_bias={"5": -100, "3": 1.5})
    assert engine.calls[-1][1].logit_bias == ((3, 1.5), (5, -100.0))


def test_stable_prompts(make_client: Callable[..., TestClient], engine: FakeEngine) -> None:
    def prompt(client: TestClient, number: int, **schema: Any) -> tuple[int, ...]:
        head = f"x-anthropic-billing-header: cc_version=2.1; cch={number};\nBe brief."
        tool = {"type": "function", "function": {"name": "f", "parameters": schema}}
        messages = [{"role": "system", "content": head}, *USER]
        chat(client, messages=messages, tools=[tool])
        return engine.calls[-1][0]

    one = {"type": "object", "properties": {"a": {"type": "string"}, "b": {"type": "integer"}}}
    two = {"properties": {"b": {"type": "integer"}, "a": {"type": "string"}}, "type": "object"}
    client = make_client()
    first = prompt(client, 1, **one)
    assert first == prompt(client, 2, **two)
    text = engine.tokenizer.decode(first, skip_special_tokens=False)
    assert "Be brief." in text and "billing" not in text
    plain = make_client(stable_prompts=False)
    assert prompt(plain, 1, **one) != prompt(plain, 2, **one)
    assert "billing" in engine.tokenizer.decode(engine.calls[-1][0])


def test_overload(make_client: Callable[..., TestClient]) -> None:
    client = make_client(limits=Limits(queued_requests=0, requests_per_key=1))
    service = client.app.state.service  # type: ignore[attr-defined]
    held = service.admission.enter("")
    response = client.post("/v1/chat/completions", json={"messages": USER})
    assert failure(response, 429)["type"] == "TooManyRequestsError"
    assert int(response.headers["retry-after"]) >= 1
    others = [service.admission.enter(str(i)) for i in range(3)]
    response = client.post("/v1/embeddings", json={"input": "x"}, headers={"x-api-key": "me"})
    failure(response, 503)
    assert int(response.headers["retry-after"]) >= 1
    for ticket in (held, *others):
        ticket.release()
    chat(client)
    events(client, "/v1/chat/completions", messages=USER)
    failure(client.post("/v1/chat/completions", json={"messages": USER, "n": 0}), 400)
    assert service.admission.num_requests == 0
    service.admission.closing = True
    failure(client.post("/v1/chat/completions", json={"messages": USER}), 503)
    failure(client.get("/ready"), 503)
