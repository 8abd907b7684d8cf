"""Completions to OpenAI-shaped replies, whole or in chunks.

The engine gives completions that grow; a reply keeps, for each choice, how much of it was sent.
Whole replies and streams are built from the same pieces, so they say the same. Plain dicts, since
one is made for every token. No torch here, and no web framework.
"""

import time
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Protocol

from aprium.base.records import Completion, TopLogprobs
from aprium.serve.events import error_body, event
from aprium.serve.wire import ChatRequest, CompletionRequest
from aprium.text.parse import Event, Parsed, ReasoningEnd, StreamParser, gather
from aprium.text.tokenizer import Tokenizer

_LOWEST = -9999.0  # stands for minus infinity, which JSON cannot express


class Reply(Protocol):
    """What the server needs of a reply, of any kind; `last_event` ends a stream."""

    id: str
    last_event: bytes

    def event(self, chunk: dict[str, Any]) -> bytes:
        """Return a chunk as it is sent."""
        ...

    def failed(self, status: int, message: str, param: str | None) -> list[dict[str, Any]]:
        """Return the chunks that say why a stream ends here."""
        ...

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

    last_event = b"data: [DONE]\n\n"

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

    def event(self, chunk: dict[str, Any]) -> bytes:
        """Return a chunk as it is sent."""
        return event(chunk)

    def failed(self, status: int, message: str, param: str | None) -> list[dict[str, Any]]:
        """Return the chunk that says why a stream ends here."""
        return [error_body(status, message, param)]

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
            "completion_tokens_details": draft_counts(self._latest.values()),
        }

    def _timed(self, chunks: list[dict[str, Any]], done: bool) -> list[dict[str, Any]]:
        """Add times to the last of `chunks`, where they are asked for."""
        asked = self._request.timings_per_token or (self._request.timings and done)
        if chunks and asked:
            chunks[-1]["timings"] = self._timings()
        return chunks

    def _timings(self) -> dict[str, Any]:
        prompt = sum(map(len, self._prompts))
        return timings(list(self._latest.values()), prompt, self._usage())

    def _prompt_logprobs(self, completion: Completion) -> list[dict[str, Any] | None]:
        """Return the log-probabilities of the prompt as vLLM has them."""
        rows: list[dict[str, Any] | None] = []
        scores = completion.prompt_logprobs or ()
        tops = completion.prompt_top_logprobs or ({},) * len(scores)
        for token, score, top in zip(completion.prompt_tokens, scores, tops, strict=True):
            if score is None:
                rows.append(None)
                continue
            ranks = {id: rank for rank, id in enumerate(top or {}, 1)}
            rows.append(
                {
                    str(id): {
                        "logprob": max(value, _LOWEST),
                        "rank": ranks.get(id),
                        "decoded_token": self._tokenizer.token_bytes(id).decode("utf-8", "replace"),
                    }
                    for id, value in {**(top or {}), token: score}.items()
                }
            )
        return rows

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
        self.answers = [
            Answer(
                tokenizer,
                thinking=thinking,
                tools=tools,
                force_content=force_content,
                include_reasoning=request.include_reasoning,
                parallel=request.parallel_tool_calls,
            )
            for _ in range(request.n or 1)
        ]

    def _usage(self) -> dict[str, Any]:
        usage = super()._usage()
        counts = [self.answers[c.index].num_reasoning(c) for c in self._latest.values()]
        usage["completion_tokens_details"]["reasoning_tokens"] = sum(counts)
        return usage

    def opening(self) -> list[dict[str, Any]]:
        """Return one chunk per choice that says who speaks."""
        opened = []
        for index in range(len(self.answers)):
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
        return self._timed([self._chunk([choice]) for choice in choices], done)

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
        if self._chat.prompt_logprobs is not None:
            reply["prompt_logprobs"] = self._prompt_logprobs(completions[0])
        return self._timed([reply], True)[0]

    def _read(self, completion: Completion) -> list[Event]:
        """Parse what `completion` has grown by."""
        self._latest[completion.index] = completion
        return self.answers[completion.index].read(completion)

    def _delta(self, index: int, event: Event) -> dict[str, Any]:
        if event.kind == "reasoning":
            return {"reasoning": event.text, "reasoning_content": event.text}
        if event.kind == "content":
            return {"content": event.text}
        call: dict[str, Any] = {"index": event.index}
        if event.kind == "call":
            call |= {"id": self.answers[index].call_id(event.index), "type": "function"}
            call["function"] = {"name": event.text, "arguments": ""}
        else:
            call["function"] = {"arguments": event.text}
        return {"tool_calls": [call]}

    def _message(self, index: int) -> dict[str, Any]:
        parsed = self.answers[index].parsed()
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
                    "id": self.answers[index].call_id(i),
                    "type": "function",
                    "function": {"name": call.name, "arguments": call.arguments},
                }
                for i, call in enumerate(parsed.tool_calls)
            ]
        return message

    def _finish_reason(self, completion: Completion) -> str | None:
        called = self.answers[completion.index].called
        return "tool_calls" if called and completion.finish == "stop" else completion.finish

    def _logprobs(self, completion: Completion, start: int) -> dict[str, Any]:
        content = []
        for token, logprob, top in token_rows(completion, start):
            content.append(
                token_logprob(self._tokenizer, token, logprob, top, self._chat.top_logprobs or 0)
            )
        return {"content": content, "refusal": None}


