"""The HTTP surface: OpenAI routes over an `AsyncEngine`.

A body is checked by `serve/wire`, becomes tokens, runs in the engine, and its completions become
replies in `serve/reply`. This file is what lies between: routes, streams, errors and clients that
go away. A client that disconnects stops its generation, whether it streams or waits.

Every error is JSON of one form, also inside a stream that has begun.
"""

import asyncio
import contextlib
import dataclasses
import hashlib
import hmac
import json
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine, Mapping, Sequence
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, TypeVar, cast

import pydantic
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

import aprium
from aprium.base import records
from aprium.base.errors import (
    ApriumError,
    EngineError,
    RequestError,
    SessionError,
    TemplateError,
)
from aprium.base.log import get_logger
from aprium.base.records import Completion, SamplingParams
from aprium.serve.reply import ChatReply, Reply, TextReply
from aprium.serve.sessions import ResumeSession, SessionRoutes, Turn, new_turn
from aprium.serve.wire import (
    ChatRequest,
    CompletionRequest,
    ControlRequest,
    DetokenizeRequest,
    TokenizeChatRequest,
    TokenizeRequest,
    describe_invalid,
)
from aprium.text.chat import starts_in_reasoning

if TYPE_CHECKING:
    from aprium.engine.client import AsyncEngine

_OPEN_PATHS = ("/health", "/version")  # these answer without a key
T = TypeVar("T")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ServeConfig:
    """What the server adds to an engine.

    `names` are those the model answers to, the first of which it gives itself. `api_keys` empty
    lets everybody in. `template_kwargs` are switches of the chat template that a request may
    override, `sampling` the sampling where a request says nothing; so are `thinking_budget`, the
    tokens that reasoning may have, and `thinking_message`, what is written where it ends by that.
    """

    names: tuple[str, ...]
    api_keys: tuple[str, ...] = ()
    template_kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    sampling: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    thinking_budget: int | None = None
    thinking_message: str = ""
    max_body_bytes: int = 64 << 20


def create_app(engine: "AsyncEngine", config: ServeConfig) -> FastAPI:
    """Return the application; it closes `engine` when it shuts down."""

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await engine.close()

    app = FastAPI(
        title="Aprium",
        version=aprium.__version__,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        default_response_class=_Json,
    )
    app.add_middleware(_Guard, config=config)
    for kind in (RequestValidationError, pydantic.ValidationError):
        app.add_exception_handler(kind, _on_invalid)
    app.add_exception_handler(HTTPException, _on_http)
    app.add_exception_handler(ApriumError, _on_error)
    app.add_exception_handler(Exception, _on_error)
    routes = _Routes(engine, config)
    app.add_api_route("/v1/chat/completions", routes.chat, methods=["POST"])
    app.add_api_route("/v1/chat/completions/control", routes.control, methods=["POST"])
    app.add_api_route("/v1/completions", routes.complete, methods=["POST"])
    app.add_api_route("/v1/models", routes.models, methods=["GET"])
    app.add_api_route("/v1/models/{name:path}", routes.model, methods=["GET"])
    sessions = SessionRoutes(engine)
    for path, handler, method in (
        ("", sessions.create, "POST"),
        ("", sessions.all, "GET"),
        ("/{id}", sessions.get, "GET"),
        ("/{id}", sessions.delete, "DELETE"),
        ("/{id}/fork", sessions.fork, "POST"),
        ("/{id}/save", sessions.save, "POST"),
        ("/{id}/resume", routes.resume, "POST"),
    ):
        app.add_api_route(f"/v1/sessions{path}", handler, methods=[method], response_model=None)
    app.add_api_route("/tokenize", routes.tokenize, methods=["POST"])
    app.add_api_route("/detokenize", routes.detokenize, methods=["POST"])
    app.add_api_route("/health", routes.health, methods=["GET"])
    app.add_api_route("/version", routes.version, methods=["GET"])
    return app


