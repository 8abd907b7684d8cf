"""Requests of Anthropic's Messages API, and what they are as a chat request.

Blocks become the messages, tool calls and tool results that the chat template knows. What this
family cannot read or do (images, tools that run at the vendor's) is refused by name; hints about
caching and billing are ignored. No torch here.
"""

from collections.abc import Iterator, Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictFloat, StrictInt, StrictStr

from aprium.base.errors import RequestError
from aprium.serve.wire import ChatRequest


class _Lenient(BaseModel):
    model_config = ConfigDict(extra="allow", protected_namespaces=())


class Block(_Lenient):
    """A part of a message, of any type; which fields it has depends on that."""

    type: StrictStr
    text: StrictStr | None = None
    thinking: StrictStr | None = None
    id: StrictStr | None = None
    name: StrictStr | None = None
    input: dict[str, Any] | None = None
    tool_use_id: StrictStr | None = None
    content: "StrictStr | list[Block] | None" = None


class MessageParam(_Lenient):
    """One message."""

    role: Literal["user", "assistant", "system"]
    content: StrictStr | list[Block]


class ToolParam(_Lenient):
    """A tool; `input_schema` is that of its arguments."""

    name: StrictStr = Field(min_length=1)
    type: StrictStr | None = None
    description: StrictStr | None = None
    input_schema: dict[str, Any] | None = None
    strict: StrictBool | None = None


class ToolChoice(_Lenient):
    """Which tool is to be called."""

    type: Literal["auto", "any", "tool", "none"]
    name: StrictStr | None = None
    disable_parallel_tool_use: StrictBool = False


class Thinking(_Lenient):
    """Whether to reason first, and for how many tokens at most."""

    type: Literal["enabled", "disabled", "adaptive", "between_tools"]
    budget_tokens: StrictInt | None = Field(default=None, ge=0)
    display: Literal["summarized", "omitted"] | None = None


class OutputConfig(_Lenient):
    """How hard to try, and which form the answer must have."""

    effort: StrictStr | None = None
    format: dict[str, Any] | None = None


class CountTokensRequest(_Lenient):
    """The body of /v1/messages/count_tokens."""

    model: StrictStr | None = None
    messages: list[MessageParam] = Field(min_length=1)
    system: StrictStr | list[Block] | None = None
    tools: list[ToolParam] | None = None
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    mcp_servers: list[Any] | None = None

    def to_chat(self, defaults: Mapping[str, Any]) -> ChatRequest:
        """Return the same as a chat request; `defaults` are the template's switches."""
        return ChatRequest.model_validate(self._fields(defaults))

    def _fields(self, defaults: Mapping[str, Any]) -> dict[str, Any]:
        if self.mcp_servers:
            raise RequestError(
                "mcp_servers are called by the vendor's servers: connect them in the client and "
                "offer their tools",
                param="mcp_servers",
            )
        messages = [{"role": "system", "content": text} for text in self._system()]
        for index, message in enumerate(self.messages):
            messages += _convert(message, f"messages[{index}]")
        fields: dict[str, Any] = {"model": self.model, "messages": messages}
        if self.tools:
            fields["tools"] = [_tool(tool, index) for index, tool in enumerate(self.tools)]
        if self.tool_choice is not None:
            fields |= _choice(self.tool_choice)
        return fields | self._thinking(defaults)

    def _system(self) -> list[str]:
        """Return the system prompt, as one text if there is one."""
        if isinstance(self.system, str):
            return [self.system]
        texts = [_text_of(block, f"system[{i}]") for i, block in enumerate(self.system or ())]
        return ["\n".join(texts)] if texts else []

    def _thinking(self, defaults: Mapping[str, Any]) -> dict[str, Any]:
        """Return the fields that say how to reason: without `thinking`, not at all."""
        fields: dict[str, Any] = {}
        asked = self.thinking
        if asked is None:
            on = bool(defaults.get("enable_thinking", False))
        else:
            on = asked.type in ("enabled", "adaptive")
            fields["thinking_token_budget"] = asked.budget_tokens
            fields["include_reasoning"] = asked.display != "omitted"
        fields["chat_template_kwargs"] = {"enable_thinking": on}
        effort = self.output_config.effort if self.output_config is not None else None
        if effort is not None and on:
            fields["reasoning_effort"] = effort
        return fields


