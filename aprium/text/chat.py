"""Conversations to prompts: the checkpoint's own Jinja chat template, in a sandbox.

Templates come with a checkpoint and decide every byte of a prompt, so they are rendered as they
are, with the environment that the Hugging Face library gives them. They are also code from
elsewhere: they run sandboxed, without access to attributes or files, and with bounded ranges,
products and output.
"""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from aprium.base.errors import RequestError, TemplateError
from aprium.base.records import Message
from aprium.text.tokenizer import read_json

_MAX_PRODUCT = 1 << 20  # longest string or list that `*` may make in a template
_MAX_OUTPUT = 1 << 26  # characters of a prompt
# Stands for the model's turn while what follows it is rendered; nobody writes this by chance.
_DUMMY = "0c5be1a7d94f4e1f"
_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token")


class ChatTemplate:
    """The chat template of one checkpoint, compiled.

    `sources` maps names to template text; "tool_use" is taken for requests with tools where it
    exists, else "default". Empty `sources` is a checkpoint without a template: rendering then
    raises TemplateError. `origin` names the file in messages.
    """

    def __init__(
        self,
        sources: Mapping[str, str],
        special_tokens: Mapping[str, str] | None = None,
        origin: str = "the chat template",
    ) -> None:
        environment = _environment()
        self._origin = origin
        self._special_tokens = dict(special_tokens or {})
        try:
            self._templates = {k: environment.from_string(text) for k, text in sources.items()}
        except jinja2.TemplateSyntaxError as error:
            raise TemplateError(f"{origin}, line {error.lineno}: {error.message}") from error

    @classmethod
    def load(cls, directory: str | Path, override: str | Path | None = None) -> "ChatTemplate":
        """Read the template of the checkpoint in `directory`.

        `chat_template.jinja` comes first, then `chat_template` in `tokenizer_config.json`, a text
        or a list of named texts. `override` is a template file to use instead. Raises
        TemplateError when a template does not compile, CheckpointError when a file is damaged.
        """
        directory = Path(directory)
        config_path = directory / "tokenizer_config.json"
        config = read_json(config_path)
        tokens = {name: _token_text(config.get(name)) for name in _TOKENS}
        tokens = {name: text for name, text in tokens.items() if text is not None}
        path = Path(override) if override is not None else directory / "chat_template.jinja"
        if override is not None or path.is_file():
            try:
                text = path.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise TemplateError(f"cannot read chat template {path}: {error}") from error
            return cls({"default": text}, tokens, str(path))
        return cls(_named(config.get("chat_template"), config_path), tokens, str(config_path))

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] = (),
        add_generation_prompt: bool = True,
        **kwargs: Any,
    ) -> str:
        """Return the prompt for `messages`.

        `tools` are in the OpenAI form; `kwargs` are the template's own switches, such as
        `enable_thinking`. Raises TemplateError when there is no template or it refuses.
        """
        template = self._template_for(tools)
        variables = {
            **self._special_tokens,
            **kwargs,
            "messages": [_template_message(message) for message in messages],
            "tools": list(tools) or None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        pieces, size = [], 0
        try:
            for piece in template.generate(variables):
                pieces.append(piece)
                size += len(piece)
                if size > _MAX_OUTPUT:
                    raise TemplateError(f"{self._origin} writes more than {_MAX_OUTPUT} characters")
        except TemplateError:
            raise
        except Exception as error:  # whatever the template's own code ran into
            raise TemplateError(f"{self._origin} refuses these messages: {error}") from error
        return "".join(pieces)

    def render_after(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] = (),
        *,
        ended: str = "",
        **kwargs: Any,
    ) -> str:
        """Return what is written from the end of the model's turn on: `messages`, and its next.

        The template writes a dummy turn before them, and what follows the dummy is returned, less
        `ended`, with which the real turn has ended already. Raises TemplateError.
        """
        dummy = (Message(role="user", content="?"), Message(role="assistant", content=_DUMMY))
        _, found, rest = self.render([*dummy, *messages], tools, **kwargs).partition(_DUMMY)
        if not found:
            raise TemplateError(f"{self._origin} does not show what the assistant says")
        return rest.removeprefix(ended)

    def _template_for(self, tools: Sequence[Mapping[str, Any]]) -> jinja2.Template:
        name = "tool_use" if tools and "tool_use" in self._templates else "default"
        if name not in self._templates:
            raise TemplateError(
                "this checkpoint has no chat template: give one with --chat-template FILE, or send "
                "a plain prompt to /v1/completions"
            )
        return self._templates[name]