class _Routes:
    """The handlers of one engine."""

    def __init__(self, engine: "AsyncEngine", config: ServeConfig) -> None:
        assert engine.tokenizer is not None and engine.template is not None
        self._engine = engine
        self._tokenizer = engine.tokenizer
        self._template = engine.template
        self._config = config

    async def chat(self, body: ChatRequest, request: Request) -> Response:
        """Answer a conversation."""
        self._check_model(body.model)
        body.refuse_unsupported()
        tools = body.tool_dicts()
        switches = body.template_kwargs(self._config.template_kwargs)
        config = self._config
        params = body.sampling(config.sampling, config.thinking_budget, config.thinking_message)
        record = self._engine.sessions.get(body.session) if body.session is not None else None
        past = record.messages if record is not None else ()
        text, tokens = await asyncio.to_thread(self._render, body, tools, switches, past)
        turn = None
        if record is not None:
            running = new_turn(body, tokens, params, tools)
            params = running.params
            turn = Turn(self._engine, record, running, starts_in_reasoning(text))
        reply = self._chat_reply(body, tokens, starts_in_reasoning(text), tools, switches)
        return await self._respond(request, reply, [tokens], params, body, reply.thinking, turn)

    async def resume(
        self, id: str, request: Request, body: ResumeSession | None = None
    ) -> Response:
        """Finish a turn of a session that was cut off; the answer is that of a chat."""
        record = self._engine.sessions.get(id)
        running = record.running
        if running is None or not record.interrupted:
            raise SessionError(f"session {id!r} has no turn to resume", "busy")
        asked = running.options.get("body") or {"messages": [{"role": "user", "content": ""}]}
        stream = body is not None and body.stream
        chat = ChatRequest.model_validate({**asked, "stream": stream, "session": id})
        tokens = list(running.prompt)
        tail = self._tokenizer.decode(tokens[-8:], skip_special_tokens=False)
        thinking, tools = starts_in_reasoning(tail), running.options.get("tools") or []
        switches = chat.template_kwargs(self._config.template_kwargs)
        reply = self._chat_reply(chat, tokens, thinking, tools, switches)
        turn = Turn(self._engine, record, running, thinking)
        return await self._respond(
            request, reply, [tokens], running.params, chat, reply.thinking, turn
        )

    def _chat_reply(
        self,
        body: ChatRequest,
        tokens: Sequence[int],
        thinking: bool,
        tools: Sequence[Mapping[str, Any]],
        switches: Mapping[str, Any],
    ) -> ChatReply:
        return ChatReply(
            body,
            self._tokenizer,
            tokens,
            model=body.model or self._config.names[0],
            thinking=thinking,
            tools=tools,
            force_content=switches.get("enable_thinking") is False
            or bool(switches.get("force_nonempty_content")),
        )

    async def control(self, body: ControlRequest) -> Response:
        """End the reasoning of a completion that is under way."""
        self._check_model(body.model)
        ended = await self._engine.finish_thinking(body.id)
        return _Json({"id": body.id, "action": body.action, "applied": ended > 0})

    async def complete(self, body: CompletionRequest, request: Request) -> Response:
        """Continue plain prompts."""
        self._check_model(body.model)
        body.refuse_unsupported()
        params = body.sampling(self._config.sampling)
        prompts, texts = await asyncio.to_thread(self._encode, body)
        reply = TextReply(
            body,
            self._tokenizer,
            prompts,
            model=body.model or self._config.names[0],
            texts=texts,
        )
        return await self._respond(request, reply, prompts, params, body)

    async def models(self) -> Response:
        """List the names the model answers to."""
        return _Json({"object": "list", "data": [self._card(n) for n in self._config.names]})

    async def model(self, name: str) -> Response:
        """Describe one of them."""
        self._check_model(name)
        return _Json(self._card(name))

    async def tokenize(self, body: dict[str, Any]) -> Response:
        """Return the token ids of a prompt or a conversation."""
        if "messages" in body:
            chat = TokenizeChatRequest.model_validate(body)
            self._check_model(chat.model)
            chat.refuse_unsupported()
            switches = chat.template_kwargs(self._config.template_kwargs)
            render = asyncio.to_thread(self._render, chat, chat.tool_dicts(), switches)
            tokens, strings = (await render)[1], chat.return_token_strs
        else:
            plain = TokenizeRequest.model_validate(body)
            self._check_model(plain.model)
            encode = self._tokenizer.encode
            tokens = await asyncio.to_thread(encode, plain.prompt, plain.add_special_tokens)
            strings = plain.return_token_strs
        token_bytes = self._tokenizer.token_bytes
        return _Json(
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
        self._check_model(body.model)
        for token in body.tokens:
            if not 0 <= token < self._tokenizer.vocab_size:
                size = self._tokenizer.vocab_size
                raise RequestError(
                    f"token id {token} is not in the vocabulary of {size}", param="tokens"
                )
        return _Json({"prompt": self._tokenizer.decode(body.tokens, skip_special_tokens=False)})

    async def health(self) -> Response:
        """Say whether the engine is well."""
        if self._engine.failed is not None:
            raise EngineError(str(self._engine.failed))
        return _Json({"status": "ok"})

    async def version(self) -> Response:
        """Return the version of this package."""
        return _Json({"version": aprium.__version__})

    def _check_model(self, name: str | None) -> None:
        if name is not None and name not in self._config.names:
            known = ", ".join(self._config.names)
            raise HTTPException(404, f"model {name!r} is not served here: use {known}")

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

    def _render(
        self,
        body: ChatRequest | TokenizeChatRequest,
        tools: Sequence[dict[str, Any]],
        switches: Mapping[str, Any],
        past: Sequence[records.Message] = (),
    ) -> tuple[str, list[int]]:
        """Return the prompt of a conversation, after its `past`, as text and as ids."""
        text = self._template.render(
            [*past, *body.records()],
            tools,
            add_generation_prompt=body.add_generation_prompt,
            **switches,
        )
        return text, self._tokenizer.encode(text)

    def _encode(self, body: CompletionRequest) -> tuple[list[list[int]], list[str]]:
        """Return the prompts as ids and, for an echo, as text."""
        ids, texts = [], []
        for prompt in body.prompts():
            if isinstance(prompt, str):
                ids.append(self._tokenizer.encode(prompt, body.add_special_tokens))
                texts.append(prompt)
            else:
                ids.append(prompt)
                texts.append(self._tokenizer.decode(prompt, False) if body.echo else "")
        return ids, texts

    async def _respond(
        self,
        request: Request,
        reply: Reply,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams,
        body: ChatRequest | CompletionRequest,
        thinking: bool = False,
        turn: Turn | None = None,
    ) -> Response:
        """Generate and reply; raises before anything is sent when a prompt cannot be served."""
        options: dict[str, Any] = {
            "cache_salt": turn.record.cache_salt if turn is not None else body.cache_salt,
            "thinking": thinking,
            "priority": body.priority,
            "deadline_s": body.deadline_s,
            "share": _share(request.headers),
        }
        if turn is not None:
            options |= turn.options

        def start() -> list[AsyncIterator[Completion]]:
            sources = [self._engine.generate(p, params, reply.id, **options) for p in prompts]
            return sources if turn is None else [turn.follow(source) for source in sources]

        try:
            sources = await asyncio.to_thread(start)  # where a guide may take a while to compile
        except RequestError as error:
            if error.param != "guide":
                raise
            raise RequestError(str(error), param=body.read_guide()[1]) from error
        completions = _merge(sources, params.n)
        if body.stream:
            return _EventStream(_events(reply, completions), media_type="text/event-stream")
        try:
            finished = await _until_gone(_collect(completions), request.receive)
        except ClientDisconnect:
            return Response(status_code=499)  # nobody is there to read it
        return _Json(await asyncio.to_thread(reply.whole, finished))


async def _merge(
    sources: Sequence[AsyncIterator[Completion]], n: int
) -> AsyncGenerator[Completion, None]:
    """Yield what several prompts give as it comes, choices numbered through.

    Closing this closes the sources, which stops their generations.
    """
    latest: asyncio.Queue[Completion | BaseException | None] = asyncio.Queue(maxsize=1)

    async def pump(number: int, source: AsyncIterator[Completion]) -> None:
        try:
            async with contextlib.aclosing(cast(AsyncGenerator[Completion], source)):
                async for c in source:
                    if number:
                        c = dataclasses.replace(c, index=c.index + number * n)
                    await latest.put(c)
            await latest.put(None)
        except Exception as error:
            await latest.put(error)

    tasks = [asyncio.create_task(pump(i, source)) for i, source in enumerate(sources)]
    running = len(tasks)
    try:
        while running:
            item = await latest.get()
            if isinstance(item, BaseException):
                raise item
            if item is None:
                running -= 1
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _collect(completions: AsyncGenerator[Completion, None]) -> list[Completion]:
    """Return the finished completion of each choice, in order."""
    finished = {}
    async with contextlib.aclosing(completions):
        async for completion in completions:
            if completion.finish is not None:
                finished[completion.index] = completion
    return [finished[index] for index in sorted(finished)]


async def _events(
    reply: Reply, completions: AsyncGenerator[Completion, None]
) -> AsyncGenerator[bytes, None]:
    """Yield the reply as server-sent events; a failure on the way becomes an error event."""
    try:
        async with contextlib.aclosing(completions):
            for chunk in reply.opening():
                yield _event(chunk)
            async for completion in completions:
                for chunk in reply.chunks(completion):
                    yield _event(chunk)
            for chunk in reply.closing():
                yield _event(chunk)
    except Exception as error:
        yield _event(_error_body(*_explain(error)))
    yield b"data: [DONE]\n\n"


async def _until_gone(work: Coroutine[Any, Any, T], receive: Receive) -> T:
    """Run `work`, cancelling it when the client disconnects; raises ClientDisconnect then."""

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    tasks = worker, watcher = asyncio.create_task(work), asyncio.create_task(watch())
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if worker.done():
            return worker.result()
        raise ClientDisconnect
    finally:
        worker.cancel()
        watcher.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _share(headers: Headers) -> str:
    """Name the client that fair shares are counted for: its key, which is not kept."""
    key = headers.get("authorization", "")
    return hashlib.blake2b(key.encode(), digest_size=8).hexdigest() if key else ""


class _EventStream(StreamingResponse):
    """A stream of events that ends, and stops its source, when the client goes away."""

    def __init__(self, content: AsyncGenerator[bytes, None], **kwargs: Any) -> None:
        super().__init__(content, headers={"Cache-Control": "no-cache"}, **kwargs)
        self._source = content

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events."""
        with contextlib.suppress(ClientDisconnect, OSError):
            async with contextlib.aclosing(self._source):
                await _until_gone(self.stream_response(send), receive)


class _Json(JSONResponse):
    """JSON that can always be sent: a lone surrogate, echoed from a request, becomes `?`."""

    def render(self, content: Any) -> bytes:
        """Return the body."""
        return _dump(content)


def _dump(content: Any) -> bytes:
    text = json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.encode("utf-8", "replace")


def _event(content: Any) -> bytes:
    return b"data: " + _dump(content) + b"\n\n"


def _error_body(status: int, message: str, param: str | None) -> dict[str, Any]:
    name = "".join(HTTPStatus(status).phrase.title().split()).replace("-", "")
    kind = name if name.endswith("Error") else f"{name}Error"
    return {"error": {"message": message, "type": kind, "param": param, "code": status}}


def _error(
    status: int, message: str, param: str | None = None, headers: Mapping[str, str] | None = None
) -> Response:
    return _Json(_error_body(status, message, param), status_code=status, headers=headers)


def _explain(error: Exception) -> tuple[int, str, str | None]:
    """Return status, message and parameter for an error; logs the unexpected ones."""
    if isinstance(error, RequestError):
        return 400, str(error), error.param
    if isinstance(error, TemplateError):
        return 400, str(error), "messages"
    if isinstance(error, SessionError):
        return {"unknown": 404, "busy": 409, "file": 400}[error.reason], str(error), "session"
    if isinstance(error, EngineError):
        return 503, str(error), None
    get_logger("serve").error("a request has failed", exc_info=error)
    return 500, f"the server has failed ({type(error).__name__}); its log says more", None


async def _on_error(request: Request, error: Exception) -> Response:
    return _error(*_explain(error))


async def _on_invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError | pydantic.ValidationError)
    message, param = describe_invalid(error.errors())
    return _error(400, message, param)


async def _on_http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = str(error.detail)
    if error.status_code == 404 and message == HTTPStatus.NOT_FOUND.phrase:
        message = f"there is no route {request.url.path}"
    if error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "another method")
        message = f"{request.url.path} does not take {request.method}: use {allowed}"
    return _error(error.status_code, message, headers=error.headers)


class _Guard:
    """Turn away requests without a key, and bodies that are too big."""

    def __init__(self, app: ASGIApp, config: ServeConfig) -> None:
        self._app = app
        self._keys = [key.encode() for key in config.api_keys]
        self._limit = config.max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Check and pass on one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        if self._keys and scope["path"] not in _OPEN_PATHS and not self._admits(headers):
            refusal = _error(
                401,
                "the API key is missing or wrong: send 'Authorization: Bearer KEY'",
                headers={"WWW-Authenticate": "Bearer"},
            )
            await refusal(scope, receive, send)
            return
        length = headers.get("content-length", "")
        if length.isdecimal() and int(length) > self._limit:
            await _error(413, self._too_big())(scope, receive, send)
            return
        size = 0

        async def counted() -> Message:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > self._limit:
                raise HTTPException(413, self._too_big())
            return message

        await self._app(scope, counted, send)

    def _admits(self, headers: Headers) -> bool:
        kind, _, given = headers.get("authorization", "").partition(" ")
        token = given.strip().encode()
        # Every key is compared, so that the time taken tells nothing.
        matches = [hmac.compare_digest(token, key) for key in self._keys]
        return kind.lower() == "bearer" and any(matches)

    def _too_big(self) -> str:
        return f"the body is larger than {self._limit} bytes: shorten the prompt"
