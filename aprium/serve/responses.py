"""OpenAI's Responses API: create, get, cancel, delete, and go on from what was said before.

A stored response is a session under the same id (`engine/sessions`): the one that goes on from it
is a fork, which shares its state and pages, so only what is new is computed, and any response can
be gone on from more than once. In the background a response runs without a client; it is asked for
by its id. With a directory for sessions responses outlive the server.
"""

import asyncio
import contextlib
import json
import uuid
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from aprium.base.errors import ApriumError, RequestError, SessionError
from aprium.base.files import remove_durably, write_durably
from aprium.base.log import get_logger
from aprium.base.records import Completion, Message
from aprium.serve.admission import Ticket
from aprium.serve.keys import owner_of
from aprium.serve.response_reply import ResponseReply
from aprium.serve.responses_wire import CreateResponse
from aprium.serve.service import Prompt, Service
from aprium.serve.sessions import Turn, new_turn
from aprium.serve.transport import Json, explain
from aprium.serve.wire import ChatRequest

if TYPE_CHECKING:
    from aprium.engine.sessions import SessionRecord, Sessions

_ENDED = ("completed", "incomplete", "failed", "cancelled")


@dataclass(kw_only=True)
class Stored:
    """A response that is kept: as it stands, its input, and the task that makes it, if any."""

    response: dict[str, Any]
    items: list[dict[str, Any]] = field(default_factory=list)
    task: "asyncio.Task[None] | None" = None


class ResponseStore:
    """The responses that are kept, at most `limit`: the oldest goes first, its session too."""

    def __init__(self, sessions: "Sessions", directory: Path | None, limit: int) -> None:
        self._sessions, self._directory, self._limit = sessions, directory, limit
        self._stored: dict[str, Stored] = {}
        found = sorted(directory.glob("*.response.json")) if directory is not None else ()
        read = [stored for path in found if (stored := _read(path)) is not None]
        for stored in sorted(read, key=lambda s: s.response["created_at"]):
            self._stored[stored.response["id"]] = stored

    def get(self, id: str) -> Stored:
        """Return a response; raises 404 where there is none."""
        stored = self._stored.get(id)
        if stored is None:
            raise HTTPException(404, f"there is no response {id!r}: it was not stored, or deleted")
        return stored

    async def keep(self, stored: Stored) -> None:
        """Keep a response as it stands now, on disk too once it has ended."""
        self._stored[stored.response["id"]] = stored
        ended = stored.response["status"] in _ENDED or stored.response["background"]
        if self._directory is not None and ended:
            data = json.dumps({"response": stored.response, "items": stored.items})
            path = self._path(stored.response["id"])
            await asyncio.to_thread(write_durably, path, data.encode())
        for id, oldest in list(self._stored.items()):
            if len(self._stored) <= self._limit:
                break
            if oldest.task is None:
                await self.delete(id)

    async def delete(self, id: str) -> None:
        """Forget a response and its session."""
        self._stored.pop(id, None)
        with contextlib.suppress(SessionError):
            await asyncio.to_thread(self._sessions.delete, id)
        if self._directory is not None:
            await asyncio.to_thread(remove_durably, self._path(id))

    def _path(self, id: str) -> Path:
        assert self._directory is not None
        return self._directory / f"{id}.response.json"


