"""A resources server, written by NeMo-Gym's protocol alone: a counter that a tool turns.

Rows say where it begins and where it should end. It checks the cookie, and what it is sent, as
strictly as the vendor's own types allow.
"""

import asyncio
import json
from typing import Any

from openai.types.responses import Response as OpenAIResponse
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

TOOL = {
    "type": "function",
    "name": "increment",
    "description": "Turn the counter.",
    "parameters": {
        "type": "object",
        "properties": {"by": {"type": "integer"}},
        "required": ["by"],
    },
    "strict": False,
}


def row(begin: int = 3, end: int = 5, **more: Any) -> dict[str, Any]:
    """Return a task; `how` makes its server misbehave at a route."""
    asked = f"The counter is at {begin}. Turn it to {end}, then say done."
    return {
        "responses_create_params": {
            "input": [{"role": "user", "content": asked}],
            "instructions": "Use the tool.",
            "tools": [TOOL],
        },
        "begin": begin,
        "end": end,
        "agent_ref": {"type": "responses_api_agents", "name": "counter_agent"},
        **more,
    }


class Counter:
    """The server; `seen` are the bodies of each route."""

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}
        self.rows: dict[str, dict[str, Any]] = {}
        self.seen: list[tuple[str, Any]] = []
        self.app = Starlette(
            routes=[
                Route("/seed_session", self.seed, methods=["POST"]),
                Route("/increment", self.increment, methods=["POST"]),
                Route("/verify", self.verify, methods=["POST"]),
            ]
        )

    async def seed(self, request: Request) -> Response:
        body = await request.json()
        self.seen.append(("seed", body))
        bad = await _misbehave(body, "seed")
        if bad is not None:
            return bad
        name = f"s{len(self.rows)}"
        self.counts[name], self.rows[name] = body["begin"], body
        response = JSONResponse({})
        response.set_cookie("session", f"{name}-0")
        return response

    def _session(self, request: Request) -> tuple[str, int]:
        name, _, step = request.cookies["session"].partition("-")
        return name, int(step)

    async def increment(self, request: Request) -> Response:
        """Turn the counter; every call gives a new cookie, which says how many there were."""
        name, step = self._session(request)
        body = await request.json()
        self.seen.append(("increment", body))
        bad = await _misbehave(self.rows[name], "tool")
        if bad is not None:
            return bad
        if set(body) != {"by"}:
            return JSONResponse({"detail": "give by"}, status_code=422)
        self.counts[name] += body["by"]
        response = JSONResponse({"count": self.counts[name]})
        response.set_cookie("session", f"{name}-{step + 1}")
        return response

    async def verify(self, request: Request) -> Response:
        body = await request.json()
        self.seen.append(("verify", body))
        bad = await _misbehave(body, "verify")
        if bad is not None:
            return bad
        OpenAIResponse.model_validate(body["response"])
        name, step = self._session(request)
        calls = [item for item in body["response"]["output"] if item["type"] == "function_call"]
        assert {k: v for k, v in body.items() if k != "response"} == self.rows[name]
        right = self.counts.pop(name) == body["end"]
        found = {"reward": float(right), "num_calls": len(calls), "step": step, "right": right}
        return JSONResponse({**body, **found, "word": "x", "_private": 3})


async def _misbehave(body: dict[str, Any], route: str) -> Response | None:
    how = body.get("how", {}).get(route)
    if how == "500":
        return PlainTextResponse("broken", status_code=500)
    if how == "502":
        return PlainTextResponse("no upstream", status_code=502)
    if how == "text":
        return PlainTextResponse("hello")
    if how == "list":
        return JSONResponse([1])
    if how == "nan":
        return Response(json.dumps({"reward": float("nan")}), media_type="application/json")
    if how == "masked":
        return JSONResponse(
            {**body, "reward": 0.0, "mask_sample": True, "failure_reason": "the judge is gone"}
        )
    if how == "slow":
        await asyncio.sleep(2)
    return None
