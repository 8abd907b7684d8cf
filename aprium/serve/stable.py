"""Prompts that stay the same from turn to turn, so that what was computed of them is found again.

Coding agents put lines into the system prompt that change with every request and say nothing to
the model, such as a checksum of the request for billing; and clients whose maps have no order
write the schemas of the same tools differently each time. Either makes every prompt a new one
from its first lines on. The lines are taken out and keys of schemas are sorted; nothing else is
touched, and `--no-stable-prompts` leaves everything as it came.
"""

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

from aprium.base.records import Message

# Lines that clients are known to put at the head of a system prompt, anew for every request.
_VOLATILE = re.compile(
    r"\A(?:[ \t]*x-anthropic-billing-header[ \t]*:[^\n]*(?:\n|\Z))+",
    re.IGNORECASE,
)


def stable_text(text: str) -> str:
    """Return `text` without the lines at its head that change with every request."""
    return _VOLATILE.sub("", text)


def stable_messages(messages: Sequence[Message]) -> list[Message]:
    """Return `messages` with such lines taken out of system messages."""
    return [
        dataclasses.replace(m, content=stable_text(m.content))
        if m.role == "system" and m.content
        else m
        for m in messages
    ]


def stable_tools(tools: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return `tools`, in their order, with keys at every depth in one order.

    Type and name come first and descriptions before what they describe, as people write them;
    the rest by the alphabet.
    """
    return [_sorted(tool) for tool in tools]


_FIRST = {key: i for i, key in enumerate(("type", "function", "name", "description"))}


def _sorted(value: Any) -> Any:
    if isinstance(value, dict):
        keys = sorted(value, key=lambda key: (_FIRST.get(key, len(_FIRST)), key))
        return {key: _sorted(value[key]) for key in keys}
    if isinstance(value, list):
        return [_sorted(item) for item in value]
    return value
