"""Chat in a terminal: streams the answer, thinking dimmed, and says how fast it was.

Turns are kept as messages, so a conversation is rendered by the checkpoint's own template each
time, as over HTTP. Without a terminal the same text comes out plain.
"""

import contextlib
import sys
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol, cast

from rich.console import Console

from aprium.base.errors import EngineError, RequestError, TemplateError
from aprium.base.records import Message, SamplingParams
from aprium.engine.client import LLM
from aprium.text.parse import Event, StreamParser, gather

HELP = "/reset starts over, /thinking switches thinking on or off, /quit or Ctrl-D leaves."


@dataclass(slots=True, kw_only=True)
class Said:
    """What has come of an answer: new `events`, and counts and times so far."""

    events: list[Event]
    num_tokens: int = 0
    first_token_s: float = 0.0
    finish: str | None = None


class Speaker(Protocol):
    """Whoever answers: a model in this process, or a server."""

    def answer(self, messages: Sequence[Message], thinking: bool) -> Iterator[Said]:
        """Yield an answer as it comes; closing it stops the answer."""
        ...


class LocalSpeaker:
    """A model in this process."""

    def __init__(self, llm: LLM, params: SamplingParams) -> None:
        self._llm, self._params = llm, params

    def answer(self, messages: Sequence[Message], thinking: bool) -> Iterator[Said]:
        """Yield the answer as it comes."""
        switches = {"enable_thinking": thinking}
        stream = self._llm.stream(list(messages), self._params, chat_template_kwargs=switches)
        parser: StreamParser | None = None
        printed = ""
        for completion in stream:
            if parser is None:  # from the prompt's own end, since a template may know no thinking
                opened = self._llm.opens_reasoning(completion.prompt_tokens)
                parser = StreamParser(thinking=opened)
            events = parser.push(completion.text[len(printed) :])
            printed = completion.text
            if completion.finish is not None:
                events += parser.finish()
            yield Said(
                events=events,
                num_tokens=len(completion.tokens),
                first_token_s=completion.timings.first_token_s,
                finish=completion.finish,
            )


@dataclass
class Chat:
    """A conversation with one speaker, printed as it goes."""

    speaker: Speaker
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
        events: list[Event] = []
        begin = time.perf_counter()
        last: Said | None = None
        self._reasoning = False
        try:
            with contextlib.closing(
                cast(
                    Generator[Said],
                    self.speaker.answer([*system, *self.history], self.thinking),
                )
            ) as stream:
                for last in stream:
                    events += self._show(last.events)
        except KeyboardInterrupt:
            self.console.print("\n[stopped]", style="yellow", markup=False)
        self.console.print()
        reply = gather(events)
        self.history.append(
            Message(role="assistant", content=reply.content, reasoning=reply.reasoning)
        )
        if last is not None:
            self._show_speed(last, time.perf_counter() - begin)

    def _show(self, events: list[Event]) -> list[Event]:
        for event in events:
            style = "dim" if event.kind == "reasoning" else None
            if self._reasoning and style is None:
                self.console.print("\n")  # the answer stands apart from the reasoning
            self._reasoning = style is not None
            self.console.print(event.text, end="", style=style, markup=False)
        return events

    def _show_speed(self, said: Said, seconds: float) -> None:
        count, first = said.num_tokens, said.first_token_s
        rate = (count - 1) / (seconds - first) if count > 1 and seconds > first else 0.0
        line = f"{count} tokens, {rate:.1f} tokens/s, first token after {1000 * first:.0f} ms"
        if said.finish == "length":
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
            except (RequestError, TemplateError, EngineError) as error:
                chat.history.pop()  # the question that was refused
                chat.console.print(f"{error}", style="yellow", markup=False)


def _terminal_reader() -> Callable[[], str]:
    from prompt_toolkit import PromptSession

    session: PromptSession[str] = PromptSession()
    # A line feed keeps an empty line apart from the end of input.
    return lambda: session.prompt("> ") + "\n"
