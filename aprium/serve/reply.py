"""Completions to OpenAI-shaped replies, whole or in chunks.

The engine gives completions that grow; a reply keeps, for each choice, how much of it was sent.
Whole replies and streams are built from the same pieces, so they say the same. Plain dicts, since
one is made for every token. No torch here, and no web framework.
"""

import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

from aprium.base.records import Completion, TopLogprobs
from aprium.serve.wire import ChatRequest, CompletionRequest
from aprium.text.parse import Event, ReasoningEnd, StreamParser, gather
from aprium.text.tokenizer import Tokenizer

_LOWEST = -9999.0  # stands for minus infinity, which JSON cannot express


class Reply(Protocol):
    """What the server needs of a reply, of either kind."""

    id: str

    def opening(self) -> list[dict[str, Any]]:
        """Return the chunks sent before the first token."""
        ...

    def chunks(self, completion: Completion) -> list[dict[str, Any]]:
        """Return the chunks for what `completion` has grown by."""
        ...

    def closing(self) -> list[dict[str, Any]]:
        """Return the chunks sent at the end."""
        ...

    def whole(self, completions: Sequence[Completion]) -> dict[str, Any]:
        """Return the reply in one piece, from the finished completion of each choice."""
        ...


class _Base:
    """What both kinds share: identity, the latest completion of each choice, token counts."""

    def __init__(
        self,
        request: ChatRequest | CompletionRequest,
        tokenizer: Tokenizer,
        prompts: Sequence[Sequence[int]],
        *,
        model: str,
        kind: str,
    ) -> None:
        self._request = request
        self._tokenizer = tokenizer
        self._prompts = prompts
        self.id = f"{'chatcmpl' if kind.startswith('chat') else 'cmpl'}-{uuid.uuid4().hex}"
        self._head = {"id": self.id, "created": int(time.time()), "model": model}
        self._kind = kind
        self._latest: dict[int, Completion] = {}
        self._sent_tokens: dict[int, int] = {}

    def closing(self) -> list[dict[str, Any]]:
        """Return the token counts, if asked for."""
        return [self._chunk([], self._usage())] if self._request.include_usage else []

    def _chunk(
        self, choices: list[dict[str, Any]], usage: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        chunk = {**self._head, "object": self._kind, "choices": choices}
        if self._request.include_usage:
            chunk["usage"] = usage
        return chunk

    def _usage(self) -> dict[str, Any]:
        prompt = sum(map(len, self._prompts))
        generated = sum(len(c.tokens) for c in self._latest.values())
        n = len(self._latest) // len(self._prompts) or 1
        reused = sum(c.reused for c in self._latest.values() if c.index % n == 0)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": generated,
            "total_tokens": prompt + generated,
            "prompt_tokens_details": {"cached_tokens": reused},
        }

    def _new_tokens(self, completion: Completion) -> int:
        """Return how many tokens of this choice were sent before, and book all as sent."""
        start = self._sent_tokens.get(completion.index, 0)
        self._sent_tokens[completion.index] = len(completion.tokens)
        return start

    def _stop_reason(self, completion: Completion) -> int | str | None:
        """Return what stopped the text, if it was asked for and not the model's own end."""
        reason = completion.stop_reason
        if isinstance(reason, int) and reason not in (self._request.stop_token_ids or ()):
            return None
        return reason

    def _end(self, completion: Completion, reason: str | None) -> dict[str, Any]:
        return {"finish_reason": reason, "stop_reason": self._stop_reason(completion)}


