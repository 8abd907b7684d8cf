"""What all generating routes do alike: let in, render, generate, count, reply, log.

A route turns its body into a conversation or prompts and its own kind of `Reply`; this runs it in
the engine. `ServeConfig` is what the server adds to an engine.
"""

import asyncio
import contextlib
import dataclasses
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from aprium.base import records
from aprium.base.errors import EngineError, OverloadError, RequestError
from aprium.base.records import Completion, SamplingParams
from aprium.serve.admission import Admission, Limits, Ticket
from aprium.serve.keys import share_of
from aprium.serve.metrics import Metrics
from aprium.serve.reply import ChatReply, Reply
from aprium.serve.stable import stable_messages, stable_tools
from aprium.serve.tracing import Tracer
from aprium.serve.transport import EventStream, Json, explain, until_gone
from aprium.serve.wire import ChatRequest, TokenizeChatRequest
from aprium.text.chat import starts_in_reasoning

if TYPE_CHECKING:
    from aprium.engine.client import AsyncEngine
    from aprium.serve.sessions import Turn


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeConfig:
    """What the server adds to an engine.

    `names` are those the model answers to, the first of which it gives itself. `api_keys` empty
    lets everybody in, `control_keys` empty nobody to the routes that change the engine.
    `template_kwargs` are switches of the chat template that a request may override, `sampling` the
    sampling where a request says nothing; so are `thinking_budget`, the tokens that reasoning may
    have, and `thinking_message`, what is written where it ends by that. `limits` bound the queue.
    `web` adds the web page.
    `stable_prompts` takes out of prompts what changes from request to request and says nothing.
    `allowed_hosts`, if any, are the names of the server that requests may use; `allowed_origins`
    are the web pages, elsewhere, whose scripts may use it. A stream that has nothing to say for
    `keep_alive_s` seconds sends a comment; 0: never. Traces go to `otlp_endpoint`, if it is given.
    """

    names: tuple[str, ...]
    api_keys: tuple[str, ...] = ()
    control_keys: tuple[str, ...] = ()
    template_kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    sampling: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    thinking_budget: int | None = None
    thinking_message: str = ""
    limits: Limits = dataclasses.field(default_factory=Limits)
    stable_prompts: bool = True
    allowed_hosts: tuple[str, ...] = ()
    allowed_origins: tuple[str, ...] = ()
    log_requests: bool = True
    web: bool = True
    max_body_bytes: int = 64 << 20
    max_json_depth: int = 64
    max_stored_responses: int = 256
    keep_alive_s: float = 10.0
    otlp_endpoint: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """A rendered conversation: its `tokens`, and whether it ends inside the reasoning."""

    tokens: list[int]
    thinking: bool


