r"""Where in a reply its answer stands: in a box, in tags, after "Answer:", or all of it."""

import re

from aprium.base.records import Message

_TAGS = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_LINE = re.compile(r"^\W*(?:the )?(?:final )?answer(?: is)?\s*[:=]\s*(.+?)\s*$", re.I | re.M)


def final_answer(reply: Message) -> str:
    r"""Return the last `\boxed{...}`, else `<answer>`, else "Answer:" line, else all the content.

    Reasoning is not looked at: what was only thought is not an answer.
    """
    text = reply.content or ""
    boxed = last_boxed(text)
    if boxed is not None:
        return boxed.strip()
    for pattern in (_TAGS, _LINE):
        if found := pattern.findall(text):
            return found[-1].strip().strip("*").strip()
    return text.strip()


def last_boxed(text: str) -> str | None:
    r"""Return what the last `\boxed{...}` holds, braces balanced, or None."""
    begin = text.rfind(r"\boxed{")
    if begin < 0:
        return None
    depth, start = 1, begin + len(r"\boxed{")
    for at in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[at], 0)
        if depth == 0:
            return text[start:at]
    return None
