"""Conversations to samples: the tokens that serving would show, weighted where the model speaks.

A turn is learnt after exactly the prompt that serving renders for it, so the reasoning of earlier
turns is there or not as the template decides. Where one turn's prompt begins with all of what was
learnt before, they share a sample; where it does not, because reasoning was left out, a new one
begins. A reply ends with its end token: what a template writes after it is not the model's.
Source: docs/training.md.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from aprium.base.errors import DataError
from aprium.base.records import Message, Sample
from aprium.text.chat import ChatTemplate
from aprium.text.tokenizer import Tokenizer

CLOSE = "</think>"
Learn = Literal["all", "last"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Style:
    """How a conversation is shown.

    `learn` weighs the assistant's turns, all or the last. `thinking` True or False sets the switch
    for the whole conversation, and False leaves reasoning out; None sets it turn by turn, on where
    there is reasoning. `cut` in [0, 1) ends the last turn's reasoning after that share of its
    tokens, as a budget does: the tag that closes it then has no weight.
    """

    learn: Learn = "all"
    thinking: bool | None = None
    cut: float | None = None


def conversation(
    messages: Sequence[Message],
    tokenizer: Tokenizer,
    template: ChatTemplate,
    domain: str,
    *,
    tools: Sequence[Mapping[str, Any]] = (),
    style: Style | None = None,
    skip: Collection[int] = (),
) -> list[Sample]:
    """Return the samples of a conversation, each learnt turn weighted in exactly one of them.

    `skip` are turns of the assistant that are shown and not learnt. Raises DataError when there is
    nothing to learn, or the template writes something else than prompt and reply.
    """
    style = style or Style()
    turns = [i for i, message in enumerate(messages) if message.role == "assistant"]
    if not turns:
        raise DataError("a conversation has no assistant turn: there is nothing to learn")
    if style.learn == "last":
        if turns[-1] != len(messages) - 1:
            raise DataError("a conversation must end with an assistant turn to learn its last")
        turns = turns[-1:]
    if style.thinking is False:
        messages = [replace(message, reasoning=None) for message in messages]
    samples: list[Sample] = []
    tokens: list[int] = []
    weights: list[float] = []
    for i in (i for i in turns if i not in skip):
        prompt, reply = _turn(messages[: i + 1], template, tools, style.thinking)
        before, (after, learnt) = tokenizer.encode(prompt), _reply(reply, tokenizer)
        if style.cut is not None and i == turns[-1]:
            after, learnt = _cut(after, learnt, style.cut, prompt, tokenizer)
        if tokens and before[: len(tokens)] != tokens:
            samples.append(_sample(tokens, weights, domain))
            weights = []
        weights += [0.0] * (len(before) - len(weights)) + learnt
        tokens = before + after
    if tokens:
        samples.append(_sample(tokens, weights, domain))
    return samples


def _sample(tokens: list[int], weights: list[float], domain: str) -> Sample:
    return Sample(tokens=tuple(tokens), ce_weight=(0.0, *weights[1:]), domain=domain)


def _turn(
    messages: Sequence[Message],
    template: ChatTemplate,
    tools: Sequence[Mapping[str, Any]],
    thinking: bool | None,
) -> tuple[str, str]:
    """Return the prompt of the last turn as serving writes it, and the reply that continues it.

    A reply without reasoning, where thinking is on, closes the open tag at once.
    """
    if thinking is None:
        thinking = bool(messages[-1].reasoning)
    prompt = template.render(messages[:-1], tools, enable_thinking=thinking)
    whole = template.render(messages, tools, add_generation_prompt=False)
    if whole.startswith(prompt):
        return prompt, whole[len(prompt) :]
    closed = template.render(messages[:-1], tools, enable_thinking=False)
    if thinking and whole.startswith(closed):
        return prompt, CLOSE + whole[len(closed) :]
    raise DataError("the chat template writes a reply that does not continue its own prompt")


def _reply(text: str, tokenizer: Tokenizer) -> tuple[list[int], list[float]]:
    """Return the tokens of a reply up to its end token, all weighted."""
    tokens = tokenizer.encode(text)
    ends = [i for i, token in enumerate(tokens) if token in tokenizer.eos_token_ids]
    if ends:
        if tokenizer.decode(tokens[ends[0] + 1 :], skip_special_tokens=False).strip():
            raise DataError("a reply goes on after its end token: take the token out of its text")
        tokens = tokens[: ends[0] + 1]
    if not tokens:
        raise DataError("a reply is empty: there is nothing to learn")
    return tokens, [1.0] * len(tokens)


def _cut(
    tokens: list[int], weights: list[float], share: float, prompt: str, tokenizer: Tokenizer
) -> tuple[list[int], list[float]]:
    """End the reasoning that a reply begins with early, where it has any."""
    close = tokenizer.id_of(CLOSE)
    if close is None:
        raise DataError(f"the tokenizer has no token {CLOSE}: reasoning cannot be cut")
    if close not in tokens or not prompt.rstrip().endswith("<think>"):
        return tokens, weights
    at = tokens.index(close)
    kept = int(share * at)
    return (
        [*tokens[:kept], *tokens[at:]],
        [*weights[:kept], 0.0, *weights[at + 1 :]],
    )
