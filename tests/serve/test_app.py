"""Routes, streams, errors and disconnects over a scripted engine."""

import asyncio
import json
from collections.abc import Callable
from typing import Any

import pytest
from starlette.testclient import TestClient

from aprium.base.errors import EngineError
from aprium.serve.app import create_app
from aprium.serve.service import ServeConfig
from tests.serve.conftest import FakeEngine

USER = [{"role": "user", "content": "hi"}]
TOOL = {
    "type": "function",
    "function": {"name": "f", "parameters": {"properties": {"i": {"type": "integer"}}}},
}
CALL = "<tool_call>\n<function=f>\n<parameter=i>\n5\n</parameter>\n</function>\n</tool_call>"


def chat(client: TestClient, **body: Any) -> dict[str, Any]:
    response = client.post("/v1/chat/completions", json={"messages": USER, **body})
    assert response.status_code == 200, response.text
    return response.json()


def events(client: TestClient, path: str, **body: Any) -> list[dict[str, Any]]:
    response = client.post(path, json={"stream": True, **body})
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    *lines, done = response.text.strip().split("\n\n")
    assert done == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines]


def failure(response: Any, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"] == status
    return error


def test_chat_whole(client: TestClient, engine: FakeEngine) -> None:
    engine.script = "why</think>so"
    reply = chat(client, model="alias", seed=3, max_completion_tokens=50)
    assert reply["object"] == "chat.completion"
    assert reply["model"] == "alias"
    (choice,) = reply["choices"]
    assert choice["finish_reason"] == "stop"
    assert choice["stop_reason"] is None
    message = choice["message"]
    assert (message["content"], message["reasoning"]) == ("so", "why")
    assert message["reasoning_content"] == "why"
    ((tokens, params),) = engine.calls
    text = engine.tokenizer.decode(tokens, skip_special_tokens=False)
    assert text.endswith("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n<think>\n")
    assert (params.seed, params.max_tokens, params.temperature) == (3, 50, 1.0)
    used = len(engine.tokenizer.encode(engine.script)) + 1
    assert reply["usage"] == {
        "prompt_tokens": len(tokens),
        "completion_tokens": used,
        "total_tokens": len(tokens) + used,
        "prompt_tokens_details": {"cached_tokens": 0},
        "completion_tokens_details": {
            "accepted_prediction_tokens": 0,
            "rejected_prediction_tokens": 0,
            "reasoning_tokens": len(engine.tokenizer.encode("why</think>")),
        },
    }


def merge(chunks: list[dict[str, Any]], index: int = 0) -> dict[str, Any]:
    """Put a chat stream together as clients do."""
    message: dict[str, Any] = {"content": "", "reasoning": "", "tool_calls": []}
    for chunk in chunks:
        for choice in chunk["choices"]:
            if choice["index"] != index:
                continue
            delta = choice["delta"]
            message["content"] += delta.get("content") or ""
            message["reasoning"] += delta.get("reasoning") or ""
            assert delta.get("reasoning") == delta.get("reasoning_content")
            for call in delta.get("tool_calls", []):
                if "id" in call:
                    assert call["index"] == len(message["tool_calls"])
                    message["tool_calls"].append({"id": call["id"], "arguments": ""})
                    message["tool_calls"][-1]["name"] = call["function"]["name"]
                found = message["tool_calls"][call["index"]]
                found["arguments"] += call["function"]["arguments"]
            if choice["finish_reason"]:
                message["finish_reason"] = choice["finish_reason"]
    return message


@pytest.mark.parametrize("text", ["why</think>so é\n", "why", "r</think>x" + CALL, CALL + CALL])
def test_chat_stream_equals_whole(client: TestClient, engine: FakeEngine, text: str) -> None:
    engine.script = text
    chunks = events(client, "/v1/chat/completions", messages=USER, tools=[TOOL])
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert all("usage" not in chunk for chunk in chunks)
    streamed = merge(chunks)
    choice = chat(client, tools=[TOOL])["choices"][0]
    whole = choice["message"]
    assert streamed["content"] == (whole["content"] or "")
    assert streamed["reasoning"] == (whole["reasoning"] or "")
    assert streamed["finish_reason"] == choice["finish_reason"]
    functions = [call["function"] for call in whole.get("tool_calls", [])]
    assert [{k: c[k] for k in ("name", "arguments")} for c in streamed["tool_calls"]] == functions


def test_tool_calls(client: TestClient, engine: FakeEngine) -> None:
    engine.script = "use it</think>\n" + CALL + "\n" + CALL
    choice = chat(client, tools=[TOOL], tool_choice="auto")["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] is None
    first, second = choice["message"]["tool_calls"]
    assert first["function"] == {"name": "f", "arguments": '{"i": 5}'}
    assert first["type"] == "function"
    assert first["id"] != second["id"]
    (only,) = chat(client, tools=[TOOL], parallel_tool_calls=False)["choices"][0]["message"][
        "tool_calls"
    ]
    assert only["function"] == first["function"]
    cut = chat(client, tools=[TOOL], max_tokens=20)["choices"][0]
    assert cut["finish_reason"] == "length"


def test_tool_choice_none_offers_no_tools(client: TestClient, engine: FakeEngine) -> None:
    engine.script = "</think>" + CALL
    choice = chat(client, tools=[TOOL], tool_choice="none")["choices"][0]
    assert choice["message"]["content"] == CALL
    assert "# Tools" not in engine.tokenizer.decode(engine.calls[0][0])


@pytest.mark.parametrize(
    "body", [{"chat_template_kwargs": {"enable_thinking": False}}, {"reasoning_effort": "none"}]
)
def test_thinking_off(client: TestClient, engine: FakeEngine, body: dict[str, Any]) -> None:
    engine.script = "so"
    assert chat(client, **body)["choices"][0]["message"]["content"] == "so"
    assert chat(client)["choices"][0]["message"]["reasoning"] == "so"
    engine.script = "<think>only this"
    assert chat(client, **body)["choices"][0]["message"]["content"] == "only this"


def test_force_nonempty_content_and_default_kwargs(
    make_client: Callable[..., TestClient], engine: FakeEngine
) -> None:
    kwargs = {"force_nonempty_content": True}
    for client, body in (
        (make_client(), {"chat_template_kwargs": kwargs}),
        (make_client(template_kwargs=kwargs), {}),
    ):
        assert chat(client, **body)["choices"][0]["message"]["content"] == "hello there"


def test_include_reasoning_false(client: TestClient, engine: FakeEngine) -> None:
    engine.script = "why</think>so"
    message = chat(client, include_reasoning=False)["choices"][0]["message"]
    assert (message["reasoning"], message["content"]) == (None, "so")


def test_n_choices(client: TestClient, engine: FakeEngine) -> None:
    engine.script = ["</think>a b c d", "</think>x", "</think>"]
    reply = chat(client, n=3)
    assert [c["message"]["content"] for c in reply["choices"]] == ["a b c d", "x", None]
    chunks = events(client, "/v1/chat/completions", messages=USER, n=3)
    assert [merge(chunks, i)["content"] for i in range(3)] == ["a b c d", "x", ""]
    assert [c["choices"][0]["index"] for c in chunks[:3]] == [0, 1, 2]


def test_stream_usage(client: TestClient) -> None:
    body = {"messages": USER, "stream_options": {"include_usage": True}}
    *chunks, last = events(client, "/v1/chat/completions", **body)
    assert all(chunk["usage"] is None for chunk in chunks)
    assert last["choices"] == []
    assert last["usage"] == chat(client)["usage"]


def test_chat_logprobs(client: TestClient, engine: FakeEngine) -> None:
    engine.script = "why</think>so €"
    (choice,) = chat(client, logprobs=True, top_logprobs=2)["choices"]
    content = choice["logprobs"]["content"]
    ids = [*engine.tokenizer.encode(engine.script), 11]
    assert [bytes(entry["bytes"]) for entry in content] == [
        engine.tokenizer.token_bytes(id) for id in ids
    ]
    assert b"".join(bytes(entry["bytes"]) for entry in content[:-1]).decode() == engine.script
    assert {entry["logprob"] for entry in content} == {-0.5}
    assert [len(entry["top_logprobs"]) for entry in content] == [2] * len(ids)
    chunks = events(client, "/v1/chat/completions", messages=USER, logprobs=True, top_logprobs=2)
    streamed = [c["choices"][0]["logprobs"] for c in chunks]
    assert [entry for logprobs in streamed if logprobs for entry in logprobs["content"]] == content
    plain = chat(client, logprobs=True)["choices"][0]["logprobs"]["content"]
    assert plain[0]["top_logprobs"] == []


def test_token_ids(client: TestClient, engine: FakeEngine) -> None:
    reply = chat(client, return_token_ids=True)
    ids = [*engine.tokenizer.encode("hello there"), 11]
    assert reply["choices"][0]["token_ids"] == ids
    assert reply["prompt_token_ids"] == list(engine.calls[0][0])
    for path, body in (("chat/completions", {"messages": USER}), ("completions", {"prompt": "q"})):
        chunks = events(client, f"/v1/{path}", return_token_ids=True, **body)
        assert [t for c in chunks for t in c["choices"][0].get("token_ids", [])] == ids


def test_completions(client: TestClient, engine: FakeEngine) -> None:
    body = {"prompt": "say", "max_tokens": 100, "stop": "x", "ignore_eos": True}
    reply = client.post("/v1/completions", json=body).json()
    assert reply["object"] == "text_completion"
    assert reply["choices"][0]["text"] == "hello there"
    tokens, params = engine.calls[0]
    assert list(tokens) == engine.tokenizer.encode("say")
    assert (params.stop, params.ignore_eos, params.max_tokens) == (("x",), True, 100)
    chunks = events(client, "/v1/completions", **body)
    assert "".join(c["choices"][0]["text"] for c in chunks) == "hello there"
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"
    client.post("/v1/completions", json={"prompt": "say"})
    assert engine.calls[-1][1].max_tokens == 16


@pytest.mark.parametrize("prompt", [["a", "b"], [[20, 21], [22]], [20, 21]])
@pytest.mark.parametrize("stream", [True, False])
def test_many_prompts_and_n(client: TestClient, prompt: Any, stream: bool) -> None:
    engine_n, body = 2, {"prompt": prompt, "n": 2, "echo": True}
    count = (2 if isinstance(prompt[0], str | list) else 1) * engine_n
    texts = dict.fromkeys(range(count), "")
    if stream:
        for chunk in events(client, "/v1/completions", **body):
            texts[chunk["choices"][0]["index"]] += chunk["choices"][0]["text"]
    else:
        choices = client.post("/v1/completions", json=body).json()["choices"]
        assert [choice["index"] for choice in choices] == list(range(count))
        texts = {choice["index"]: choice["text"] for choice in choices}
    assert len(texts) == count
    assert all(text.endswith("hello there") for text in texts.values())
    if prompt == ["a", "b"]:
        assert [text[0] for text in texts.values()] == ["a", "a", "b", "b"]


def test_echo_with_logprobs_scores_the_prompt(client: TestClient, engine: FakeEngine) -> None:
    body = {"prompt": "what is", "echo": True, "logprobs": 1, "max_tokens": 1, "temperature": 0}
    choice = client.post("/v1/completions", json=body).json()["choices"][0]
    ids = engine.tokenizer.encode("what is")
    logprobs = choice["logprobs"]
    assert len(ids) > 1
    assert "".join(logprobs["tokens"]) == choice["text"]
    assert logprobs["token_logprobs"] == [None, *[-2.0] * (len(ids) - 1), -0.5]
    assert logprobs["top_logprobs"][0] is None
    assert logprobs["top_logprobs"][1] == {
        "<SPECIAL_3>": -1.0,
        engine.tokenizer.decode(ids[1:2]): -2.0,
    }
    assert logprobs["text_offset"][:2] == [0, len(logprobs["tokens"][0])]
    assert engine.calls[0][1].prompt_logprobs == 1
    nothing = client.post("/v1/completions", json={**body, "max_tokens": 0}).json()["choices"][0]
    assert (nothing["text"], nothing["finish_reason"]) == ("what is", "length")
    streamed = events(client, "/v1/completions", **{**body, "max_tokens": 4})
    offsets = [o for c in streamed for o in c["choices"][0]["logprobs"]["text_offset"]]
    assert offsets == sorted(set(offsets))


def test_sampling_defaults(make_client: Callable[..., TestClient], engine: FakeEngine) -> None:
    client = make_client(sampling={"temperature": 0.25, "top_k": 7})
    chat(client)
    chat(client, temperature=0, top_k=None)
    assert [(p.temperature, p.top_k) for _, p in engine.calls] == [(0.25, 7), (0, 7)]


def test_models_and_health(client: TestClient, engine: FakeEngine) -> None:
    models = client.get("/v1/models").json()
    assert [m["id"] for m in models["data"]] == ["toy", "alias"]
    assert models["data"][0]["max_model_len"] == 500
    assert client.get("/v1/models/alias").json()["id"] == "alias"
    assert "'gpt'" in failure(client.get("/v1/models/gpt"), 404)["message"]
    assert client.get("/health").status_code == 200
    assert set(client.get("/version").json()) == {"version"}
    engine.failed = EngineError("out of luck")
    assert "out of luck" in failure(client.get("/health"), 503)["message"]


def test_tokenize_and_back(client: TestClient, engine: FakeEngine) -> None:
    reply = client.post("/tokenize", json={"prompt": "hi<think>", "return_token_strs": True}).json()
    assert reply["tokens"] == engine.tokenizer.encode("hi<think>")
    assert reply["count"] == len(reply["tokens"])
    assert "".join(reply["token_strs"]) == "hi<think>"
    back = client.post("/detokenize", json={"tokens": reply["tokens"]}).json()
    assert back == {"prompt": "hi<think>"}
    chat(client)
    body = {"messages": USER, "add_generation_prompt": True}
    assert client.post("/tokenize", json=body).json()["tokens"] == list(engine.calls[0][0])
    assert failure(client.post("/detokenize", json={"tokens": [99999]}), 400)["param"] == "tokens"
    assert failure(client.post("/tokenize", json={}), 400)["param"] == "prompt"
    assert failure(client.post("/tokenize", json=[1]), 400)


BAD_CHATS: list[tuple[dict[str, Any], str, str]] = [
    ({"messages": []}, "messages", "at least 1"),
    ({"messages": "hi"}, "messages", "list"),
    ({"messages": [{"content": "x"}]}, "messages.0.role", "missing"),
    ({"messages": [{"role": "user", "content": 5}]}, "messages.0.content", "5"),
    ({"messages": [{"role": "narrator", "content": "x"}]}, "messages", "unknown role"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
        "messages",
        "image_url",
    ),
    ({"temperature": -1}, "temperature", "-1"),
    ({"temperature": "hot"}, "temperature", "hot"),
    ({"top_p": 0}, "top_p", "top_p is 0"),
    ({"n": 0}, "n", "between 1"),
    ({"n": 1.5}, "n", "1.5"),
    ({"max_tokens": -5}, "max_tokens", "-5"),
    ({"stop": [""]}, "stop", "non-empty"),
    ({"top_logprobs": 3}, "top_logprobs", "needs logprobs"),
    ({"frequency_penalty": 0.5}, "frequency_penalty", "penalties"),
    ({"logit_bias": {"5": 101}}, "logit_bias", "between -100 and 100"),
    ({"logit_bias": {"x": 1}}, "logit_bias", "must be token ids"),
    ({"response_format": {"type": "xml"}}, "response_format", "json_schema"),
    ({"guided_json": {}, "guided_regex": "a"}, "guided_regex", "both ask for a form"),
    ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs", "give one"),
    ({"structured_outputs": {"structural_tag": "x"}}, "structured_outputs", "give one"),
    ({"tool_choice": "required"}, "tool_choice", "give tools"),
    ({"tool_choice": "often"}, "tool_choice", "use auto, none, required"),
    (
        {"tool_choice": {"type": "function", "function": {"name": "g"}}, "tools": [TOOL]},
        "tool_choice",
        "not among the tools",
    ),
    ({"thinking_token_budget": -2}, "thinking_token_budget", "-1 for no limit"),
    ({"nvext": {"max_thinking_tokens": "x"}}, "nvext.max_thinking_tokens", "number of tokens"),
    (
        {"thinking_token_budget": 5, "reasoning_budget": 6},
        "thinking_token_budget",
        "give one of them",
    ),
    ({"reasoning_budget_message": "</think>"}, "thinking_message", "tags that end"),
    ({"tools": [{"type": "function"}]}, "tools.0.function", "missing"),
    ({"tools": [{"type": "retrieval", "function": {"name": "f"}}]}, "tools.0.type", "retrieval"),
    ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs", "'messages'"),
    ({"messages": [{"role": "user", "content": "long " * 400}]}, "prompt", "too long"),
    (
        {
            "messages": [
                {
                    "role": "assistant",
                    "tool_calls": [{"function": {"name": "f", "arguments": "{"}}],
                }
            ]
        },
        "messages",
        "not valid JSON",
    ),
]


@pytest.mark.parametrize(("body", "param", "words"), BAD_CHATS)
@pytest.mark.parametrize("stream", [False, True])
def test_bad_chats(
    client: TestClient, body: dict[str, Any], param: str, words: str, stream: bool
) -> None:
    response = client.post(
        "/v1/chat/completions", json={"messages": USER, "stream": stream, **body}
    )
    error = failure(response, 400)
    assert error["type"] == "BadRequestError"
    assert error["param"] == param
    assert words in error["message"]


@pytest.mark.parametrize("prompt", [None, [], [1, "a"], [True], 5, [[1], "a"], [1.5], [[True]]])
def test_bad_prompts(client: TestClient, prompt: Any) -> None:
    error = failure(client.post("/v1/completions", json={"prompt": prompt}), 400)
    assert error["param"] == "prompt"
    assert "must be a string, a list of strings" in error["message"]


def test_harmless_fields_are_accepted(client: TestClient) -> None:
    chat(
        client,
        user="me",
        metadata={"a": "b"},
        store=True,
        service_tier="auto",
        frequency_penalty=0,
        presence_penalty=0.0,
        repetition_penalty=1.0,
        logit_bias={},
        response_format={"type": "text"},
        logprobs=False,
        stream_options=None,
        never_heard_of=1,
    )


@pytest.mark.parametrize(
    "content",
    [
        b"{",
        b"",
        b"[1]",
        b'"x"',
        b"\xff\xfe",
        b'{"messages": [' + b"[" * 100000,
        b'{"messages":[{"role":"user","content":"x"}],"temperature":NaN}',
        b'{"messages":[{"role":"user","content":"x"}],"temperature":Infinity}',
        b'{"messages":[{"role":"\\ud800","content":"x"}]}',
        b'{"messages":[{"role":"user","content":"x"}],"max_tokens":' + b"9" * 5000 + b"}",
    ],
)
def test_hostile_bodies(client: TestClient, content: bytes) -> None:
    headers = {"content-type": "application/json"}
    failure(client.post("/v1/chat/completions", content=content, headers=headers), 400)


def test_lone_surrogates_survive(client: TestClient, engine: FakeEngine) -> None:
    body = b'{"messages":[{"role":"user","content":"\\ud800"}]}'
    headers = {"content-type": "application/json"}
    response = client.post("/v1/chat/completions", content=body, headers=headers)
    assert response.status_code == 200
    assert "user\n?<|im_end|>" in engine.tokenizer.decode(engine.calls[0][0], False)


def test_http_errors_are_json(make_client: Callable[..., TestClient]) -> None:
    client = make_client(max_body_bytes=500)
    assert failure(client.get("/nowhere"), 404)["message"] == "there is no route /nowhere"
    response = client.get("/v1/chat/completions")
    assert "use POST" in failure(response, 405)["message"]
    assert response.headers["allow"] == "POST"
    big = {"messages": [{"role": "user", "content": "x" * 1000}]}
    error = failure(client.post("/v1/chat/completions", json=big), 413)
    assert "500 bytes" in error["message"]
    pieces = (b"x" * 100 for _ in range(10))
    assert failure(client.post("/v1/chat/completions", content=pieces), 413)
    assert failure(client.post("/v1/completions", json={"model": "gpt", "prompt": "x"}), 404)


def test_engine_failure(client: TestClient, engine: FakeEngine) -> None:
    engine.fail_after = 1
    response = client.post("/v1/chat/completions", json={"messages": USER})
    assert "on purpose" in failure(response, 503)["message"]
    *_, last = events(client, "/v1/chat/completions", messages=USER)
    assert last["error"]["code"] == 503
    assert engine.running == 0


def test_unexpected_failure(
    client: TestClient, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: Any) -> None:
        raise KeyError("secret")

    monkeypatch.setattr(engine, "generate", broken)
    error = failure(client.post("/v1/chat/completions", json={"messages": USER}), 500)
    assert error["type"] == "InternalServerError"
    assert "secret" not in error["message"]


def test_api_keys(make_client: Callable[..., TestClient]) -> None:
    client = make_client(api_keys=("one", "two"))
    for headers in ({}, {"Authorization": "Bearer three"}, {"Authorization": "one"}):
        response = client.get("/v1/models", headers=headers)
        assert "API key" in failure(response, 401)["message"]
        assert response.headers["www-authenticate"] == "Bearer"
    for key in ("one", "two"):
        headers = {"Authorization": f"Bearer {key}"}
        assert client.get("/v1/models", headers=headers).status_code == 200
    assert client.get("/health").status_code == 200


def test_shutdown_closes_the_engine(
    make_client: Callable[..., TestClient], engine: FakeEngine
) -> None:
    with make_client():
        assert not engine.closed
    assert engine.closed


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("prompts", [1, 3])
def test_a_client_that_goes_away_stops_its_generation(
    engine: FakeEngine, stream: bool, prompts: int
) -> None:
    engine.hang = True
    app = create_app(engine, ServeConfig(names=("toy",)))  # type: ignore[arg-type]
    body = json.dumps({"prompt": ["q"] * prompts, "stream": stream}).encode()
    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": "POST",
        "path": "/v1/completions",
        "query_string": b"",
        "headers": [(b"content-type", b"application/json")],
    }

    async def talk() -> list[dict[str, Any]]:
        sent: list[dict[str, Any]] = []
        inbox: asyncio.Queue[dict[str, Any]] = asyncio.Queue()

        async def send(message: Any) -> None:
            sent.append(message)

        inbox.put_nowait({"type": "http.request", "body": body, "more_body": False})
        task = asyncio.create_task(app(scope, inbox.get, send))  # type: ignore[arg-type]
        while engine.running < prompts or (stream and len(sent) < 1 + prompts):
            await asyncio.sleep(0.001)
        inbox.put_nowait({"type": "http.disconnect"})
        await asyncio.wait_for(task, 5)
        return sent

    sent = asyncio.run(talk())
    assert (engine.running, engine.stopped) == (0, prompts)
    assert not any(b"[DONE]" in message.get("body", b"") for message in sent)


def test_a_reader_that_breaks_off_stops_its_generation(engine: FakeEngine) -> None:
    app = create_app(engine, ServeConfig(names=("toy",)))  # type: ignore[arg-type]
    engine.script = "word " * 200

    async def talk() -> None:
        body = json.dumps({"prompt": "q", "stream": True, "max_tokens": 500}).encode()
        messages = iter([{"type": "http.request", "body": body, "more_body": False}])

        async def receive() -> Any:
            for message in messages:
                return message
            await asyncio.Event().wait()

        async def send(message: Any) -> None:
            if message["type"] == "http.response.body" and engine.calls:
                raise OSError("connection lost")

        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.4"},
            "http_version": "1.1",
            "method": "POST",
            "path": "/v1/completions",
            "query_string": b"",
            "headers": [(b"content-type", b"application/json")],
        }
        await asyncio.wait_for(app(scope, receive, send), 5)  # type: ignore[arg-type]

    asyncio.run(talk())
    assert (engine.running, engine.stopped) == (0, 1)


