"""Items say what messages say, there and back, and tools and tokens survive the way."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai.types.responses import ResponseFunctionToolCall, ResponseOutputMessage
from openai.types.responses.response_reasoning_item import ResponseReasoningItem

from aprium.base.errors import RequestError
from aprium.base.records import Message, ToolCall
from aprium.text.items import (
    Echo,
    chat_messages,
    chat_tool,
    item_tool,
    read_arguments,
    read_echo,
    read_items,
    split_echo,
    write_items,
)

TEXT = st.text(max_size=8)
CALLS = st.builds(
    ToolCall,
    name=st.text("abc", min_size=1, max_size=4),
    arguments=st.dictionaries(TEXT, st.integers(), max_size=2).map(json.dumps),
    id=st.text("xyz", min_size=1, max_size=4),
)
TURNS = st.builds(
    Message,
    role=st.just("assistant"),
    content=st.text(min_size=1, max_size=8),
    reasoning=st.none() | st.text(min_size=1, max_size=8),
    tool_calls=st.lists(CALLS, max_size=3).map(tuple),
)
SHOWN = st.builds(Message, role=st.sampled_from(["user", "system"]), content=TEXT) | st.builds(
    Message, role=st.just("tool"), content=TEXT, tool_call_id=st.text("xyz", min_size=1)
)


@given(st.lists(st.tuples(SHOWN, TURNS), max_size=4))
def test_messages_come_back_from_items(pairs: list[tuple[Message, Message]]) -> None:
    messages = [message for pair in pairs for message in pair]
    items = [item for n, message in enumerate(messages) for item in write_items(message, str(n))]
    assert list(read_items(json.loads(json.dumps(items)))) == messages


@given(TURNS)
def test_turns_are_items_of_the_vendors_own_types(message: Message) -> None:
    kinds = {
        "reasoning": ResponseReasoningItem,
        "message": ResponseOutputMessage,
        "function_call": ResponseFunctionToolCall,
    }
    for item in write_items(message, "x"):
        assert kinds[item["type"]].model_validate(item).model_dump(exclude_none=True) == item


def test_instructions_of_developers_and_texts() -> None:
    (message,) = read_items("hi")
    assert (message.role, message.content) == ("user", "hi")
    (message,) = read_items([{"role": "developer", "content": [{"type": "text", "text": "a"}]}])
    assert (message.role, message.content) == ("system", "a")


@pytest.mark.parametrize(
    ("item", "words"),
    [
        ({"role": "user", "content": [{"type": "input_image"}]}, "reads text only"),
        ({"role": "user", "content": 5}, "reads text only"),
        ({"role": "user", "content": ["x"]}, "reads text only"),
        ({"type": "web_search_call"}, "cannot be read here"),
        ({"type": "function_call", "arguments": "{}"}, "without a name"),
        ({"content": "x"}, "role is missing"),
    ],
)
def test_what_cannot_be_read(item: dict[str, Any], words: str) -> None:
    with pytest.raises(RequestError, match=words) as caught:
        chat_messages([item], 7)
    assert "input[7]" in str(caught.value)


def test_tools_there_and_back() -> None:
    tool = {"type": "function", "name": "f", "parameters": {"type": "object"}, "strict": True}
    assert item_tool(chat_tool(tool, 0)) == tool | {"description": None}
    chat = {"type": "function", "function": {"name": "g", "description": "a"}}
    assert chat_tool(item_tool(chat), 0) == chat
    with pytest.raises(RequestError, match=r"tools\[3\] is of type 'web_search'"):
        chat_tool({"type": "web_search"}, 3)
    assert [read_arguments(text) for text in ("", '{"a": 1}', "[]", "{")] == [
        {}, {"a": 1}, None, None,
    ]  # fmt: skip


def test_the_last_turn_with_tokens_counts() -> None:
    echo = Echo(prompt=(1, 2), generated=(3,), logprobs=(-0.5,))
    later = Echo(prompt=(1, 2, 3, 4), generated=(5, 6), logprobs=(-1.0, 0))
    turn = {"type": "message", "role": "assistant", "content": "x"}
    items = [turn | echo.fields(), {"role": "user"}, turn | later.fields(), {"role": "user"}]
    assert split_echo(items) == (later, 3) and later.tokens == (1, 2, 3, 4, 5, 6)
    assert split_echo(items[:2]) == (echo, 1) and split_echo([turn]) == (None, 0)
    for broken in ({"prompt_token_ids": "12"}, {"generation_token_ids": [True]}):
        with pytest.raises(RequestError, match=r"input\[0\]\..*echo all of"):
            read_echo(turn | echo.fields() | broken, "input[0]")