class Answer:
    """One answer as it grows, in its parts; every API's replies are made of these.

    `include_reasoning` and `parallel` false leave reasoning, and calls after the first, out.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        thinking: bool,
        tools: Sequence[Mapping[str, Any]] = (),
        force_content: bool = False,
        include_reasoning: bool = True,
        parallel: bool = True,
    ) -> None:
        self._tokenizer = tokenizer
        self._parser = StreamParser(thinking=thinking, tools=tools, force_content=force_content)
        self._include_reasoning, self._parallel = include_reasoning, parallel
        self._events: list[Event] = []
        self._sent = 0
        self._call_ids: dict[int, str] = {}
        self._end = ReasoningEnd(tool["function"]["name"] for tool in tools)
        self._open, self._tail, self._count = thinking, b"", 0

    def read(self, completion: Completion) -> list[Event]:
        """Parse what `completion` has grown by; leave out what is not wanted."""
        new = completion.text[self._sent :]
        self._sent = len(completion.text)
        events = self._parser.push(new) if new else []
        if completion.finish is not None:
            events += self._parser.finish()
        if not self._include_reasoning:
            events = [event for event in events if event.kind != "reasoning"]
        if not self._parallel:
            events = [event for event in events if event.index == 0]
        self._events += events
        return events

    def parsed(self) -> Parsed:
        """Return what has come, in parts."""
        return gather(self._events)

    @property
    def called(self) -> bool:
        """Whether there is a tool call in it."""
        return any(event.kind == "call" for event in self._events)

    def call_id(self, index: int, prefix: str = "call_") -> str:
        """Return the name of a call."""
        return self._call_ids.setdefault(index, f"{prefix}{uuid.uuid4().hex[:24]}")

    def num_reasoning(self, completion: Completion) -> int:
        """Return how many of its tokens are reasoning, with the tag that ends it."""
        tokens = completion.tokens
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
        return self._timed([self._chunk([choice])], done)

    def whole(self, completions: Sequence[Completion]) -> dict[str, Any]:
        """Return the reply in one piece, from the finished completion of each choice."""
        self._latest = {completion.index: completion for completion in completions}
        choices = [
            self._choice(completion, completion.text, 0, echo=self._plain.echo)
            for completion in completions
        ]
        if self._plain.prompt_logprobs is not None:
            for choice, completion in zip(choices, completions, strict=True):
                choice["prompt_logprobs"] = self._prompt_logprobs(completion)
        reply = {**self._head, "object": self._kind, "choices": choices, "usage": self._usage()}
        return self._timed([reply], True)[0]

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
        rows: list[tuple[int, float | None, TopLogprobs | None]] = [*token_rows(completion, start)]
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


def draft_counts(completions: Iterable[Completion]) -> dict[str, int]:
    """Return how many drafted tokens were right and how many were not, by OpenAI's names."""
    drafted = accepted = 0
    for completion in completions:
        drafted, accepted = drafted + completion.drafted, accepted + completion.accepted
    return {
        "accepted_prediction_tokens": accepted,
        "rejected_prediction_tokens": drafted - accepted,
    }


def timings(
    completions: Sequence[Completion], num_prompt: int, usage: Mapping[str, Any]
) -> dict[str, Any]:
    """Return where the time of a request went, by llama.cpp's names and some more."""
    times = [completion.timings for completion in completions]
    first_s = min((t.first_token_s for t in times if t.first_token_s), default=0.0)
    queue_s = min((t.queue_s for t in times), default=0.0)
    total_s = max((t.total_s for t in times), default=0.0)
    prompt_s, decode_s = max(first_s - queue_s, 0.0), max(total_s - first_s, 0.0)
    cached = usage["prompt_tokens_details"]["cached_tokens"]
    read, generated = num_prompt - cached, usage["completion_tokens"]
    later = max(generated - len(completions), 0)  # tokens after the first of each
    drafts = usage["completion_tokens_details"]
    return {
        "queue_ms": 1000 * queue_s,
        "cache_n": cached,
        "why_not_more": next((c.why_not_more for c in completions), None),
        "prompt_n": read,
        "prompt_ms": 1000 * prompt_s,
        "prompt_per_second": read / prompt_s if prompt_s else 0.0,
        "predicted_n": generated,
        "predicted_ms": 1000 * decode_s,
        "predicted_per_second": later / decode_s if decode_s else 0.0,
        "draft_n": drafts["accepted_prediction_tokens"] + drafts["rejected_prediction_tokens"],
        "draft_n_accepted": drafts["accepted_prediction_tokens"],
        "total_ms": 1000 * total_s,
    }


def token_logprob(
    tokenizer: Tokenizer, token: int, logprob: float, top: TopLogprobs, count: int
) -> dict[str, Any]:
    """Return a token with its log-probability and `count` alternatives, as OpenAI has them."""
    entry = _token(tokenizer, token, logprob)
    entry["top_logprobs"] = [_token(tokenizer, t, value) for t, value in [*top.items()][:count]]
    return entry


def _token(tokenizer: Tokenizer, token: int, logprob: float) -> dict[str, Any]:
    raw = tokenizer.token_bytes(token)
    text = raw.decode("utf-8", "replace")
    return {"token": text, "logprob": max(logprob, _LOWEST), "bytes": list(raw)}


def token_rows(completion: Completion, start: int) -> Iterator[tuple[int, float, TopLogprobs]]:
    """Return token, log-probability and alternatives of each generated position from `start`."""
    tokens = completion.tokens[start:]
    tops = completion.top_logprobs[start:] or ({},) * len(tokens)
    return zip(tokens, completion.logprobs[start:], tops, strict=True)
