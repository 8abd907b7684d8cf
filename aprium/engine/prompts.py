"""From what a caller calls a prompt to token ids: a string, ids, or a list of messages."""

from collections.abc import Mapping, Sequence
from typing import Any

from aprium.base.errors import RequestError
from aprium.base.records import Message
from aprium.text.chat import ChatTemplate
from aprium.text.messages import read_message
from aprium.text.tokenizer import Tokenizer

# One prompt; a list of messages may mix `Message`s and mappings in the OpenAI form.
Prompt = str | Sequence[int] | Sequence[Message | Mapping[str, Any]]


def split_prompts(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """Tell one prompt from a list of them; always returns a list."""
    if isinstance(prompts, str):
        return [prompts]
    if not isinstance(prompts, Sequence):
        raise RequestError(
            f"{prompts!r} is not a prompt: give a string, token ids, or messages", param="prompt"
        )
    items: list[Any] = list(prompts)
    if items and all(isinstance(item, int | Message | Mapping) for item in items):
        return [items]
    for item in items:
        if not isinstance(item, str | list | tuple):
            raise RequestError(
                f"{item!r} is not a prompt: give a string, token ids, or messages, or a list of "
                "such prompts",
                param="prompt",
            )
    return items


def are_messages(prompt: Prompt) -> bool:
    """Say whether a prompt is a list of messages, which the chat template is for."""
    return not isinstance(prompt, str) and any(isinstance(m, Message | Mapping) for m in prompt)


def encode_prompt(
    prompt: Prompt,
    tokenizer: Tokenizer | None,
    template: ChatTemplate | None,
    *,
    tools: Sequence[Mapping[str, Any]] = (),
    template_kwargs: Mapping[str, Any] | None = None,
) -> tuple[int, ...]:
    """Return the token ids of one prompt.

    Raises RequestError when the prompt is no prompt, or is text and there is no tokenizer;
    TemplateError when the template refuses the messages.
    """
    if not isinstance(prompt, str):
        items = list(prompt)
        if all(isinstance(item, int) for item in items):
            return tuple(items)  # pyright: ignore[reportReturnType] - checked one by one
        if not all(isinstance(item, Message | Mapping) for item in items):
            raise RequestError(
                f"{items!r} is not a prompt: its entries must all be token ids, or all messages",
                param="prompt",
            )
    if tokenizer is None or template is None:
        raise RequestError(
            "this model has no tokenizer files: give the prompt as token ids", param="prompt"
        )
    if isinstance(prompt, str):
        return tuple(tokenizer.encode(prompt, add_special_tokens=True))
    messages = [read_message(m) for m in prompt]  # pyright: ignore[reportArgumentType]
    return tuple(tokenizer.encode(template.render(messages, tools, **(template_kwargs or {}))))
