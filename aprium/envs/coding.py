"""Writing programs: a function of several described steps, graded by hidden tests in a sandbox.

The sandbox gets inputs alone and gives back outputs, which are compared outside it: there is no
answer in it to find, and nothing to gain by writing a reward of one's own.
"""

import json
import random
import re
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from aprium.base.errors import TaskError
from aprium.base.records import Message
from aprium.envs import sandbox
from aprium.envs.env import Env, SingleTurn
from aprium.envs.task import Task, say

_BLOCK = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)```", re.DOTALL)
_LIMITS = sandbox.SandboxLimits(wall_s=10.0, cpu_s=4, memory_bytes=512 << 20)
_NUM_TESTS = 12

# Runs in the sandbox: reads inputs, calls `solve` on each, writes outputs after a mark. What the
# program itself prints goes nowhere.
_DRIVER = """
import json, os, sys
told = json.loads(sys.stdin.read())
mouth = os.dup(1)
os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
found = []
try:
    from solution import solve
    for value in told["inputs"]:
        try:
            found.append(["value", solve(value)])
        except Exception as error:
            found.append(["raised", type(error).__name__])
    text = json.dumps(found)
except BaseException as error:
    text = json.dumps([["raised", type(error).__name__]])
os.write(mouth, ("\\n" + told["mark"] + text + "\\n").encode())
os._exit(0)
"""


@dataclass(frozen=True, slots=True)
class _Move:
    """One step of a program: what it says, and a Python expression of `xs` and `k`."""

    words: str
    source: str


_MOVES = (
    _Move("keep only the numbers divisible by {k}", "[x for x in xs if x % {k} == 0]"),
    _Move("drop the numbers smaller than {k}", "[x for x in xs if x >= {k}]"),
    _Move("multiply every number by {k}", "[x * {k} for x in xs]"),
    _Move("add {k} to every number", "[x + {k} for x in xs]"),
    _Move("square every number", "[x * x for x in xs]"),
    _Move("reverse the order", "xs[::-1]"),
    _Move("sort in descending order", "sorted(xs, reverse=True)"),
    _Move("remove duplicates, keeping first occurrences", "list(dict.fromkeys(xs))"),
    _Move("keep every {k}-th element, beginning with the first", "xs[::{k}]"),
    _Move(
        "replace the list by its running sums", "[sum(xs[: i + 1]) for i in range(len(xs))]"
    ),
    _Move(
        "replace the list by the differences of neighbours, second minus first",
        "[b - a for a, b in zip(xs, xs[1:])]",
    ),
    _Move("move the first {k} elements to the end", "xs[{k}:] + xs[:{k}]"),
    _Move("replace every number by its remainder modulo {k}", "[x % {k} for x in xs]"),
    _Move("drop the first {k} elements", "xs[{k}:]"),
    _Move("replace negative numbers by zero", "[max(x, 0) for x in xs]"),
)  # fmt: skip
_ENDS = (
    _Move("return the list", "xs"),
    _Move("return the sum, 0 for an empty list", "sum(xs)"),
    _Move("return the number of elements", "len(xs)"),
    _Move("return the largest element, or None for an empty list", "max(xs, default=None)"),
    _Move("return how many distinct elements there are", "len(set(xs))"),
    _Move("return the elements joined by '-' as a string", "'-'.join(map(str, xs))"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Coding:
    """Functions of `least` to `most` steps over a list of integers."""

    least: int = 2
    most: int = 4
    domain: str = "code"

    def __post_init__(self) -> None:
        """Check ranges."""
        if not 1 <= self.least <= self.most <= len(_MOVES):
            raise TaskError(
                f"least {self.least} and most {self.most}: they must be 1..{len(_MOVES)} in order"
            )

    def draw(self, rng: random.Random) -> Task:
        """Make a function to write, with examples and hidden tests."""
        moves = rng.sample(_MOVES, rng.randint(self.least, self.most))
        steps = [(move, rng.randint(2, 5)) for move in moves] + [(rng.choice(_ENDS), 0)]
        words = [move.words.format(k=k) for move, k in steps]
        source = "def solve(xs):\n"
        for move, k in steps[:-1]:
            source += f"    xs = {move.source.format(k=k)}\n"
        source += f"    return {steps[-1][0].source}\n"
        inputs: list[list[int]] = [[], [rng.randint(-20, 20)]]
        inputs += [
            [rng.randint(-30, 30) for _ in range(rng.randint(3, 12))] for _ in range(_NUM_TESTS)
        ]
        solve = _reference(source)
        tests = [[value, solve(list(value))] for value in inputs]
        listed = "\n".join(f"{i + 1}. {text[0].upper()}{text[1:]}." for i, text in enumerate(words))
        shown = "\n".join(f"solve({i!r}) == {o!r}" for i, o in tests[2:4])
        text = (
            "Write a Python function `solve(xs)` that takes a list of integers and does this, in "
            f"order:\n{listed}\nExamples:\n{shown}\nAnswer with one Python code block."
        )
        return Task(
            domain=self.domain,
            key=" | ".join(words),
            messages=(say(text, role="user"),),
            data={"tests": tests, "shown": 2},
            solution=(say(f"```python\n{source}```"),),
        )

    def start(self, task: Task) -> Env:
        """Return the environment of one function."""
        return SingleTurn(task, _grade)

    def wrong(self, task: Task) -> Sequence[tuple[Message, ...]]:
        """Return no code, broken code, the shown examples by heart, and attempts to cheat."""
        shown = {json.dumps(i): o for i, o in task.data["tests"][2:4]}
        programs = (
            "def solve(xs):",
            f"import json\ndef solve(xs): return {shown!r}.get(json.dumps(xs), 'no')",
            "import os\nos.write(1, b'[]')\nos._exit(0)",
            "class Same:\n  __eq__ = lambda a, b: True\ndef solve(xs): return Same()",
        )
        texts = ["", "I would rather not.", *(f"```python\n{p}\n```" for p in programs)]
        return [(say(text),) for text in texts]


def _reference(source: str) -> Callable[[list[int]], Any]:
    """Return the function that a solution of this file's own making defines."""
    scope: dict[str, Any] = {}
    exec(source, scope)
    return scope["solve"]


def code_of(reply: Message) -> str | None:
    """Return the last code block of a reply, or None."""
    blocks = _BLOCK.findall(reply.content or "")
    return blocks[-1] if blocks else None


def _grade(task: Task, reply: Message) -> dict[str, float]:
    code, tests = code_of(reply), task.data["tests"]
    if code is None:
        return {"reward": 0.0, "passed": 0.0, "has_code": 0.0}
    outputs = run_solution(code, [value for value, _ in tests])
    right = [
        kind == "value" and _same(value, expected)
        for (kind, value), (_, expected) in zip(outputs, tests, strict=False)
    ]
    passed = sum(right) / len(tests)
    return {"reward": float(passed == 1.0), "passed": passed, "has_code": 1.0}


def run_solution(
    code: str, inputs: Sequence[Any], limits: sandbox.SandboxLimits | None = None
) -> list[list[Any]]:
    """Call the `solve` of `code` on each input, in a sandbox.

    Returns ["value", output] or ["raised", name] for each, fewer where the program ended or was
    ended. Raises TaskError where programs cannot be isolated.
    """
    mark = secrets.token_hex(16)
    found = sandbox.run_python(
        _DRIVER,
        stdin=json.dumps({"inputs": list(inputs), "mark": mark}),
        limits=limits or _LIMITS,
        solution=code,
    )
    _, marked, text = found.stdout.rpartition(mark)
    try:
        outputs = json.loads(text) if marked else []
    except ValueError:
        return []
    return [o for o in outputs if isinstance(o, list) and len(o) == 2]


def _same(value: Any, expected: Any) -> bool:
    """Compare as Python's literals would, True being no 1."""
    return json.dumps(value) == json.dumps(expected)