GUIDED = [
    ({"response_format": {"type": "json_object"}}, "json", {"type": "object"}),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "null"}}}},
        "json",
        {"type": "null"},
    ),
    ({"guided_json": {"type": "null"}}, "json", {"type": "null"}),
    ({"guided_json": '{"type": "null"}'}, "json", {"type": "null"}),
    ({"json_schema": {"type": "null"}}, "json", {"type": "null"}),
    ({"structured_outputs": {"json": {"type": "null"}}}, "json", {"type": "null"}),
    ({"structured_outputs": {"json_object": True}}, "json", {"type": "object"}),
    ({"guided_regex": "a+"}, "regex", "a+"),
    ({"structured_outputs": {"regex": "a+", "choice": None}}, "regex", "a+"),
    ({"guided_choice": ["a", "b"]}, "choice", ["a", "b"]),
    ({"grammar": 'root ::= "a"'}, "grammar", 'root ::= "a"'),
    ({"guided_grammar": 'start: "a"'}, "grammar", 'start: "a"'),
]


@pytest.mark.parametrize(("body", "kind", "value"), GUIDED)
def test_forms_of_every_spelling(
    client: TestClient, engine: FakeEngine, body: dict[str, Any], kind: str, value: Any
) -> None:
    for path, prompt in (
        ("chat/completions", {"messages": USER}),
        ("completions", {"prompt": "x"}),
    ):
        assert client.post(f"/v1/{path}", json={**prompt, **body}).status_code == 200
        guide = engine.calls[-1][1].guide
        assert guide is not None and guide.kind == kind
        assert (json.loads(guide.value) if kind in ("json", "choice") else guide.value) == value
        assert engine.thinking == (path == "chat/completions")


