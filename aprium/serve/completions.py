"""OpenAI's first routes: chat, completions, embeddings, models, and tokens of a text."""

import asyncio
import base64
import math
import struct
import uuid
from collections.abc import Sequence
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from aprium.base.errors import RequestError, SessionError
from aprium.base.records import SamplingParams
from aprium.serve.keys import owner_of
from aprium.serve.reply import TextReply
from aprium.serve.service import Prompt, Service, collect
from aprium.serve.sessions import ResumeSession, Turn, new_turn
from aprium.serve.transport import Json, until_gone
from aprium.serve.wire import (
    AnyTokenizeRequest,
    ChatRequest,
    CompletionRequest,
    ControlRequest,
    DetokenizeRequest,
    EmbeddingsRequest,
    TokenizeChatRequest,
)
from aprium.text.chat import starts_in_reasoning


class CompletionRoutes:
    """The handlers of one service."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._engine = service.engine
        self._tokenizer = service.tokenizer

    async def chat(self, body: ChatRequest, request: Request) -> Response:
        """Answer a conversation."""
        service = self._service
        service.check_model(body.model)
        body.refuse_unsupported()
        with service.admit(request, body.best_of or body.n) as ticket:
            params = service.sampling(body)
            record, past, turns = None, [], 0
            if body.session is not None:
                record = self._engine.sessions.get(body.session, owner_of(request.headers))
                past, turns = list(record.messages), record.turns
            prompt = await service.render(body, past)
            turn = None
            if record is not None:
                running = new_turn(body, prompt.tokens, params, service.tools(body), turns)
                params = running.params
                turn = Turn(self._engine, record, running, prompt.thinking)
            reply = service.chat_reply(body, prompt)
            return await service.respond(
                request, ticket, reply, [prompt.tokens], params, body, turn, thinking=reply.thinking
            )

    async def resume(
        self, id: str, request: Request, body: ResumeSession | None = None
    ) -> Response:
        """Finish a turn of a session that was cut off; the answer is that of a chat."""
        record = self._engine.sessions.get(id, owner_of(request.headers))
        running = record.running
        if running is None or not record.interrupted:
            raise SessionError(f"session {id!r} has no turn to resume", "busy")
        asked = running.options.get("body") or {"messages": [{"role": "user", "content": ""}]}
        stream = body is not None and body.stream
        chat = ChatRequest.model_validate({**asked, "stream": stream, "session": id})
        tokens = list(running.prompt)
        tail = self._tokenizer.decode(tokens[-8:], skip_special_tokens=False)
        prompt = Prompt(tokens=tokens, thinking=starts_in_reasoning(tail))
        reply = self._service.chat_reply(chat, prompt)
        with self._service.admit(request) as ticket:
            turn = Turn(self._engine, record, running, prompt.thinking)
            return await self._service.respond(
                *(request, ticket, reply, [tokens], running.params, chat, turn),
                thinking=reply.thinking,
            )

    async def control(self, body: ControlRequest) -> Response:
        """End the reasoning of a completion that is under way."""
        self._service.check_model(body.model)
        ended = await self._engine.finish_thinking(body.id)
        return Json({"id": body.id, "action": body.action, "applied": ended > 0})

    async def complete(self, body: CompletionRequest, request: Request) -> Response:
        """Continue plain prompts."""
        service = self._service
        service.check_model(body.model)
        body.refuse_unsupported()
        given = body.prompts()
        with service.admit(request, len(given) * (body.best_of or body.n or 1)) as ticket:
            params = body.sampling(service.config.sampling)
            prompts = await self._encode(given, body.add_special_tokens)
            reply = TextReply(
                body,
                self._tokenizer,
                prompts,
                model=body.model or service.config.names[0],
                texts=[self._echo(p) if body.echo else "" for p in given],
            )
            return await service.respond(request, ticket, reply, prompts, params, body)

    async def embed(self, body: EmbeddingsRequest, request: Request) -> Response:
        """Return a vector for each input."""
        service = self._service
        service.check_model(body.model)
        body.refuse_unsupported()
        width = self._engine.model_config.hidden_size
        if body.dimensions not in (None, width):
            raise RequestError(
                f"dimensions is {body.dimensions}: vectors of this model have {width}, leave it "
                "out",
                param="dimensions",
            )
        given = body.prompts()
        with service.admit(request, len(given)) as ticket:
            prompts = await self._encode(given)
            facts = request.scope["state"]["facts"]
            facts["request"] = id = f"embd-{uuid.uuid4().hex}"
            params = SamplingParams(max_tokens=0, temperature=0)
            completions = await service.start(
                ticket, id, prompts, params, body, None, facts, pooling=body.pooling
            )
            try:
                finished = await until_gone(collect(completions), request.receive)
            except ClientDisconnect:
                return Response(status_code=499)
        vectors = [_vector(c.embedding or (), body) for c in finished]
        count = sum(map(len, prompts))
        return Json(
            {
                "object": "list",
                "model": body.model or service.config.names[0],
                "data": [
                    {"object": "embedding", "index": index, "embedding": vector}
                    for index, vector in enumerate(vectors)
                ],
                "usage": {"prompt_tokens": count, "total_tokens": count},
            }
        )

    async def models(self) -> Response:
        """List the names the model answers to."""
        names = self._service.config.names
        return Json({"object": "list", "data": [self._card(n) for n in names]})

    async def model(self, name: str) -> Response:
        """Describe one of them."""
        self._service.check_model(name)
        return Json(self._card(name))

    async def tokenize(self, body: AnyTokenizeRequest) -> Response:
        """Return the token ids of a prompt or a conversation."""
        self._service.check_model(body.model)
        if isinstance(body, TokenizeChatRequest):
            body.refuse_unsupported()
            tokens = (await self._service.render(body)).tokens
        else:
            (tokens,) = await self._encode([body.prompt], body.add_special_tokens)
        token_bytes = self._tokenizer.token_bytes
        strings = body.return_token_strs
        return Json(
            {
                "count": len(tokens),
                "max_model_len": self._engine.max_model_len,
                "tokens": tokens,
                "token_strs": [token_bytes(t).decode("utf-8", "replace") for t in tokens]
                if strings
                else None,
            }
        )

    async def detokenize(self, body: DetokenizeRequest) -> Response:
        """Return the text of token ids, special tokens included."""
        self._service.check_model(body.model)
        self._check_ids(body.tokens, "tokens")
        return Json({"prompt": self._tokenizer.decode(body.tokens, skip_special_tokens=False)})

    def _card(self, name: str) -> dict[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": 0,
            "owned_by": "aprium",
            "root": self._engine.config.model,
            "parent": None,
            "max_model_len": self._engine.max_model_len,
        }

    async def _encode(
        self, prompts: Sequence[str | list[int]], special: bool = True
    ) -> list[list[int]]:
        """Return prompts as ids."""
        encode = self._tokenizer.encode

        def work() -> list[list[int]]:
            return [encode(p, special) if isinstance(p, str) else p for p in prompts]

        return await asyncio.to_thread(work)

    def _echo(self, prompt: str | list[int]) -> str:
        if isinstance(prompt, str):
            return prompt
        self._check_ids(prompt, "prompt")
        return self._tokenizer.decode(prompt, False)

    def _check_ids(self, tokens: Sequence[int], param: str) -> None:
        size = self._tokenizer.vocab_size
        for token in tokens:
            if not 0 <= token < size:
                raise RequestError(
                    f"token id {token} is not in the vocabulary of {size}", param=param
                )


def _vector(values: Sequence[float], body: EmbeddingsRequest) -> list[float] | str:
    """Return a vector of length 1, if asked for, as numbers or as the bytes of float32."""
    size = math.hypot(*values) or 1.0 if body.normalize else 1.0
    vector = [value / size for value in values]
    if body.encoding_format == "float":
        return vector
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
