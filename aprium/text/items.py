"""Items of the Responses form, as plain mappings: to messages and back, and the tokens they have.

Reasoning, text and calls that follow each other are one turn of the assistant. The last item of a
turn may say which tokens the turn was, in the fields that NeMo-Gym gave them: the prompt's ids, the
ids that were generated, and the log-probabilities of those. Who gets them echoes them unchanged, so
that the next prompt begins with exactly these tokens.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from aprium.base.errors import RequestError
from aprium.base.records import Message
from aprium.text.messages import read_message

Item = Mapping[str, Any]
TOKEN_FIELDS = ("prompt_token_ids", "generation_token_ids", "generation_log_probs")


@dataclass(frozen=True, slots=True, kw_only=True)
class Echo:
    """The tokens of one call of a model: its prompt, what it generated, and those' logarithms."""

    prompt: tuple[int, ...]
    generated: tuple[int, ...]
    logprobs: tuple[float, ...]

    @property
    def tokens(self) -> tuple[int, ...]:
        """Return prompt and generation as one sequence."""
        return self.prompt + self.generated

    def fields(self) -> dict[str, list[Any]]:
        """Return the fields that an item carries."""
        values = (list(self.prompt), list(self.generated), list(self.logprobs))
        return dict(zip(TOKEN_FIELDS, values, strict=True))


def read_echo(item: Item, where: str) -> Echo | None:
    """Return the tokens that an item carries, None where it has none.

    Raises RequestError for fields that are incomplete or do not fit each other.
    """
    given = [name for name in TOKEN_FIELDS if item.get(name) is not None]
    if not given:
        return None
    for name in TOKEN_FIELDS:
        kind = float if name == TOKEN_FIELDS[2] else int
        values = item.get(name)
        fits = isinstance(values, list) and all(
            type(value) is kind or (kind is float and type(value) is int) for value in values
        )
        if not fits:
            raise RequestError(
                f"{where}.{name} is not a list of numbers: echo all of {', '.join(TOKEN_FIELDS)} "
                "as they came",
                param="input",
            )
    prompt, generated, logprobs = (tuple(item[name]) for name in TOKEN_FIELDS)
    if len(generated) != len(logprobs) or not prompt:
        raise RequestError(
            f"{where} has {len(prompt)} prompt tokens, {len(generated)} generated ones and "
            f"{len(logprobs)} log-probabilities: echo them as they came",
            param="input",
        )
    return Echo(prompt=prompt, generated=generated, logprobs=logprobs)


def split_echo(items: Sequence[Item]) -> tuple[Echo | None, int]:
    """Return the tokens of the last turn that carries them, and how many items those cover.

    Raises RequestError where the turn goes on after them, as it may not.
    """
    for index in reversed(range(len(items))):
        echo = read_echo(items[index], f"input[{index}]")
        if echo is None:
            continue
        after = index + 1
        if after < len(items) and is_assistants(items[after]):
            raise RequestError(
                f"input[{index}] has token ids and input[{after}] is of the same turn: they belong "
                "on the last item of a turn",
                param="input",
            )
        return echo, after
    return None, 0


def is_assistants(item: Item) -> bool:
    """Say whether an item is part of a turn of the assistant."""
    kind = item.get("type")
    if kind in (None, "message"):
        return item.get("role") == "assistant"
    return kind in ("reasoning", "function_call")


def chat_messages(items: str | Sequence[Item], first: int = 0) -> list[dict[str, Any]]:
    """Return items as messages in the OpenAI form; raises RequestError for what cannot be read.

    `first` is the number of the first item, for messages of errors.
    """
    if isinstance(items, str):
        return [{"role": "user", "content": items}]
    found: list[dict[str, Any]] = []
    turn: dict[str, Any] | None = None  # of the assistant, which may have several items
    for index, item in enumerate(items, first):
        where = f"input[{index}]"
        if not is_assistants(item):
            turn = None
            found.append(_message(item, where))
            continue
        if turn is None:
            turn = {"role": "assistant", "content": None}
            found.append(turn)
        for key, value in _assistant_part(item, where).items():
            before = turn.get(key)
            turn[key] = value if before is None else before + value
    return found


def read_items(items: str | Sequence[Item]) -> tuple[Message, ...]:
    """Return items as records; raises RequestError as `chat_messages` does."""
    return tuple(read_message(message) for message in chat_messages(items))


