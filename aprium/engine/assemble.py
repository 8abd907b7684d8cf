"""Turn the deltas of one continuation into a growing completion: text, stop strings, alignment.

Text lags behind tokens twice: the decoder holds half a character, and an end of the text that
could still become a stop string is held back, so that no reader ever sees part of one. When a stop
string is complete the continuation ends there, whatever the engine sends after; before as many
tokens as an answer must have it is text like any other.
"""

from collections.abc import Sequence
from typing import Protocol

from aprium.base.records import Completion, Delta, Timings, TopLogprobs


class TextStream(Protocol):
    """An incremental decoder, such as `Tokenizer.stream()` gives."""

    def push(self, ids: Sequence[int]) -> str:
        """Take ids and return the text they complete."""
        ...

    def flush(self) -> str:
        """Return what is left."""
        ...


class Assembler:
    """One continuation as its reader sees it.

    `finish` is set when it has ended; `cut` tells that a stop string ended it, so that the engine
    must be told to abort. No stop string is looked for in the text of the first `min_tokens`.
    `stream` None is a model without a tokenizer: the text stays empty.
    """

    def __init__(
        self,
        *,
        prompt_tokens: tuple[int, ...],
        stop: tuple[str, ...],
        stream: TextStream | None,
        index: int = 0,
        min_tokens: int = 0,
    ) -> None:
        self.index = index
        self.finish: str | None = None
        self.cut = False
        self._prompt_tokens = prompt_tokens
        self._stop, self._min_tokens = stop, min_tokens
        self._stream = stream
        self._text = ""
        self._tokens: list[int] = []
        self._logprobs: list[float] = []
        self._top_logprobs: list[TopLogprobs] = []
        self._prompt_logprobs: tuple[float | None, ...] | None = None
        self._prompt_top_logprobs: tuple[TopLogprobs | None, ...] | None = None
        self._stop_reason: int | str | None = None
        self._drafted = self._accepted = self._reused = 0
        self._why_not_more: str | None = None
        self._embedding: tuple[float, ...] | None = None
        self._spans: list[tuple[int, int]] = []  # (version of the weights, tokens)
        self._timings = Timings()

    def push(self, delta: Delta) -> None:
        """Take the next delta; does nothing once the continuation has ended."""
        if self.finish is not None:
            return
        self._timings = delta.timings
        self._drafted, self._accepted = delta.drafted, delta.accepted
        self._reused, self._why_not_more = delta.reused, delta.why_not_more
        self._embedding = delta.embedding
        if delta.tokens:
            version, count = self._spans.pop() if self._spans else (delta.weight_version, 0)
            if version != delta.weight_version:
                self._spans.append((version, count))
                version, count = delta.weight_version, 0
            self._spans.append((version, count + len(delta.tokens)))
        if delta.prompt_logprobs is not None:
            self._prompt_logprobs = delta.prompt_logprobs
            self._prompt_top_logprobs = delta.prompt_top_logprobs
        last = len(delta.tokens) - 1
        for i, token in enumerate(delta.tokens):
            self._tokens.append(token)
            self._logprobs.append(delta.logprobs[i])
            if delta.top_logprobs:
                self._top_logprobs.append(delta.top_logprobs[i])
            ends = delta.finish == "stop" and i == last and token == delta.stop_reason
            if self._stream is not None and not ends and self._add(self._stream.push((token,))):
                return
        if delta.finish is not None:
            if self._stream is not None and self._add(self._stream.flush()):
                return
            self.finish, self._stop_reason = delta.finish, delta.stop_reason

    def completion(self) -> Completion:
        """Return the continuation so far."""
        text = self._text
        if self.finish is None:
            text = text[: len(text) - held_back(text, self._stop)]
        return Completion(
            text=text,
            tokens=tuple(self._tokens),
            logprobs=tuple(self._logprobs),
            finish=self.finish,
            index=self.index,
            prompt_tokens=self._prompt_tokens,
            top_logprobs=tuple(self._top_logprobs),
            prompt_logprobs=self._prompt_logprobs,
            prompt_top_logprobs=self._prompt_top_logprobs,
            stop_reason=self._stop_reason,
            reused=self._reused,
            why_not_more=self._why_not_more,
            drafted=self._drafted,
            accepted=self._accepted,
            embedding=self._embedding,
            weight_spans=tuple(self._spans),
            timings=self._timings,
        )

    def _add(self, piece: str) -> bool:
        """Append text; at a stop string, cut there, end, and return True."""
        before = len(self._text)
        self._text += piece
        if not piece or not self._stop or len(self._tokens) <= self._min_tokens:
            return False
        # The match that is complete first, whatever the pieces; of two, the one that began first.
        found = [
            (at + len(stop), at, stop)
            for stop in self._stop
            if (at := self._text.find(stop, max(0, before - len(stop) + 1))) >= 0
        ]
        if not found:
            return False
        _, begin, self._stop_reason = min(found)
        self._text = self._text[:begin]
        self.finish, self.cut = "stop", True
        return True


def held_back(text: str, stop: Sequence[str]) -> int:
    """Return the length of the longest end of `text` that begins one of the `stop` strings."""
    longest = max(map(len, stop), default=1) - 1
    for size in range(min(longest, len(text)), 0, -1):
        end = text[-size:]
        if any(len(s) > size and s.startswith(end) for s in stop):
            return size
    return 0
