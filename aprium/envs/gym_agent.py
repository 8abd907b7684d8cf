"""A rollout as NeMo-Gym's agents play it: a loop against a model server's `/v1/responses`.

Everything that the model server returns is sent back to it unchanged in the next request, the token
ids of its items among it, so that what it samples from is what it wrote. See `text/items`.
"""

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import httpx2

from aprium.base.errors import EngineError, RequestError
from aprium.base.log import get_logger
from aprium.envs.env import Env, Limits, Stop
from aprium.envs.gym_http import HttpSession
from aprium.envs.task import say
from aprium.text.items import read_items, write_items

log = get_logger("envs")
_COUNTS = ("input_tokens", "output_tokens", "total_tokens")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelServer:
    """Where a model answers `/v1/responses`: its address, the model's name there, and a key.

    `return_token_ids` asks for them by the field of that name. Servers that refuse fields they do
    not know, as NeMo-Gym's own do, return ids by their configuration instead.
    """

    url: str
    model: str | None = None
    key: str | None = None
    return_token_ids: bool = True
    transport: httpx2.AsyncBaseTransport | None = None

    def session(self, timeout_s: float) -> HttpSession:
        """Return the requests of one rollout; raises EngineError for what is no address."""
        return HttpSession(
            self.url.rstrip("/").removesuffix("/v1"),
            timeout_s=timeout_s,
            key=self.key,
            failure=EngineError,
            transport=self.transport,
        )

    def body(self, params: Mapping[str, Any], items: list[Any]) -> dict[str, Any]:
        """Return a request with `items` as its input."""
        body = {**params, "input": items}
        if self.model is not None:
            body["model"] = self.model
        if self.return_token_ids:
            body["return_token_ids"] = True
        return body


@dataclass(slots=True, kw_only=True)
class Rollout:
    """What was played: the last response with the items of all turns, and what it was worth."""

    response: dict[str, Any] | None = None
    output: list[dict[str, Any]] = field(default_factory=list)
    usage: dict[str, Any] = field(default_factory=lambda: dict.fromkeys(_COUNTS, 0))
    num_turns: int = 0
    reward: float = 0.0
    parts: dict[str, float] = field(default_factory=dict)
    stop: Stop = "error"
    error: str | None = None

    def whole(self) -> dict[str, Any]:
        """Return the response with everything that was said in it."""
        response = self.response or {
            "id": "resp_aprium", "created_at": time.time(), "model": "", "object": "response",
            "parallel_tool_calls": True, "tool_choice": "auto", "tools": [],
        }  # fmt: skip
        counts = {
            **self.usage,
            "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
            "output_tokens_details": {"reasoning_tokens": 0},
        }
        return {**response, "output": self.output, "usage": counts}

    def count(self, response: Mapping[str, Any]) -> None:
        """Add what a call used, as its server says."""
        usage = response.get("usage")
        for name in _COUNTS:
            value = usage.get(name) if isinstance(usage, Mapping) else None
            self.usage[name] += value if isinstance(value, int) else 0


async def play(env: Env, params: Mapping[str, Any], model: ModelServer, limits: Limits) -> Rollout:
    """Let the model play `env`, asked with `params`; never raises but for cancellation.

    The input of `params` is what is asked; `max_tokens` bounds what one call reads and writes.
    """
    rollout = Rollout()
    begun = time.monotonic()
    try:
        async with asyncio.timeout(limits.deadline_s):
            rollout.stop = await _turns(rollout, env, params, model, limits)
    except Exception as error:
        late = isinstance(error, TimeoutError) and time.monotonic() - begun >= limits.deadline_s
        rollout.stop = "deadline" if late else "error"
        rollout.error = (
            f"not done in {limits.deadline_s:g} s" if late else f"{type(error).__name__}: {error}"
        )
        rollout.reward = 0.0
        log.debug("%s: %s", env.task.id, rollout.error, exc_info=not late)
    return rollout


async def _turns(
    rollout: Rollout, env: Env, params: Mapping[str, Any], model: ModelServer, limits: Limits
) -> Stop:
    """Take turns until the end and say what ended it."""
    asked = params["input"]
    asked = [{"role": "user", "content": asked}] if isinstance(asked, str) else list(asked)
    session = model.session(limits.deadline_s)
    await env.reset()
    while rollout.num_turns < limits.max_turns:
        response = await session.ask("/v1/responses", model.body(params, asked + rollout.output))
        items = _items(response, model.url)
        rollout.response = response
        rollout.output += items
        rollout.num_turns += 1
        rollout.count(response)
        if response.get("status") == "failed":
            raise EngineError(f"{model.url} has failed: {response.get('error')}")
        if response.get("incomplete_details") or response.get("status") == "incomplete":
            return "tokens"
        try:
            replies = read_items(items) or (say(""),)
        except RequestError as error:
            raise EngineError(f"{model.url} says what cannot be read: {error}") from error
        if len(replies) != 1:
            raise EngineError(f"{model.url} says {len(replies)} turns at once, not one")
        step = await env.step(replies[0])
        rollout.reward += step.reward
        for name, value in step.parts.items():
            rollout.parts[name] = rollout.parts.get(name, 0.0) + value
        if step.done:
            return "done"
        for message in step.messages:
            rollout.output += write_items(message, str(len(rollout.output)))
        usage = response.get("usage")
        used = usage.get("total_tokens") if isinstance(usage, Mapping) else None
        if isinstance(used, int) and used >= limits.max_tokens:
            return "tokens"
    return "turns"


def _items(response: Any, url: str) -> list[dict[str, Any]]:
    """Return the output of a response; raises EngineError where there is none."""
    output = response.get("output") if isinstance(response, dict) else None
    if not isinstance(output, list) or not all(isinstance(item, dict) for item in output):
        raise EngineError(f"{url} answers with no response: {str(response)[:200]}")
    return output
