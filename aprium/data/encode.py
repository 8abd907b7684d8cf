"""Text and conversations into `Sample`s: which tokens there are and which of them are learned.

A document is learned from its second token on, and ends with the end-of-text token, so that the
model learns to stop. In a conversation only what the assistant itself generates is learned: the
turn's text and its closing tag, not the header or the opening of the reasoning, which the prompt
supplies when the model is used. Prompt and reply are tokenised apart for the same reason.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from aprium.base.errors import DataError
from aprium.base.records import Conversation, Message, Sample, ToolCall

# A reply as the family's templates write it: header and opening tags, then what was generated.
_REPLY = re.compile(
    r"(?P<prompt><\|im_start\|>assistant\n(?:<think>\n|<think></think>)?)"
    r"(?P<reply>.*?<\|im_end\|>)",
    re.DOTALL,
)
_CONTROL = ("<|im_start|>", "<|im_end|>")


class TextEncoder(Protocol):
    """The part of a tokenizer that is used here."""

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text`, control tokens in it included."""
        ...


class Renderer(Protocol):
    """The part of a chat template that is used here."""

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] = ...,
        add_generation_prompt: bool = ...,
        **options: Any,
    ) -> str:
        """Return the conversation as one string."""
        ...


def encode_text(text: str, tokenizer: TextEncoder, *, end_token: int, domain: str = "") -> Sample:
    """Turn a document into a sample that ends with `end_token`; all but index 0 has weight 1."""
    tokens = (*tokenizer.encode(text), end_token)
    return Sample(tokens=tokens, ce_weight=(0.0,) + (1.0,) * (len(tokens) - 1), domain=domain)


def encode_conversation(
    conversation: Conversation, tokenizer: TextEncoder, template: Renderer
) -> Sample:
    """Turn a conversation into a sample whose weight is 1 on what the assistant generated.

    Raises DataError when there is no reply to learn from, or when a turn contains the control
    tokens that mark turns.
    """
    for message in conversation.messages:
        content = message.content or ""
        if any(tag in content for tag in _CONTROL):
            raise DataError(f"a {message.role} turn contains a control token: {content[:80]!r}")
    text = template.render(conversation.messages, conversation.tools, add_generation_prompt=False)
    tokens: list[int] = []
    weights: list[float] = []
    end = 0
    for match in _REPLY.finditer(text):
        prompt = tokenizer.encode(text[end : match.end("prompt")])
        reply = tokenizer.encode(match["reply"])
        tokens += prompt + reply
        weights += [0.0] * len(prompt) + [1.0] * len(reply)
        end = match.end()
    if not end:
        raise DataError(f"a conversation has no assistant turn to learn from: {text[:80]!r}")
    rest = tokenizer.encode(text[end:])
    tokens += rest
    weights += [0.0] * len(rest)
    return Sample(tokens=tuple(tokens), ce_weight=tuple(weights), domain=conversation.domain)


def split_sample(sample: Sample, max_length: int) -> list[Sample]:
    """Cut `sample` into consecutive pieces of at most `max_length` tokens.

    Each piece after the first begins with the last token of the one before, with weight 0, so
    that every token but the very first is predicted in exactly one piece and none is lost. Pieces
    with nothing to learn in them are left out.
    """
    if max_length < 2:
        raise DataError(f"max_length is {max_length}: it must be at least 2")
    pieces = []
    for start in range(0, max(1, len(sample.tokens) - 1), max_length - 1):
        tokens = sample.tokens[start : start + max_length]
        weights = (0.0, *sample.ce_weight[start + 1 : start + max_length])
        if any(weights):
            pieces.append(Sample(tokens=tokens, ce_weight=weights, domain=sample.domain))
    return pieces


def read_conversation(record: Mapping[str, Any], *, where: str, domain: str = "") -> Conversation:
    """Build a conversation from a JSON record `{"messages": [...], "tools": [...]}`.

    Messages have the chat API's form; reasoning is under `reasoning_content` or `reasoning`.
    `where` names the record in the DataError raised when it has another shape.
    """
    messages, tools = record.get("messages"), record.get("tools") or []
    if not isinstance(messages, list) or not messages or not isinstance(tools, list):
        raise DataError(f'{where}: expected {{"messages": [...], "tools": [...]}}')
    turns = tuple(_read_message(message, where) for message in messages)
    return Conversation(messages=turns, tools=tuple(tools), domain=domain)


def _read_message(message: Any, where: str) -> Message:
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise DataError(f"{where}: a message must be an object with a role, not {message!r}")
    texts = {
        "content": message.get("content"),
        "reasoning": message.get("reasoning_content", message.get("reasoning")),
        "tool_call_id": message.get("tool_call_id"),
    }
    for key, value in texts.items():
        if value is not None and not isinstance(value, str):
            raise DataError(f"{where}: {key} must be a string, not {value!r}")
    calls = tuple(_read_call(call, where) for call in message.get("tool_calls") or ())
    return Message(role=message["role"], tool_calls=calls, **texts)


def _read_call(call: Any, where: str) -> ToolCall:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise DataError(f"{where}: a tool call must hold function.name, not {call!r}")
    if not isinstance(function.get("arguments"), str):
        raise DataError(f"{where}: function.arguments must be JSON text, not {function!r}")
    return ToolCall(name=function["name"], arguments=function["arguments"], id=call.get("id"))
