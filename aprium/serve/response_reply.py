"""Completions to replies of OpenAI's Responses API: items, and the events that build them.

A whole response is put together from the events of the stream, so both say the same.
"""

import time
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from aprium.base.records import Completion
from aprium.serve.events import event
from aprium.serve.reply import Answer, token_logprob, token_rows
from aprium.serve.responses_wire import CreateResponse
from aprium.serve.wire import ChatRequest
from aprium.text.items import Echo
from aprium.text.parse import Event
from aprium.text.tokenizer import Tokenizer

Chunk = dict[str, Any]
_PARTS = {"reasoning": "reasoning_text", "content": "output_text"}


class ResponseReply:
    """The reply to one request; `response` is the response as it stands."""

    last_event = b""

    def __init__(
        self,
        id: str,
        request: CreateResponse,
        chat: ChatRequest,
        tokenizer: Tokenizer,
        prompt: Sequence[int],
        *,
        model: str,
        thinking: bool,
        tools: Sequence[Mapping[str, Any]],
        stored: bool,
    ) -> None:
        self.id = id
        self._answer = Answer(
            tokenizer, thinking=thinking, tools=tools, parallel=chat.parallel_tool_calls
        )
        self._num_prompt = len(prompt)
        self._prompt = tuple(prompt) if request.return_token_ids else None
        self._number = 0
        self._kind: str | None = None  # of the item that is open
        count = chat.top_logprobs or 0
        self._scores = _Scores(tokenizer, count) if request.logprobs else None
        self.response = _blank(id, request, chat, model, stored)

    def event(self, chunk: Chunk) -> bytes:
        """Return a chunk as it is sent."""
        return event(chunk, chunk["type"])

    def opening(self) -> list[Chunk]:
        """Return the events before the first token."""
        self.response["status"] = "in_progress"
        return [self._state("response.created"), self._state("response.in_progress")]

    def closing(self) -> list[Chunk]:
        """Return the last event."""
        return [self._state(f"response.{self.response['status']}")]

    def failed(self, status: int, message: str, param: str | None) -> list[Chunk]:
        """Return the event that says why a stream ends here."""
        self.response["status"] = "failed"
        self.response["error"] = {"code": "server_error", "message": message}
        return [self._state("response.failed")]

    def chunks(self, completion: Completion) -> list[Chunk]:
        """Return the events of what `completion` has grown by."""
        chunks: list[Chunk] = []
        for part in self._answer.read(completion):
            chunks += self._part(part, completion)
        if completion.finish is None:
            return chunks
        response = self.response
        cut = completion.finish == "length"
        if self._prompt is not None:
            chunks += self._add_tokens(self._prompt, completion)
        chunks += self._close("incomplete" if cut else "completed")
        response["status"] = "incomplete" if cut else "completed"
        response["completed_at"] = None if cut else int(time.time())
        response["usage"] = self._usage(completion)
        if cut:
            response["incomplete_details"] = {"reason": "max_output_tokens"}
        elif completion.finish == "abort":
            message = f"the answer was given up: {completion.stop_reason}"
            self.failed(503, message, None)
        return chunks

    def whole(self, completions: Sequence[Completion]) -> dict[str, Any]:
        """Return the reply in one piece."""
        self.chunks(completions[0])
        return self.response

    def _part(self, part: Event, completion: Completion) -> list[Chunk]:
        """Add a part to the item that is open, or to a new one."""
        output = self.response["output"]
        if part.kind == "call":
            item = {
                "id": f"fc_{uuid.uuid4().hex}",
                "type": "function_call",
                "call_id": self._answer.call_id(part.index),
                "name": part.text,
                "arguments": "",
                "status": "in_progress",
            }
            return self._open("call", item)
        if part.kind == "arguments":
            output[-1]["arguments"] += part.text
            return [self._at("response.function_call_arguments.delta", delta=part.text)]
        chunks, text = [], part.text
        if self._kind != part.kind:
            if part.kind == "content":
                text = text.lstrip()  # no message of white space alone
                if not text:
                    return []
            chunks = self._open_text(part.kind)
        shown = output[-1]["content"][0]
        shown["text"] += text
        more = {}
        if part.kind == "content":
            more["logprobs"] = scores = []
            if self._scores is not None and part.at is not None:
                end = part.at + len(part.text)
                scores += self._scores.take(completion, end - len(text), end)
            shown["logprobs"] += scores
        name = f"response.{_PARTS[part.kind]}.delta"
        return [*chunks, self._at(name, content_index=0, delta=text, **more)]

    def _open_text(self, kind: str) -> list[Chunk]:
        chunks = self._open(kind, _item(kind))
        part = self._at("response.content_part.added", content_index=0, part=_text(kind))
        self.response["output"][-1]["content"] = [_text(kind)]
        return [*chunks, part]

    def _open(self, kind: str, item: dict[str, Any]) -> list[Chunk]:
        chunks = self._close("completed")
        output = self.response["output"]
        output.append(item)
        self._kind = kind
        added = self._next("response.output_item.added", output_index=len(output) - 1)
        return [*chunks, {**added, "item": dict(item)}]

    def _close(self, status: str) -> list[Chunk]:
        """End the item that is open."""
        kind, self._kind = self._kind, None
        if kind is None:
            return []
        item = self.response["output"][-1]
        item["status"] = status
        if kind == "call":
            name = "response.function_call_arguments.done"
            chunks = [self._at(name, arguments=item["arguments"], name=item["name"])]
        else:
            (part,) = item["content"]
            more = {"logprobs": part["logprobs"]} if kind == "content" else {}
            done = f"response.{_PARTS[kind]}.done"
            chunks = [
                self._at(done, content_index=0, text=part["text"], **more),
                self._at("response.content_part.done", content_index=0, part=part),
            ]
        index = len(self.response["output"]) - 1
        done = self._next("response.output_item.done", output_index=index)
        return [*chunks, {**done, "item": dict(item)}]

    def _add_tokens(self, prompt: tuple[int, ...], completion: Completion) -> list[Chunk]:
        """Put the tokens of the call on the last item, which an empty answer gets for that."""
        opened = [] if self.response["output"] else self._open_text("content")
        echo = Echo(prompt=prompt, generated=completion.tokens, logprobs=completion.logprobs)
        self.response["output"][-1] |= echo.fields()
        return opened

    def _state(self, name: str) -> Chunk:
        return self._next(name, response={**self.response, "output": [*self.response["output"]]})

    def _at(self, name: str, /, **fields: Any) -> Chunk:
        """Return an event about the item that came last."""
        output = self.response["output"]
        where = {"item_id": output[-1]["id"], "output_index": len(output) - 1}
        return self._next(name, **where, **fields)

    def _next(self, name: str, /, **fields: Any) -> Chunk:
        self._number += 1
        return {"type": name, "sequence_number": self._number - 1, **fields}

    def _usage(self, completion: Completion) -> dict[str, Any]:
        count = len(completion.tokens)
        return {
            "input_tokens": self._num_prompt,
            "input_tokens_details": {"cached_tokens": completion.reused, "cache_write_tokens": 0},
            "output_tokens": count,
            "output_tokens_details": {"reasoning_tokens": self._answer.num_reasoning(completion)},
            "total_tokens": self._num_prompt + count,
        }


