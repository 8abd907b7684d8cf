"""Tasks of NeMo-Gym's resources servers as environments here, and whole rollouts of its agents.

`GymRows` is a family over a file of rows: our policy plays, the server has the tools and grades.
`run_rollout` leaves the playing to an agent server and reads the tokens that its model chose.
"""

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

import httpx2

from aprium.base.errors import TaskError
from aprium.base.records import Message, ToolCall, Trajectory
from aprium.envs.env import AskedOnce, Env, Step
from aprium.envs.gym import (
    Streams,
    finish,
    open_rows,
    read_reward,
    read_rollout,
    row_task,
    write_response,
)
from aprium.envs.gym_http import HttpSession
from aprium.envs.task import Task, say
from aprium.text.items import read_arguments, write_items

_UNREACHABLE = (502, 503, 504)  # of a gateway; other errors of a tool are shown to the model


@dataclass(frozen=True, slots=True, kw_only=True)
class GymRows:
    """Rows of the JSONL file `rows`, graded by the resources server at `url`.

    `servers` are pairs of an agent's name and the address of its server, for a file with rows of
    several. One request takes at most `timeout_s`.
    """

    rows: str
    url: str = ""
    servers: tuple[tuple[str, str], ...] = ()
    timeout_s: float = 120.0
    domain: str = "nemo-gym"

    def __post_init__(self) -> None:
        """Check that there are rows, and addresses that can be asked."""
        if self.timeout_s <= 0:
            raise TaskError(f"timeout_s is {self.timeout_s}: it must be above 0")
        for url in (self.url, *(address for _, address in self.servers)):
            if url:
                HttpSession(url)
        open_rows(self.rows)

    def draw(self, rng: random.Random) -> Task:
        """Read a row."""
        rows = open_rows(self.rows)
        return row_task(rows[rng.randrange(len(rows))], self.domain)

    def start(self, task: Task) -> Env:
        """Return the environment of one row; raises TaskError where it has no server."""
        url = dict(self.servers).get(task.domain, self.url)
        if not url:
            raise TaskError(
                f"there is no server for rows of {task.domain!r}: give its address as url, or in "
                "servers"
            )
        return GymEnv(task, url, timeout_s=self.timeout_s)

    def wrong(self, task: Task) -> Sequence[tuple[Message, ...]]:
        """Return the answer that is never right: nothing."""
        return [(say(""),)]


class GymEnv(AskedOnce):
    """One task on a resources server: calls go to its tools, and an answer without one is graded.

    `task` is one of `row_task`.
    """

    def __init__(
        self,
        task: Task,
        url: str,
        *,
        timeout_s: float = 120.0,
        transport: httpx2.AsyncBaseTransport | None = None,
    ) -> None:
        super().__init__(task)
        self._row: dict[str, Any] = task.data["row"]
        self._server = HttpSession(url, timeout_s=timeout_s, transport=transport)
        self._tools = {tool["function"]["name"] for tool in task.tools}
        self._items: list[dict[str, Any]] = []

    async def reset(self) -> tuple[Message, ...]:
        """Begin a session on the server, and return what is asked."""
        messages = await super().reset()
        await self._server.ask("/seed_session", self._row)
        return messages

    async def step(self, reply: Message) -> Step:
        """Make the calls of a turn, or have the answer graded."""
        self._items += write_items(reply, str(len(self._items)))
        if not reply.tool_calls:
            body = {**self._row, "response": write_response(self._items, self._row)}
            result = await self._server.ask("/verify", body)
            reward, parts = read_reward(result, self._row, f"{self._server.url}/verify")
            return Step(done=True, reward=reward, parts=parts)
        results = []
        for call in reply.tool_calls:
            content = await self._call(call)
            results.append(Message(role="tool", content=content, tool_call_id=call.id))
            self._items += write_items(results[-1], str(len(self._items)))
        return Step(messages=tuple(results))

    async def _call(self, call: ToolCall) -> str:
        """Return what a tool says, its errors included, which are for the model to see."""
        if call.name not in self._tools:
            return json.dumps({"error": f"there is no tool {call.name}"})
        arguments = read_arguments(call.arguments)
        if arguments is None:
            return json.dumps({"error": "the arguments are no JSON object"})
        path = f"/{quote(call.name, safe='')}"
        status, text = await self._server.post(path, arguments)
        if status in _UNREACHABLE:
            raise TaskError(f"{self._server.url}{path} answers {status}: {text[:300]}")
        return text


async def run_rollout(
    task: Task,
    url: str,
    *,
    timeout_s: float = 1800.0,
    weight_version: int = 0,
    transport: httpx2.AsyncBaseTransport | None = None,
) -> Trajectory:
    """Let the agent server at `url` play and grade `task` (of `row_task`); return what happened.

    `weight_version` is what the weights of its model are called. Never raises but for cancellation:
    whatever fails is a trajectory with `error`.
    """
    try:
        server = HttpSession(url, timeout_s=timeout_s, transport=transport)
        result = await server.ask("/run", task.data["row"])
    except TaskError as error:
        late = isinstance(error.__cause__, TimeoutError)
        return finish(task, Streams(), "deadline" if late else "error", str(error))
    return read_rollout(task, result, f"{server.url}/run", weight_version)
