"""Our families behind NeMo-Gym's protocol: resources server and agent server in one application.

`/seed_session` begins an episode under a cookie, every tool is a route, `/verify` grades; `/run`
plays a whole episode against a model server. Rows are those that `write_row` writes, and whoever
sends them is trusted with what they say. A task that could not be measured comes back with
`mask_sample` and the reason: never with a reward that means nothing.
"""

import asyncio
import json
import socket
import uuid
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from aprium.base.errors import ApriumError, TaskError
from aprium.base.listen import place_of
from aprium.base.log import get_logger
from aprium.base.records import Message as Turn
from aprium.base.records import ToolCall
from aprium.envs.env import Env, Limits, Step
from aprium.envs.family import Family
from aprium.envs.gym import own_task
from aprium.envs.gym_agent import ModelServer, play
from aprium.envs.gym_metrics import aggregate
from aprium.envs.gym_wire import (
    AggregateRequest,
    RunRequest,
    VerifyRequest,
    VerifyResponse,
    answered_turns,
)
from aprium.envs.task import Task
from aprium.text.items import read_arguments

log = get_logger("envs")
COOKIE = "aprium_episode"
MAX_BODY_BYTES = 64 << 20
MAX_SESSIONS = 16_384
_MAX_CALLS = 1024  # of tools in one episode
_GONE_S = 1.0  # how often to look whether a client has gone
_ROUTES = ("seed_session", "verify", "run", "aggregate_metrics")


@dataclass(slots=True, kw_only=True)
class Episode:
    """An episode under a cookie: its environment, and what it is worth so far."""

    env: Env
    reward: float = 0.0
    parts: dict[str, float] = field(default_factory=dict)
    num_steps: int = 0
    done: bool = False
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def step(self, turn: Turn) -> Step:
        """Take a turn of the model."""
        step = await self.env.step(turn)
        self.num_steps += 1
        self.reward += step.reward
        self.done = step.done
        for name, value in step.parts.items():
            self.parts[name] = self.parts.get(name, 0.0) + value
        return step


class GymRoutes:
    """The handlers for tasks of `families`; `model` is who plays in `/run`."""

    def __init__(
        self,
        families: Sequence[Family],
        model: ModelServer | None,
        limits: Limits,
        max_rollouts: int,
    ) -> None:
        self._families = {family.domain: family for family in families}
        self._model, self._limits = model, limits
        self._places = asyncio.Semaphore(max_rollouts)
        self._episodes: OrderedDict[str, Episode] = OrderedDict()

    async def seed_session(self, body: RunRequest) -> Response:
        """Begin an episode."""
        task = _row_task(body)
        for tool in task.tools:
            if tool["function"]["name"] in _ROUTES:
                raise TaskError(f"a tool is named {tool['function']['name']}, as a route is")
        episode = Episode(env=self._start(task))
        await episode.env.reset()
        name = uuid.uuid4().hex
        self._episodes[name] = episode
        while len(self._episodes) > MAX_SESSIONS:
            self._episodes.popitem(last=False)
        response = JSONResponse({})
        response.set_cookie(COOKIE, name, httponly=True)
        return response

    async def tool(self, tool: str, request: Request) -> Response:
        """Call a tool of the episode, and return what it says as it is."""
        name = request.cookies.get(COOKIE, "")
        episode = self._episodes.get(name)
        if episode is None:
            raise HTTPException(
                400, f"there is no episode to call {tool} in: ask /seed_session, send its cookie"
            )
        arguments = (await request.body()).decode(errors="replace")
        if read_arguments(arguments) is None:
            raise HTTPException(400, f"the arguments of {tool} are no JSON object")
        self._episodes.move_to_end(name)
        call = ToolCall(name=tool, arguments=arguments or "{}", id="call")
        async with episode.lock, asyncio.timeout(self._limits.deadline_s):
            if episode.done or episode.num_steps >= _MAX_CALLS:
                return JSONResponse({"error": "the episode has ended"})
            step = await episode.step(Turn(role="assistant", tool_calls=(call,)))
        text = "\n".join(message.content or "" for message in step.messages)
        text = text or json.dumps({"done": step.done})
        response = Response(text, media_type="application/json" if _is_json(text) else "text/plain")
        response.set_cookie(COOKIE, name, httponly=True)  # clients keep those of the last answer
        return response

    async def verify(self, body: VerifyRequest, request: Request) -> Response:
        """Grade what was answered: in its episode, or by playing it again where there is none."""
        row, task = body.model_dump(exclude_unset=True), _row_task(body)
        turns, fresh = answered_turns(body.response), Episode(env=self._start(task))
        episode = self._episodes.pop(request.cookies.get(COOKIE, ""), None)
        try:
            if episode is None or not episode.num_steps or episode.env.task.id != task.id:
                episode = fresh
                await episode.env.reset()
            else:
                turns = turns[-1:] if turns and not turns[-1].tool_calls else []
            async with episode.lock, asyncio.timeout(self._limits.deadline_s):
                await _finish(episode, turns, self._limits.max_turns)
        except Exception as error:
            return _failure(row, "verifier_error", error)
        return _graded(row, episode.reward, episode.parts)

    async def run(self, body: RunRequest, request: Request) -> Response:
        """Play a whole episode, and grade it."""
        if self._model is None:
            raise TaskError("there is no model to play with: start the server with --model-url")
        row, task = body.model_dump(exclude_unset=True), _row_task(body)
        params, env = row["responses_create_params"], self._start(task)
        async with self._places:
            work = asyncio.create_task(play(env, params, self._model, self._limits))
            rollout = await _until_gone(work, request)
        row["response"] = rollout.whole()
        if rollout.error is not None:
            kind = "agent_timeout" if rollout.stop == "deadline" else "agent_run_error"
            return _failure(row, kind, rollout.error)
        if rollout.stop == "tokens":
            reason = {"reason": "max_output_tokens"}
            row["response"] |= {"status": "incomplete", "incomplete_details": reason}
        return _graded(row, rollout.reward, rollout.parts)

    async def aggregate_metrics(self, body: AggregateRequest) -> dict[str, Any]:
        """Return the figures of graded rows."""
        return aggregate(body.verify_responses)

    async def reverify_mode(self) -> str:
        """Say that what was answered can be graded again without its episode."""
        return "stateless"

    def _start(self, task: Task) -> Env:
        family = self._family(task)
        try:
            return family.start(task)
        except (KeyError, TypeError, ValueError) as error:
            raise TaskError(
                f"the row's task.data does not fit {task.domain}, {type(error).__name__}: {error}; "
                "send rows that aprium env rows writes"
            ) from error

    def _family(self, task: Task) -> Family:
        if task.domain not in self._families:
            known = ", ".join(self._families)
            raise TaskError(f"tasks of {task.domain!r} are not served here: there are {known}")
        return self._families[task.domain]


