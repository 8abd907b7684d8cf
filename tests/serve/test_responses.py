"""The Responses API on the engine itself: created, streamed, gone on from, cancelled, deleted."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.testclient import TestClient

from aprium.base.records import Completion
from aprium.serve.response_reply import ResponseReply
from aprium.serve.responses_wire import CreateResponse
from aprium.text.tokenizer import Tokenizer
from tests.serve.test_app import failure

Serve = Callable[..., TestClient]
PATH = "/v1/responses"
QUIET = {"reasoning": {"effort": "none"}, "temperature": 0, "max_output_tokens": 24}
TOOL = {
    "type": "function",
    "name": "get_weather",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
}


LOGPROBS = {"include": ["message.output_text.logprobs"], "top_logprobs": 2}


def create(client: TestClient, input: Any, **options: Any) -> dict[str, Any]:
    response = client.post(PATH, json={"input": input, **QUIET, **options})
    assert response.status_code == 200, response.text
    return response.json()


def text_of(response: dict[str, Any]) -> str:
    (message,) = (item for item in response["output"] if item["type"] == "message")
    return message["content"][0]["text"]


def stream(client: TestClient, input: Any, **options: Any) -> list[dict[str, Any]]:
    text = client.post(PATH, json={"input": input, "stream": True, **QUIET, **options}).text
    chunks = []
    for part in text.strip().split("\n\n"):
        name, data = part.split("\n")
        chunks.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {chunks[-1]['type']}"
    assert [chunk["sequence_number"] for chunk in chunks] == list(range(len(chunks)))
    return chunks


def merge(chunks: list[dict[str, Any]]) -> dict[str, Any]:
    """Put a stream together from its deltas, and check that what is said at ends agrees."""
    response = chunks[0]["response"]
    assert [chunk["type"] for chunk in chunks[:2]] == ["response.created", "response.in_progress"]
    for chunk in chunks[2:-1]:
        kind = chunk["type"].removeprefix("response.")
        if kind == "output_item.added":
            response["output"].append(chunk["item"])
            continue
        item = response["output"][chunk["output_index"]]
        if kind == "content_part.added":
            item["content"] = [*item["content"], chunk["part"]]
        elif kind in ("output_text.delta", "reasoning_text.delta"):
            part = item["content"][chunk["content_index"]]
            part["text"] += chunk["delta"]
            if kind == "output_text.delta":
                part["logprobs"] = [*part["logprobs"], *chunk["logprobs"]]
        elif kind == "function_call_arguments.delta":
            item["arguments"] += chunk["delta"]
        elif kind in ("output_text.done", "reasoning_text.done"):
            assert chunk["text"] == item["content"][0]["text"]
            assert chunk.get("logprobs") == item["content"][0].get("logprobs")
        elif kind == "function_call_arguments.done":
            assert chunk["arguments"] == item["arguments"]
        elif kind == "output_item.done":
            item["status"] = chunk["item"]["status"]
            assert item == chunk["item"]
        else:
            assert kind == "content_part.done"
    assert chunks[-1]["response"]["output"] == response["output"]
    return chunks[-1]["response"]


def said(response: dict[str, Any]) -> Any:
    """Return a response without what differs from one to the next."""
    volatile = ("id", "call_id", "created_at", "completed_at", "usage")
    plain = {key: value for key, value in response.items() if key not in volatile}
    plain["output"] = [
        {key: value for key, value in item.items() if key not in volatile}
        for item in response["output"]
    ]
    return plain


@pytest.mark.parametrize(
    ("input", "options"),
    [
        ("Who are you?", {}),
        ("What is 3 + 4?", {"reasoning": {"effort": "high"}, "max_output_tokens": 200}),
        ("What is the weather in Paris?", {"tools": [TOOL], "tool_choice": "required"}),
        ("Who are you?", {"max_output_tokens": 3}),
        ("Who are you?", LOGPROBS),
        ("What is 3 + 4?", LOGPROBS | {"reasoning": {"effort": "high"}, "max_output_tokens": 200}),
    ],
)
def test_streams_equal_wholes(serve: Serve, input: str, options: dict[str, Any]) -> None:
    client = serve()
    options = {"max_output_tokens": 60, **options}
    whole = create(client, input, **options)
    chunks = stream(client, input, **options)
    assert said(merge(chunks)) == said(whole)
    ends = "incomplete" if options["max_output_tokens"] == 3 else "completed"
    assert whole["status"] == ends and chunks[-1]["type"] == f"response.{ends}"
    assert whole["usage"]["total_tokens"] > 0
    if "tools" in options:
        (call,) = whole["output"]
        assert (call["type"], call["name"]) == ("function_call", "get_weather")
        json.loads(call["arguments"])


@pytest.mark.parametrize("effort", ["none", "high"])
def test_the_tokens_of_the_text_come_with_their_logprobs(serve: Serve, effort: str) -> None:
    """They are those of a chat, without the tokens of reasoning, its tag, and the end."""
    client = serve()
    ask = {"reasoning": {"effort": effort}, "max_output_tokens": 300}
    response = create(client, "What is 3 + 4?", **LOGPROBS, **ask)
    (message,) = (item for item in response["output"] if item["type"] == "message")
    (part,) = message["content"]
    scores = part["logprobs"]
    said = b"".join(bytes(entry["bytes"]) for entry in scores).decode()
    assert said.strip() == part["text"].strip() and part["text"]
    chat = client.post(
        "/v1/chat/completions",
        json={
            "messages": [{"role": "user", "content": "What is 3 + 4?"}],
            "temperature": 0, "logprobs": True, "top_logprobs": 2, "max_tokens": 300,
            "reasoning_effort": effort,
        },
    ).json()  # fmt: skip
    every = chat["choices"][0]["logprobs"]["content"]
    assert scores == every[len(every) - 1 - len(scores) : -1]
    assert all(len(entry["top_logprobs"]) == 2 for entry in scores)
    assert response["top_logprobs"] == 2
    kept = client.get(f"{PATH}/{response['id']}").json()
    assert kept == response
    other = create(client, "And 2 + 2?", previous_response_id=response["id"], include=[])
    (message,) = (item for item in other["output"] if item["type"] == "message")
    assert message["content"][0]["logprobs"] == []


@given(
    st.lists(st.sampled_from([*range(16, 40), 13, 205, 178]), min_size=1, max_size=30),
    st.booleans(),
    st.data(),
)
@settings(max_examples=60)
def test_every_token_of_the_text_is_given_once(
    directory: Path, tokens: list[int], thinking: bool, data: st.DataObject
) -> None:
    """However an answer is cut, and where a character has several tokens."""
    tokenizer = Tokenizer.load(directory)
    body = CreateResponse.model_validate({"input": "x", **LOGPROBS})

    def reply() -> ResponseReply:
        return ResponseReply(
            *("r", body, body.to_chat()[0], tokenizer, [1]),
            model="m", thinking=thinking, tools=[], stored=False,
        )  # fmt: skip

    def grown(size: int, done: bool) -> Completion:
        stream = tokenizer.stream()
        text = stream.push(tokens[:size]) + (stream.flush() if done else "")
        some = tuple(tokens[:size])
        scores = tuple(-float(i) for i in range(size))
        return Completion(
            text=text, tokens=some, logprobs=scores, finish="length" if done else None
        )

    whole = reply().whole([grown(len(tokens), True)])
    streamed = reply()
    cuts = data.draw(st.sets(st.integers(1, len(tokens))))
    chunks = [c for size in sorted(cuts) for c in streamed.chunks(grown(size, False))]
    chunks += streamed.chunks(grown(len(tokens), True))
    assert said(streamed.response) == said(whole)
    deltas = [c for c in chunks if c["type"] == "response.output_text.delta"]
    given = [entry["logprob"] for c in deltas for entry in c["logprobs"]]
    assert given == sorted(set(given), reverse=True)
    messages = [item for item in whole["output"] if item["type"] == "message"]
    for message in messages:
        (part,) = message["content"]
        raw = b"".join(bytes(e["bytes"]) for e in part["logprobs"]).decode("utf-8", "replace")
        assert part["text"] in raw


def test_a_response_is_gone_on_from_its_state(serve: Serve) -> None:
    client = serve()
    first = create(client, "What is 3 + 4?", instructions="Be brief.")
    second = create(client, "And 2 + 2?", previous_response_id=first["id"])
    other = create(client, "And 5 + 5?", previous_response_id=first["id"])
    third = create(client, "Thanks.", previous_response_id=second["id"])
    assert second["previous_response_id"] == first["id"]
    assert second["usage"]["input_tokens_details"]["cached_tokens"] == 0  # other instructions
    assert third["usage"]["input_tokens_details"]["cached_tokens"] > 30
    whole = create(
        client,
        [
            {"role": "user", "content": "What is 3 + 4?"},
            *first["output"],
            {"type": "message", "role": "user", "content": "And 5 + 5?"},
        ],
        store=False,
    )
    assert text_of(other) == text_of(whole)
    failure(client.get(f"{PATH}/{whole['id']}"), 404)
    kept = create(client, "And 2 + 2?", previous_response_id=first["id"], store=False)
    assert text_of(kept) == text_of(second)


def test_get_delete_and_another_process(serve: Serve) -> None:
    client = serve()
    first = create(client, "What is 3 + 4?")
    url = f"{PATH}/{first['id']}"
    assert client.get(url).json() == first
    items = client.get(f"{url}/input_items").json()["data"]
    assert items == [{"type": "message", "role": "user", "content": "What is 3 + 4?"}]
    assert failure(client.post(f"{url}/cancel"), 400)["param"] == "id"
    later = serve()
    assert later.get(url).json() == first
    second = create(later, "And 2 + 2?", previous_response_id=first["id"])
    assert text_of(second)
    assert later.delete(url).json() == {"id": first["id"], "object": "response", "deleted": True}
    for response in (later.get(url), later.delete(url), later.get(f"{url}/input_items")):
        assert first["id"] in failure(response, 404)["message"]
    failure(later.post(PATH, json={"input": "x", "previous_response_id": first["id"]}), 404)
    third = create(later, "Thanks.", previous_response_id=second["id"])
    assert text_of(third)


def test_in_the_background(serve: Serve) -> None:
    client = serve()
    made = create(client, "Who are you?", background=True, max_output_tokens=80)
    assert made["status"] in ("queued", "in_progress") and made["background"]
    url = f"{PATH}/{made['id']}"
    for _ in range(200):
        found = client.get(url).json()
        if found["status"] not in ("queued", "in_progress"):
            break
        time.sleep(0.02)
    assert found["status"] == "completed"
    assert text_of(found) == text_of(create(client, "Who are you?", max_output_tokens=80))
    assert client.post(f"{url}/cancel").json()["status"] == "completed"
    long = {"background": True, "max_output_tokens": 900, "tool_choice": "auto", "stop": None}
    running = create(client, "Tell me a long story.", **long, thinking_token_budget=None)
    url = f"{PATH}/{running['id']}"
    stopped = client.post(f"{url}/cancel").json()
    assert stopped["status"] == "cancelled"
    assert client.get(url).json()["status"] == "cancelled"
    body = {"input": "x", "previous_response_id": running["id"]}
    assert "cancelled" in failure(client.post(PATH, json=body), 409)["message"]
    load = client.get("/load").json()
    assert (load["server_load"], load["engine"]["num_running"]) == (0, 0)


def test_the_oldest_is_forgotten(serve: Serve) -> None:
    client = serve(max_stored_responses=2)
    ids = [create(client, f"What is {i} + 4?")["id"] for i in range(3)]
    found = [client.get(f"{PATH}/{id}").status_code for id in ids]
    assert found == [404, 200, 200]
    assert len(client.get("/v1/sessions").json()["data"]) == 2
    none = serve(max_stored_responses=0)
    assert not create(none, "x")["store"]


def test_nothing_is_kept_of_what_fails(serve: Serve) -> None:
    client = serve()
    failure(client.post(PATH, json={"input": "x", "max_output_tokens": 10**6}), 400)
    failure(client.post(PATH, json={"input": "x", "text": {"format": {"type": "xml"}}}), 400)
    assert client.get("/v1/sessions").json()["data"] == []
    assert client.get("/load").json()["server_load"] == 0


def test_items_become_messages() -> None:
    body = CreateResponse.model_validate(
        {
            "input": [
                {"role": "developer", "content": "rules"},
                {"role": "user", "content": [{"type": "input_text", "text": "q"}]},
                {"type": "reasoning", "id": "rs", "summary": [],
                 "content": [{"type": "reasoning_text", "text": "hm"}]},
                {"type": "message", "role": "assistant", "id": "m", "status": "completed",
                 "content": [{"type": "output_text", "text": "calling", "annotations": []}]},
                {"type": "function_call", "call_id": "c1", "name": "f", "arguments": '{"i": 1}'},
                {"type": "function_call", "call_id": "c2", "name": "f", "arguments": '{"i": 2}'},
                {"type": "function_call_output", "call_id": "c1", "output": "one"},
                {"type": "function_call_output", "call_id": "c2",
                 "output": [{"type": "input_text", "text": "two"}]},
            ],
            "tools": [TOOL, TOOL | {"name": "g"}],
            "tool_choice": {"type": "allowed_tools", "mode": "required",
                            "tools": [{"type": "function", "name": "g"}]},
            "text": {"format": {"type": "json_schema", "name": "n", "schema": {}, "strict": True}},
        }
    )  # fmt: skip
    chat = body.to_chat()[0]
    messages = chat.records()
    assert [(m.role, m.content) for m in messages] == [
        ("system", "rules"), ("user", "q"), ("assistant", "calling"), ("tool", "one"),
        ("tool", "two"),
    ]  # fmt: skip
    assert messages[2].reasoning == "hm"
    assert [c.arguments for c in messages[2].tool_calls] == ['{"i": 1}', '{"i": 2}']
    assert [tool["function"]["name"] for tool in chat.tool_dicts()] == ["g"]
    assert chat.tool_choice == "required"
    assert chat.response_format == {
        "type": "json_schema",
        "json_schema": {"name": "n", "schema": {}, "strict": True},
    }


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"tools": [{"type": "web_search"}]}, "tools"),
        ({"conversation": "c"}, "conversation"),
        ({"truncation": "auto"}, "truncation"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"include": ["message.output_text.logprobs"], "top_logprobs": 101}, "logprobs"),
        ({"background": True, "stream": True}, "stream"),
        ({"background": True, "store": False}, "store"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input"),
        ({"tool_choice": {"type": "file_search"}}, "tool_choice"),
        ({"input": 5}, "input"),
        ({"input": []}, "messages"),
        ({"stream": "yes"}, "stream"),
    ],
)
def test_what_is_refused(client: TestClient, body: dict[str, Any], param: str) -> None:
    error = failure(client.post(PATH, json={"input": "x", **body}), 400)
    assert error["param"] == param
