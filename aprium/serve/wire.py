"""Requests as they come over HTTP: the OpenAI fields, vLLM's extras, and what they mean here.

A body becomes a pydantic model, and that becomes `Message`s and `SamplingParams`. A field that
would change the answer and is not supported is refused by name, unless it has the value that
changes nothing; every other unknown field is ignored, as clients send many. No torch here.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    StrictBool,
    StrictFloat,
    StrictInt,
    StrictStr,
    Tag,
)

from aprium.base.errors import RequestError
from aprium.base.records import RECOMMENDED_SAMPLING, Guide, Message, SamplingParams, ToolCall
from aprium.serve.guided import GUIDE_FIELDS, read_guide, read_tool_choice, tools_guide

_NEUTRAL = (None, False, 0, [], {}, "")
_LATER = "it is not supported yet, leave it out"
_PENALTY = "penalties are not supported, leave it out or adjust temperature and min_p"

# Field -> (values that change nothing, what to do instead).
_REFUSED: dict[str, tuple[Sequence[Any], str]] = {
    "frequency_penalty": (_NEUTRAL, _PENALTY),
    "presence_penalty": (_NEUTRAL, _PENALTY),
    "repetition_penalty": ((None, 1), _PENALTY),
    "length_penalty": ((None, 1), "beam search is not supported, leave it out"),
    "use_beam_search": (_NEUTRAL, "beam search is not supported, use n and temperature"),
    "bad_words": (_NEUTRAL, "token biases are not supported, leave it out"),
    "allowed_token_ids": (_NEUTRAL, "token biases are not supported, leave it out"),
    "guided_whitespace_pattern": (_NEUTRAL, "use structured_outputs with whitespace_pattern"),
    "structural_tag": (_NEUTRAL, "use tools for calls, or a grammar"),
    "functions": (_NEUTRAL, "use tools, which replaced it"),
    "function_call": ((None, "none", "auto"), "use tool_choice, which replaced it"),
    "web_search_options": (_NEUTRAL[:1], "the model has no web access, leave it out"),
    "audio": (_NEUTRAL, "this family writes text only"),
    "modalities": ((None, ["text"]), "this family writes text only"),
    "suffix": (_NEUTRAL, "the model only continues text, put everything into the prompt"),
    "prompt_embeds": (_NEUTRAL, "send the prompt as text or token ids"),
    "truncate_prompt_tokens": (_NEUTRAL[:1], "shorten the prompt before sending it"),
    "skip_special_tokens": ((None, True), "use return_token_ids and /detokenize"),
    "include_stop_str_in_output": (_NEUTRAL, "the stop is given as stop_reason"),
    "continue_final_message": (_NEUTRAL, "send a plain prompt to /v1/completions instead"),
    "chat_template": (_NEUTRAL[:1], "start the server with --chat-template FILE"),
    "documents": (_NEUTRAL, "put the documents into a message"),
    "kv_transfer_params": (_NEUTRAL, _LATER),
}


_BUDGETS = (
    "thinking_token_budget", "reasoning_budget", "reasoning_budget_tokens",
    "thinking_budget_tokens",
)  # fmt: skip


def _read_prompt(value: Any) -> Any:
    """Check the four forms of a prompt, which a union would report four times over."""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and value:
        kinds = {type(item) for item in value}
        ids = [value] if kinds == {int} else value if kinds == {list} else []
        if kinds == {str} or (ids and all(set(map(type, item)) == {int} for item in ids)):
            return value
    raise ValueError(
        "must be a string, a list of strings, a list of token ids, or a list of such lists"
    )


def _split(given: Any) -> list[str | list[int]]:
    """Return the prompts in one of those forms."""
    return [given] if isinstance(given, str) or isinstance(given[0], int) else list(given)


class UnsupportedFields(BaseModel):
    """A body whose fields not named stay in `model_extra`, where those in `refused` are found."""

    model_config = ConfigDict(extra="allow", protected_namespaces=())
    refused: ClassVar[Mapping[str, tuple[Sequence[Any], str]]] = {}

    def refuse_unsupported(self) -> None:
        """Raise RequestError for a field that would change the answer and is not supported."""
        for name, value in (self.model_extra or {}).items():
            if name not in self.refused:
                continue
            neutral, remedy = self.refused[name]
            if value not in neutral:
                raise RequestError(
                    f"{name} is {_short(value)}, which this server does not support: {remedy}",
                    param=name,
                )


class _Body(UnsupportedFields):
    """What OpenAI's older bodies share."""

    refused = _REFUSED

    model: StrictStr | None = None


class StreamOptions(BaseModel):
    """`include_usage` adds a last chunk with token counts."""

    include_usage: StrictBool = False


