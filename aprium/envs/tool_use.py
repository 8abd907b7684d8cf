"""Using tools over several turns: services with a state, and calls that fail at first.

A task ends when the model answers without a call. It is solved when the state of the service is
what it should be, and the answer too. Some calls fail once for no reason, as networks do: who gives
up, or acts twice, does not reach the state. How many were made again is a part of its own.
"""

import copy
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from aprium.base.errors import TaskError
from aprium.base.records import Message, ToolCall
from aprium.envs.answer import final_answer
from aprium.envs.env import AskedOnce, Step
from aprium.envs.services import DAYS, SERVICES, State, call, describe
from aprium.envs.task import Task, say

_NAMES = ("Ada", "Boris", "Chen", "Dalia", "Edgar", "Farah", "Goran", "Hana")
_TITLES = ("budget", "interview", "review", "lunch", "training", "planning", "demo", "retro")
_WORDS = ("draft", "final", "secret", "old", "urgent", "plain")
_UNAVAILABLE = json.dumps({"error": "the service is unavailable for the moment: try again"})
_MAX_CALLS = 40
# A call by name and arguments.
Call = tuple[str, dict[str, Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Scenario:
    """A state, what is asked, and the calls and answer that do it."""

    service: str
    state: State
    words: str
    calls: list[Call]
    answer: str


def _accounts(rng: random.Random) -> tuple[State, list[str]]:
    owners: list[str] = rng.sample(_NAMES, 4)
    ids = rng.sample(range(1000, 9999), 4)
    accounts = {
        f"A-{id}": {"owner": owner, "balance": rng.randint(50, 900)}
        for id, owner in zip(ids, owners, strict=True)
    }
    return {"accounts": accounts}, owners


def _bank(rng: random.Random) -> _Scenario:
    state, (giver, taker, *_) = _accounts(rng)
    ids = {a["owner"]: id for id, a in state["accounts"].items()}
    balance = state["accounts"][ids[giver]]["balance"]
    amount = rng.randint(10, balance)
    act = {"source": ids[giver], "target": ids[taker], "amount": amount}
    calls: list[Call] = [
        ("find_accounts", {"owner": giver}),
        ("find_accounts", {"owner": taker}),
        ("transfer", act),
    ]
    words = f"Move {amount} from {giver} to {taker}. Then answer with {giver}'s new balance."
    return _Scenario(
        service="bank", state=state, words=words, calls=calls, answer=str(balance - amount)
    )


def _richest(rng: random.Random) -> _Scenario:
    state, owners = _accounts(rng)
    first, second, target = owners[:3]
    ids = {a["owner"]: id for id, a in state["accounts"].items()}
    balances = {o: state["accounts"][ids[o]]["balance"] for o in (first, second)}
    if balances[first] == balances[second]:
        state["accounts"][ids[first]]["balance"] += 1
        balances[first] += 1
    richer = max(balances, key=lambda owner: balances[owner])
    calls: list[Call] = [("find_accounts", {"owner": o}) for o in (first, second, target)]
    calls += [("get_balance", {"account": ids[o]}) for o in (first, second)]
    calls.append(("transfer", {"source": ids[richer], "target": ids[target], "amount": 25}))
    words = (
        f"Find out which of {first} and {second} has the higher balance, and move 25 from that "
        f"person to {target}. Answer with the name of the person who paid."
    )
    return _Scenario(service="bank", state=state, words=words, calls=calls, answer=richer)


def _events(rng: random.Random) -> State:
    events: dict[str, Any] = {}
    places = rng.sample([(day, hour) for day in DAYS for hour in range(8, 17)], 12)
    for number, (day, hour) in zip(rng.sample(range(1, 99), 12), places, strict=True):
        title = f"{rng.choice(_TITLES)} {number}"
        events[f"event-{number}"] = {"title": title, "day": day, "hour": hour}
    return {"events": events}


def _reschedule(rng: random.Random) -> _Scenario:
    state = _events(rng)
    id = rng.choice(list(state["events"]))
    event = state["events"][id]
    day = rng.choice([d for d in DAYS if d != event["day"]])
    taken = {e["hour"] for e in state["events"].values() if e["day"] == day}
    hour = next(h for h in range(8, 18) if h not in taken)
    words = (
        f"Move '{event['title']}' from {event['day']} to the first free hour on {day}, 8 being the "
        "first of the day. Answer with the hour."
    )
    calls: list[Call] = [("list_events", {"day": event["day"]}), ("list_events", {"day": day})]
    calls.append(("move_event", {"event": id, "day": day, "hour": hour}))
    return _Scenario(service="calendar", state=state, words=words, calls=calls, answer=str(hour))


def _clear(rng: random.Random) -> _Scenario:
    state = _events(rng)
    day = rng.choice(sorted({e["day"] for e in state["events"].values()}))
    ids = [id for id, e in state["events"].items() if e["day"] == day]
    calls: list[Call] = [("list_events", {"day": day})]
    calls += [("cancel_event", {"event": id}) for id in ids]
    words = f"Cancel all events on {day}. Answer with how many there were."
    return _Scenario(
        service="calendar", state=state, words=words, calls=calls, answer=str(len(ids))
    )


def _total(rng: random.Random) -> _Scenario:
    names = rng.sample(_TITLES, 3)
    numbers = {f"/reports/{name}.txt": str(rng.randint(1, 500)) for name in names}
    others = {f"/notes/{name}.txt": str(rng.randint(1, 500)) for name in names[:2]}
    total = str(sum(map(int, numbers.values())))
    calls: list[Call] = [("list_files", {})]
    calls += [("read_file", {"path": path}) for path in sorted(numbers)]
    calls.append(("write_file", {"path": "/total.txt", "text": total}))
    words = (
        "Add up the numbers in the files under /reports, write nothing but the sum to /total.txt, "
        "and answer with it."
    )
    return _Scenario(
        service="files", state={"files": numbers | others}, words=words, calls=calls, answer=total
    )


def _purge(rng: random.Random) -> _Scenario:
    word, *others = rng.sample(_WORDS, 4)
    paths = [f"/{rng.choice(_TITLES)}-{n}.md" for n in rng.sample(range(10, 99), 5)]
    files = {p: f"This is {rng.choice(others)}." for p in paths}
    for path in rng.sample(paths, rng.randint(1, 3)):
        files[path] = f"This is {word}."
    gone = sorted(p for p, text in files.items() if word in text)
    calls: list[Call] = [("list_files", {})]
    calls += [("read_file", {"path": path}) for path in sorted(files)]
    calls += [("delete_file", {"path": path}) for path in gone]
    words = f"Delete every file whose text has the word '{word}'. Answer with how many those were."
    return _Scenario(
        service="files", state={"files": files}, words=words, calls=calls, answer=str(len(gone))
    )


SCENARIOS: dict[str, Callable[[random.Random], _Scenario]] = {
    "transfer": _bank,
    "richest": _richest,
    "reschedule": _reschedule,
    "clear-day": _clear,
    "total": _total,
    "purge": _purge,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolUse:
    """Errands of `kinds` (empty for all), of whose calls up to `failures` fail at first."""

    kinds: tuple[str, ...] = ()
    failures: int = 2
    domain: str = "tool-use"

    def __post_init__(self) -> None:
        """Check names and ranges."""
        for kind in self.kinds:
            if kind not in SCENARIOS:
                raise TaskError(f"no errand {kind!r}: choose of {', '.join(SCENARIOS)}")
        if self.failures < 0:
            raise TaskError(f"failures is {self.failures}: it must be 0 or more")

    def draw(self, rng: random.Random) -> Task:
        """Make an errand."""
        kind = rng.choice(self.kinds or tuple(SCENARIOS))
        scenario = SCENARIOS[kind](rng)
        tools = SERVICES[scenario.service]
        goal = copy.deepcopy(scenario.state)
        for name, arguments in scenario.calls:
            call(tools, goal, name, json.dumps(arguments))
        most = min(self.failures, len(scenario.calls))
        failing = sorted(rng.sample(range(len(scenario.calls)), rng.randint(0, most)))
        # As a count of calls made: each failure before shifts the later ones by its repetition.
        failing = [at + before for before, at in enumerate(failing)]
        text = f"{scenario.words} Put the answer after 'Answer: '."
        return Task(
            domain=self.domain,
            key=f"{kind} {json.dumps(scenario.state, sort_keys=True)} {scenario.words}",
            messages=(say(text, role="user"),),
            tools=describe(tools),
            data={
                "service": scenario.service,
                "state": scenario.state,
                "goal": goal,
                "answer": scenario.answer,
                "failing": failing,
            },
            solution=_turns(scenario.calls, failing, scenario.answer),
        )

    def start(self, task: Task) -> "ErrandEnv":
        """Return the service in its first state."""
        return ErrandEnv(task)

    def wrong(self, task: Task) -> Sequence[tuple[Message, ...]]:
        """Return answers without acts, acts left out or done twice, and another answer."""
        *acts, end = task.solution
        tools = SERVICES[task.data["service"]]
        last = max(i for i, turn in enumerate(acts) if tools[turn.tool_calls[0].name].changes)
        other = say(f"Answer: {task.data['answer']}0")
        found = [(say("Answer: done"),), (*acts, other), (*acts[:last], end)]
        return [*found, (*acts, _turn(_uncalled_for(task)), end)]


def _uncalled_for(task: Task) -> Call:
    """Return a change that was not asked for."""
    if task.data["service"] == "calendar":
        return "create_event", {"title": "party", "day": "Friday", "hour": 17}
    if task.data["service"] == "files":
        return "write_file", {"path": "/party.txt", "text": "party"}
    accounts = task.data["goal"]["accounts"]
    giver = max(accounts, key=lambda id: accounts[id]["balance"])
    taker = min(accounts, key=lambda id: accounts[id]["balance"])
    return "transfer", {"source": giver, "target": taker, "amount": 1}


def _turn(made: Call) -> Message:
    name, arguments = made
    return Message(
        role="assistant", tool_calls=(ToolCall(name=name, arguments=json.dumps(arguments)),)
    )


def _turns(calls: Sequence[Call], failing: Sequence[int], answer: str) -> tuple[Message, ...]:
    """Return one turn a call, those that fail made again, and the answer."""
    turns: list[Message] = []
    for made in calls:
        if len(turns) in failing:
            turns.append(_turn(made))
        turns.append(_turn(made))
    return (*turns, say(f"Answer: {answer}"))


class ErrandEnv(AskedOnce):
    """One errand: calls change the service, and an answer without a call ends it."""

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        self._tools = SERVICES[task.data["service"]]
        self._state: State = copy.deepcopy(dict(task.data["state"]))
        self._num_calls = self._invalid = 0
        self._failed: list[tuple[str, str]] = []
        self._recovered = 0

    async def step(self, reply: Message) -> Step:
        """Make the calls of a turn, or grade its answer."""
        if not reply.tool_calls:
            return self._grade(final_answer(reply))
        invalid = self._invalid
        results = tuple(
            Message(role="tool", content=self._call(made), tool_call_id=made.id)
            for made in reply.tool_calls
        )
        if self._num_calls > _MAX_CALLS:
            return self._grade("")
        wrong = ("invalid_call",) if self._invalid > invalid else ()
        return Step(messages=results, defects=wrong)

    def _call(self, made: ToolCall) -> str:
        number, this = self._num_calls, (made.name, made.arguments)
        self._num_calls += 1
        if this in self._failed:
            self._failed.remove(this)
            self._recovered += 1
        elif number in self.task.data["failing"]:
            self._failed.append(this)
            return _UNAVAILABLE
        result, valid = call(self._tools, self._state, made.name, made.arguments)
        self._invalid += not valid
        return result

    def _grade(self, answer: str) -> Step:
        data = self.task.data
        state = float(self._state == data["goal"])
        right = float(answer.strip(" .").casefold() == data["answer"].casefold())
        parts = {
            "state": state,
            "answer": right,
            "invalid_calls": float(self._invalid),
            "recovered": float(self._recovered),
            "given_up": float(len(self._failed)),
        }
        return Step(done=True, reward=state * right, parts=parts)
