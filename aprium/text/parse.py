r"""Model text to reasoning, content and tool calls, as a stream.

The family writes `reasoning</think>content`, starting inside the reasoning when the prompt opened
it, and calls tools as

    <tool_call>\n<function=NAME>\n<parameter=KEY>\nVALUE\n</parameter>\n</function>\n</tool_call>

Text arrives cut anywhere. Nothing is given out that could still turn out to be part of a tag, and
what is given out does not depend on where the cuts were. Models forget closing tags, so all but
the opening of a call may be missing, and a call may come without `</think>`. Everything else is
passed on unchanged, but for white space next to a call, which the chat template writes itself.

Values are converted by the declared JSON-schema type (`text/values`).
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from aprium.base.records import ToolCall
from aprium.text.values import json_text, json_value, parameters_of, types_of

_SPACE = 64  # longest white space between tags
_NAME = 128  # longest name of a function or parameter
_REACH = 1024  # more bytes than any header of a call has
_TAIL = 256  # longer than any match of _VALUE_END, so an unfinished one starts within it

_HEADER = re.compile(rf"<tool_call>\s{{0,{_SPACE}}}<function=([^<>\n]{{1,{_NAME}}})>")
_FUNCTION = re.compile(rf"<function=([^<>\n]{{1,{_NAME}}})>")
_PARAMETER = re.compile(rf"<parameter=([^<>\n]{{1,{_NAME}}})>\n?")
# A structural tag inside a value ends it only where the format would put that tag, so that code
# which mentions the tags survives.
_VALUE_END = re.compile(
    r"\n?</parameter>"
    rf"|\n(?=<parameter=[^<>\n]{{1,{_NAME}}}>)"
    rf"|\n?(?=</function>\s{{0,{_SPACE}}}(?:</?tool_call>|<function=))"
    r"|\n(?=</tool_call>)"
)
_CLOSING = re.compile(r"\n?(?:</function>\s*)?(?:</tool_call>\s*)?\Z")
_BODY_TAGS = ("<parameter=", "</function>", "</tool_call>", "<function=", "<tool_call>")
_VALUE_TAGS = ("</parameter>", "</function>", "</tool_call>", "<parameter=")


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """A piece of the parsed stream.

    `text` is a piece of reasoning or content, the name of a function ("call"), or a piece of the
    JSON text of its arguments; `index` numbers the calls. Reasoning and content say `at` which
    character of the whole text they begin, but for content that repeats the reasoning.
    """

    kind: Literal["reasoning", "content", "call", "arguments"]
    text: str
    index: int = 0
    at: int | None = field(default=None, compare=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Parsed:
    """A whole answer in parts; a part that is absent is None."""

    reasoning: str | None
    content: str | None
    tool_calls: tuple[ToolCall, ...]


def gather(events: Iterable[Event]) -> Parsed:
    """Put the pieces of a stream together."""
    said = {"reasoning": "", "content": ""}
    calls: list[list[str]] = []
    for event in events:
        if event.kind == "call":
            calls.append([event.text, ""])
        elif event.kind == "arguments":
            calls[event.index][1] += event.text
        else:
            said[event.kind] += event.text
    return Parsed(
        reasoning=said["reasoning"] or None,
        content=said["content"] or None,
        tool_calls=tuple(ToolCall(name=name, arguments=text) for name, text in calls),
    )


def parse(
    text: str,
    *,
    thinking: bool,
    tools: Sequence[Mapping[str, Any]] = (),
    force_content: bool = False,
) -> Parsed:
    """Split a whole answer; the arguments are those of StreamParser."""
    parser = StreamParser(thinking=thinking, tools=tools, force_content=force_content)
    return gather([*parser.push(text), *parser.finish()])


class ReasoningEnd:
    """Finds where reasoning ends, as the parser sees it, in the bytes of tokens.

    It ends with its closing tag, or with a call of one of the tools `names`.
    """

    def __init__(self, names: Iterable[str] = ()) -> None:
        self._names = frozenset(names)

    def push(self, tail: bytes, new: bytes) -> tuple[bytes, bool]:
        """Take `new` bytes after `tail`; return the tail to give next time, and whether it ended.

        The first tail is empty.
        """
        text = tail + new
        ended = False
        if b">" in new:  # which both end with
            ended = b"</think>" in text
            headers = _HEADER.finditer(text.decode("utf-8", "ignore")) if self._names else ()
            ended = ended or any(header[1] in self._names for header in headers)
        return text[-_REACH:], ended


class StreamParser:
    """Split the text of one answer as it arrives.

    `thinking`: the prompt opened the reasoning, so text starts inside it. `tools`, in the OpenAI
    form, switch tool calls on and give the types of their parameters. `force_content`: an answer
    with neither content nor calls gets its reasoning as content, too.
    """

    def __init__(
        self,
        *,
        thinking: bool,
        tools: Sequence[Mapping[str, Any]] = (),
        force_content: bool = False,
    ) -> None:
        self._schemas = dict(parameters_of(tool) for tool in tools)
        self._thinking = thinking
        self._force_content = force_content
        self._buffer = ""
        self._length = 0  # of all that was pushed, of which the buffer is the end
        self._events: list[Event] = []
        self._state = self._start
        self._in_reasoning = False
        self._reasoning_open = False  # no </think> so far
        self._reasoning: list[str] = []
        self._answered = False  # some content or a call was given
        self._after_call = False  # nothing but white space since the last call
        self._num_calls = 0
        self._function = ""
        self._keys: set[str] = set()
        self._key = ""
        self._scanned = 0

    def push(self, text: str) -> list[Event]:
        """Take the next piece of text and return what it settles."""
        self._buffer += text
        self._length += len(text)
        while self._state(False):
            pass
        return self._drain()

    def finish(self) -> list[Event]:
        """Return what was held back, closing what is open. Nothing may be pushed after it."""
        while self._state(True):
            pass
        if self._force_content and not self._answered and self._reasoning:
            self._events.append(Event(kind="content", text="".join(self._reasoning)))
        return self._drain()

    def _drain(self) -> list[Event]:
        """Return the waiting events, neighbours of one kind joined."""
        joined: list[Event] = []
        for event in self._events:
            last = joined[-1] if joined else None
            if last is not None and _goes_on(last, event):
                joined[-1] = replace(last, text=last.text + event.text)
            else:
                joined.append(event)
        self._events = []
        return joined

    # Each state takes what it can from the buffer and says whether to go on; `final` means that
    # no more text will come.

    def _start(self, final: bool) -> bool:
        """Drop a leading <think>, which only repeats what the prompt said."""
        text = self._buffer.lstrip()
        opened = text.startswith("<think>")
        if not final and ("<think>\n".startswith(text) if opened else "<think>".startswith(text)):
            return False
        if opened:
            self._buffer = text.removeprefix("<think>").removeprefix("\n")
        self._in_reasoning = self._reasoning_open = opened or self._thinking
        self._state = self._text
        return True

    def _text(self, final: bool) -> bool:
        """Pass on reasoning or content until a tag."""
        buffer = self._buffer
        tags = ["</think>"] if self._reasoning_open else []
        tags += ["<tool_call>"] if self._schemas else []
        found = [(at, tag) for tag in tags if (at := buffer.find(tag)) >= 0]
        if not found:
            hold = 0 if final else _partial(buffer, tags)
            self._give(buffer[: len(buffer) - hold], final)
            return False
        at, tag = min(found)
        if tag == "<tool_call>":
            return self._open_call(at, final)
        self._give(buffer[:at], True)
        self._buffer = buffer[at + len(tag) :]
        self._in_reasoning = self._reasoning_open = False
        return True

    def _give(self, text: str, whole: bool) -> None:
        """Pass on `text`, the head of the buffer, and take it off the buffer.

        Unless `whole`, white space at its end stays in the buffer while a call may follow.
        """
        keep, at = len(text), self._length - len(self._buffer)
        if self._schemas and not whole:
            keep -= _trailing_space(text)
        given = text[:keep]
        self._buffer = self._buffer[keep:]
        if self._after_call and not given.strip() and whole:
            return
        if not given:
            return
        if self._in_reasoning:
            if self._force_content:
                self._reasoning.append(given)
            self._events.append(Event(kind="reasoning", text=given, at=at))
            return
        self._events.append(Event(kind="content", text=given, at=at))
        self._after_call = False
        self._answered = self._answered or bool(given.strip())

    def _open_call(self, at: int, final: bool) -> bool:
        """Begin a call at `at` in the buffer, or treat its tag as text."""
        header = _HEADER.match(self._buffer, at)
        # In reasoning a model may talk about calls; only one that can be meant ends it.
        if header and (not self._in_reasoning or header[1] in self._schemas):
            rest = self._buffer[header.end() :]
            self._give(self._buffer[:at], False)
            self._buffer = rest
            self._in_reasoning = False
            self._begin(header[1])
            return True
        after = at + len("<tool_call>")
        if not header and _may_become_header(self._buffer[after:]):
            self._give(self._buffer[:at], False)
            if final:  # a call that was cut off is not something to say
                self._buffer = ""
            return False
        self._give(self._buffer[:after], True)
        return True

    def _begin(self, name: str) -> None:
        self._function, self._keys = name, set()
        self._events.append(Event(kind="call", text=name, index=self._num_calls))
        self._num_calls += 1
        self._answered = self._after_call = True
        self._state = self._body

    def _close(self) -> None:
        self._arguments("}" if self._keys else "{}")

    def _arguments(self, text: str) -> None:
        self._events.append(Event(kind="arguments", text=text, index=self._num_calls - 1))

    def _body(self, final: bool) -> bool:
        """Between the parameters of a call: act on the next tag, drop anything else."""
        buffer = self._buffer
        found = [(at, tag) for tag in _BODY_TAGS if (at := buffer.find(tag)) >= 0]
        if not found:
            if final:
                self._close()
                self._state = self._done
            else:
                self._buffer = buffer[len(buffer) - _partial(buffer, _BODY_TAGS) :]
            return False
        at, tag = min(found)
        rest = self._buffer = buffer[at:]
        if tag == "<parameter=":
            return self._open_parameter(final)
        if tag == "<function=" and not _FUNCTION.match(rest):
            if not final and _open_name(rest.removeprefix(tag)):
                return False
            self._buffer = rest[len(tag) :]
            return True
        self._close()
        self._state = self._text if tag in ("<tool_call>", "</tool_call>") else self._after
        self._buffer = rest[len(tag) :] if tag.startswith("</") else rest
        return True

    def _open_parameter(self, final: bool) -> bool:
        """Read the name of a parameter at the head of the buffer."""
        match = _PARAMETER.match(self._buffer)
        if not match:
            rest = self._buffer.removeprefix("<parameter=")
            if not final and _open_name(rest):
                return False
            self._buffer = rest
            return True
        if not final and match.end() == len(self._buffer) and not match[0].endswith("\n"):
            return False  # the line break after the tag may still come
        self._key, self._scanned = match[1], 0
        self._buffer = self._buffer[match.end() :]
        self._state = self._value
        return True

    def _value(self, final: bool) -> bool:
        """Collect a value until it ends, then give it as JSON."""
        schema = self._schemas.get(self._function, {}).get(self._key)
        # A value that stays an unfinished string to the last ends where it would have without it.
        match = _VALUE_END.search(self._buffer, 0 if final else self._scanned)
        while match and not final and _in_json_text(self._buffer[: match.start()], schema):
            match = _VALUE_END.search(self._buffer, max(match.end(), match.start() + 1))
        if match:
            value, self._buffer = self._buffer[: match.start()], self._buffer[match.end() :]
        elif final:
            value = _CLOSING.sub("", self._buffer, count=1)
            cut = _partial(value, _VALUE_TAGS)
            value = value[:-cut].removesuffix("\n") if cut > 1 else value
            self._buffer = ""
        else:
            self._scanned = max(0, len(self._buffer) - _TAIL)
            return False
        if self._key not in self._keys:  # of a parameter given twice the first counts
            pair = f"{json_text(self._key)}: {json_value(value, schema)}"
            self._arguments((", " if self._keys else "{") + pair)
            self._keys.add(self._key)
        self._state = self._body
        return True

    def _after(self, final: bool) -> bool:
        """After a function: the end of the call, or another function in it."""
        text = self._buffer.lstrip()
        if text.startswith("</tool_call>"):
            self._buffer = text.removeprefix("</tool_call>")
            self._state = self._text
            return True
        if match := _FUNCTION.match(text):
            self._buffer = text[match.end() :]
            self._begin(match[1])
            return True
        waits = (
            "</tool_call>".startswith(text)
            or "<function=".startswith(text)
            or (text.startswith("<function=") and _open_name(text.removeprefix("<function=")))
        )
        if waits:
            if final:
                self._buffer = ""
                self._state = self._done
            return False
        self._state = self._text
        return True

    def _done(self, final: bool) -> bool:
        """Take nothing more."""
        return False


def _in_json_text(value: str, schema: Any) -> bool:
    """Say whether `value`, cut off here, ends within a string of the JSON that it is to be."""
    if not value.lstrip().startswith(("{", "[")) or not types_of(schema) & {"object", "array"}:
        return False
    return re.sub(r"\\.", "", value, flags=re.DOTALL).count('"') % 2 == 1


def _goes_on(last: Event, event: Event) -> bool:
    """Whether `event` is the same thing gone on with, without anything left out between."""
    if event.kind == "call" or (last.kind, last.index) != (event.kind, event.index):
        return False
    return last.at is None or last.at + len(last.text) == event.at


def _partial(text: str, tags: Sequence[str]) -> int:
    """Return the length of the longest end of `text` that begins one of `tags`."""
    longest = max((len(tag) for tag in tags), default=1) - 1
    for size in range(min(longest, len(text)), 0, -1):
        if any(tag.startswith(text[-size:]) for tag in tags):
            return size
    return 0


def _trailing_space(text: str) -> int:
    tail = text[-_SPACE:]
    return len(tail) - len(tail.rstrip())


def _open_name(text: str) -> bool:
    """Say whether `text` may be the beginning of a name whose `>` has not come."""
    return len(text) <= _NAME and not any(c in "<>\n" for c in text)


def _may_become_header(text: str) -> bool:
    """Say whether `text`, which follows <tool_call>, may grow into the header of a call."""
    rest = text.lstrip()
    if len(text) - len(rest) > _SPACE:
        return False
    if "<function=".startswith(rest):
        return True
    return rest.startswith("<function=") and _open_name(rest.removeprefix("<function="))