class ChatReply(_Base):
    """The reply to one conversation; `thinking` says whether its prompt opened the reasoning."""

    def __init__(
        self,
        request: ChatRequest,
        tokenizer: Tokenizer,
        prompt: Sequence[int],
        *,
        model: str,
        thinking: bool,
        tools: Sequence[Mapping[str, Any]],
        force_content: bool,
    ) -> None:
        kind = "chat.completion.chunk" if request.stream else "chat.completion"
        super().__init__(request, tokenizer, [prompt], model=model, kind=kind)
        self.thinking = thinking
        self._chat = request
        self._parsers = [
            StreamParser(thinking=thinking, tools=tools, force_content=force_content)
            for _ in range(request.n or 1)
        ]
        self._events: list[list[Event]] = [[] for _ in self._parsers]
        names = [tool["function"]["name"] for tool in tools]
        self._reasoning = [_ReasoningCount(tokenizer, names, thinking) for _ in self._parsers]
        self._call_ids: dict[tuple[int, int], str] = {}
        self._sent_text: dict[int, int] = {}

    def _usage(self) -> dict[str, Any]:
        counts = [self._reasoning[c.index].count(c.tokens) for c in self._latest.values()]
        return {**super()._usage(), "completion_tokens_details": {"reasoning_tokens": sum(counts)}}

    def opening(self) -> list[dict[str, Any]]:
        """Return one chunk per choice that says who speaks."""
        opened = []
        for index in range(len(self._parsers)):
            choice = {"index": index, "delta": {"role": "assistant", "content": ""}}
            opened.append(self._chunk([{**choice, "logprobs": None, "finish_reason": None}]))
        if self._chat.return_token_ids:
            opened[0]["prompt_token_ids"] = list(self._prompts[0])
        return opened

    def chunks(self, completion: Completion) -> list[dict[str, Any]]:
        """Return a chunk for each new part of the answer; the last one says how it ended."""
        index, done = completion.index, completion.finish is not None
        deltas = [self._delta(index, event) for event in self._read(completion)]
        if not deltas and not done:
            return []
        if done:
            deltas.append({})
        start = self._new_tokens(completion)
        choices = [
            {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}
            for delta in deltas
        ]
        # Tokens and parts do not correspond one to one: the first chunk carries what came since.
        if self._chat.logprobs and start < len(completion.tokens):
            choices[0]["logprobs"] = self._logprobs(completion, start)
        if self._chat.return_token_ids:
            choices[0]["token_ids"] = list(completion.tokens[start:])
        if done:
            choices[-1].update(self._end(completion, self._finish_reason(completion)))
        return [self._chunk([choice]) for choice in choices]

    def whole(self, completions: Sequence[Completion]) -> dict[str, Any]:
        """Return the reply in one piece, from the finished completion of each choice."""
        choices = []
        for completion in completions:
            index = completion.index
            self._read(completion)
            choice: dict[str, Any] = {
                "index": index,
                "message": self._message(index),
                "logprobs": self._logprobs(completion, 0) if self._chat.logprobs else None,
                **self._end(completion, self._finish_reason(completion)),
            }
            if self._chat.return_token_ids:
                choice["token_ids"] = list(completion.tokens)
            choices.append(choice)
        reply = {**self._head, "object": self._kind, "choices": choices, "usage": self._usage()}
        if self._chat.return_token_ids:
            reply["prompt_token_ids"] = list(self._prompts[0])
        return reply

    def _read(self, completion: Completion) -> list[Event]:
        """Parse what `completion` has grown by; leave out what the request does not want."""
        index = completion.index
        self._latest[index] = completion
        new = completion.text[self._sent_text.get(index, 0) :]
        self._sent_text[index] = len(completion.text)
        parser = self._parsers[index]
        events = parser.push(new) if new else []
        if completion.finish is not None:
            events += parser.finish()
        if not self._chat.include_reasoning:
            events = [event for event in events if event.kind != "reasoning"]
        if not self._chat.parallel_tool_calls:
            events = [event for event in events if event.index == 0]
        self._events[index] += events
        return events

    def _delta(self, index: int, event: Event) -> dict[str, Any]:
        if event.kind == "reasoning":
            return {"reasoning": event.text, "reasoning_content": event.text}
        if event.kind == "content":
            return {"content": event.text}
        call: dict[str, Any] = {"index": event.index}
        if event.kind == "call":
            call |= {"id": self._call_id(index, event.index), "type": "function"}
            call["function"] = {"name": event.text, "arguments": ""}
        else:
            call["function"] = {"arguments": event.text}
        return {"tool_calls": [call]}

    def _message(self, index: int) -> dict[str, Any]:
        parsed = gather(self._events[index])
        message: dict[str, Any] = {
            "role": "assistant",
            "content": parsed.content,
            "refusal": None,
            "reasoning": parsed.reasoning,
            "reasoning_content": parsed.reasoning,
        }
        if parsed.tool_calls:
            message["tool_calls"] = [
                {
                    "id": self._call_id(index, i),
                    "type": "function",
                    "function": {"name": call.name, "arguments": call.arguments},
                }
                for i, call in enumerate(parsed.tool_calls)
            ]
        return message

    def _finish_reason(self, completion: Completion) -> str | None:
        called = any(event.kind == "call" for event in self._events[completion.index])
        return "tool_calls" if called and completion.finish == "stop" else completion.finish

    def _call_id(self, index: int, call: int) -> str:
        return self._call_ids.setdefault((index, call), f"call_{uuid.uuid4().hex[:24]}")

    def _logprobs(self, completion: Completion, start: int) -> dict[str, Any]:
        content = []
        for token, logprob, top in _rows(completion, start):
            alternatives = list(top.items())[: self._chat.top_logprobs or 0]
            entry = self._token(token, logprob)
            entry["top_logprobs"] = [self._token(t, value) for t, value in alternatives]
            content.append(entry)
        return {"content": content, "refusal": None}

    def _token(self, token: int, logprob: float) -> dict[str, Any]:
        raw = self._tokenizer.token_bytes(token)
        text = raw.decode("utf-8", "replace")
        return {"token": text, "logprob": max(logprob, _LOWEST), "bytes": list(raw)}