class Service:
    """One engine behind HTTP."""

    def __init__(
        self, engine: "AsyncEngine", config: ServeConfig, tracer: Tracer | None = None
    ) -> None:
        assert engine.tokenizer is not None and engine.template is not None
        self.engine = engine
        self.config = config
        self.tokenizer = engine.tokenizer
        self.template = engine.template
        self.admission = Admission(engine, config.limits)
        self.metrics = Metrics(engine, self.admission, config.names[0])
        self.tracer = tracer

    async def close(self) -> None:
        """Close the engine, and send what is left of traces."""
        await self.engine.close()
        if self.tracer is not None:
            await asyncio.to_thread(self.tracer.close)

    def check_model(self, name: str | None) -> None:
        """Raise 404 for a model that is not served here."""
        if name is not None and name not in self.config.names:
            known = ", ".join(self.config.names)
            raise HTTPException(404, f"model {name!r} is not served here: use {known}")

    def admit(self, request: Request, sequences: int | None = 1) -> Ticket:
        """Let a request in (see `Admission.enter`)."""
        span = self.tracer.begin(request) if self.tracer is not None else None
        try:
            ticket = self.admission.enter(share_of(request.headers), max(sequences or 1, 1))
        except OverloadError as error:
            if span is not None:
                span.failed(error)
                span.end()
            raise
        ticket.span = span
        return ticket

    def switches(self, body: ChatRequest | TokenizeChatRequest) -> dict[str, Any]:
        """Return the template's switches for `body`."""
        return body.template_kwargs(self.config.template_kwargs)

    def sampling(self, body: ChatRequest) -> SamplingParams:
        """Return how to answer `body`."""
        config = self.config
        return body.sampling(config.sampling, config.thinking_budget, config.thinking_message)

    def tools(self, body: ChatRequest | TokenizeChatRequest) -> list[dict[str, Any]]:
        """Return the tools that `body` offers, in an order of keys that does not change."""
        tools = body.tool_dicts()
        return stable_tools(tools) if self.config.stable_prompts else tools

    async def render(
        self,
        body: ChatRequest | TokenizeChatRequest,
        past: Sequence[records.Message] = (),
        first: Sequence[records.Message] = (),
    ) -> Prompt:
        """Return the prompt of a conversation: `first`, its `past`, then the messages of `body`."""
        tools, switches = self.tools(body), self.switches(body)

        def work() -> Prompt:
            messages = [*first, *past, *body.records()]
            if self.config.stable_prompts:
                messages = stable_messages(messages)
            text = self.template.render(
                messages, tools, add_generation_prompt=body.add_generation_prompt, **switches
            )
            return Prompt(tokens=self.tokenizer.encode(text), thinking=starts_in_reasoning(text))

        return await asyncio.to_thread(work)

    async def render_after(self, tokens: Sequence[int], body: ChatRequest) -> Prompt:
        """Return `tokens`, which end with a turn of the model, and the messages of `body` after.

        Not one of `tokens` is decoded and encoded again: many sequences spell the same text.
        """
        tools, switches = self.tools(body), self.switches(body)

        def work() -> Prompt:
            ended = self.tokenizer.end_text(tokens[-1])
            text = self.template.render_after(body.records(), tools, ended=ended, **switches)
            rest = self.tokenizer.encode(text)
            return Prompt(tokens=[*tokens, *rest], thinking=starts_in_reasoning(text))

        return await asyncio.to_thread(work)

    def chat_reply(self, body: ChatRequest, prompt: Prompt) -> ChatReply:
        """Return the OpenAI reply to `body`."""
        switches = self.switches(body)
        return ChatReply(
            body,
            self.tokenizer,
            prompt.tokens,
            model=body.model or self.config.names[0],
            thinking=prompt.thinking,
            tools=self.tools(body),
            force_content=switches.get("enable_thinking") is False
            or bool(switches.get("force_nonempty_content")),
        )

    async def start(
        self,
        ticket: Ticket,
        request_id: str,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams,
        body: Any,
        turn: "Turn | None" = None,
        facts: dict[str, Any] | None = None,
        **options: Any,
    ) -> AsyncGenerator[Completion, None]:
        """Begin to generate; raises before anything is sent when a prompt cannot be served.

        `facts` collects what is logged.
        """
        options |= {
            "cache_salt": turn.record.cache_salt if turn is not None else body.cache_salt,
            "priority": body.priority,
            "deadline_s": body.deadline_s,
            "share": ticket.share,
        }
        if turn is not None:
            options |= turn.options
        if ticket.span is not None:
            ticket.span.asked(request_id, body.model or self.config.names[0], params, body)
        self.admission.add_tokens(ticket, sum(map(len, prompts)))

        def begin() -> list[AsyncIterator[Completion]]:
            sources = [self.engine.generate(p, params, request_id, **options) for p in prompts]
            return sources if turn is None else [turn.follow(source) for source in sources]

        try:
            sources = await asyncio.to_thread(begin)  # where a guide may take a while to compile
        except RequestError as error:
            if error.param != "guide":
                raise
            raise RequestError(str(error), param=body.read_guide()[1]) from error
        return self._follow(_merge(sources, params.n), ticket, facts if facts is not None else {})

    async def respond(
        self,
        request: Request,
        ticket: Ticket,
        reply: Reply,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams,
        body: Any,
        turn: "Turn | None" = None,
        **options: Any,
    ) -> Response:
        """Generate and reply."""
        facts = request.scope["state"]["facts"]
        facts["request"] = reply.id
        completions = await self.start(
            ticket, reply.id, prompts, params, body, turn, facts, **options
        )
        return await self.reply(request, ticket, reply, completions, body.stream)

    async def reply(
        self,
        request: Request,
        ticket: Ticket,
        reply: Reply,
        completions: AsyncGenerator[Completion, None],
        stream: bool,
    ) -> Response:
        """Send `completions`, whole or as a stream, which then holds the ticket."""
        if stream:
            ticket.handed = True
            events = _events(reply, completions)
            return EventStream(events, ticket.release, self.config.keep_alive_s)
        try:
            finished = await until_gone(collect(completions), request.receive)
        except ClientDisconnect:
            return Response(status_code=499)  # nobody is there to read it
        return Json(await asyncio.to_thread(reply.whole, finished))

    async def _follow(
        self,
        completions: AsyncGenerator[Completion, None],
        ticket: Ticket,
        facts: dict[str, Any],
    ) -> AsyncGenerator[Completion, None]:
        """Pass on `completions`, and count them."""
        watch = self.metrics.watch()
        latest: dict[int, Completion] = {}
        try:
            async with contextlib.aclosing(completions):
                async for completion in completions:
                    ticket.start()
                    latest[completion.index] = completion
                    watch.see(completion)
                    if completion.finish not in (None, "abort"):
                        timings = completion.timings
                        self.admission.learn(timings.total_s - timings.queue_s)
                    yield completion
        except Exception as error:
            if ticket.span is not None:
                ticket.span.failed(error)
            raise
        finally:
            facts |= _summary(list(latest.values()), ticket.tokens)
            if ticket.span is not None:
                ticket.span.answered(list(latest.values()), ticket.tokens)


def _summary(completions: Sequence[Completion], num_prompt: int) -> dict[str, Any]:
    """Return what the log says of answers: counts and times, nothing of what was said."""
    facts: dict[str, Any] = {"prompt_tokens": num_prompt}
    if not completions:
        return facts
    first = completions[0]
    return facts | {
        "generated_tokens": sum(len(c.tokens) for c in completions),
        "cached_tokens": first.reused,
        "why_not_more": first.why_not_more,
        "drafted": sum(c.drafted for c in completions),
        "accepted": sum(c.accepted for c in completions),
        "finish": sorted({c.finish or "gone" for c in completions}),
        "queue_s": round(first.timings.queue_s, 4),
        "first_token_s": round(first.timings.first_token_s, 4),
    }


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


async def collect(completions: AsyncGenerator[Completion, None]) -> list[Completion]:
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
                yield reply.event(chunk)
            async for completion in completions:
                for chunk in reply.chunks(completion):
                    yield reply.event(chunk)
            for chunk in reply.closing():
                yield reply.event(chunk)
    except Exception as error:
        for chunk in reply.failed(*explain(error)):
            yield reply.event(chunk)
    if reply.last_event:
        yield reply.last_event


def check_running(engine: "AsyncEngine") -> None:
    """Raise EngineError where the engine has failed."""
    if engine.failed is not None:
        raise EngineError(str(engine.failed))
