"""Defects: what is seen in a turn, and that an episode has them with their tokens."""

import asyncio
import random
from dataclasses import replace

import pytest

from aprium.base.records import Message, ToolCall
from aprium.envs.defects import DEFECTS, find_defects
from aprium.envs.dialogue import ChatFormat
from aprium.envs.env import run_episode
from aprium.envs.tool_use import ToolUse
from tests.scripted import ScriptedPolicy, written


def turn(content: str | None, reasoning: str | None = None, *, call: bool = False) -> Message:
    calls = (ToolCall(name="f", arguments="{}"),) if call else ()
    return Message(role="assistant", content=content, reasoning=reasoning, tool_calls=calls)


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        (turn("42", "six times seven"), ()),
        (turn(None, "let me look", call=True), ()),
        (turn("a < b and c > d"), ()),
        (turn(None, "and then"), ("empty_answer",)),
        (turn("  \n", None), ("empty_answer",)),
        (turn("42</think>42"), ("malformed_reasoning",)),
        (turn("42", "so <think> again"), ("malformed_reasoning",)),
        (turn("<tool_call>f(x)"), ("malformed_call",)),
        (turn("42", "I call <function=f>"), ("malformed_call",)),
        (turn("It is 42.\n", "It is 42."), ("repeated_reasoning",)),
        (turn("<tool_call></think>"), ("malformed_call", "malformed_reasoning")),
    ],
)
def test_what_is_seen_in_a_turn(reply: Message, expected: tuple[str, ...]) -> None:
    assert find_defects(reply) == expected
    assert set(expected) <= set(DEFECTS)


def test_an_episode_has_them_with_their_tokens(chat: ChatFormat) -> None:
    quiet = replace(chat, thinking=False)
    task = ToolUse(kinds=("total",), failures=0).draw(random.Random(3))
    unknown = Message(role="assistant", tool_calls=(ToolCall(name="fly", arguments="{}"),))
    turns = [task.solution[0], unknown]
    texts = [written(quiet, task.messages, one, task.tools) for one in turns]
    texts.append("Answer: 1</think>")  # which no template would write
    family = ToolUse(kinds=("total",))
    found = asyncio.run(run_episode(family.start(task), ScriptedPolicy(quiet, texts), quiet))
    assert [what for _, _, what in found.defects] == ["invalid_call", "malformed_reasoning"]
    assert found.error is None and found.parts["invalid_calls"] == 1.0
    for (begin, end, _), text in zip(found.defects, texts[1:], strict=True):
        assert all(found.sampled[begin:end]) and not found.sampled[begin - 1]
        shown = quiet.tokenizer.decode(list(found.tokens[begin:end]), skip_special_tokens=False)
        assert shown == f"{text}<|im_end|>"