class _ReasoningCount:
    """Counts the tokens of one answer's reasoning, with the tag that ends it."""

    def __init__(self, tokenizer: Tokenizer, names: Sequence[str], thinking: bool) -> None:
        self._tokenizer, self._end = tokenizer, ReasoningEnd(names)
        self._open, self._tail, self._count = thinking, b"", 0

    def count(self, tokens: Sequence[int]) -> int:
        """Return how many of `tokens`, which have grown since the last call, are reasoning."""
        while self._open and self._count < len(tokens):
            new = self._tokenizer.token_bytes(tokens[self._count])
            self._tail, ended = self._end.push(self._tail, new)
            self._open = not ended
            self._count += 1
        return self._count


class TextReply(_Base):
    """The reply to plain prompts; `texts` are the prompts as they are echoed.

    Choice `i` continues prompt `i // n`.
    """

    def __init__(
        self,
        request: CompletionRequest,
        tokenizer: Tokenizer,
        prompts: Sequence[Sequence[int]],
        *,
        model: str,
        texts: Sequence[str],
    ) -> None:
        super().__init__(request, tokenizer, prompts, model=model, kind="text_completion")
        self._plain = request
        self._texts = texts
        self._sent_text: dict[int, int] = {}
        self._offset: dict[int, int] = {}
        self._opened: set[int] = set()

    def opening(self) -> list[dict[str, Any]]:
        """Return nothing: an echo comes with the first chunk."""
        return []

    def chunks(self, completion: Completion) -> list[dict[str, Any]]:
        """Return one chunk for what is new."""
        index = completion.index
        self._latest[index] = completion
        echo = self._plain.echo and index not in self._opened
        sent = self._sent_text.get(index, 0)
        text, done = completion.text[sent:], completion.finish is not None
        if not text and not done and not echo:
            return []
        self._sent_text[index] = len(completion.text)
        start = self._new_tokens(completion)
        choice = self._choice(completion, text, start, echo=echo)
        if self._plain.return_token_ids and index in self._opened:
            del choice["prompt_token_ids"]
        self._opened.add(index)
        return [self._chunk([choice])]

    def whole(self, completions: Sequence[Completion]) -> dict[str, Any]:
        """Return the reply in one piece, from the finished completion of each choice."""
        self._latest = {completion.index: completion for completion in completions}
        choices = [
            self._choice(completion, completion.text, 0, echo=self._plain.echo)
            for completion in completions
        ]
        return {**self._head, "object": self._kind, "choices": choices, "usage": self._usage()}

    def _choice(
        self, completion: Completion, text: str, start: int, *, echo: bool
    ) -> dict[str, Any]:
        index = completion.index
        prompt = index // (self._plain.n or 1)
        choice: dict[str, Any] = {
            "index": index,
            "text": (self._texts[prompt] if echo else "") + text,
            "logprobs": None,
            **self._end(completion, completion.finish),
        }
        if self._plain.logprobs is not None:
            choice["logprobs"] = self._logprobs(completion, start, echo=echo)
        if self._plain.return_token_ids:
            choice["token_ids"] = list(completion.tokens[start:])
            choice["prompt_token_ids"] = list(self._prompts[prompt])
        return choice

    def _logprobs(self, completion: Completion, start: int, *, echo: bool) -> dict[str, Any]:
        rows: list[tuple[int, float | None, TopLogprobs | None]] = [*_rows(completion, start)]
        if echo:
            ids = completion.prompt_tokens
            scores = completion.prompt_logprobs or (None,) * len(ids)
            alternatives = completion.prompt_top_logprobs or ({},) * len(ids)
            rows = [*zip(ids, scores, alternatives, strict=True), *rows]
        offset = self._offset.get(completion.index, 0)
        result: dict[str, list[Any]] = {
            "tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []
        }  # fmt: skip
        for token, logprob, top in rows:
            text = self._piece(token)
            result["tokens"].append(text)
            result["text_offset"].append(offset)
            offset += len(text)
            result["token_logprobs"].append(None if logprob is None else max(logprob, _LOWEST))
            result["top_logprobs"].append(
                None if logprob is None else self._top({**(top or {}), token: logprob})
            )
        self._offset[completion.index] = offset
        return dict(result)

    def _top(self, top: TopLogprobs) -> dict[str, float]:
        """Return alternatives by text; of two with the same text the likelier one."""
        named: dict[str, float] = {}
        for token, logprob in sorted(top.items(), key=lambda pair: -pair[1]):
            named.setdefault(self._piece(token), max(logprob, _LOWEST))
        return named

    def _piece(self, token: int) -> str:
        return self._tokenizer.token_bytes(token).decode("utf-8", "replace")


def _rows(completion: Completion, start: int) -> Iterator[tuple[int, float, TopLogprobs]]:
    """Return token, log-probability and alternatives of each generated position from `start`."""
    tokens = completion.tokens[start:]
    tops = completion.top_logprobs[start:] or ({},) * len(tokens)
    return zip(tokens, completion.logprobs[start:], tops, strict=True)