def test_tools_are_always_guided(client: TestClient, engine: FakeEngine) -> None:
    named = {"type": "function", "function": {"name": "f"}}
    form = {"type": "json_object"}
    for choice, expected in ((None, "auto"), ("required", "required"), (named, "f")):
        engine.script = CALL
        body = {"tool_choice": choice, "parallel_tool_calls": False, "response_format": form}
        chat(client, tools=[TOOL], **body)
        guide = engine.calls[-1][1].guide
        assert guide is not None and guide.kind == "tools"
        value = json.loads(guide.value)
        assert (value["tools"], value["choice"], value["parallel"]) == ([TOOL], expected, False)
        assert (value["answer"] is not None) == (expected == "auto")
    chat(client, tools=[TOOL], tool_choice="none")
    assert engine.calls[-1][1].guide is None


def test_thinking_budgets_of_every_spelling(
    make_client: Callable[..., TestClient], engine: FakeEngine
) -> None:
    client = make_client(thinking_budget=70, thinking_message="enough")
    for body, expected in (
        ({}, 70),
        ({"thinking_token_budget": 5}, 5),
        ({"reasoning_budget": 0}, 0),
        ({"reasoning_budget_tokens": 5, "thinking_budget_tokens": 5}, 5),
        ({"nvext": {"max_thinking_tokens": 9}}, 9),
        ({"reasoning_budget": -1}, None),
    ):
        chat(client, **body)
        params = engine.calls[-1][1]
        assert (params.thinking_budget, params.thinking_message) == (expected, "enough")
    chat(client, reasoning_budget_message="stop")
    assert engine.calls[-1][1].thinking_message == "stop"