class _Generation(_Body):
    """The sampling fields that chat and plain completions share.

    Those from `response_format` on ask for a form of the answer: see `serve/guided`.
    """

    stream: StrictBool = False
    stream_options: StreamOptions | None = None
    cache_salt: StrictStr = ""
    priority: StrictInt = 0
    deadline_s: StrictFloat | None = None
    n: StrictInt | None = None
    best_of: StrictInt | None = None
    temperature: StrictFloat | None = None
    top_p: StrictFloat | None = None
    top_k: StrictInt | None = None
    min_p: StrictFloat | None = None
    seed: StrictInt | None = None
    stop: StrictStr | list[StrictStr] | None = None
    stop_token_ids: list[StrictInt] | None = None
    ignore_eos: StrictBool = False
    min_tokens: StrictInt | None = None
    max_tokens: StrictInt | None = None
    return_token_ids: StrictBool = False
    logit_bias: dict[StrictStr, StrictFloat] | None = None
    prompt_logprobs: StrictInt | None = None
    timings: StrictBool = False
    timings_per_token: StrictBool = False
    response_format: dict[str, Any] | None = None
    structured_outputs: dict[str, Any] | None = None
    guided_json: dict[str, Any] | StrictStr | None = None
    guided_regex: StrictStr | None = None
    guided_choice: list[StrictStr] | None = None
    guided_grammar: StrictStr | None = None
    json_schema: dict[str, Any] | None = None
    grammar: StrictStr | None = None

    def read_guide(self) -> tuple[Guide | None, str | None]:
        """Return the form that the answer must have, and the field that asks for it."""
        names = ("response_format", "structured_outputs", *GUIDE_FIELDS)
        return read_guide({name: getattr(self, name) for name in names})

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with token counts."""
        return self.stream_options is not None and self.stream_options.include_usage

    def _sampling(
        self,
        defaults: Mapping[str, Any],
        *,
        max_tokens: int | None,
        logprobs: int | None,
        prompt_logprobs: int | None = None,
        **more: Any,
    ) -> SamplingParams:
        if self.prompt_logprobs is not None and self.stream:
            raise RequestError(
                "prompt_logprobs come with whole answers: leave stream out", param="prompt_logprobs"
            )
        asked = (n for n in (prompt_logprobs, self.prompt_logprobs) if n is not None)
        given = {name: getattr(self, name) for name in RECOMMENDED_SAMPLING}
        given = {k: defaults.get(k) if v is None else v for k, v in given.items()}
        stop = self.stop or ()
        return SamplingParams(
            **{name: value for name, value in given.items() if value is not None},
            max_tokens=max_tokens,
            logprobs=logprobs,
            prompt_logprobs=max(asked, default=None),
            logit_bias=_bias(self.logit_bias),
            n=1 if self.n is None else self.n,
            best_of=self.best_of,
            seed=self.seed,
            stop=(stop,) if isinstance(stop, str) else tuple(stop),
            stop_token_ids=tuple(self.stop_token_ids or ()),
            ignore_eos=self.ignore_eos,
            min_tokens=self.min_tokens or 0,
            **more,
        )


class CompletionRequest(_Generation):
    """The body of /v1/completions."""

    prompt: Annotated[str | list[str] | list[int] | list[list[int]], BeforeValidator(_read_prompt)]
    echo: StrictBool = False
    logprobs: StrictInt | None = None
    add_special_tokens: StrictBool = True

    def refuse_unsupported(self) -> None:
        """Raise RequestError for a field that would change the answer and is not supported."""
        super().refuse_unsupported()
        for name in _BUDGETS:
            if (self.model_extra or {}).get(name) not in (None, -1):
                raise RequestError(
                    f"{name} is for reasoning, which a plain prompt knows nothing of: send "
                    "messages to /v1/chat/completions",
                    param=name,
                )

    def prompts(self) -> list[str | list[int]]:
        """Return the prompts one by one."""
        return _split(self.prompt)

    def sampling(self, defaults: Mapping[str, Any]) -> SamplingParams:
        """Return how to continue the prompts; `defaults` are those of `generation_config.json`."""
        return self._sampling(
            defaults,
            max_tokens=16 if self.max_tokens is None else self.max_tokens,
            logprobs=self.logprobs,
            prompt_logprobs=self.logprobs if self.echo else None,
            guide=self.read_guide()[0],
        )


class ContentPart(BaseModel):
    """One part of a message's content; only text parts can be read."""

    type: StrictStr = "text"
    text: StrictStr | None = None


class FunctionCall(BaseModel):
    """The function of a tool call; `arguments` is JSON text, or the object itself."""

    name: StrictStr
    arguments: StrictStr | dict[str, Any] = "{}"


class WireToolCall(BaseModel):
    """A tool call in an earlier assistant turn."""

    id: StrictStr | None = None
    function: FunctionCall


