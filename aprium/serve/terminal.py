"""Chat in a terminal: streams the answer, thinking dimmed, and says how fast it was.

Turns are kept as messages, so a conversation is rendered by the checkpoint's own template each
time, as over HTTP. Without a terminal the same text comes out plain.
"""

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from rich.console import Console

from aprium.base.errors import RequestError, TemplateError
from aprium.base.records import Completion, Message, SamplingParams
from aprium.engine.client import LLM
from aprium.text.chat import starts_in_reasoning
from aprium.text.parse import Event, StreamParser, gather

HELP = "/reset starts over, /thinking switches thinking on or off, /quit or Ctrl-D leaves."


@dataclass
class Chat:
    """A conversation with one model, printed as it goes."""

    llm: LLM
    params: SamplingParams
    thinking: bool = True
    system: str | None = None
    console: Console = field(
        default_factory=lambda: Console(highlight=False, soft_wrap=True, emoji=False)
    )
    history: list[Message] = field(default_factory=list)
    _reasoning: bool = False

    def ask(self, text: str) -> None:
        """Put a question, stream the answer to the console, and remember both.

        Ctrl-C stops the answer and keeps what has come.
        """
        self.history.append(Message(role="user", content=text))
        system = [Message(role="system", content=self.system)] if self.system else []
        parser = StreamParser(thinking=False)
        events: list[Event] = []
        begin = time.perf_counter()
        last: Completion | None = None
        printed = ""
        self._reasoning = False
        stream = self.llm.stream(
            [*system, *self.history],
            self.params,
            chat_template_kwargs={"enable_thinking": self.thinking},
        )
        try:
            for last in stream:
                if not printed:
                    parser = StreamParser(thinking=self._starts_in_reasoning(last))
                new = parser.push(last.text[len(printed) :])
                printed = last.text
                events += self._show(new)
        except KeyboardInterrupt:
            self.console.print("\n[stopped]", style="yellow", markup=False)
        events += self._show(parser.finish())
        self.console.print()
        reply = gather(events)
        self.history.append(
            Message(role="assistant", content=reply.content, reasoning=reply.reasoning)
        )
        if last is not None:
            self._show_speed(last, time.perf_counter() - begin)

    def _starts_in_reasoning(self, completion: Completion) -> bool:
        """Tell from the prompt's own end, since a template may know no thinking."""
        assert self.llm.tokenizer is not None
        tail = list(completion.prompt_tokens[-8:])
        return starts_in_reasoning(self.llm.tokenizer.decode(tail, skip_special_tokens=False))

    def _show(self, events: list[Event]) -> list[Event]:
        for event in events:
            style = "dim" if event.kind == "reasoning" else None
            if self._reasoning and style is None:
                self.console.print("\n")  # the answer stands apart from the reasoning
            self._reasoning = style is not None
            self.console.print(event.text, end="", style=style, markup=False)
        return events

    def _show_speed(self, completion: Completion, seconds: float) -> None:
        count, first = len(completion.tokens), completion.timings.first_token_s
        rate = (count - 1) / (seconds - first) if count > 1 and seconds > first else 0.0
        line = f"{count} tokens, {rate:.1f} tokens/s, first token after {1000 * first:.0f} ms"
        if completion.finish == "length":
            line += ", stopped at the token limit"
        self.console.print(line, style="dim cyan", markup=False)

    def command(self, text: str) -> bool:
        """Carry out a line that begins with a slash; return False to leave."""
        word = text.split()[0]
        if word in ("/quit", "/exit"):
            return False
        if word == "/reset":
            self.history.clear()
            self.console.print("a new conversation", style="dim")
        elif word == "/thinking":
            self.thinking = not self.thinking
            self.console.print(f"thinking {'on' if self.thinking else 'off'}", style="dim")
        else:
            self.console.print(HELP, style="dim", markup=False)
        return True


def interact(chat: Chat) -> None:
    """Read questions until the end of input and answer them, with history and line editing."""
    read = _terminal_reader() if sys.stdin.isatty() else sys.stdin.readline
    if sys.stdin.isatty():
        chat.console.print(HELP, style="dim", markup=False)
    while True:
        try:
            line = read()
        except KeyboardInterrupt:
            continue
        except EOFError:
            return
        if not line:
            return
        text = line.strip()
        if text.startswith("/"):
            if not chat.command(text):
                return
        elif text:
            try:
                chat.ask(text)
            except (RequestError, TemplateError) as error:
                chat.history.pop()  # the question that was refused
                chat.console.print(f"{error}", style="yellow", markup=False)


def _terminal_reader() -> Callable[[], str]:
    from prompt_toolkit import PromptSession

    session: PromptSession[str] = PromptSession()
    # A line feed keeps an empty line apart from the end of input.
    return lambda: session.prompt("> ") + "\n"
