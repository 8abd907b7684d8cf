"""Messages are read in each of their spellings, and what is none is refused as a bad request."""

import datetime
from typing import Any

import pytest

from aprium.base.errors import RequestError
from aprium.base.records import Message, ToolCall
from aprium.text.messages import read_message


def test_spellings() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": {"é": 1}}}
    read = ToolCall(name="f", arguments='{"é": 1}', id="1")
    for calls in ([call], (call,), [read], [{"id": "1", **call["function"]}]):  # type: ignore[dict-item]
        found = read_message({"role": "assistant", "content": None, "tool_calls": calls})
        assert found == Message(role="assistant", tool_calls=(read,))
    for more in ({"reasoning": "x"}, {"reasoning": "", "reasoning_content": "x"}):
        found = read_message({"role": "assistant", "content": [{"text": "a"}], **more})
        assert found == Message(role="assistant", content="a", reasoning="x")
    empty = {"reasoning": None, "reasoning_content": None, "tool_calls": None, "weight": 1}
    assert read_message({"role": "user", **empty}) == Message(role="user")


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ({"role": 5}, "has no role"),
        ({"content": 5}, "content 5 is not text"),
        ({"tool_calls": 5}, "tool_calls 5 is not a list"),
        ({"tool_calls": "f"}, "tool_calls 'f' is not a list"),
        ({"tool_calls": {"name": "f"}}, "tool_calls {.*} is not a list"),
        ({"tool_calls": ["f"]}, "tool call 'f' has no function name"),
        ({"tool_calls": [{"function": "f"}]}, "tool call {'function': 'f'} has no function name"),
        ({"tool_calls": [{"name": "f", "arguments": {"x": datetime.date.max}}]}, "of f cannot be"),
        ({"reasoning": 5}, "reasoning 5 is not text"),
        ({"reasoning": "x", "reasoning_content": ["a"]}, "reasoning_content .* is not text"),
        ({"reasoning": 0, "reasoning_content": "x"}, "reasoning 0 is not text"),
    ],
)
def test_what_is_no_message(data: dict[str, Any], words: str) -> None:
    with pytest.raises(RequestError, match=words) as found:
        read_message({"role": "assistant", **data})
    assert found.value.param == "messages"
