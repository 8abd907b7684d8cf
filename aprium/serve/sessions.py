"""Sessions over HTTP: conversations that the server remembers, forks and resumes.

A chat request with `session` sends only what is new; the turn is written down as it runs. The
routes here make, list, fork, save, delete and resume sessions; the answers themselves are
`serve/app`'s and look like those of any chat.
"""

import asyncio
import dataclasses
import random
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, Field, StrictBool, StrictStr
from starlette.requests import Request

from aprium.base.errors import RequestError
from aprium.base.records import Completion, SamplingParams
from aprium.serve.keys import owner_of
from aprium.serve.wire import ChatRequest, WireMessage
from aprium.text.messages import read_message
from aprium.text.parse import parse

if TYPE_CHECKING:
    from aprium.engine.client import AsyncEngine
    from aprium.engine.sessions import Running, SessionRecord


class CreateSession(BaseModel):
    """The body of POST /v1/sessions."""

    id: StrictStr | None = None
    messages: list[WireMessage] = Field(default_factory=list)
    cache_salt: StrictStr = ""


class ForkSession(BaseModel):
    """The body of POST /v1/sessions/{id}/fork; `id` is that of the new session."""

    id: StrictStr | None = None


class ResumeSession(BaseModel):
    """The body of POST /v1/sessions/{id}/resume."""

    stream: StrictBool = False


def describe(record: "SessionRecord", whole: bool = False) -> dict[str, Any]:
    """Return a session as JSON; `whole` with its messages.

    `title` is the beginning of its first question, and `running_messages` are those of a turn that
    is under way or was cut off, which are none of its messages yet.
    """
    running = record.running.messages if record.running is not None else []
    asked = (m.content for m in (*record.messages, *running) if m.role == "user" and m.content)
    found: dict[str, Any] = {
        "id": record.id,
        "object": "session",
        "title": " ".join(next(asked, "")[:400].split())[:80],
        "created": record.created,
        "parent": record.parent,
        "num_messages": len(record.messages),
        "num_tokens": len(record.tokens),
        "busy": record.busy,
        "interrupted": record.interrupted,
    }
    if whole:
        found["messages"] = [message_json(m) for m in record.messages]
        found["running_messages"] = [message_json(m) for m in running]
    return found


def message_json(message: Any) -> dict[str, Any]:
    """Return a message in the OpenAI form."""
    found: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.reasoning is not None:
        found["reasoning"] = found["reasoning_content"] = message.reasoning
    if message.tool_calls:
        found["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.name, "arguments": call.arguments},
            }
            for call in message.tool_calls
        ]
    if message.tool_call_id is not None:
        found["tool_call_id"] = message.tool_call_id
    return found


class SessionRoutes:
    """The handlers that do not generate."""

    def __init__(self, engine: "AsyncEngine") -> None:
        self._sessions = engine.sessions

    async def create(self, body: CreateSession, request: Request) -> dict[str, Any]:
        """Begin a session."""
        owner = owner_of(request.headers)
        messages = [m.to_message(f"messages[{i}]") for i, m in enumerate(body.messages)]
        create = self._sessions.create
        made = await asyncio.to_thread(create, body.id, messages, body.cache_salt, owner)
        return describe(made)

    async def all(self, request: Request) -> dict[str, Any]:
        """List the sessions of this client."""
        owner = owner_of(request.headers)
        own = [record for record in self._sessions.all() if record.owner == owner]
        return {"object": "list", "data": [describe(record) for record in own]}

    async def get(self, id: str, request: Request) -> dict[str, Any]:
        """Return one, with its messages."""
        return describe(self._own(id, request), whole=True)

    async def fork(
        self, id: str, request: Request, body: ForkSession | None = None
    ) -> dict[str, Any]:
        """Begin another with the same past."""
        self._own(id, request)
        new = body.id if body is not None else None
        return describe(await asyncio.to_thread(self._sessions.fork, id, new))

    async def save(self, id: str, request: Request) -> dict[str, Any]:
        """Write one down to the server's directory of sessions."""
        self._own(id, request)
        await asyncio.to_thread(self._sessions.save, id)
        return describe(self._sessions.get(id))

    async def delete(self, id: str, request: Request) -> dict[str, Any]:
        """Forget one."""
        self._own(id, request)
        await asyncio.to_thread(self._sessions.delete, id)
        return {"id": id, "object": "session", "deleted": True}

    def _own(self, id: str, request: Request) -> "SessionRecord":
        """Return a session of the client that asks; raises SessionError where it has none."""
        return self._sessions.get(id, owner_of(request.headers))


class Turn:
    """One turn of a session; `options` are what the engine is told beside.

    Raises SessionError where the session is answering already.
    """

    def __init__(
        self, engine: "AsyncEngine", record: "SessionRecord", running: "Running", thinking: bool
    ) -> None:
        self._engine, self._sessions = engine, engine.sessions
        self._running, self._thinking = running, thinking
        self.record = record
        engine.sessions.check_idle(record)
        self.options: dict[str, Any] = {"keep_every": self._sessions.keep_every}
        if running.generated:  # its last token is chosen anew, so that an end is found again
            self.options["said"] = running.generated[:-1], running.logprobs[:-1]

    async def follow(
        self, completions: AsyncIterator[Completion]
    ) -> AsyncGenerator[Completion, None]:
        """Yield `completions`, writing down what they come to."""
        last: Completion | None = None
        sessions, record = self._sessions, self.record
        begin = asyncio.ensure_future(asyncio.to_thread(sessions.begin, record.id, self._running))
        ended: asyncio.Future[None] | None = None
        try:
            await asyncio.shield(begin)
            async for last in completions:
                sessions.note(record, last)
                if last.finish not in (None, "abort"):
                    ended = asyncio.ensure_future(self._end(last))
                    await asyncio.shield(ended)
                yield last
        finally:
            # What threads do goes on when this is cancelled, so it is waited for.
            await asyncio.gather(begin, *([ended] if ended else ()), return_exceptions=True)
            if isinstance(completions, AsyncGenerator):
                await completions.aclose()
            mine = begin.done() and not begin.cancelled() and begin.exception() is None
            if mine and record.busy:  # the client is gone, or the engine failed: can be resumed
                sessions.end(record, None)

    async def _end(self, completion: Completion) -> None:
        answer = None
        if self._running.messages:
            tools = self._running.options.get("tools") or ()
            said = parse(completion.text, thinking=self._thinking, tools=tools)
            answer = read_message(
                {
                    "role": "assistant",
                    "content": said.content,
                    "reasoning": said.reasoning,
                    "tool_calls": said.tool_calls,
                }
            )
        await asyncio.to_thread(self._sessions.end, self.record, completion, answer)


def new_turn(
    body: ChatRequest,
    tokens: Sequence[int],
    params: SamplingParams,
    tools: Sequence[Mapping[str, Any]],
    turns: int = 0,
) -> "Running":
    """Return what is written down of a turn that begins, after `turns` others."""
    from aprium.engine.sessions import Running

    if params.n > 1 or (params.best_of or 1) > 1:
        raise RequestError(f"n is {params.n}: a session has one answer, fork it", param="n")
    seed = random.getrandbits(62) if params.seed is None else params.seed
    return Running(
        prompt=tuple(tokens),
        params=dataclasses.replace(params, seed=seed),
        messages=body.records(),
        turn=turns,
        options={"tools": list(tools), "body": body.model_dump(mode="json", exclude_unset=True)},
    )
