"""NeMo-Gym's data as plain values: rows of its files, responses to grade, what came of a rollout.

A row is one JSON object: `responses_create_params` say what a model is asked, `agent_ref.name`
where the row belongs, and whatever else there is is the verifier's. It is sent back whole to
whoever grades. Source: NeMo-Gym 0.7, its resources servers, agents and example data.
"""

import functools
import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aprium.base.errors import RequestError, TaskError
from aprium.base.records import Message, Trajectory
from aprium.envs.env import Stop
from aprium.envs.task import Task, key_of
from aprium.text.items import chat_tool, item_tool, read_echo, read_items, write_items

Row = Mapping[str, Any]
PARAMS = "responses_create_params"
# What a graded row has beside the row itself and is no part of the reward.
_NO_PART = {"reward", "reward_components", "mask_sample", "response", PARAMS}


def write_row(task: Task) -> dict[str, Any]:
    """Return a task of one of our families as a row, which `own_task` reads."""
    items = [
        item
        for number, message in enumerate(task.messages)
        for item in write_items(message, f"{task.id}-{number}")
    ]
    params: dict[str, Any] = {"input": items}
    if task.tools:
        params["tools"] = [item_tool(tool) for tool in task.tools]
    return {
        PARAMS: params,
        "task": {"domain": task.domain, "key": task.key, "data": dict(task.data)},
        "agent_ref": {"type": "responses_api_agents", "name": task.domain},
    }


def own_task(row: Row) -> Task:
    """Return the task of a row that `write_row` wrote; raises TaskError for any other."""
    task = row.get("task")
    names = ("domain", "key", "data")
    if not isinstance(task, Mapping) or any(name not in task for name in names):
        raise TaskError(
            "the row has no task with domain, key and data: send rows that aprium env rows writes"
        )
    domain, key, data = (task[name] for name in names)
    if not (isinstance(domain, str) and isinstance(key, str) and isinstance(data, Mapping)):
        raise TaskError(f"the row's task is malformed: {str(task)[:80]}")
    messages, tools = _asked(row)
    return Task(domain=domain, key=key, messages=messages, tools=tools, data=data)


def row_task(row: Row, domain: str) -> Task:
    """Return the task of any row, to be graded by its own server: its data is the row.

    Its domain is `agent_ref.name`, by which its server is chosen, `domain` where the row has none.
    Its key is what is asked: one of our own families' is kept, so that an item is on the same side
    of the split wherever it is played. Raises TaskError for what is no row.
    """
    messages, tools = _asked(row)
    agent, own = row.get("agent_ref"), row.get("task")
    name = agent.get("name") if isinstance(agent, Mapping) else None
    key = own.get("key") if isinstance(own, Mapping) else None
    return Task(
        domain=name if isinstance(name, str) and name else domain,
        key=key if isinstance(key, str) else key_of(messages),
        messages=messages,
        tools=tools,
        data={"row": dict(row)},
    )


def _asked(row: Row) -> tuple[tuple[Message, ...], tuple[dict[str, Any], ...]]:
    """Return the messages and tools of a row."""
    params = row.get(PARAMS)
    given = params.get("input") if isinstance(params, Mapping) else None
    if not isinstance(params, Mapping) or not isinstance(given, str | list) or not given:
        raise TaskError(f"a row has no {PARAMS}.input: {str(dict(row))[:80]}")
    if isinstance(given, list) and not all(isinstance(item, Mapping) for item in given):
        raise TaskError(f"{PARAMS}.input has an item that is no object: {str(given)[:80]}")
    instructions, offered = params.get("instructions"), params.get("tools") or ()
    if not isinstance(offered, list | tuple) or not all(isinstance(t, Mapping) for t in offered):
        raise TaskError(f"{PARAMS}.tools is no list of objects: {str(offered)[:80]}")
    first = (Message(role="system", content=instructions),) if instructions else ()
    try:
        tools = tuple(chat_tool(tool, i) for i, tool in enumerate(offered))
        return (*first, *read_items(given)), tools
    except RequestError as error:
        raise TaskError(f"a row cannot be asked: {error}") from error


class RowFile:
    """The rows of a JSONL file, read when asked for."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offsets: list[int] = []
        with path.open("rb") as file:
            offset = 0
            for line in file:
                if line.strip():
                    self._offsets.append(offset)
                offset += len(line)

    def __len__(self) -> int:
        return len(self._offsets)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Read a row; raises TaskError where a line is no JSON object."""
        with self._path.open("rb") as file:
            file.seek(self._offsets[index])
            line = file.readline()
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise TaskError(f"{self._path}, row {index + 1} is not JSON: {error}") from error
        if not isinstance(row, dict):
            raise TaskError(
                f"{self._path}, row {index + 1} is {str(row)[:40]}: it must be an object"
            )
        return row


