"""An exercise of pico's: what is asked, the one right answer, and a worked solution to learn from.

Exercises are made by families (`envs.families`) from a random generator, so there is no end of
them. Whether an item is held out follows from a hash of what is asked (the word, the numbers) and
not of how: whatever seed and phrasing, an item that was trained on is never one that is tested on.
"""

import re
from dataclasses import dataclass

from aprium.base.records import Message, ToolCall
from aprium.envs.task import is_held_out


@dataclass(frozen=True, slots=True, kw_only=True)
class Exercise:
    """One verifiable item.

    `key` names what is asked, whatever the phrasing; `short` says that the phrasing is the family's
    short form. `reasoning` is a worked solution, empty where
    there is nothing to work out. A task that wants a tool call has `call` and no `answer`; its
    tools are JSON-schema descriptions.
    """

    family: str
    key: str
    question: str
    answer: str = ""
    reasoning: str = ""
    short: bool = False
    call: ToolCall | None = None
    tools: tuple[dict, ...] = ()

    @property
    def held_out(self) -> bool:
        """Tell whether the item belongs to the test set: one in sixteen, by its key."""
        return is_held_out(f"{self.family} {self.key}")

    def messages(self, *, thinking: bool) -> tuple[Message, ...]:
        """Return question and solution as a conversation to train on."""
        reply = Message(
            role="assistant",
            content=self.answer,
            reasoning=self.reasoning if thinking and self.reasoning else None,
            tool_calls=(self.call,) if self.call else (),
        )
        return Message(role="user", content=self.question), reply


def verify(task: Exercise, content: str, calls: tuple[ToolCall, ...] = ()) -> bool:
    """Tell whether a reply solves `task`: the answer word for word, or the call asked for.

    Only outer and repeated white space and a full stop at the end are forgiven.
    """
    if task.call is not None:
        wanted = (task.call.name, _plain(task.call.arguments))
        return [(c.name, _plain(c.arguments)) for c in calls] == [wanted]
    return not calls and _plain(content) == _plain(task.answer)


def _plain(text: str) -> str:
    return re.sub(r"\s+", " ", text).strip().removesuffix(".")
