"""Requests of OpenAI's Responses API, and what they are as a chat request.

Items become the messages that the chat template knows (`text/items`); where they carry token ids,
only what comes after those does. Tools that run at the vendor's, and state kept elsewhere than
in `previous_response_id`, are refused by name. No torch here.
"""

from collections.abc import Sequence
from typing import Any

from pydantic import ConfigDict, Field, StrictBool, StrictFloat, StrictInt, StrictStr

from aprium.base.errors import RequestError
from aprium.serve.wire import ChatRequest, UnsupportedFields
from aprium.text.items import Echo, chat_messages, chat_tool, split_echo

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
    prompt_token_ids: list[StrictInt] | None = None
    generation_token_ids: list[StrictInt] | None = None
    generation_log_probs: list[StrictFloat] | None = None


class Reasoning(UnsupportedFields):
    """How much to reason."""

    effort: StrictStr | None = None


class TextConfig(UnsupportedFields):
    """Which form the answer must have."""

    format: dict[str, Any] | None = None


class CreateResponse(UnsupportedFields):
    """The body of POST /v1/responses; fields of a chat request may be added.

    `return_token_ids` asks for the tokens of the call, on the last item of the output.
    """

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
    return_token_ids: StrictBool = False
    metadata: dict[str, Any] | None = None

    def to_chat(self) -> tuple[ChatRequest, Echo | None]:
        """Return the input as a chat request, and the tokens that its prompt begins with, if any.

        Without instructions and what came before; with tokens, of what comes after them alone.
        """
        self.refuse_unsupported()
        echo, messages = self._messages()
        given = (self.model_extra or {}).items()
        fields: dict[str, Any] = {k: v for k, v in given if k in _PASSED and v is not None}
        tools, choice = self._tools()
        fields |= {
            "model": self.model,
            "messages": messages,
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
        return ChatRequest.model_validate(fields), echo

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
        tools = [chat_tool(tool, index) for index, tool in enumerate(self.tools or ())]
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

    def _messages(self) -> tuple[Echo | None, list[dict[str, Any]]]:
        """Return the tokens that the input carries, and the messages after them."""
        items = self.items()
        echo, covered = split_echo(items)
        messages = chat_messages(items[covered:], covered)
        if echo is not None and self.previous_response_id is not None:
            raise RequestError(
                "the input carries token ids, which are all that was said before: leave "
                "previous_response_id out",
                param="previous_response_id",
            )
        if echo is not None and (self.store or self.background):
            raise RequestError(
                "the input carries token ids: such a response is not stored, and echoed instead",
                param="store",
            )
        if echo is not None and not messages:
            raise RequestError(
                "the input ends with the model's own turn: add what follows it, such as the "
                "output of a function call",
                param="input",
            )
        return echo, messages


def _response_format(form: dict[str, Any]) -> dict[str, Any]:
    if form.get("type") != "json_schema":
        return form
    keys = ("name", "schema", "strict", "description")
    return {"type": "json_schema", "json_schema": {k: form[k] for k in keys if k in form}}
