"""Requests of OpenAI's Responses API, and what they are as a chat request.

Items become the messages that the chat template knows: reasoning, text and calls that follow each
other are one turn of the assistant. Tools that run at the vendor's, and state kept elsewhere than
in `previous_response_id`, are refused by name. No torch here.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from pydantic import ConfigDict, Field, StrictBool, StrictInt, StrictStr

from aprium.base.errors import RequestError
from aprium.serve.wire import ChatRequest, UnsupportedFields

# Fields of a chat request that may be given here as they are.
_PASSED = (
    *("temperature", "top_p", "top_k", "min_p", "seed", "stop", "cache_salt", "priority"),
    *(
        "min_tokens",
        "deadline_s",
        "parallel_tool_calls",
        "chat_template_kwargs",
        "thinking_token_budget",
    ),
)
LOGPROBS = "message.output_text.logprobs"  # what `include` may ask for
_NONE = (None, [], {}, "")
_REFUSED: dict[str, tuple[Sequence[Any], str]] = {
    "conversation": (_NONE, "use previous_response_id, or /v1/sessions"),
    "prompt": (_NONE, "templates of prompts are kept elsewhere: send instructions and input"),
    "truncation": ((None, "disabled"), "nothing is dropped of a conversation: shorten the input"),
    "moderation": (_NONE, "there is no moderation here, leave it out"),
    "context_management": (_NONE, "nothing is dropped of a conversation: shorten the input"),
}


class Item(UnsupportedFields):
    """A part of the input, of any type; which fields it has depends on that."""

    type: StrictStr | None = None
    role: StrictStr | None = None
    content: "StrictStr | list[Item] | None" = None
    text: StrictStr | None = None
    refusal: StrictStr | None = None
    name: StrictStr | None = None
    call_id: StrictStr | None = None
    arguments: StrictStr | None = None
    output: "StrictStr | list[Item] | None" = None
    summary: "list[Item] | None" = None


class Reasoning(UnsupportedFields):
    """How much to reason."""

    effort: StrictStr | None = None


class TextConfig(UnsupportedFields):
    """Which form the answer must have."""

    format: dict[str, Any] | None = None


class CreateResponse(UnsupportedFields):
    """The body of POST /v1/responses; fields of a chat request may be added."""

    model_config = ConfigDict(extra="allow", protected_namespaces=())
    refused = _REFUSED

    model: StrictStr | None = None
    input: StrictStr | list[Item] = Field(default_factory=list)
    instructions: StrictStr | None = None
    previous_response_id: StrictStr | None = None
    store: StrictBool | None = None
    stream: StrictBool | None = None
    background: StrictBool | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: StrictStr | dict[str, Any] | None = None
    max_output_tokens: StrictInt | None = None
    reasoning: Reasoning | None = None
    text: TextConfig | None = None
    include: list[StrictStr] | None = None
    top_logprobs: StrictInt | None = None
    metadata: dict[str, Any] | None = None

    def to_chat(self) -> ChatRequest:
        """Return the input as a chat request, without instructions and what came before."""
        self.refuse_unsupported()
        given = (self.model_extra or {}).items()
        fields: dict[str, Any] = {k: v for k, v in given if k in _PASSED and v is not None}
        tools, choice = self._tools()
        fields |= {
            "model": self.model,
            "messages": list(self._messages()),
            "stream": bool(self.stream),
            "max_tokens": self.max_output_tokens,
            "tools": tools or None,
            "tool_choice": choice,
            "logprobs": self.logprobs,
            "top_logprobs": self.top_logprobs if self.logprobs else None,
        }
        if self.reasoning is not None:
            fields["reasoning_effort"] = self.reasoning.effort
        form = self.text.format if self.text is not None else None
        if form is not None:
            fields["response_format"] = _response_format(form)
        return ChatRequest.model_validate(fields)

    @property
    def logprobs(self) -> bool:
        """Whether the tokens of the text are to come with their log-probabilities."""
        return LOGPROBS in (self.include or ())

    def items(self) -> list[dict[str, Any]]:
        """Return the input as a list of items."""
        if isinstance(self.input, str):
            return [{"type": "message", "role": "user", "content": self.input}]
        return [item.model_dump(exclude_unset=True) for item in self.input]

    def refuse_unsupported(self) -> None:
        """Raise RequestError for what would change the answer and is not supported."""
        super().refuse_unsupported()
        if self.top_logprobs and not self.logprobs:
            raise RequestError(
                f"top_logprobs is {self.top_logprobs}: add {LOGPROBS!r} to include",
                param="top_logprobs",
            )
        if self.background and self.stream:
            raise RequestError(
                "background is true: such a response is not streamed, ask for it by its id",
                param="stream",
            )
        if self.background and self.store is False:
            raise RequestError(
                "background is true: such a response has to be stored", param="store"
            )

    def _tools(self) -> tuple[list[dict[str, Any]], Any]:
        """Return tools and choice in the form of a chat request."""
        tools = [_tool(tool, index) for index, tool in enumerate(self.tools or ())]
        choice = self.tool_choice
        if not isinstance(choice, dict):
            return tools, choice
        if choice.get("type") == "allowed_tools":
            listed = choice.get("tools")
            allowed = listed if isinstance(listed, list) else []
            names = {tool.get("name") for tool in allowed if isinstance(tool, dict)}
            kept = [tool for tool in tools if tool["function"]["name"] in names]
            return kept, choice.get("mode", "auto")
        if choice.get("type") != "function":
            raise RequestError(
                f"tool_choice is of type {choice.get('type')!r}: choose a function",
                param="tool_choice",
            )
        return tools, {"type": "function", "function": {"name": choice.get("name")}}

    def _messages(self) -> Iterator[dict[str, Any]]:
        """Yield the messages of the input."""
        if isinstance(self.input, str):
            yield {"role": "user", "content": self.input}
            return
        turn: dict[str, Any] | None = None  # of the assistant, which may have several items
        for index, item in enumerate(self.input):
            part = _assistant_part(item, f"input[{index}]")
            if part is None:
                if turn is not None:
                    yield turn
                turn = None
                yield _message(item, f"input[{index}]")
                continue
            turn = _joined(turn, part)
        if turn is not None:
            yield turn


def _assistant_part(item: Item, where: str) -> dict[str, Any] | None:
    """Return what an item adds to a turn of the assistant; None for items of others."""
    if item.type == "reasoning":
        parts = item.content if isinstance(item.content, list) else item.summary
        return {"reasoning": "".join(part.text or "" for part in parts or ())}
    if item.type == "function_call":
        if not item.name:
            raise RequestError(f"{where} is a function_call without a name", param="input")
        function = {"name": item.name, "arguments": item.arguments or "{}"}
        return {"tool_calls": [{"id": item.call_id, "function": function}]}
    if item.type in (None, "message") and item.role == "assistant":
        return {"content": _text(item.content, where)}
    return None


def _joined(turn: dict[str, Any] | None, part: dict[str, Any]) -> dict[str, Any]:
    turn = turn or {"role": "assistant", "content": None}
    for key, value in part.items():
        before = turn.get(key)
        turn[key] = value if before is None else before + value
    return turn


def _message(item: Item, where: str) -> dict[str, Any]:
    """Return the message of an item of anybody but the assistant."""
    if item.type == "function_call_output":
        content = _text(item.output, f"{where}.output")
        return {"role": "tool", "tool_call_id": item.call_id, "content": content}
    if item.type not in (None, "message"):
        raise RequestError(
            f"{where} is of type {item.type!r}, which cannot be read here: send messages, "
            "reasoning, function_call and function_call_output",
            param="input",
        )
    return {"role": item.role, "content": _text(item.content, where)}


def _text(content: str | list[Item] | None, where: str) -> str:
    """Return the text of content; raises RequestError for parts that are none."""
    if content is None or isinstance(content, str):
        return content or ""
    texts = []
    for index, part in enumerate(content):
        text = part.refusal if part.type == "refusal" else part.text
        if part.type not in ("input_text", "output_text", "text", "refusal") or text is None:
            raise RequestError(
                f"{where}.content[{index}] is of type {part.type!r}: this family reads text only",
                param="input",
            )
        texts.append(text)
    return "".join(texts)


def _tool(tool: dict[str, Any], index: int) -> dict[str, Any]:
    if tool.get("type") != "function":
        raise RequestError(
            f"tools[{index}] is of type {tool.get('type')!r}, which only its vendor can run: "
            "offer functions",
            param="tools",
        )
    keys = ("name", "description", "parameters", "strict")
    function = {key: tool[key] for key in keys if tool.get(key) is not None}
    return {"type": "function", "function": function}


def _response_format(form: dict[str, Any]) -> dict[str, Any]:
    if form.get("type") != "json_schema":
        return form
    keys = ("name", "schema", "strict", "description")
    return {"type": "json_schema", "json_schema": {k: form[k] for k in keys if k in form}}
