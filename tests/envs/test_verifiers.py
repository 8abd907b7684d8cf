"""Tasksets of the verifiers package, where it is installed: asked and graded as it grades them."""

import asyncio
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from aprium.base.errors import ConfigError, TaskError
from aprium.envs import verifiers
from aprium.envs.env import Step, replay, run_episode
from aprium.envs.family import distinct, take
from aprium.envs.registry import make
from aprium.envs.task import say
from tests.scripted import ScriptedPolicy

TASKSET = """
    import asyncio
    import verifiers.v1 as vf

    class Data(vf.TaskData):
        answer: int

    class Sum(vf.Task[Data]):
        @vf.reward(weight=2.0)
        async def right(self, trace) -> float:
            if trace.last_reply == "break":
                raise ValueError("on purpose")
            if trace.last_reply == "sleep":
                await asyncio.sleep(9)
            return float(trace.last_reply == str(self.data.answer))

        @vf.reward
        async def brief(self, task, trace) -> dict[str, float]:
            assert trace.num_turns == 1 and trace.task.data.answer == task.answer
            return {"short": float(0 < len(trace.last_reply) < 5)}

        @vf.metric
        async def length(self, trace) -> float:
            return float(sum(len(message.content) for message in trace.messages))

    class Config(vf.TasksetConfig):
        count: int = 50

    class Sums(vf.Taskset[Sum, Config]):
        def load(self):
            for i in range(self.config.count):
                prompt = f"What is {i} + 1?"
                if i % 2:
                    prompt = [vf.UserMessage(content="Hi"), vf.AssistantMessage(content="Yes?"),
                              vf.UserMessage(content=prompt)]
                data = Data(prompt=prompt, answer=i + 1, system_prompt="Be brief.",
                            timeout=vf.TaskTimeout(scoring=0.5))
                yield Sum(data, self.config.task)

    __all__ = ["Sums"]
"""


@pytest.fixture(scope="module")
def modules(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A directory whose modules can be imported; needs the package."""
    pytest.importorskip("verifiers.v1", reason="pip install 'aprium[verifiers]'")
    path = tmp_path_factory.mktemp("tasksets")
    (path / "sums.py").write_text(textwrap.dedent(TASKSET))
    sys.path.insert(0, str(path))
    yield path
    sys.path.remove(str(path))


def graded(family: Any, task: Any, text: str) -> Step:
    return asyncio.run(replay(family.start(task), [say(text)]))


def test_a_taskset_is_a_family(modules: Path) -> None:
    family = make("verifiers", {"taskset": "sums", "options": [["count", 30]]})
    tasks = distinct(family, 20)
    assert len({task.key for task in tasks}) == 20 and {t.domain for t in tasks} == {"verifiers"}
    assert all(task.messages[0] == say("Be brief.", role="system") for task in tasks)
    assert {len(task.messages) for task in tasks} == {2, 4}
    task = take(family, 3)
    assert task == take(family, 3)
    answer = str(task.data["index"] + 1)
    shown = sum(len(m.content or "") for m in task.messages)
    found = graded(family, task, answer)
    assert found.done and found.reward == 3.0
    assert found.parts == {"right": 2.0, "short": 1.0, "length": shown + len(answer)}
    assert graded(family, task, "wrong answer").reward == 0.0
    assert all(graded(family, task, t[0].content or "").reward == 0 for t in family.wrong(task))


@pytest.mark.parametrize(("text", "words"), [("break", "on purpose"), ("sleep", "not scored in")])
def test_a_reward_that_fails_is_a_trajectory(
    modules: Path, chat: Any, text: str, words: str
) -> None:
    family = make("verifiers", {"taskset": "sums"})
    policy = ScriptedPolicy(chat, ["</think>" + text])
    found = asyncio.run(run_episode(family.start(take(family, 0)), policy, chat))
    assert found.stop == "error" and words in (found.error or "") and found.reward == 0.0


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("class Sum(vf.Task[Data]):", "class Sum(vf.Task[Data]):\n    NEEDS_CONTAINER = True"),
         "needs a container"),
        (("async def length(self, trace)", "async def length(self, trace, runtime)"),
         "its metric length needs a runtime"),
        (("@vf.metric", "async def setup(self, trace, runtime): pass\n    @vf.metric"),
         "prepares a runtime"),
        (("if i % 2:", "prompt = None\n            if False:"), "no prompt"),
        (("for i in range(self.config.count):", "for i in ():"), "has no tasks"),
        (("yield Sum(", "raise KeyError(1); yield Sum("), "cannot be loaded"),
        (('__all__ = ["Sums"]', "__all__ = []"), "exports no Taskset"),
    ],
)  # fmt: skip
def test_what_cannot_be_played(modules: Path, change: tuple[str, str], words: str) -> None:
    name = f"changed_{abs(hash(change))}"
    text = textwrap.dedent(TASKSET)
    assert change[0] in text
    (modules / f"{name}.py").write_text(text.replace(*change))
    with pytest.raises(TaskError, match=words):
        make("verifiers", {"taskset": name})


def test_parameters_that_cannot_be(modules: Path) -> None:
    with pytest.raises(TaskError, match="taskset 'nothing_here' not found"):
        make("verifiers", {"taskset": "nothing_here"})
    with pytest.raises(TaskError, match="cannot be loaded"):
        make("verifiers", {"taskset": "sums", "options": [["cuont", 3]]})
    with pytest.raises(TaskError, match="limit is 0"):
        make("verifiers", {"taskset": "sums", "limit": 0})
    assert len(make("verifiers", {"taskset": "sums", "limit": 3})._tasks()) == 3


def test_a_missing_package_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "verifiers.v1", None)
    verifiers._load.cache_clear()
    with pytest.raises(TaskError, match=r"verifiers.v1 is not installed .*aprium\[verifiers\]"):
        make("verifiers", {"taskset": "sums"})
    with pytest.raises(ConfigError, match=r"missing key verifiers\.taskset"):
        make("verifiers")
