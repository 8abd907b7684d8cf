"""A task: what is asked, what its environment needs to grade it, and turns that solve it.

Whether a task is held out follows from a hash of what is asked, not from a seed: generators with
neighbouring seeds give the same items, and a split made by seed alone is not a split.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from aprium.base.records import Message

_HELD_OUT_SHARE = 16


def is_held_out(key: str) -> bool:
    """Tell whether the item belongs to the test set: one in sixteen, by what is asked."""
    digest = hashlib.sha256(key.encode()).digest()
    return digest[0] % _HELD_OUT_SHARE == 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One verifiable item of a family.

    `domain` is the name of its family, by which teachers and figures are chosen, and `key` what is
    asked, whatever the phrasing. `messages` are shown first, with `tools` in the OpenAI form.
    `data` is what grading needs, as plain values; the model never sees it. `solution` are the
    assistant's turns that solve it, none where no solution is known.
    """

    domain: str
    key: str
    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...] = ()
    data: Mapping[str, Any] = field(default_factory=dict)
    solution: tuple[Message, ...] = ()

    @property
    def id(self) -> str:
        """Name the task: equal for equal items of a family, in any process."""
        digest = hashlib.sha256(f"{self.domain} {self.key}".encode()).hexdigest()
        return f"{self.domain}/{digest[:16]}"

    @property
    def held_out(self) -> bool:
        """Tell whether the item belongs to the test set: in all environments, or in none."""
        return is_held_out(self.key)


def key_of(messages: Sequence[Message]) -> str:
    """Return what messages ask as a key, for tasks that come with none."""
    return json.dumps(
        [[m.role, m.content, [[c.name, c.arguments] for c in m.tool_calls]] for m in messages]
    )


def say(text: str, *, role: str = "assistant") -> Message:
    """Return a message of nothing but text."""
    return Message(role=role, content=text)
