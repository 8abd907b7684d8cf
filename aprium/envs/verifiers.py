"""Tasksets of the verifiers package as a family: asked here in one turn, and graded by its rewards.

A task there may want a container, tools over MCP, a simulated user or a program that plays it.
Those are refused by name: what is graded here is a reply, by the rewards and metrics of the task
itself, on a trace of one turn. Source: verifiers 0.4, the interface `verifiers.v1`.
"""

import asyncio
import functools
import inspect
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from aprium.base.errors import RequestError, TaskError
from aprium.base.records import Message
from aprium.envs.env import AskedOnce, Env, Step
from aprium.envs.family import optional
from aprium.envs.task import Task, key_of, say
from aprium.text.messages import read_message

_LIMIT_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Verifiers:
    """Tasks of the installed `taskset`, the first `limit`.

    `options` are of its own configuration: pairs of a name and a value.
    """

    taskset: str
    options: tuple[tuple[str, Any], ...] = ()
    limit: int = 10_000
    domain: str = "verifiers"

    def __post_init__(self) -> None:
        """Check that the taskset is there, and can be asked here."""
        if self.limit < 1:
            raise TaskError(f"limit is {self.limit}: it must be 1 or more")
        self._tasks()

    def draw(self, rng: random.Random) -> Task:
        """Take a task."""
        tasks = self._tasks()
        index = rng.randrange(len(tasks))
        messages = _asked(tasks[index].data)
        return Task(
            domain=self.domain, key=key_of(messages), messages=messages, data={"index": index}
        )

    def start(self, task: Task) -> Env:
        """Return the environment of one task."""
        return GradedTurn(task, self._tasks()[task.data["index"]])

    def wrong(self, task: Task) -> Sequence[tuple[Message, ...]]:
        """Return the answer that is never right: nothing."""
        return [(say(""),)]

    def _tasks(self) -> list[Any]:
        return _load(self.taskset, json.dumps(dict(self.options)), self.limit)


class GradedTurn(AskedOnce):
    """The environment of one task: the first reply is scored, and that is the end."""

    def __init__(self, task: Task, scored: Any) -> None:
        super().__init__(task)
        self._scored = scored

    async def step(self, reply: Message) -> Step:
        """Score the reply, in a thread and a loop of its own: rewards may block."""
        reward, parts = await asyncio.to_thread(asyncio.run, self._score(reply))
        return Step(done=True, reward=reward, parts=parts)

    async def _score(self, reply: Message) -> tuple[float, dict[str, float]]:
        """Return reward and parts; raises TaskError where a reward was not given."""
        trace = _trace(self._scored, (*self.task.messages, reply))
        limit_s = self._scored.data.timeout.scoring or _LIMIT_S
        try:
            async with asyncio.timeout(limit_s):
                await self._scored.score(trace)
        except TimeoutError as error:
            raise TaskError(f"{self.task.id} was not scored in {limit_s:g} s") from error
        lacking = [name for name, given in trace.rewards.items() if given is None]
        if lacking or not trace.rewards:
            raise TaskError(f"{self.task.id} has no reward {', '.join(lacking) or 'at all'}")
        parts = {name: float(value) for name, value in trace.metrics.items() if value is not None}
        parts |= {name: float(given.value) for name, given in trace.rewards.items()}
        return float(trace.reward), parts


@functools.lru_cache(maxsize=16)
def _load(taskset: str, options: str, limit: int) -> list[Any]:
    """Return the tasks of a taskset, each of which can be asked and scored here."""
    vf = optional("verifiers.v1", "verifiers")
    try:
        kind = vf.taskset_config_type(taskset)
        config = kind.model_validate({**json.loads(options), "id": taskset})
        loaded = vf.load_taskset(config)
        if vf.environment_class(taskset) is not vf.SingleAgentEnv:
            raise TaskError(
                f"{taskset} has an environment of its own: only tasksets are played here"
            )
        if type(loaded).toolsets(config):
            raise TaskError(f"{taskset} has tools over MCP, which are not served here")
        tasks = list(loaded.take(limit))
    except TaskError:
        raise
    except Exception as error:  # whatever the taskset's own code ran into
        raise TaskError(f"the taskset {taskset!r} cannot be loaded: {error}") from error
    if not tasks:
        raise TaskError(f"the taskset {taskset!r} has no tasks with {options}")
    for task in tasks:
        why = _why_not(vf, task)
        if why is not None:
            raise TaskError(f"task {task.data.idx} of {taskset} cannot be played here: {why}")
    return tasks


def _why_not(vf: Any, task: Any) -> str | None:
    """Say what a task needs that is not here, None where there is nothing."""
    kind = type(task)
    if task.NEEDS_CONTAINER or task.data.image:
        return "it needs a container"
    if kind.toolsets(task.config):
        return "it has tools over MCP"
    if kind.setup is not vf.Task.setup or kind.finalize is not vf.Task.finalize:
        return "it prepares a runtime"
    for name in ("reward", "metric"):
        for hook in task.hooks(name):
            given = inspect.signature(hook).parameters.get("runtime")
            if given is not None and given.default is inspect.Parameter.empty:
                return f"its {name} {hook.__name__} needs a runtime"
    if not task.hooks("reward") and not task.config.judges:
        return "it has no reward"
    try:
        _asked(task.data)
    except TaskError as error:
        return str(error)
    return None


def _asked(data: Any) -> tuple[Message, ...]:
    """Return what a task asks; raises TaskError where that is nothing, or no text."""
    if not data.prompt:
        raise TaskError("it has no prompt: a user of its own would begin")
    first = [] if data.system_prompt is None else [say(data.system_prompt, role="system")]
    if isinstance(data.prompt, str):
        return (*first, say(data.prompt, role="user"))
    try:
        return (*first, *(read_message(message.model_dump()) for message in data.prompt))
    except RequestError as error:
        raise TaskError(str(error)) from error


def _trace(task: Any, messages: Sequence[Message]) -> Any:
    """Return a trace of which the last message is the model's."""
    vf = optional("verifiers.v1", "verifiers")
    about = vf.TraceTask(type=type(task).__name__, data=task.data, key=task.key, hash=task.hash)
    trace = vf.Trace(task=about, agent=vf.AgentInfo(config=vf.AgentConfig()))
    last = len(messages) - 1
    for index, message in enumerate(messages):
        node = {
            "message": _wire(message),
            "parent": index - 1 if index else None,
            "sampled": index == last,
        }
        trace.nodes.append(vf.MessageNode.model_validate(node))
    trace.is_completed = trace.ok = True
    return trace


def _wire(message: Message) -> Mapping[str, Any]:
    """Return a message as verifiers reads it."""
    found: dict[str, Any] = {"role": message.role, "content": message.content or ""}
    if message.role == "tool":
        found["tool_call_id"] = message.tool_call_id or ""
    if message.role == "assistant":
        found["reasoning_content"] = message.reasoning
        found["tool_calls"] = [
            {"id": call.id or "", "name": call.name, "arguments": call.arguments}
            for call in message.tool_calls
        ] or None
    return found