class WireMessage(BaseModel):
    """One message of a conversation."""

    role: StrictStr
    content: StrictStr | list[ContentPart] | None = None
    reasoning: StrictStr | None = None
    reasoning_content: StrictStr | None = None
    tool_calls: list[WireToolCall] | None = None
    tool_call_id: StrictStr | None = None

    def to_message(self, where: str) -> Message:
        """Return the record; `where` names the message in errors."""
        content = self.content
        if isinstance(content, list):
            for part in content:
                if part.type not in ("text", "input_text") or part.text is None:
                    raise RequestError(
                        f"{where}.content has a part of type {_short(part.type)}: this family "
                        "reads text only",
                        param="messages",
                    )
            content = "".join(part.text or "" for part in content)
        return Message(
            role="system" if self.role == "developer" else self.role,
            content=content,
            reasoning=self.reasoning if self.reasoning is not None else self.reasoning_content,
            tool_calls=tuple(
                ToolCall(name=c.function.name, arguments=_text(c.function.arguments), id=c.id)
                for c in self.tool_calls or ()
            ),
            tool_call_id=self.tool_call_id,
        )


class Function(BaseModel):
    """The function of a tool; other fields are passed to the template as they came."""

    model_config = ConfigDict(extra="allow")

    name: StrictStr = Field(min_length=1)
    description: StrictStr | None = None
    parameters: dict[str, Any] | None = None


class Tool(BaseModel):
    """A tool the model may call."""

    model_config = ConfigDict(extra="allow")

    type: Literal["function"] = "function"
    function: Function


class _Conversation(_Body):
    """The fields that make a prompt out of messages."""

    messages: list[WireMessage] = Field(min_length=1)
    tools: list[Tool] | None = None
    tool_choice: Any = None
    add_generation_prompt: StrictBool = True
    chat_template_kwargs: dict[str, Any] | None = None
    reasoning_effort: StrictStr | None = None

    def records(self) -> list[Message]:
        """Return the conversation as records."""
        return [m.to_message(f"messages[{i}]") for i, m in enumerate(self.messages)]

    def tool_dicts(self) -> list[dict[str, Any]]:
        """Return the tools to offer, in the OpenAI form; none with tool_choice "none".

        Raises RequestError for a choice that there is not.
        """
        tools = [tool.model_dump(exclude_unset=True) for tool in self.tools or ()]
        return [] if read_tool_choice(self.tool_choice, tools) == "none" else tools

    def template_kwargs(self, defaults: Mapping[str, Any]) -> dict[str, Any]:
        """Return the template's switches: `defaults`, then the effort, then the request's own."""
        own = self.chat_template_kwargs or {}
        for name in ("self", "messages", "tools", "documents", "add_generation_prompt"):
            if name in own:
                raise RequestError(
                    f"chat_template_kwargs may not set {name!r}: use the field of that name",
                    param="chat_template_kwargs",
                )
        return {**defaults, **_effort(self.reasoning_effort), **own}


class ChatRequest(_Conversation, _Generation):
    """The body of /v1/chat/completions."""

    max_completion_tokens: StrictInt | None = None
    logprobs: StrictBool = False
    top_logprobs: StrictInt | None = None
    session: StrictStr | None = None
    parallel_tool_calls: StrictBool = True
    include_reasoning: StrictBool = True
    thinking_token_budget: StrictInt | None = None
    reasoning_budget: StrictInt | None = None
    reasoning_budget_tokens: StrictInt | None = None
    thinking_budget_tokens: StrictInt | None = None
    reasoning_budget_message: StrictStr | None = None
    nvext: dict[str, Any] | None = None

    def read_guide(self) -> tuple[Guide | None, str | None]:
        """Return the form that the answer must have, tool calls included, and the field for it."""
        guide, field = super().read_guide()
        tools = self.tool_dicts()
        if not tools:
            return guide, field
        choice = read_tool_choice(self.tool_choice, tools)
        return tools_guide(tools, choice, self.parallel_tool_calls, guide), field or "tools"

    def _thinking_budget(self) -> int | None:
        """Return the tokens that reasoning may have, None where nothing is said of it."""
        given: dict[str, Any] = {name: getattr(self, name) for name in _BUDGETS}
        given["nvext.max_thinking_tokens"] = (self.nvext or {}).get("max_thinking_tokens")
        given = {name: value for name, value in given.items() if value is not None}
        if len(set(map(repr, given.values()))) > 1:
            names = " and ".join(given)
            raise RequestError(f"{names} differ: give one of them", param=next(iter(given)))
        for name, value in given.items():
            if type(value) is not int or value < -1:
                raise RequestError(
                    f"{name} is {_short(value)}: give a number of tokens, or -1 for no limit",
                    param=name,
                )
            return value
        return None

    def sampling(
        self,
        defaults: Mapping[str, Any],
        thinking_budget: int | None = None,
        thinking_message: str = "",
    ) -> SamplingParams:
        """Return how to answer; `defaults` are those of `generation_config.json`.

        `thinking_budget` and `thinking_message` are those of a request that says nothing.
        """
        if self.top_logprobs is not None and self.top_logprobs > 0 and not self.logprobs:
            raise RequestError(
                f"top_logprobs is {self.top_logprobs}: it needs logprobs true",
                param="top_logprobs",
            )
        limit = self.max_completion_tokens
        budget = self._thinking_budget()
        budget = thinking_budget if budget is None else budget
        message = self.reasoning_budget_message
        return self._sampling(
            defaults,
            max_tokens=self.max_tokens if limit is None else limit,
            logprobs=(self.top_logprobs or 0) if self.logprobs else None,
            guide=self.read_guide()[0],
            thinking_budget=None if budget == -1 else budget,
            thinking_message=thinking_message if message is None else message,
        )


