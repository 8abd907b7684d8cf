"""What is wrong with a turn whatever its task: tags out of place, calls that do not parse, nothing.

Names of defects are those of `DEFECTS`; `aprium.rl.credit` says what they cost. Source: the reward
checks of the published recipes (docs/training.md).
"""

from aprium.base.records import Message

DEFECTS = {
    "invalid_call": "a call of a tool that is not there, or with arguments it does not take",
    "malformed_call": "tags of a call in the answer or the reasoning: it could not be read as one",
    "malformed_reasoning": "tags of reasoning where none can be",
    "repeated_reasoning": "the answer is the reasoning, word for word",
    "empty_answer": "neither an answer nor a call",
}
_CALL_TAGS = ("<tool_call>", "</tool_call>", "<function=", "</function>")
_REASONING_TAGS = ("<think>", "</think>")


def find_defects(reply: Message) -> tuple[str, ...]:
    """Return the names of what is wrong with the form of a finished turn."""
    answer, reasoning = (reply.content or "").strip(), (reply.reasoning or "").strip()
    text = f"{reasoning}\n{answer}"
    found = {
        "malformed_call": any(tag in text for tag in _CALL_TAGS),
        "malformed_reasoning": any(tag in text for tag in _REASONING_TAGS),
        "repeated_reasoning": bool(answer) and answer == reasoning,
        "empty_answer": not answer and not reply.tool_calls,
    }
    return tuple(name for name, present in found.items() if present)
