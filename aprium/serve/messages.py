"""Anthropic's Messages API: `/v1/messages` and its token counts, whole and as a stream.

The conversation becomes a chat request (`serve/messages_wire`), runs as any other, and its parts
become blocks: thinking, text, tool use. A whole message is put together from the events of the
stream, so both say the same.
"""

import dataclasses
import hashlib
import json
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from aprium.base.errors import EngineError
from aprium.base.records import Completion
from aprium.serve.events import anthropic_error_body, event
from aprium.serve.messages_wire import CountTokensRequest, MessagesRequest
from aprium.serve.reply import Answer
from aprium.serve.service import Service
from aprium.serve.transport import Json
from aprium.serve.wire import ChatRequest
from aprium.text.parse import Event
from aprium.text.tokenizer import Tokenizer

Chunk = dict[str, Any]


class MessageRoutes:
    """The handlers of one service."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def create(self, body: MessagesRequest, request: Request) -> Response:
        """Answer a conversation."""
        service = self._service
        service.check_model(body.model)
        chat = body.to_chat(service.config.template_kwargs)
        with service.admit(request) as ticket:
            params = service.sampling(chat)
            prompt = await service.render(chat)
            # Clients ask for as much as the largest models give; what there is room for must do.
            room = service.engine.max_model_len - len(prompt.tokens)
            cut = body.max_tokens > room > 0
            if cut:
                params = dataclasses.replace(params, max_tokens=room)
            reply = MessageReply(
                chat,
                service.tokenizer,
                prompt.tokens,
                model=body.model or service.config.names[0],
                thinking=prompt.thinking,
                tools=service.tools(chat),
                cut=cut,
            )
            return await service.respond(
                *(request, ticket, reply, [prompt.tokens], params, chat), thinking=prompt.thinking
            )

    async def count_tokens(self, body: CountTokensRequest) -> Response:
        """Count the tokens of a conversation's prompt."""
        self._service.check_model(body.model)
        chat = body.to_chat(self._service.config.template_kwargs)
        prompt = await self._service.render(chat)
        return Json({"input_tokens": len(prompt.tokens)})


