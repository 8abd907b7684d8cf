"""Errands over services: state and answer decide, failed calls are made again, and only once."""

import asyncio
import json
import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aprium.base.errors import TaskError
from aprium.base.records import Message, ToolCall
from aprium.envs.dialogue import ChatFormat
from aprium.envs.env import replay, run_episode
from aprium.envs.services import BANK, CALENDAR, FILES, SERVICES, call
from aprium.envs.task import say
from aprium.envs.tool_use import SCENARIOS, ErrandEnv, ToolUse
from tests.scripted import ScriptedPolicy, written

ACCOUNTS = {"a": {"owner": "Ada", "balance": 10}, "b": {"owner": "Boris", "balance": 0}}


def test_calls_that_are_wrong_change_nothing() -> None:
    state = {"accounts": json.loads(json.dumps(ACCOUNTS))}
    wrong = [
        ("transfer", '{"source": "a", "target": "b", "amount": 11}', True),
        ("transfer", '{"source": "a", "target": "b", "amount": -1}', True),
        ("transfer", '{"source": "a", "target": "a", "amount": 1}', True),
        ("transfer", '{"source": "a", "target": "c", "amount": 1}', True),
        ("transfer", '{"source": "a", "target": "b", "amount": "1"}', False),
        ("transfer", '{"source": "a", "target": "b", "amount": true}', False),
        ("transfer", '{"source": "a", "target": "b"}', False),
        ("transfer", "{", False),
        ("transfer", "[]", False),
        ("steal", "{}", False),
    ]
    for name, arguments, valid in wrong:
        text, was_valid = call(BANK, state, name, arguments)
        assert "error" in json.loads(text) and was_valid is valid, arguments
        assert state["accounts"] == ACCOUNTS
    text, _ = call(BANK, state, "transfer", '{"source": "a", "target": "b", "amount": 4}')
    assert json.loads(text) == {"result": {"balance": 6}}
    assert state["accounts"]["b"]["balance"] == 4


def test_calendars_have_one_event_an_hour() -> None:
    state = {"events": {"e": {"title": "x", "day": "Monday", "hour": 9}}}
    for day, hour in (("Monday", 9), ("Sunday", 9), ("Monday", 3)):
        arguments = json.dumps({"title": "y", "day": day, "hour": hour})
        assert "error" in call(CALENDAR, state, "create_event", arguments)[0]
    call(CALENDAR, state, "move_event", '{"event": "e", "day": "Friday", "hour": 10}')
    assert state["events"]["e"] == {"title": "x", "day": "Friday", "hour": 10}


@given(st.lists(st.tuples(st.sampled_from(sorted(FILES)), st.text(max_size=20)), max_size=8))
@settings(max_examples=50)
def test_no_call_breaks_a_service(calls: list) -> None:
    for tools in SERVICES.values():
        state = {"accounts": dict(ACCOUNTS), "events": {}, "files": {}}
        for name, text in calls:
            json.loads(call(tools, state, name, text)[0])
            json.loads(call(tools, state, name, json.dumps({"path": text, "text": text}))[0])


@pytest.mark.parametrize("kind", SCENARIOS)
def test_every_errand_can_be_done_and_ignored(kind: str) -> None:
    family = ToolUse(kinds=(kind,), failures=3)
    for seed in range(20):
        task = family.draw(random.Random(seed))
        step = asyncio.run(replay(family.start(task), task.solution))
        assert step.reward == 1.0 and step.parts["recovered"] == len(task.data["failing"])
        assert step.parts["given_up"] == step.parts["invalid_calls"] == 0.0
        idle = asyncio.run(replay(family.start(task), [task.solution[-1]]))
        assert idle.reward == 0.0 and idle.parts["answer"] == 1.0


def test_who_gives_up_is_not_paid() -> None:
    family = ToolUse(failures=3)
    task = next(
        t for t in map(family.draw, map(random.Random, range(99))) if len(t.data["failing"]) > 1
    )
    once = list(dict.fromkeys(task.solution))  # no call is made again
    step = asyncio.run(replay(family.start(task), once))
    assert step.parts["recovered"] < len(task.data["failing"]) and step.parts["given_up"] > 0


def test_an_endless_caller_is_stopped() -> None:
    task = ToolUse(kinds=("total",), failures=0).draw(random.Random(0))
    made = Message(role="assistant", tool_calls=(ToolCall(name="list_files", arguments="{}"),))
    step = asyncio.run(replay(ErrandEnv(task), [made] * 60))
    assert step.done and step.reward == 0.0
    env = ErrandEnv(task)
    asyncio.run(env.reset())
    with pytest.raises(TaskError, match="was used"):
        asyncio.run(env.reset())


def test_an_episode_in_tokens(chat: ChatFormat) -> None:
    """The solution as text, through the template's calls and results, earns what it should."""
    quiet = replace(chat, thinking=False)
    for kind in SCENARIOS:
        family = ToolUse(kinds=(kind,), failures=1)
        task = family.draw(random.Random(3))
        texts = [written(quiet, task.messages, turn, task.tools) for turn in task.solution]
        policy = ScriptedPolicy(quiet, texts)
        found = asyncio.run(run_episode(family.start(task), policy, quiet))
        assert (found.stop, found.error, found.reward) == ("done", None, 1.0), (kind, found)
        assert found.num_turns == len(task.solution) and found.domain == "tool-use"
        lost = asyncio.run(
            run_episode(family.start(task), ScriptedPolicy(quiet, [texts[-1]]), quiet)
        )
        assert lost.reward == 0.0 and lost.stop == "done"


def test_messages_of_results_answer_their_calls() -> None:
    task = ToolUse(kinds=("total",), failures=0).draw(random.Random(0))
    env = ErrandEnv(task)
    asyncio.run(env.reset())
    both = tuple(ToolCall(name="list_files", arguments="{}", id=f"call-{i}") for i in range(2))
    step = asyncio.run(env.step(Message(role="assistant", tool_calls=both)))
    assert [m.tool_call_id for m in step.messages] == ["call-0", "call-1"]
    assert asyncio.run(env.step(say("Answer: 0"))).done
