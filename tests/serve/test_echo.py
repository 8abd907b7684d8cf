"""Tokens over /v1/responses: given when asked for, and spliced as they were when they come back."""

import json
from collections.abc import Callable
from typing import Any

import pytest
from starlette.testclient import TestClient

from aprium.base.records import Completion, Message
from aprium.checkpoint.hub import PICO_DIR
from aprium.envs.dialogue import ChatFormat, Dialogue
from aprium.text.chat import ChatTemplate
from aprium.text.items import TOKEN_FIELDS
from aprium.text.tokenizer import Tokenizer
from tests.serve.test_app import failure
from tests.serve.test_responses import TOOL, create, merge, stream

Serve = Callable[..., TestClient]
IDS = {"return_token_ids": True, "store": False}
WEATHER = "What is the weather in Paris?"


def tokens_of(response: dict[str, Any]) -> tuple[list[int], list[int], list[float]]:
    """Return the tokens of a call, which are on its last item and no other."""
    *others, last = response["output"]
    assert not any(name in item for item in others for name in TOKEN_FIELDS)
    prompt, generated, logprobs = (last[name] for name in TOKEN_FIELDS)
    return prompt, generated, logprobs


@pytest.fixture(scope="module")
def pico_chat() -> ChatFormat:
    return ChatFormat(tokenizer=Tokenizer.load(PICO_DIR), template=ChatTemplate.load(PICO_DIR))


def test_the_tokens_of_a_call_come_when_asked_for(serve: Serve) -> None:
    client = serve()
    ask = {"reasoning": {"effort": "high"}, "max_output_tokens": 300}
    plain = create(client, "What is 3 + 4?", store=False, **ask)
    assert not any(name in item for item in plain["output"] for name in TOKEN_FIELDS)
    whole = create(client, "What is 3 + 4?", **IDS, **ask)
    prompt, generated, logprobs = tokens_of(whole)
    assert len(whole["output"]) == 2 and len(generated) == whole["usage"]["output_tokens"]
    streamed = merge_tokens(stream(client, "What is 3 + 4?", **IDS, **ask))
    assert tokens_of(streamed) == (prompt, generated, logprobs)
    said = client.post(
        "/v1/completions",
        json={
            "prompt": prompt, "max_tokens": 300, "temperature": 0, "logprobs": 0,
            "return_token_ids": True,
        },
    ).json()["choices"][0]  # fmt: skip
    assert said["token_ids"] == generated
    assert said["logprobs"]["token_logprobs"] == pytest.approx(logprobs, abs=1e-6)


def merge_tokens(chunks: list[dict[str, Any]]) -> dict[str, Any]:
    """Put a stream together, whose items get their tokens when they are done."""
    added = {name: value for c in chunks if c["type"] == "response.output_item.done"
             for name, value in c["item"].items() if name in TOKEN_FIELDS}  # fmt: skip
    bare = json.loads(json.dumps(chunks))
    for chunk in bare:
        response = chunk.get("response") or {"output": [chunk["item"]] if "item" in chunk else []}
        for item in response["output"]:
            for name in TOKEN_FIELDS:
                item.pop(name, None)
    merged = merge(bare)
    merged["output"][-1] |= added
    assert merged["output"] == chunks[-1]["response"]["output"]
    return merged


