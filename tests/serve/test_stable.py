"""Texts that change with every request, and schemas of the same tools."""

import json
import random
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from aprium.base.records import Message
from aprium.serve.stable import stable_messages, stable_text, stable_tools


def test_lines_that_change() -> None:
    for head in ("x-anthropic-billing-header: a=1; b=2\n", " X-Anthropic-Billing-Header : q\n"):
        assert stable_text(head + head + "You are\nhelpful") == "You are\nhelpful"
    assert stable_text("x-anthropic-billing-header: a") == ""
    for text in ("You are\nx-anthropic-billing-header: a\n", "x-other: 1\n", ""):
        assert stable_text(text) == text
    line = "x-anthropic-billing-header: a\nb"
    said = [Message(role="system", content=line), Message(role="user", content=line)]
    assert [m.content for m in stable_messages(said)] == ["b", line]


VALUES: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.integers() | st.text(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["type", "name", "a", "b", "c"]), inner)
    ),
)


def shuffled(value: Any, rng: random.Random) -> Any:
    if isinstance(value, dict):
        keys = list(value)
        rng.shuffle(keys)
        return {key: shuffled(value[key], rng) for key in keys}
    return [shuffled(item, rng) for item in value] if isinstance(value, list) else value


@given(st.lists(st.dictionaries(st.text(max_size=3), VALUES), max_size=3), st.randoms())
def test_schemas_of_any_order_are_written_alike(
    tools: list[dict[str, Any]], rng: random.Random
) -> None:
    once = stable_tools(tools)
    assert once == tools
    other = stable_tools([shuffled(tool, rng) for tool in tools])
    assert json.dumps(other) == json.dumps(once)
