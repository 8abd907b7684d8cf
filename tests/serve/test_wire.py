"""Bodies to records: what a request means."""

import subprocess
import sys
from typing import Any

import pydantic
import pytest

from aprium.base.errors import RequestError
from aprium.base.records import Message, SamplingParams, ToolCall
from aprium.serve.wire import ChatRequest, CompletionRequest, describe_invalid


def chat(**body: Any) -> ChatRequest:
    return ChatRequest.model_validate({"messages": [{"role": "user", "content": "x"}], **body})


def test_messages() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": {"k": "é"}}}
    request = chat(
        messages=[
            {"role": "developer", "content": "be brief"},
            {"role": "user", "content": parts, "name": "me"},
            {"role": "assistant", "content": None, "reasoning": "r", "tool_calls": [call]},
            {"role": "tool", "content": "1", "tool_call_id": "c1"},
            {"role": "assistant", "content": "y", "reasoning_content": "s", "refusal": None},
        ]
    )
    assert request.records() == [
        Message(role="system", content="be brief"),
        Message(role="user", content="ab"),
        Message(
            role="assistant",
            reasoning="r",
            tool_calls=(ToolCall(name="f", arguments='{"k": "é"}', id="c1"),),
        ),
        Message(role="tool", content="1", tool_call_id="c1"),
        Message(role="assistant", content="y", reasoning="s"),
    ]


def test_sampling() -> None:
    request = chat(
        temperature=0.5, top_p=0.9, top_k=-1, min_p=0.1, seed=-4, stop="a", stop_token_ids=[5],
        min_tokens=3, max_tokens=9, max_completion_tokens=7, n=2, logprobs=True, top_logprobs=3,
        ignore_eos=True,
    )  # fmt: skip
    assert request.sampling({"temperature": 0.1, "top_k": 4}) == SamplingParams(
        temperature=0.5, top_p=0.9, top_k=0, min_p=0.1, seed=-4, stop=("a",), stop_token_ids=(5,),
        min_tokens=3, max_tokens=7, n=2, logprobs=3, ignore_eos=True,
    )  # fmt: skip
    assert chat().sampling({"top_k": 4}) == SamplingParams(max_tokens=None, top_k=4)
    assert chat(logprobs=True).sampling({}).logprobs == 0
    plain = CompletionRequest.model_validate({"prompt": "x", "echo": True, "logprobs": 1})
    assert plain.sampling({}) == SamplingParams(max_tokens=16, logprobs=1, prompt_logprobs=1)


def test_template_switches() -> None:
    assert chat().template_kwargs({"a": 1}) == {"a": 1}
    own = chat(chat_template_kwargs={"a": 2}, reasoning_effort="low")
    assert own.template_kwargs({"a": 1}) == {"a": 2, "reasoning_effort": "low", "low_effort": True}
    switches = chat(reasoning_effort="none").template_kwargs({"enable_thinking": True})
    assert switches["enable_thinking"] is False


def test_tools_keep_their_fields() -> None:
    tool = {"type": "function", "function": {"name": "f", "strict": True, "parameters": {}}}
    assert chat(tools=[tool]).tool_dicts() == [tool]
    assert chat(tools=[tool], tool_choice="none").tool_dicts() == []


@pytest.mark.parametrize("value", [0, 0.0, None])
def test_neutral_values_pass(value: Any) -> None:
    chat(presence_penalty=value, best_of=1, prompt_logprobs=None).refuse_unsupported()


@pytest.mark.parametrize("body", [{"length_penalty": 0}, {"truncate_prompt_tokens": 5}])
def test_other_values_are_refused(body: dict[str, Any]) -> None:
    with pytest.raises(RequestError) as caught:
        chat(**body).refuse_unsupported()
    assert caught.value.param == next(iter(body))


def test_invalid_bodies_are_described_in_one_line() -> None:
    with pytest.raises(pydantic.ValidationError) as caught:
        chat(stop=[["a" * 500]])
    message, param = describe_invalid(caught.value.errors())
    assert (param or "").startswith("stop")
    assert "\n" not in message and len(message) < 300


def test_import_is_light() -> None:
    code = (
        "import sys, aprium.serve.wire, aprium.serve.reply\n"
        "print([m for m in ('torch', 'fastapi', 'starlette') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