def test_echoed_tokens_are_the_prefix_as_in_an_episode(serve: Serve, pico_chat: ChatFormat) -> None:
    """Turn by turn the server's tokens are those of a dialogue played here, token for token."""
    client, odd = serve(), pico_chat.tokenizer.encode
    tool = {"type": "function", "function": {k: v for k, v in TOOL.items() if k != "type"}}
    dialogue = Dialogue(pico_chat, [tool])
    items: list[dict[str, Any]] = [{"role": "user", "content": WEATHER}]
    dialogue.show([Message(role="user", content=WEATHER)])
    for turn in range(3):
        response = create(
            client, items, tools=[TOOL], tool_choice="required", parallel_tool_calls=False,
            max_output_tokens=120, reasoning={}, **IDS,
        )  # fmt: skip
        prompt, generated, logprobs = tokens_of(response)
        assert prompt == dialogue.tokens
        (*_, call) = response["output"]
        if turn == 1:  # spelled as no tokenizer would: what is echoed counts, not its text
            text = pico_chat.tokenizer.decode(generated, skip_special_tokens=False)
            end = text.index("<tool_call>")
            single = [t for letter in text[:end] if letter not in "<>" for t in odd(letter)]
            generated = [*single, *odd(text[end:])]
            logprobs = [-0.5] * len(generated)
            call |= dict(zip(TOKEN_FIELDS, (prompt, generated, logprobs), strict=True))
        dialogue.hear(
            Completion(text="", tokens=tuple(generated), logprobs=tuple(logprobs), finish="stop")
        )
        output = {
            "type": "function_call_output",
            "call_id": call["call_id"],
            "output": '{"sky": "grey"}',
        }
        items += [*response["output"], output]
        dialogue.show([Message(role="tool", content=output["output"], tool_call_id="x")])
    response = create(client, items, tools=[TOOL], max_output_tokens=5, reasoning={}, **IDS)
    assert tokens_of(response)[0] == dialogue.tokens
    assert response["status"] == "incomplete"


def test_an_answer_that_was_cut_is_ended(serve: Serve) -> None:
    client = serve()
    first = create(client, "Who are you?", max_output_tokens=3, **IDS)
    items = [{"role": "user", "content": "Who are you?"}, *first["output"]]
    second = create(client, [*items, {"role": "user", "content": "Go on."}], **IDS)
    prompt, generated, _ = tokens_of(first)
    after = tokens_of(second)[0]
    assert after[: len(prompt) + 3] == prompt + generated
    end = Tokenizer.load(PICO_DIR).id_of("<|im_end|>")
    assert after[len(prompt) + 3] == end


def test_an_empty_answer_has_its_tokens_on_an_empty_message(
    client: TestClient, engine: Any
) -> None:
    engine.script = ""
    response = client.post("/v1/responses", json={"input": "x", **IDS, "store": False}).json()
    (item,) = response["output"]
    assert item["type"] == "message" and item["content"][0]["text"] == ""
    assert len(tokens_of(response)[1]) == 1


ECHO = {"prompt_token_ids": [1, 2], "generation_token_ids": [3], "generation_log_probs": [-0.5]}
SAID = {"type": "message", "role": "assistant", "content": "hm"}
NEXT = {"role": "user", "content": "more"}


@pytest.mark.parametrize(
    ("items", "words"),
    [
        ([SAID | ECHO | {"generation_log_probs": [-0.5, -1.0]}, NEXT], "2 log-probabilities"),
        ([SAID | ECHO | {"prompt_token_ids": []}, NEXT], "0 prompt tokens"),
        ([SAID | {"prompt_token_ids": [1]}, NEXT], "generation_token_ids is not a list"),
        ([SAID | ECHO], "ends with the model's own turn"),
        ([SAID | ECHO, SAID, NEXT], r"input\[1\] is of the same turn"),
        ([SAID | ECHO | {"prompt_token_ids": [1.5]}, NEXT], "prompt_token_ids"),
        ([SAID | ECHO | {"generation_token_ids": [99_999]}, NEXT], "not in the vocabulary"),
    ],
)
def test_tokens_that_cannot_be_spliced(
    serve: Serve, items: list[dict[str, Any]], words: str
) -> None:
    response = serve().post("/v1/responses", json={"input": items})
    with pytest.raises(AssertionError, match=words):
        raise AssertionError(failure(response, 400)["message"])


def test_tokens_are_all_that_was_said(serve: Serve) -> None:
    body = {"input": [SAID | ECHO, NEXT], "previous_response_id": "resp_x"}
    client = serve()
    assert failure(client.post("/v1/responses", json=body), 400)["param"] == "previous_response_id"
    body = {"input": [SAID | ECHO, NEXT], "max_output_tokens": 2}
    for more in ({"store": True}, {"background": True}):
        assert failure(client.post("/v1/responses", json=body | more), 400)["param"] == "store"
    response = client.post("/v1/responses", json=body).json()
    assert response["store"] is False
    failure(client.get(f"/v1/responses/{response['id']}"), 404)