def _row_task(body: RunRequest) -> Task:
    return own_task(body.model_dump(exclude_unset=True))


async def _finish(episode: Episode, turns: Sequence[Turn], max_turns: int) -> None:
    """Play what is left of an episode."""
    for turn in turns[:max_turns]:
        if episode.done:
            break
        await episode.step(turn)


async def _until_gone(work: "asyncio.Task[Any]", request: Request) -> Any:
    """Wait for `work`, and stop it when nobody waits for what comes of it."""
    try:
        while not work.done():
            await asyncio.wait([work], timeout=_GONE_S)
            if not work.done() and await request.is_disconnected():
                raise HTTPException(499, "the client has gone")
        return work.result()
    finally:
        work.cancel()
        await asyncio.gather(work, return_exceptions=True)


def _graded(row: dict[str, Any], reward: float, parts: dict[str, float]) -> Response:
    """Return a graded row, its parts also as numbers of its own for whoever averages those."""
    found = {"reward": reward, "reward_components": parts, "mask_sample": False}
    return JSONResponse({**parts, **row, **found})


def _failure(row: dict[str, Any], kind: str, error: Exception | str) -> Response:
    """Return a row that could not be graded."""
    reason = error if isinstance(error, str) else f"{type(error).__name__}: {error}"
    log.warning("%s: %s", kind, reason)
    found = {"reward": 0.0, "reward_components": {}, "mask_sample": True}
    return JSONResponse({**row, **found, "failure_kind": kind, "failure_reason": reason})


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


class BodyLimit:
    """The outermost part of the application: no body is larger than `MAX_BODY_BYTES`."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on one request, whose body ends with an error where it grows too large."""
        size = 0

        async def counted() -> Message:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > MAX_BODY_BYTES:
                raise HTTPException(413, f"the body is larger than {MAX_BODY_BYTES} bytes")
            return message

        await self._app(scope, counted if scope["type"] == "http" else receive, send)


def create_app(
    families: Sequence[Family],
    model: ModelServer | None = None,
    limits: Limits | None = None,
    *,
    max_rollouts: int = 64,
) -> FastAPI:
    """Return the application; at most `max_rollouts` are played at a time, others wait.

    Raises TaskError for two families of one name, and bounds that are none.
    """
    names = [family.domain for family in families]
    if not names or len(set(names)) < len(names):
        raise TaskError(f"families {names} cannot be served: name one or more, each once")
    if max_rollouts < 1:
        raise TaskError(f"max_rollouts is {max_rollouts}: it must be 1 or more")
    app = FastAPI(title=f"serving {', '.join(names)}", docs_url=None, redoc_url=None)
    routes = GymRoutes(families, model, limits or Limits(), max_rollouts)
    app.post("/seed_session")(routes.seed_session)
    app.post("/verify", response_model=None, responses={200: {"model": VerifyResponse}})(
        routes.verify
    )
    app.post("/run", response_model=None, responses={200: {"model": VerifyResponse}})(routes.run)
    app.post("/aggregate_metrics")(routes.aggregate_metrics)
    app.get("/reverify_mode")(routes.reverify_mode)
    app.post("/{tool}")(routes.tool)
    app.add_middleware(BodyLimit)
    app.add_exception_handler(ApriumError, _on_error)
    app.add_exception_handler(Exception, _on_failure)
    return app


async def _on_error(request: Request, error: Exception) -> Response:
    return JSONResponse({"detail": str(error)}, status_code=400)


async def _on_failure(request: Request, error: Exception) -> Response:
    detail = f"the environment has failed: {type(error).__name__}: {error}"
    return JSONResponse({"detail": detail}, status_code=500)


def serve(app: FastAPI, listener: socket.socket) -> None:
    """Serve until told to stop."""
    config = uvicorn.Config(app, http="h11", ws="none", log_level="warning", access_log=False)
    log.info("%s on http://%s", app.title, place_of(listener))
    uvicorn.Server(config).run(sockets=[listener])
