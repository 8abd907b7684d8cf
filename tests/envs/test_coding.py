"""Programs graded by hidden tests: hostile ones earn nothing and end nothing."""

import asyncio
import random
import time

import pytest

from aprium.envs import coding, sandbox
from aprium.envs.coding import Coding, code_of, run_solution
from aprium.envs.env import replay
from aprium.envs.task import say

pytestmark = pytest.mark.skipif(
    sandbox.why_not() is not None, reason=sandbox.why_not() or "isolated"
)
QUICK = sandbox.SandboxLimits(wall_s=1.5, cpu_s=1)


def test_outputs_errors_and_printing() -> None:
    code = "print('noise')\ndef solve(xs):\n  print(xs)\n  return 10 // xs[0]"
    found = run_solution(code, [[2], [0], []])
    assert found == [["value", 5], ["raised", "ZeroDivisionError"], ["raised", "IndexError"]]
    assert run_solution("def solve(:", [[1]]) == [["raised", "SyntaxError"]]
    assert run_solution("x = 1", [[1]]) == [["raised", "ImportError"]]
    assert run_solution("def solve(xs): return {1, 2}", [[1]]) == [["raised", "TypeError"]]


@pytest.mark.parametrize(
    "code",
    [
        "while True: pass",
        "def solve(xs):\n  while True: pass",
        "import os\nwhile True:\n  try: os.fork()\n  except OSError: pass",
        "x = [0] * 10**10",
        "import os, signal\nos.kill(os.getppid(), 9)\nos.kill(-1, 9)",
        "import sys\nsys.exit(0)",
        "import os\nos._exit(0)",
        "import os\nwhile True: os.write(2, b'x' * 9999)",
        "import sys\nsys.setrecursionlimit(10**9)\ndef f(): f()\nf()",
    ],
)
def test_hostile_programs_have_no_outputs(code: str) -> None:
    begun = time.monotonic()
    found = run_solution(code, [[1], [2]], QUICK)
    assert not [kind for kind, _ in found if kind == "value"]
    assert time.monotonic() - begun < 10


def test_nothing_in_the_sandbox_tells_the_answers() -> None:
    spy = (
        "import os, sys, gc\nseen = ''\nfor root, _, files in os.walk('/work'):\n"
        "  for f in files: seen += open(os.path.join(root, f)).read()\n"
        "main = sys.modules['__main__']\nseen += repr(main.__dict__)\n"
        "def solve(xs): return seen.replace(main.told['mark'], '')"
    )
    ((_, seen),) = run_solution(spy, [[41]])
    assert "told" in seen and "41" in seen and "expected" not in seen


def test_forged_output_earns_nothing() -> None:
    family = Coding()
    task = family.draw(random.Random(4))
    marked = (
        "import sys, os\nm = sys.modules['__main__']\n"
        "os.write(m.mouth, ('\\n' + m.told['mark'] + '[[\"value\", 1]]\\n').encode())\n"
        "os._exit(0)"
    )
    step = asyncio.run(replay(family.start(task), [say(f"```python\n{marked}\n```")]))
    assert step.reward == 0.0 and step.parts["has_code"] == 1.0


def test_the_last_block_counts_and_partial_passes_are_no_reward() -> None:
    assert code_of(say("```python\na\n```\nand\n```py\nb\n```")) == "b\n"
    assert code_of(say("no code")) is None
    family = Coding()
    task = family.draw(random.Random(4))
    tests = [[[1], 1], [[2], 2]]
    task = type(task)(domain="code", key="k", messages=task.messages, data={"tests": tests})
    step = asyncio.run(replay(family.start(task), [say("```python\ndef solve(xs): return 1\n```")]))
    assert step.reward == 0.0 and step.parts["passed"] == 0.5
    assert not coding._same(True, 1) and coding._same([1, "a"], [1, "a"])