class MessageReply:
    """The reply to one conversation; `cut` says that the context leaves less room than asked."""

    last_event = b""

    def __init__(
        self,
        request: ChatRequest,
        tokenizer: Tokenizer,
        prompt: Sequence[int],
        *,
        model: str,
        thinking: bool,
        tools: Sequence[Mapping[str, Any]],
        cut: bool,
    ) -> None:
        self.id = f"msg_{uuid.uuid4().hex}"
        self._answer = Answer(
            tokenizer,
            thinking=thinking,
            tools=tools,
            include_reasoning=request.include_reasoning,
            parallel=request.parallel_tool_calls,
        )
        self._cut = cut
        self._num_prompt = len(prompt)
        self._message: dict[str, Any] = {
            "id": self.id,
            "type": "message",
            "role": "assistant",
            "model": model,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
        }
        self._begun = False
        self._kind: str | None = None  # of the block that is open
        self._json = ""

    def event(self, chunk: Chunk) -> bytes:
        """Return a chunk as it is sent."""
        return event(chunk, chunk["type"])

    def failed(self, status: int, message: str, param: str | None) -> list[Chunk]:
        """Return the chunk that says why a stream ends here."""
        return [anthropic_error_body(status, message, param)]

    def opening(self) -> list[Chunk]:
        """Return nothing: the first event has counts that are known with the first token."""
        return []

    def closing(self) -> list[Chunk]:
        """Return the last event."""
        return [{"type": "message_stop"}]

    def chunks(self, completion: Completion) -> list[Chunk]:
        """Return the events of what `completion` has grown by."""
        chunks: list[Chunk] = []
        if not self._begun:
            self._begun = True
            usage = self._usage(completion) | {"output_tokens": 0}
            message = {**self._message, "content": [], "usage": usage}
            chunks.append({"type": "message_start", "message": message})
        for part in self._answer.read(completion):
            chunks += self._part(part)
        if completion.finish is not None:
            chunks += [*self._close(), self._end(completion)]
        return chunks

    def whole(self, completions: Sequence[Completion]) -> dict[str, Any]:
        """Return the reply in one piece."""
        (completion,) = completions
        self.chunks(completion)
        return {**self._message, "usage": self._usage(completion)}

    def _part(self, part: Event) -> list[Chunk]:
        """Add a part to the block that is open, or to a new one."""
        content = self._message["content"]
        if part.kind == "call":
            id = self._answer.call_id(part.index, "toolu_")
            return self._open({"type": "tool_use", "id": id, "name": part.text, "input": {}})
        if part.kind == "arguments":
            self._json += part.text
            return [self._delta({"type": "input_json_delta", "partial_json": part.text})]
        if part.kind == "reasoning":
            chunks = []
            if self._kind != "thinking":
                chunks = self._open({"type": "thinking", "thinking": "", "signature": ""})
            content[-1]["thinking"] += part.text
            return [*chunks, self._delta({"type": "thinking_delta", "thinking": part.text})]
        chunks, text = [], part.text
        if self._kind != "text":
            text = text.lstrip()  # no block of white space alone
            if not text:
                return []
            chunks = self._open({"type": "text", "text": ""})
        content[-1]["text"] += text
        return [*chunks, self._delta({"type": "text_delta", "text": text})]

    def _open(self, block: dict[str, Any]) -> list[Chunk]:
        chunks = self._close()
        content = self._message["content"]
        content.append(block)
        self._kind = block["type"]
        index = len(content) - 1
        return [
            *chunks,
            {"type": "content_block_start", "index": index, "content_block": dict(block)},
        ]

    def _delta(self, delta: dict[str, Any]) -> Chunk:
        index = len(self._message["content"]) - 1
        return {"type": "content_block_delta", "index": index, "delta": delta}

    def _close(self) -> list[Chunk]:
        """End the block that is open."""
        if self._kind is None:
            return []
        content, chunks = self._message["content"], []
        block = content[-1]
        if self._kind == "thinking":
            # Clients keep what is signed; nothing here has to be proved by it later.
            text = block["thinking"].encode("utf-8", "replace")
            block["signature"] = hashlib.blake2b(text, digest_size=16).hexdigest()
            signed = {"type": "signature_delta", "signature": block["signature"]}
            chunks.append(self._delta(signed))
        elif self._kind == "tool_use":
            block["input"] = _read_arguments(self._json)
            self._json = ""
        self._kind = None
        return [*chunks, {"type": "content_block_stop", "index": len(content) - 1}]

    def _end(self, completion: Completion) -> Chunk:
        """Say how the message ended."""
        if completion.finish == "abort":
            raise EngineError(f"the answer was given up: {completion.stop_reason}")
        reason, text = "end_turn", None
        if completion.finish == "length":
            reason = "model_context_window_exceeded" if self._cut else "max_tokens"
        elif isinstance(completion.stop_reason, str):
            reason, text = "stop_sequence", completion.stop_reason
        elif self._answer.called:
            reason = "tool_use"
        self._message |= {"stop_reason": reason, "stop_sequence": text}
        delta = {"stop_reason": reason, "stop_sequence": text}
        return {"type": "message_delta", "delta": delta, "usage": self._usage(completion)}

    def _usage(self, completion: Completion) -> dict[str, Any]:
        """Return token counts; those of the prompt that were known already stand apart."""
        return {
            "input_tokens": self._num_prompt - completion.reused,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": completion.reused,
            "output_tokens": len(completion.tokens),
        }


def _read_arguments(text: str) -> Any:
    """Return the arguments of a call that may have been cut off."""
    try:
        return json.loads(text or "{}")
    except ValueError:
        return {}