def test_plain_prompts_have_no_reasoning_to_limit(client: TestClient) -> None:
    body = {"prompt": "x", "thinking_token_budget": 5}
    error = failure(client.post("/v1/completions", json=body), 400)
    assert error["param"] == "thinking_token_budget" and "messages" in error["message"]


def test_reasoning_can_be_ended(client: TestClient, engine: FakeEngine) -> None:
    path = "/v1/chat/completions/control"
    reply = client.post(path, json={"id": "chatcmpl-1", "action": "reasoning_end"})
    assert reply.json() == {"id": "chatcmpl-1", "action": "reasoning_end", "applied": False}
    assert engine.told == ["chatcmpl-1"]
    assert failure(client.post(path, json={}), 400)["param"] == "id"
    assert failure(client.post(path, json={"id": "x", "action": "y"}), 400)["param"] == "action"


def test_reasoning_tokens_of_calls_and_without_thinking(
    client: TestClient, engine: FakeEngine
) -> None:
    def counted(**body: Any) -> int:
        return chat(client, **body)["usage"]["completion_tokens_details"]["reasoning_tokens"]

    engine.script = "hm " + CALL
    header = "hm " + CALL[: CALL.index("<parameter")].rstrip()
    assert counted(tools=[TOOL]) == len(engine.tokenizer.encode(header))
    assert counted(reasoning_effort="none") == 0
    chunks = events(
        client, "/v1/chat/completions", messages=USER, tools=[TOOL],
        stream_options={"include_usage": True},
    )  # fmt: skip
    details = chunks[-1]["usage"]["completion_tokens_details"]
    assert details["reasoning_tokens"] == counted(tools=[TOOL])


def test_echo_of_ids_that_are_none(client: TestClient) -> None:
    body = {"prompt": [6019365, -188, 46386570779], "echo": True}
    assert failure(client.post("/v1/completions", json=body), 400)["param"] == "prompt"


def test_all_methods_of_a_path_are_named(client: TestClient) -> None:
    for method in ("OPTIONS", "PUT"):
        response = client.request(method, "/v1/responses/x")
        assert "DELETE, GET" in failure(response, 405)["message"]
        assert response.headers["allow"] == "DELETE, GET"
