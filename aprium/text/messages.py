"""Messages in the OpenAI form, as plain mappings, to `Message` records."""

import json
from collections.abc import Mapping
from typing import Any

from aprium.base.errors import RequestError
from aprium.base.records import Message, ToolCall


def read_message(data: Message | Mapping[str, Any]) -> Message:
    """Read a message in the OpenAI form; raises RequestError naming what is wrong with it."""
    if isinstance(data, Message):
        return data
    role = data.get("role")
    if not isinstance(role, str):
        raise RequestError(f"message {dict(data)!r} has no role", param="messages")
    return Message(
        role=role,
        content=_read_content(data.get("content")),
        reasoning=data.get("reasoning") or data.get("reasoning_content"),
        tool_calls=tuple(_read_tool_call(call) for call in data.get("tool_calls") or ()),
        tool_call_id=data.get("tool_call_id"),
    )


def _read_content(content: Any) -> str | None:
    """Read a text, or a list of text parts."""
    if content is None or isinstance(content, str):
        return content
    if isinstance(content, list) and all(
        isinstance(part, Mapping) and isinstance(part.get("text"), str) for part in content
    ):
        return "".join(part["text"] for part in content)
    raise RequestError(
        f"message content {content!r} is not text: this family reads text only", param="messages"
    )


def _read_tool_call(data: Any) -> ToolCall:
    if isinstance(data, ToolCall):
        return data
    call = data.get("function", data) if isinstance(data, Mapping) else {}
    name, arguments = call.get("name"), call.get("arguments", "{}")
    if not isinstance(name, str):
        raise RequestError(f"tool call {data!r} has no function name", param="messages")
    if not isinstance(arguments, str):
        arguments = json.dumps(arguments, ensure_ascii=False)
    return ToolCall(name=name, arguments=arguments, id=data.get("id"))
