"""Simulated services with a state: a bank, a calendar and a store of files, and their tools.

A service is a table of tools over a state of plain values. Whatever is wrong with a call is told to
the caller as an error, as a real service would, and changes nothing.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

State = dict[str, Any]
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday")


@dataclass(frozen=True, slots=True, kw_only=True)
class Tool:
    """One tool: what it says of itself, its parameters with their JSON types, and what it does.

    `run` takes the state and the arguments, may change the state, and returns a JSON value; it
    raises ValueError, with words for the caller, before it changes anything. `changes` tells
    whether it is for changing.
    """

    words: str
    parameters: Mapping[str, str]
    run: Callable[..., Any]
    changes: bool = False


def describe(tools: Mapping[str, Tool]) -> tuple[dict[str, Any], ...]:
    """Return the tools in the OpenAI form."""
    return tuple(
        {
            "type": "function",
            "function": {
                "name": name,
                "description": tool.words,
                "parameters": {
                    "type": "object",
                    "properties": {key: {"type": kind} for key, kind in tool.parameters.items()},
                    "required": list(tool.parameters),
                },
            },
        }
        for name, tool in tools.items()
    )


def call(tools: Mapping[str, Tool], state: State, name: str, arguments: str) -> tuple[str, bool]:
    """Call a tool with JSON text; return its result as JSON text, and whether it was valid."""
    if name not in tools:
        return _error(f"there is no tool {name}: use one of {', '.join(tools)}"), False
    tool = tools[name]
    try:
        given = json.loads(arguments or "{}")
    except (ValueError, RecursionError):
        return _error("the arguments are not JSON"), False
    if not isinstance(given, dict) or set(given) != set(tool.parameters):
        return _error(f"{name} takes exactly {', '.join(tool.parameters) or 'nothing'}"), False
    for key, kind in tool.parameters.items():
        fits = isinstance(given[key], {"string": str, "integer": int}[kind])
        if not fits or isinstance(given[key], bool):
            return _error(f"{key} must be of type {kind}"), False
    try:
        return json.dumps({"result": tool.run(state, **given)}), True
    except ValueError as error:
        return _error(str(error)), True


def _error(text: str) -> str:
    return json.dumps({"error": text})


def _account(state: State, account: str) -> dict[str, Any]:
    if account not in state["accounts"]:
        raise ValueError(f"there is no account {account}")
    return state["accounts"][account]


def _find_accounts(state: State, owner: str) -> list[str]:
    found = [id for id, a in state["accounts"].items() if a["owner"] == owner]
    if not found:
        raise ValueError(f"{owner} has no account")
    return found


def _transfer(state: State, source: str, target: str, amount: int) -> dict[str, int]:
    giver, taker = _account(state, source), _account(state, target)
    if source == target or amount <= 0:
        raise ValueError("an amount above 0 goes from one account to another")
    if giver["balance"] < amount:
        raise ValueError("the balance is too low")
    giver["balance"] -= amount
    taker["balance"] += amount
    return {"balance": giver["balance"]}


BANK: dict[str, Tool] = {
    "find_accounts": Tool(
        words="List the account numbers of a person.",
        parameters={"owner": "string"},
        run=_find_accounts,
    ),
    "get_balance": Tool(
        words="Get the balance of an account.",
        parameters={"account": "string"},
        run=lambda state, account: _account(state, account)["balance"],
    ),
    "transfer": Tool(
        words="Move an amount from one account to another.",
        parameters={"source": "string", "target": "string", "amount": "integer"},
        run=_transfer,
        changes=True,
    ),
}


def _event(state: State, event: str) -> dict[str, Any]:
    if event not in state["events"]:
        raise ValueError(f"there is no event {event}")
    return state["events"][event]


def _list_events(state: State, day: str) -> list[dict[str, Any]]:
    if day not in DAYS:
        raise ValueError(f"{day} is no day: use one of {', '.join(DAYS)}")
    events = [{"event": id, **e} for id, e in state["events"].items() if e["day"] == day]
    return sorted(events, key=lambda e: e["hour"])


def _free(state: State, day: str, hour: int) -> None:
    """Raise ValueError unless there is room."""
    if not 8 <= hour <= 17:
        raise ValueError("events begin at 8 to 17 hours")
    if any(event["hour"] == hour for event in _list_events(state, day)):
        raise ValueError(f"there is another event on {day} at {hour}")


def _move_event(state: State, event: str, day: str, hour: int) -> str:
    moved = _event(state, event)
    _free(state, day, hour)
    moved.update(day=day, hour=hour)
    return "moved"


def _create_event(state: State, title: str, day: str, hour: int) -> str:
    _free(state, day, hour)
    id = f"event-{len(state['events']) + 100}"
    state["events"][id] = {"title": title, "day": day, "hour": hour}
    return id


def _cancel_event(state: State, event: str) -> str:
    _event(state, event)
    del state["events"][event]
    return "cancelled"


CALENDAR: dict[str, Tool] = {
    "list_events": Tool(
        words="List the events of a day, each of one hour.",
        parameters={"day": "string"},
        run=_list_events,
    ),
    "create_event": Tool(
        words="Create an event of one hour.",
        parameters={"title": "string", "day": "string", "hour": "integer"},
        run=_create_event,
        changes=True,
    ),
    "move_event": Tool(
        words="Move an event to another day and hour.",
        parameters={"event": "string", "day": "string", "hour": "integer"},
        run=_move_event,
        changes=True,
    ),
    "cancel_event": Tool(
        words="Cancel an event.",
        parameters={"event": "string"},
        run=_cancel_event,
        changes=True,
    ),
}


def _read_file(state: State, path: str) -> str:
    if path not in state["files"]:
        raise ValueError(f"there is no file {path}")
    return state["files"][path]


def _write_file(state: State, path: str, text: str) -> str:
    if not path.startswith("/") or len(text) > 10_000:
        raise ValueError("a path begins with /, and a file has at most 10000 characters")
    state["files"][path] = text
    return "written"


def _delete_file(state: State, path: str) -> str:
    _read_file(state, path)
    del state["files"][path]
    return "deleted"


FILES: dict[str, Tool] = {
    "list_files": Tool(
        words="List the paths of all files.",
        parameters={},
        run=lambda state: sorted(state["files"]),
    ),
    "read_file": Tool(words="Read a file.", parameters={"path": "string"}, run=_read_file),
    "write_file": Tool(
        words="Write a file, in place of what it was.",
        parameters={"path": "string", "text": "string"},
        run=_write_file,
        changes=True,
    ),
    "delete_file": Tool(
        words="Delete a file.", parameters={"path": "string"}, run=_delete_file, changes=True
    ),
}
SERVICES: dict[str, dict[str, Tool]] = {"bank": BANK, "calendar": CALENDAR, "files": FILES}