class _Scores:
    """The log-probabilities of an answer's tokens, which are given out with the text they are of.

    A token belongs to the first stretch of text that has any of its characters.
    """

    def __init__(self, tokenizer: Tokenizer, count: int) -> None:
        self._tokenizer, self._count = tokenizer, count
        self._stream = tokenizer.stream()
        self._next = 0  # token to be looked at
        self._ends = [0]  # characters of the text after so many tokens

    def take(self, completion: Completion, begin: int, end: int) -> list[dict[str, Any]]:
        """Return those of characters `begin` to `end` of the text that were not given yet."""
        for token in completion.tokens[len(self._ends) - 1 :]:
            self._ends.append(self._ends[-1] + len(self._stream.push((token,))))
        found = []
        for token, logprob, top in token_rows(completion, self._next):
            first, last = self._ends[self._next : self._next + 2]
            if first >= end:
                break
            self._next += 1
            # The first bytes of a character, of which the text has nothing yet, belong to it.
            said = token not in self._tokenizer.special_ids
            if said and max(last, first + 1) > begin:
                found.append(token_logprob(self._tokenizer, token, logprob, top, self._count))
        return found


def _item(kind: str) -> dict[str, Any]:
    """Return an item of text that begins."""
    name = uuid.uuid4().hex
    if kind == "reasoning":
        return {
            "id": f"rs_{name}", "type": "reasoning", "summary": [], "content": [],
            "status": "in_progress",
        }  # fmt: skip
    return {
        "id": f"msg_{name}", "type": "message", "role": "assistant", "content": [],
        "status": "in_progress",
    }  # fmt: skip


def _text(kind: str) -> dict[str, Any]:
    """Return an empty part of such an item."""
    if kind == "reasoning":
        return {"type": "reasoning_text", "text": ""}
    return {"type": "output_text", "text": "", "annotations": [], "logprobs": []}


def _blank(
    id: str, request: CreateResponse, chat: ChatRequest, model: str, stored: bool
) -> dict[str, Any]:
    """Return a response that has not begun: what was asked for, as clients expect to see it."""
    effort = request.reasoning.effort if request.reasoning is not None else None
    form = request.text.format if request.text is not None else None
    return {
        "id": id,
        "object": "response",
        "created_at": int(time.time()),
        "completed_at": None,
        "status": "queued",
        "background": bool(request.background),
        "error": None,
        "incomplete_details": None,
        "instructions": request.instructions,
        "max_output_tokens": request.max_output_tokens,
        "metadata": request.metadata or {},
        "model": model,
        "output": [],
        "parallel_tool_calls": chat.parallel_tool_calls,
        "previous_response_id": request.previous_response_id,
        "reasoning": {"effort": effort, "summary": None},
        "store": stored,
        "temperature": chat.temperature,
        "text": {"format": form or {"type": "text"}},
        "tool_choice": request.tool_choice or "auto",
        "tools": request.tools or [],
        "top_logprobs": request.top_logprobs or 0,
        "top_p": chat.top_p,
        "truncation": "disabled",
        "usage": None,
    }
