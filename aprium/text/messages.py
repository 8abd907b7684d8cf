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
    calls = data.get("tool_calls")
    if calls is not None and not isinstance(calls, (list, tuple)):
        raise RequestError(
            f"tool_calls {calls!r} is not a list: give a list of calls, or leave it out",
            param="messages",
        )
    reasonings = [_read_text(data, name) for name in ("reasoning", "reasoning_content")]
    return Message(
        role=role,
        content=_read_content(data.get("content")),
        reasoning=reasonings[0] or reasonings[1],
        tool_calls=tuple(_read_tool_call(call) for call in calls or ()),
        tool_call_id=data.get("tool_call_id"),
    )


def _read_text(data: Mapping[str, Any], name: str) -> str | None:
    value = data.get(name)
    if value is not None and not isinstance(value, str):
        raise RequestError(
            f"{name} {value!r} is not text: give a string, or leave it out", param="messages"
        )
    return value


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
    call = data.get("function", data) if isinstance(data, Mapping) else None
    name = call.get("name") if isinstance(call, Mapping) else None
    if not isinstance(call, Mapping) or not isinstance(name, str):
        raise RequestError(f"tool call {data!r} has no function name", param="messages")
    arguments = call.get("arguments", "{}")
    if not isinstance(arguments, str):
        try:
            arguments = json.dumps(arguments, ensure_ascii=False)
        except (TypeError, ValueError) as error:
            raise RequestError(
                f"arguments {arguments!r} of {name} cannot be JSON: {error}", param="messages"
            ) from error
    return ToolCall(name=name, arguments=arguments, id=data.get("id"))
