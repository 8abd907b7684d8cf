"""A dialogue as the tokens of one sequence: what was shown, and what the model wrote, untouched.

What the model wrote is never decoded and encoded again, since many token sequences spell one text
and a policy must be trained on those it chose. After each of its turns only what the environment
adds is rendered: the template writes a dummy turn and the new messages after it, and what follows
the dummy is appended. So reasoning of earlier turns stays, whatever the template does with it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from aprium.base.records import Completion, Message
from aprium.text.chat import ChatTemplate, starts_in_reasoning
from aprium.text.parse import parse
from aprium.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatFormat:
    """How one model's conversations are written: tokenizer, template, and the template's switches.

    `thinking` is the switch `enable_thinking`; `switches` are others.
    """

    tokenizer: Tokenizer
    template: ChatTemplate
    thinking: bool = True
    switches: Mapping[str, Any] = field(default_factory=dict)


class Dialogue:
    """The tokens of one dialogue with `tools`; `sampled` and `logprobs` run in parallel to them."""

    def __init__(self, chat: ChatFormat, tools: Sequence[Mapping[str, Any]] = ()) -> None:
        self._chat, self._tools = chat, tools
        self.tokens: list[int] = []
        self.sampled: list[bool] = []
        self.logprobs: list[float] = []
        self.weight_spans: list[tuple[int, int]] = []
        self._reasoning = False
        self._num_calls = 0

    def show(self, messages: Sequence[Message]) -> None:
        """Append `messages` and the opening of the model's next turn; raises TemplateError."""
        text = self._render(messages)
        self._reasoning = starts_in_reasoning(text)
        tokens = self._chat.tokenizer.encode(text)
        self.tokens += tokens
        self.sampled += [False] * len(tokens)
        self.logprobs += [0.0] * len(tokens)

    def hear(self, completion: Completion) -> Message:
        """Append the model's turn as it is, and return what it says.

        Calls of tools are numbered, for the results to answer.
        """
        self.tokens += completion.tokens
        self.sampled += [True] * len(completion.tokens)
        self.logprobs += completion.logprobs
        for version, count in completion.weight_spans or ((0, len(completion.tokens)),):
            last, before = self.weight_spans.pop() if self.weight_spans else (version, 0)
            if last != version:
                self.weight_spans.append((last, before))
                before = 0
            self.weight_spans.append((version, before + count))
        parsed = parse(completion.text, thinking=self._reasoning, tools=self._tools)
        first = self._num_calls
        self._num_calls += len(parsed.tool_calls)
        return Message(
            role="assistant",
            content=parsed.content,
            reasoning=parsed.reasoning,
            tool_calls=tuple(
                replace(call, id=f"call-{first + i}") for i, call in enumerate(parsed.tool_calls)
            ),
        )

    def _render(self, messages: Sequence[Message]) -> str:
        chat = self._chat
        switches = {"enable_thinking": chat.thinking, **chat.switches}
        if not self.tokens:
            return chat.template.render(messages, self._tools, **switches)
        ended = chat.tokenizer.end_text(self.tokens[-1])
        return chat.template.render_after(messages, self._tools, ended=ended, **switches)
