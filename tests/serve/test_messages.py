"""Anthropic's routes over a scripted engine: conversions, streams, errors."""

import json
from collections.abc import Callable
from typing import Any

import pytest
from starlette.testclient import TestClient

from aprium.base.errors import EngineError
from aprium.serve.messages_wire import MessagesRequest
from tests.serve.conftest import FakeEngine
from tests.serve.test_app import CALL

PATH = "/v1/messages"
USER = [{"role": "user", "content": "hi"}]
TOOL = {"name": "f", "input_schema": {"type": "object", "properties": {"i": {"type": "integer"}}}}
THINK = {"type": "enabled", "budget_tokens": 64}


def create(client: TestClient, **body: Any) -> dict[str, Any]:
    response = client.post(PATH, json={"messages": USER, "max_tokens": 100, **body})
    assert response.status_code == 200, response.text
    return response.json()


def stream(client: TestClient, **body: Any) -> list[dict[str, Any]]:
    response = client.post(PATH, json={"messages": USER, "max_tokens": 100, "stream": True, **body})
    assert response.headers["content-type"].startswith("text/event-stream")
    chunks = []
    for part in response.text.strip().split("\n\n"):
        name, data = part.split("\n")
        chunks.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {chunks[-1]['type']}"
    return chunks


def merge(chunks: list[dict[str, Any]]) -> dict[str, Any]:
    """Put a stream together as clients do."""
    assert chunks[0]["type"] == "message_start" and chunks[-1]["type"] == "message_stop"
    message = chunks[0]["message"]
    text = ""
    for chunk in chunks[1:-1]:
        if chunk["type"] == "content_block_start":
            assert chunk["index"] == len(message["content"])
            message["content"].append(chunk["content_block"])
            text = ""
        elif chunk["type"] == "content_block_delta":
            delta, block = chunk["delta"], message["content"][chunk["index"]]
            kind = delta.pop("type").removesuffix("_delta")
            if kind == "input_json":
                text += delta["partial_json"]
                continue
            ((key, value),) = delta.items()
            block[key] += value
        elif chunk["type"] == "content_block_stop":
            if message["content"][chunk["index"]]["type"] == "tool_use":
                message["content"][chunk["index"]]["input"] = json.loads(text)
        else:
            assert chunk["type"] == "message_delta"
            message |= chunk["delta"]
            message["usage"] |= chunk["usage"]
    return message


def failure(response: Any, status: int, kind: str) -> str:
    assert response.status_code == status, response.text
    body = response.json()
    assert set(body) == {"type", "error"} and body["type"] == "error"
    assert set(body["error"]) == {"type", "message"} and body["error"]["type"] == kind
    return body["error"]["message"]


@pytest.mark.parametrize("script", ["why</think>so é\n", "why", "r</think>\nx" + CALL, CALL + CALL])
def test_streams_equal_wholes(client: TestClient, engine: FakeEngine, script: str) -> None:
    engine.script = script
    whole = create(client, tools=[TOOL], thinking=THINK)
    streamed = merge(stream(client, tools=[TOOL], thinking=THINK))
    for message in (whole, streamed):
        message["id"] = "x"
        for block in message["content"]:
            assert block.pop("id", "toolu_").startswith("toolu_")
    assert streamed == whole


def test_blocks(client: TestClient, engine: FakeEngine) -> None:
    engine.script = "why</think>\n\nso" + CALL
    message = create(client, tools=[TOOL], thinking=THINK)
    thinking, text, call = message["content"]
    assert (thinking["type"], thinking["thinking"]) == ("thinking", "why")
    assert thinking["signature"]
    assert text == {"type": "text", "text": "so"}
    assert (call["type"], call["name"], call["input"]) == ("tool_use", "f", {"i": 5})
    assert (message["stop_reason"], message["stop_sequence"]) == ("tool_use", None)
    assert engine.calls[-1][1].thinking_budget == 64
    usage = message["usage"]
    assert usage["input_tokens"] == len(engine.calls[-1][0])
    assert usage["output_tokens"] == len(engine.tokenizer.encode(engine.script)) + 1
    omitted = create(client, tools=[TOOL], thinking={"type": "adaptive", "display": "omitted"})
    assert [block["type"] for block in omitted["content"]] == ["text", "tool_use"]


def test_how_it_ends(client: TestClient, engine: FakeEngine) -> None:
    engine.script = "hello there"
    assert create(client)["stop_reason"] == "end_turn"
    assert create(client, max_tokens=2)["stop_reason"] == "max_tokens"
    create(client, stop_sequences=["x"])
    assert engine.calls[-1][1].stop == ("x",)
    engine.script = "word " * 1000
    assert create(client, max_tokens=64000)["stop_reason"] == "model_context_window_exceeded"
    prompt, params = engine.calls[-1]
    assert params.max_tokens == engine.max_model_len - len(prompt)