@functools.lru_cache(maxsize=16)
def open_rows(path: str) -> RowFile:
    """Return the rows of a file, whose lines are looked for once; raises TaskError."""
    try:
        rows = RowFile(Path(path))
    except OSError as error:
        raise TaskError(f"cannot read rows of {path!r}: {error.strerror}") from error
    if not len(rows):
        raise TaskError(f"{path} has no rows: write some, one JSON object a line")
    return rows


def write_response(items: Sequence[Mapping[str, Any]], row: Row) -> dict[str, Any]:
    """Return what a model answered, over all its turns, as the response that a server grades."""
    params = row[PARAMS]
    return {
        "id": "resp_aprium",
        "created_at": time.time(),
        "model": params.get("model") or "aprium",
        "object": "response",
        "output": list(items),
        "parallel_tool_calls": params.get("parallel_tool_calls", True),
        "tool_choice": params.get("tool_choice") or "auto",
        "tools": params.get("tools") or [],
        "status": "completed",
    }


def read_reward(result: Any, row: Row, where: str) -> tuple[float, dict[str, float]]:
    """Return reward and parts of a graded row.

    Parts are its `reward_components`, else the numbers that the row did not have before. Raises
    TaskError where there is no finite reward, or the server says that it measures nothing.
    """
    reward = result.get("reward") if isinstance(result, Mapping) else None
    if isinstance(reward, bool) or not isinstance(reward, int | float) or not math.isfinite(reward):
        raise TaskError(f"{where} gives no reward: {str(result)[:200]}")
    if result.get("mask_sample"):
        reason = result.get("failure_reason") or result.get("failure_kind") or "it says no more"
        raise TaskError(f"{where} could not measure: {reason}")
    parts = result.get("reward_components")
    if not isinstance(parts, Mapping):
        parts = {k: v for k, v in result.items() if k not in row and k not in _NO_PART}
    return float(reward), {
        name: float(value)
        for name, value in parts.items()
        if isinstance(value, int | float) and math.isfinite(value) and not name.startswith("_")
    }


@dataclass(slots=True, kw_only=True)
class Streams:
    """The tokens of an episode that was played elsewhere, put together call by call."""

    tokens: list[int] = field(default_factory=list)
    sampled: list[bool] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    num_turns: int = 0

    def read(self, items: Sequence[Any]) -> None:
        """Take the items of a whole rollout; raises TaskError where tokens are missing or changed.

        What was read before that stays.
        """
        for index, item in enumerate(items):
            where = f"output[{index}]"
            if not isinstance(item, Mapping):
                raise TaskError(f"{where} is no object: {str(item)[:80]}")
            try:
                echo = read_echo(item, where)
            except RequestError as error:
                raise TaskError(str(error)) from error
            if echo is None:
                continue
            before = len(self.tokens)
            if list(echo.prompt[:before]) != self.tokens:
                raise TaskError(
                    f"{where}.prompt_token_ids do not begin with the tokens of the turns before: "
                    "history was rewritten on the way, echo items unchanged"
                )
            shown = len(echo.prompt) - before
            self.tokens += [*echo.prompt[before:], *echo.generated]
            self.sampled += [False] * shown + [True] * len(echo.generated)
            self.logprobs += [0.0] * shown + list(echo.logprobs)
            self.num_turns += 1
        if not self.num_turns:
            raise TaskError(
                "the output has no token ids: let the model server return them "
                "(return_token_ids, return_token_id_information)"
            )


def read_rollout(task: Task, result: Any, where: str, weight_version: int = 0) -> Trajectory:
    """Return what came of a whole rollout of `task`, which a server played and graded.

    Never raises: what cannot be read is a trajectory with `error`.
    """
    streams, reward, parts = Streams(), 0.0, {}
    stop: Stop = "error"
    error: str | None = None
    try:
        response = result.get("response") if isinstance(result, Mapping) else None
        output = response.get("output") if isinstance(response, Mapping) else None
        if not isinstance(response, Mapping) or not isinstance(output, list):
            raise TaskError(f"{where} gives no response: {str(result)[:200]}")
        streams.read(output)
        reward, parts = read_reward(result, task.data["row"], where)
        stop = "tokens" if response.get("incomplete_details") else "done"
    except TaskError as caught:
        error = str(caught)
    return finish(task, streams, stop, error, reward, parts, weight_version)


def finish(
    task: Task,
    streams: Streams,
    stop: Stop,
    error: str | None,
    reward: float = 0.0,
    parts: Mapping[str, float] | None = None,
    weight_version: int = 0,
) -> Trajectory:
    """Return an episode that was played elsewhere as a record."""
    count = sum(streams.sampled)
    return Trajectory(
        task=task.id,
        domain=task.domain,
        tokens=tuple(streams.tokens),
        sampled=tuple(streams.sampled),
        logprobs=tuple(streams.logprobs),
        reward=reward,
        parts=dict(parts or {}),
        stop=stop,
        error=error,
        weight_spans=((weight_version, count),) if count else (),
        num_turns=streams.num_turns,
    )