class TokenizeRequest(_Body):
    """The body of /tokenize with a plain prompt."""

    prompt: StrictStr
    add_special_tokens: StrictBool = True
    return_token_strs: StrictBool = False


class TokenizeChatRequest(_Conversation):
    """The body of /tokenize with a conversation."""

    return_token_strs: StrictBool = False


def _kind_of_tokenize(body: Any) -> str:
    chat = isinstance(body, TokenizeChatRequest) or (
        isinstance(body, Mapping) and "messages" in body
    )
    return "of messages" if chat else "of a prompt"


# Told apart by what there is, so that errors speak of one of them.
AnyTokenizeRequest = Annotated[
    Annotated[TokenizeChatRequest, Tag("of messages")]
    | Annotated[TokenizeRequest, Tag("of a prompt")],
    Discriminator(_kind_of_tokenize),
]


class ControlRequest(_Body):
    """The body of /v1/chat/completions/control: `id` is that of a running completion."""

    id: StrictStr
    action: Literal["reasoning_end"] = "reasoning_end"


class EmbeddingsRequest(_Body):
    """The body of /v1/embeddings; `pooling` and `normalize` are those of `LLM.embed`."""

    input: Annotated[str | list[str] | list[int] | list[list[int]], BeforeValidator(_read_prompt)]
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: StrictInt | None = None
    pooling: Literal["last", "mean"] = "last"
    normalize: StrictBool = True
    cache_salt: StrictStr = ""
    priority: StrictInt = 0
    deadline_s: StrictFloat | None = None

    def prompts(self) -> list[str | list[int]]:
        """Return the inputs one by one."""
        return _split(self.input)


class DetokenizeRequest(_Body):
    """The body of /detokenize."""

    tokens: list[StrictInt]


def describe_invalid(errors: Sequence[Mapping[str, Any]]) -> tuple[str, str | None]:
    """Say in one line what pydantic found wrong first, and in which field."""
    first = errors[0]
    path = [part for part in first["loc"] if part != "body"]
    if first["type"] == "json_invalid" or not path:
        problem = "the body is not a JSON object sent as Content-Type: application/json"
        return f"{problem} ({first['msg']})", None
    # A union reports each of its options by type name; the field is what counts.
    names = [str(p) for p in path if isinstance(p, int) or str(p).isidentifier()]
    field = ".".join(n for n in names if n not in ("str", "int", "list", "dict"))
    if first["type"] == "missing":
        return f"{field} is missing", field
    message = first["msg"].removeprefix("Value error, ")
    return f"{field} is {_short(first['input'])}: {message}", field


def _bias(given: Mapping[str, float] | None) -> tuple[tuple[int, float], ...]:
    """Return biases by token id, which JSON can only have as text."""
    for token in given or {}:
        if not token.isdecimal() or len(token) > 12:
            raise RequestError(
                f"logit_bias has {_short(token)}: its keys must be token ids", param="logit_bias"
            )
    return tuple((int(token), bias) for token, bias in (given or {}).items())


def _effort(effort: str | None) -> dict[str, Any]:
    """Return the template switches for `reasoning_effort`; the members of the family differ."""
    if effort is None:
        return {}
    switches: dict[str, dict[str, Any]] = {
        "none": {"enable_thinking": False},
        "minimal": {"low_effort": True},
        "low": {"low_effort": True},
        "medium": {"medium_effort": True},
    }
    return {"reasoning_effort": effort, **switches.get(effort, {})}


def _text(arguments: str | dict[str, Any]) -> str:
    if isinstance(arguments, str):
        return arguments
    return json.dumps(arguments, ensure_ascii=False)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