def starts_in_reasoning(prompt: str) -> bool:
    """Say whether a model that continues `prompt` starts inside the reasoning.

    Only the tail counts: the template opens the tag there when thinking is on. A tag that stands
    anywhere else was quoted by a user or a tool.
    """
    return prompt.rstrip().endswith("<think>")


class _GenerationTag(jinja2.ext.Extension):
    """Accept `{% generation %}`, which marks what a trainer learns, and render its body."""

    tags = {"generation"}  # noqa: RUF012 - the library's own spelling of this attribute

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        """Return the statements between the tags, in a scope of their own."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body).set_lineno(line)


class _Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """Jinja's sandbox, also refusing to build huge values with `*` and `**`."""

    intercepted_binops = frozenset({"*", "**"})

    def call_binop(
        self, context: jinja2.runtime.Context, operator: str, left: Any, right: Any
    ) -> Any:
        """Compute `left operator right` unless the result would be absurdly large."""
        if operator == "**":
            if not all(isinstance(x, int | float) and abs(x) < 1024 for x in (left, right)):
                raise jinja2.sandbox.SecurityError("power of large values is not allowed")
        else:
            for value, count in ((left, right), (right, left)):
                if isinstance(value, str | list | tuple) and len(value) * count > _MAX_PRODUCT:
                    raise jinja2.sandbox.SecurityError("a repeated text or list is too long")
        return super().call_binop(context, operator, left, right)


def _environment() -> jinja2.Environment:
    environment = _Sandbox(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_GenerationTag, "jinja2.ext.loopcontrols"],
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Write `value` as JSON; unlike Jinja's own filter it leaves HTML characters alone."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _token_text(value: Any) -> str | None:
    text = value.get("content") if isinstance(value, dict) else value
    return text if isinstance(text, str) else None


def _named(value: Any, path: Path) -> dict[str, str]:
    """Return the templates in a `chat_template` value by name."""
    if value is None:
        return {}
    if isinstance(value, str):
        return {"default": value}
    try:
        named = {item["name"]: item["template"] for item in value}
    except (TypeError, KeyError):
        named = {"": value}
    if not all(isinstance(x, str) for pair in named.items() for x in pair):
        raise TemplateError(
            f"{path}: chat_template must be a text or a list of objects with name and template"
        )
    return named


def _template_message(message: Message) -> dict[str, Any]:
    """Return `message` with the keys that templates look for, absent ones left out."""
    data: dict[str, Any] = {"role": message.role, "content": message.content or ""}
    if message.reasoning is not None:
        data["reasoning_content"] = data["reasoning"] = message.reasoning
    if message.tool_calls:
        data["tool_calls"] = [
            {
                **({"id": call.id} if call.id is not None else {}),
                "type": "function",
                "function": {"name": call.name, "arguments": _arguments(call.arguments)},
            }
            for call in message.tool_calls
        ]
    if message.tool_call_id is not None:
        data["tool_call_id"] = message.tool_call_id
    return data


def _arguments(text: str) -> dict[str, Any]:
    """Return the arguments of a call as an object, which is what templates iterate over."""
    try:
        value = json.loads(text) if text.strip() else {}
    except (ValueError, RecursionError) as error:
        raise RequestError(
            f"tool call arguments {text[:80]!r} are not valid JSON: {error}", param="messages"
        ) from error
    if not isinstance(value, dict):
        raise RequestError(
            f"tool call arguments {text[:80]!r} must be a JSON object", param="messages"
        )
    return value