class MessagesRequest(CountTokensRequest):
    """The body of /v1/messages."""

    max_tokens: StrictInt = Field(ge=0)
    stream: StrictBool = False
    temperature: StrictFloat | None = None
    top_p: StrictFloat | None = None
    top_k: StrictInt | None = None
    stop_sequences: list[StrictStr] | None = None
    output_format: dict[str, Any] | None = None
    cache_salt: StrictStr = ""
    priority: StrictInt = 0

    def _fields(self, defaults: Mapping[str, Any]) -> dict[str, Any]:
        fields = super()._fields(defaults) | {
            "max_tokens": self.max_tokens,
            "stream": self.stream,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "stop": self.stop_sequences,
            "cache_salt": self.cache_salt,
            "priority": self.priority,
        }
        form = self.output_format
        if form is None and self.output_config is not None:
            form = self.output_config.format
        if form is not None:
            if form.get("type") != "json_schema" or not isinstance(form.get("schema"), Mapping):
                raise RequestError(
                    'the format must be {"type": "json_schema", "schema": ...}',
                    param="output_config.format",
                )
            schema = {"name": "answer", "schema": form["schema"]}
            fields["response_format"] = {"type": "json_schema", "json_schema": schema}
        return fields


def _convert(message: MessageParam, where: str) -> Iterator[dict[str, Any]]:
    """Yield a message as OpenAI's messages: results of tools are messages of their own there."""
    if isinstance(message.content, str):
        yield {"role": message.role, "content": message.content}
        return
    texts: list[str] = []
    reasoning: list[str] = []
    calls: list[dict[str, Any]] = []
    for index, block in enumerate(message.content):
        place = f"{where}.content[{index}]"
        if block.type == "tool_result" and message.role == "user":
            if texts:
                yield {"role": "user", "content": "\n".join(texts)}
                texts = []
            yield _result(block, place)
        elif block.type == "thinking" and message.role == "assistant":
            reasoning.append(block.thinking or "")
        elif block.type == "redacted_thinking" and message.role == "assistant":
            continue
        elif block.type == "tool_use" and message.role == "assistant":
            calls.append(_call(block, place))
        else:
            texts.append(_text_of(block, place))
    if message.role == "assistant":
        yield {
            "role": "assistant",
            "content": "".join(texts) or None,
            "reasoning": "".join(reasoning) or None,
            "tool_calls": calls or None,
        }
    elif texts:
        yield {"role": message.role, "content": "\n".join(texts)}


def _call(block: Block, where: str) -> dict[str, Any]:
    if not block.name:
        raise RequestError(f"{where} is a tool_use without a name", param="messages")
    return {"id": block.id, "function": {"name": block.name, "arguments": block.input or {}}}


def _result(block: Block, where: str) -> dict[str, Any]:
    content = block.content
    if not isinstance(content, str):
        parts = enumerate(content or ())
        content = "\n".join(_text_of(part, f"{where}.content[{i}]") for i, part in parts)
    return {"role": "tool", "tool_call_id": block.tool_use_id, "content": content}


def _text_of(block: Block, where: str) -> str:
    """Return the text of a block; raises RequestError for one that is none."""
    if block.type != "text" or block.text is None:
        raise RequestError(
            f"{where} is of type {block.type!r}, which cannot be read here: send text",
            param=where.partition("[")[0],
        )
    return block.text


def _tool(tool: ToolParam, index: int) -> dict[str, Any]:
    if tool.type not in (None, "custom"):
        raise RequestError(
            f"tools[{index}] is of type {tool.type!r}, which only its vendor can run: describe it "
            "with name, description and input_schema",
            param="tools",
        )
    function: dict[str, Any] = {"name": tool.name}
    if tool.description is not None:
        function["description"] = tool.description
    if tool.input_schema is not None:
        function["parameters"] = tool.input_schema
    if tool.strict is not None:
        function["strict"] = tool.strict
    return {"type": "function", "function": function}


def _choice(choice: ToolChoice) -> dict[str, Any]:
    fields: dict[str, Any] = {"parallel_tool_calls": not choice.disable_parallel_tool_use}
    if choice.type == "tool":
        named = {"type": "function", "function": {"name": choice.name}}
        return fields | {"tool_choice": named}
    return fields | {"tool_choice": "required" if choice.type == "any" else choice.type}