def test_thinking_is_off_unless_asked_for(
    make_client: Callable[..., TestClient], engine: FakeEngine
) -> None:
    create(make_client())
    assert not engine.thinking
    create(make_client(), thinking={"type": "disabled"})
    assert not engine.thinking
    create(make_client(), thinking=THINK)
    assert engine.thinking
    create(make_client(template_kwargs={"enable_thinking": True}))
    assert engine.thinking


def test_conversations_become_chats() -> None:
    body = MessagesRequest.model_validate(
        {
            "max_tokens": 5,
            "system": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}],
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "q"}]},
                {
                    "role": "assistant",
                    "content": [
                        {"type": "thinking", "thinking": "hm", "signature": "s"},
                        {"type": "redacted_thinking", "data": "x"},
                        {"type": "text", "text": "calling"},
                        {"type": "tool_use", "id": "t1", "name": "f", "input": {"i": 1}},
                    ],
                },
                {
                    "role": "user",
                    "content": [
                        {"type": "tool_result", "tool_use_id": "t1", "content": "one"},
                        {
                            "type": "tool_result",
                            "tool_use_id": "t2",
                            "content": [{"type": "text", "text": "two"}],
                        },
                        {"type": "text", "text": "and now?"},
                    ],
                },
            ],
            "tools": [TOOL | {"cache_control": {"type": "ephemeral"}}],
            "tool_choice": {"type": "any", "disable_parallel_tool_use": True},
            "output_config": {"format": {"type": "json_schema", "schema": {"type": "null"}}},
        }
    )
    chat = body.to_chat({})
    said = chat.records()
    assert [(m.role, m.content) for m in said] == [
        ("system", "a\nb"), ("user", "q"), ("assistant", "calling"), ("tool", "one"),
        ("tool", "two"), ("user", "and now?"),
    ]  # fmt: skip
    assert said[2].reasoning == "hm"
    assert (said[2].tool_calls[0].name, said[2].tool_calls[0].arguments) == ("f", '{"i": 1}')
    assert (said[3].tool_call_id, said[4].tool_call_id) == ("t1", "t2")
    assert chat.tool_dicts() == [
        {"type": "function", "function": {"name": "f", "parameters": TOOL["input_schema"]}}
    ]
    assert (chat.tool_choice, chat.parallel_tool_calls) == ("required", False)
    assert chat.response_format is not None


BAD: list[tuple[dict[str, Any], str]] = [
    ({"max_tokens": None}, "max_tokens"),
    ({"messages": []}, "messages"),
    ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, "'image'"),
    ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "only its vendor"),
    ({"mcp_servers": [{"url": "x"}]}, "mcp_servers"),
    ({"tool_choice": {"type": "tool", "name": "g"}, "tools": [TOOL]}, "not among the tools"),
    ({"temperature": -1}, "temperature is -1"),
    ({"output_config": {"format": {"type": "xml"}}}, "json_schema"),
    ({"messages": [{"role": "narrator", "content": "x"}]}, "messages.0.role"),
]


@pytest.mark.parametrize(("body", "words"), BAD)
@pytest.mark.parametrize("streaming", [False, True])
def test_bad_messages(
    client: TestClient, body: dict[str, Any], words: str, streaming: bool
) -> None:
    whole = {"messages": USER, "max_tokens": 5, "stream": streaming, **body}
    response = client.post(PATH, json=whole)
    assert words in failure(response, 400, "invalid_request_error")


def test_other_errors_have_the_form_too(
    make_client: Callable[..., TestClient], engine: FakeEngine
) -> None:
    client = make_client(api_keys=("k",))
    failure(client.post(PATH, json={}), 401, "authentication_error")
    headers = {"x-api-key": "k"}
    body = {"messages": USER, "max_tokens": 5}
    response = client.post(PATH, json={**body, "model": "claude"}, headers=headers)
    assert "'claude'" in failure(response, 404, "not_found_error")
    failure(client.get(PATH, headers=headers), 405, "invalid_request_error")
    failure(client.post(f"{PATH}/nowhere", headers=headers), 404, "not_found_error")
    client.app.state.service.admission.closing = True  # type: ignore[attr-defined]
    failure(client.post(PATH, json=body, headers=headers), 503, "overloaded_error")
    client.app.state.service.admission.closing = False  # type: ignore[attr-defined]
    engine.fail_after = 2
    failure(client.post(PATH, json=body, headers=headers), 503, "overloaded_error")
    text = client.post(PATH, json={**body, "stream": True}, headers=headers).text
    *_, last = text.strip().split("\n\n")
    assert last.startswith("event: error\n") and "on purpose" in last
    engine.failed = EngineError("gone")


def test_count_tokens(client: TestClient, engine: FakeEngine) -> None:
    body = {"messages": USER, "system": "be brief", "tools": [TOOL]}
    count = client.post(f"{PATH}/count_tokens", json=body).json()
    create(client, **body)
    assert count == {"input_tokens": len(engine.calls[-1][0])}