class ResponseRoutes:
    """The handlers of one service."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._sessions = service.engine.sessions
        config = service.config
        self._store = ResponseStore(
            self._sessions, service.engine.config.session_dir, config.max_stored_responses
        )

    async def create(self, body: CreateResponse, request: Request) -> Response:
        """Answer, after a response before it if there is one."""
        service = self._service
        service.check_model(body.model)
        chat, echo = body.to_chat()
        before = self._before(body.previous_response_id)
        # Tokens without what they say cannot be gone on from.
        stored = (
            body.store is not False and service.config.max_stored_responses > 0 and echo is None
        )
        if body.background and not stored:
            raise RequestError(
                "background is true, and this server stores no responses: start it with "
                "--max-stored-responses",
                param="background",
            )
        with service.admit(request) as ticket:
            past = before.messages if before is not None else ()
            if before is not None and not chat.cache_salt:
                chat.cache_salt = before.cache_salt
            first = [Message(role="system", content=body.instructions)] if body.instructions else []
            if echo is None:
                prompt = await service.render(chat, past, first)
            else:  # whose tokens have the instructions already
                prompt = await service.render_after(echo.tokens, chat)
            reply = ResponseReply(
                *(f"resp_{uuid.uuid4().hex}", body, chat, service.tokenizer, prompt.tokens),
                model=body.model or service.config.names[0],
                thinking=prompt.thinking,
                tools=service.tools(chat),
                stored=stored,
            )
            kept = Stored(response=reply.response, items=body.items())
            return await self._run(request, ticket, reply, chat, prompt, before, kept)

    async def _run(
        self,
        request: Request,
        ticket: Ticket,
        reply: ResponseReply,
        chat: ChatRequest,
        prompt: Prompt,
        before: "SessionRecord | None",
        kept: Stored,
    ) -> Response:
        """Generate: for a client that waits, for one that reads along, or for nobody."""
        service = self._service
        params, turn = service.sampling(chat), None
        if reply.response["store"]:
            owner = owner_of(request.headers)
            record = await self._begin(reply.id, before, chat.cache_salt, owner)
            turns = record.turns
            running = new_turn(chat, prompt.tokens, params, service.tools(chat), turns)
            params = running.params
            turn = Turn(service.engine, record, running, prompt.thinking)
        facts = request.scope["state"]["facts"]
        try:
            completions = await service.start(
                *(ticket, reply.id, [prompt.tokens], params, chat, turn, facts),
                thinking=prompt.thinking,
            )
        except BaseException:
            await self._store.delete(reply.id)
            raise
        facts["request"] = reply.id
        if reply.response["store"]:
            await self._store.keep(kept)
        followed = self._follow(reply, completions, kept)
        if not reply.response["background"]:
            answer = await service.reply(request, ticket, reply, followed, chat.stream)
            if reply.response["store"] and reply.response["status"] in _ENDED:
                await self._store.keep(kept)
            return answer
        ticket.handed = True
        kept.task = asyncio.create_task(self._work(reply, followed, kept, ticket))
        await asyncio.sleep(0)  # a task that is cancelled before it begins cleans nothing up
        return Json(kept.response)

    async def _follow(
        self, reply: ResponseReply, completions: AsyncGenerator[Completion, None], kept: Stored
    ) -> AsyncGenerator[Completion, None]:
        """Pass on `completions`; at the end keep what was streamed, and nothing of what failed."""
        last: Completion | None = None
        try:
            async with contextlib.aclosing(completions):
                async for last in completions:
                    yield last
        finally:
            done = last is not None and last.finish not in (None, "abort")
            if reply.response["store"] and not reply.response["background"]:
                if not done:
                    await self._store.delete(reply.id)
                elif reply.response["status"] in _ENDED:
                    await self._store.keep(kept)

    async def _work(
        self,
        reply: ResponseReply,
        completions: AsyncGenerator[Completion, None],
        kept: Stored,
        ticket: Ticket,
    ) -> None:
        """Make a response in the background."""
        reply.opening()
        try:
            async with contextlib.aclosing(completions):
                async for completion in completions:
                    reply.chunks(completion)
        except asyncio.CancelledError:
            reply.response["status"] = "cancelled"
        except Exception as error:
            reply.failed(*explain(error))
            if not isinstance(error, ApriumError):
                get_logger("serve").error("response %s has failed", reply.id)
        finally:
            ticket.release()
            kept.task = None
        if reply.response["status"] in ("failed", "cancelled"):
            with contextlib.suppress(SessionError):
                await asyncio.to_thread(self._sessions.delete, reply.id)
        await self._store.keep(kept)

    async def get(self, id: str) -> Response:
        """Return a response as it stands."""
        return Json(self._store.get(id).response)

    async def input_items(self, id: str) -> Response:
        """Return what a response was asked with."""
        data = self._store.get(id).items
        return Json({"object": "list", "data": data, "has_more": False})

    async def cancel(self, id: str) -> Response:
        """Stop a response that runs in the background."""
        stored = self._store.get(id)
        if not stored.response["background"]:
            raise RequestError(
                f"response {id!r} does not run in the background: close its connection", param="id"
            )
        task = stored.task
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        return Json(stored.response)

    async def delete(self, id: str) -> Response:
        """Forget a response; one that runs is stopped first."""
        stored = self._store.get(id)
        if stored.task is not None:
            stored.task.cancel()
            await asyncio.gather(stored.task, return_exceptions=True)
        await self._store.delete(id)
        return Json({"id": id, "object": "response", "deleted": True})

    def _before(self, id: str | None) -> "SessionRecord | None":
        """Return the session of the response that is gone on from."""
        if id is None:
            return None
        stored = self._store.get(id)
        if stored.response["status"] not in ("completed", "incomplete"):
            raise SessionError(
                f"response {id!r} is {stored.response['status']}: only one that has ended well "
                "can be gone on from",
                "busy",
            )
        try:
            return self._sessions.get(id)
        except SessionError as error:
            raise HTTPException(
                404,
                f"the session of response {id!r} is gone, for others that were used later "
                "(--max-sessions): send what was said as input",
            ) from error

    async def _begin(
        self, id: str, before: "SessionRecord | None", salt: str, owner: str
    ) -> "SessionRecord":
        """Begin the session of a response."""
        if before is not None:
            return await asyncio.to_thread(self._sessions.fork, before.id, id)
        return await asyncio.to_thread(self._sessions.create, id, (), salt, owner)


def _read(path: Path) -> Stored | None:
    """Read a response that was written down; one that was cut off says so."""
    try:
        data = json.loads(path.read_bytes())
        stored = Stored(response=data["response"], items=data["items"])
        if stored.response["status"] not in _ENDED:
            stored.response["status"] = "failed"
            message = "the server ended before the response did"
            stored.response["error"] = {"code": "server_error", "message": message}
        return stored
    except (OSError, ValueError, KeyError, TypeError):
        get_logger("serve").warning("%s is damaged: the response is not kept", path)
        return None