def _assistant_part(item: Item, where: str) -> dict[str, Any]:
    """Return what an item adds to a turn of the assistant."""
    kind = item.get("type")
    if kind == "reasoning":
        content = item.get("content")
        return {"reasoning": _text(content if content else item.get("summary"), where)}
    if kind == "function_call":
        name, arguments = item.get("name"), item.get("arguments")
        if not name or not isinstance(name, str):
            raise RequestError(f"{where} is a function_call without a name", param="input")
        function = {"name": name, "arguments": arguments or "{}"}
        return {"tool_calls": [{"id": item.get("call_id"), "function": function}]}
    return {"content": _text(item.get("content"), where)}


def _message(item: Item, where: str) -> dict[str, Any]:
    """Return the message of an item of anybody but the assistant."""
    kind, role = item.get("type"), item.get("role")
    if kind == "function_call_output":
        content = _text(item.get("output"), f"{where}.output")
        return {"role": "tool", "tool_call_id": item.get("call_id"), "content": content}
    if kind not in (None, "message"):
        raise RequestError(
            f"{where} is of type {kind!r}, which cannot be read here: send messages, "
            "reasoning, function_call and function_call_output",
            param="input",
        )
    if not isinstance(role, str):
        raise RequestError(f"{where}.role is missing: say whose message it is", param="input")
    content = _text(item.get("content"), where)
    return {"role": "system" if role == "developer" else role, "content": content}


_PARTS = (
    *("input_text", "output_text", "text", "refusal"),
    *("reasoning_text", "summary_text"),
)


def _text(content: Any, where: str) -> str:
    """Return the text of content; raises RequestError for parts that are none."""
    if content is None or isinstance(content, str):
        return content or ""
    texts = []
    for index, part in enumerate(content if isinstance(content, Sequence) else [content]):
        kind = part.get("type") if isinstance(part, Mapping) else None
        text = part.get("refusal" if kind == "refusal" else "text") if kind in _PARTS else None
        if not isinstance(text, str):
            raise RequestError(
                f"{where}.content[{index}] is of type {kind!r}: this family reads text only",
                param="input",
            )
        texts.append(text)
    return "".join(texts)


def write_items(message: Message, name: str) -> list[dict[str, Any]]:
    """Return a message as items, whose ids begin with `name`."""
    if message.role == "tool":
        return [
            {
                "id": f"fco_{name}", "type": "function_call_output", "status": "completed",
                "call_id": message.tool_call_id or "", "output": message.content or "",
            }
        ]  # fmt: skip
    if message.role != "assistant":
        return [{"type": "message", "role": message.role, "content": message.content or ""}]
    found: list[dict[str, Any]] = []
    if message.reasoning:
        summary = [{"type": "summary_text", "text": message.reasoning}]
        found.append({"id": f"rs_{name}", "type": "reasoning", "summary": summary})
    if message.content or not message.tool_calls:
        part = {"type": "output_text", "text": message.content or "", "annotations": []}
        found.append(
            {
                "id": f"msg_{name}", "type": "message", "role": "assistant",
                "status": "completed", "content": [part],
            }
        )  # fmt: skip
    for index, call in enumerate(message.tool_calls):
        found.append(
            {
                "id": f"fc_{name}_{index}", "type": "function_call", "status": "completed",
                "call_id": call.id or f"call_{name}_{index}",
                "name": call.name, "arguments": call.arguments,
            }
        )  # fmt: skip
    return found


_TOOL_KEYS = ("name", "description", "parameters", "strict")


def chat_tool(tool: Mapping[str, Any], index: int) -> dict[str, Any]:
    """Return a tool of the Responses form in that of a chat; raises RequestError for others."""
    if tool.get("type") != "function":
        raise RequestError(
            f"tools[{index}] is of type {tool.get('type')!r}, which only its vendor can run: "
            "offer functions",
            param="tools",
        )
    function = {key: tool[key] for key in _TOOL_KEYS if tool.get(key) is not None}
    return {"type": "function", "function": function}


def item_tool(tool: Mapping[str, Any]) -> dict[str, Any]:
    """Return a tool of a chat in the Responses form, where no key is left out."""
    return {"type": "function", **{key: tool["function"].get(key) for key in _TOOL_KEYS}}


def read_arguments(text: str) -> dict[str, Any] | None:
    """Return the arguments of a call as an object, None where they are no JSON object."""
    try:
        value = json.loads(text or "{}")
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None
