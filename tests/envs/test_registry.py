"""Every environment grades its solutions 1 and known-wrong answers 0, and splits do not leak."""

import json
import os
import subprocess
import sys

import pytest

from aprium.base.errors import ConfigError, TaskError
from aprium.base.records import ToolCall
from aprium.cli import main
from aprium.envs import sandbox
from aprium.envs.family import constant_baseline, distinct, optional, take, validate
from aprium.envs.registry import ENVIRONMENTS, make

ISOLATED = {"reasoning", "mathematics", "coding"}  # modules whose graders need a sandbox
OWN = [n for n, e in ENVIRONMENTS.items() if not e.needs]  # the others need what is elsewhere
CHEAP = [n for n, e in ENVIRONMENTS.items() if e.family.__module__.split(".")[-1] not in ISOLATED]
needs_isolation = pytest.mark.skipif(
    sandbox.why_not() is not None, reason=sandbox.why_not() or "isolated"
)


def names(count: int) -> list:
    """All environments: with more tasks where grading is cheap."""
    return [
        pytest.param(
            name, count if name in CHEAP else 4, marks=() if name in CHEAP else needs_isolation
        )
        for name in OWN
    ]


@pytest.mark.parametrize(("name", "count"), names(60))
def test_known_answers_are_graded_as_known(name: str, count: int) -> None:
    found = validate(make(name), count=count, seed=1)
    assert found.ok, found
    assert found.tasks == count and found.wrong_tried >= count


@pytest.mark.parametrize(("name", "count"), names(0))
def test_tasks_are_plain_and_repeatable(name: str, count: int) -> None:
    family = make(name)
    task = take(family, 3, seed=5)
    assert task == take(make(name), 3, seed=5) and task.domain == name
    assert json.loads(json.dumps(dict(task.data))) == dict(task.data)
    json.dumps(task.tools)
    assert task.messages[-1].content and task.id.startswith(f"{name}/")
    for turn in task.solution:
        assert all(isinstance(call, ToolCall) for call in turn.tool_calls)


@pytest.mark.parametrize("name", ["math", "choice", "instructions", "tool-use", "exercises"])
def test_sides_of_the_split_share_nothing(name: str) -> None:
    family = make(name)
    trained = {take(family, i, seed=s).key for s in (0, 1) for i in range(60)}
    tested = {take(family, i, seed=s, held_out=True).key for s in (0, 1) for i in range(30)}
    assert trained and tested and not trained & tested


def test_an_item_is_on_the_same_side_everywhere() -> None:
    easy = {task.key: task.held_out for task in distinct(make("math"), 200)}
    hard = distinct(make("math-hard", {"size": 12}), 200)
    shared = [task for task in hard if task.key in easy]
    assert shared and all(task.held_out == easy[task.key] for task in shared)


def test_tasks_are_the_same_in_another_process() -> None:
    program = (
        "from aprium.envs.registry import make\nfrom aprium.envs.family import take\n"
        "print([take(make(n), 7).id for n in ('tool-use', 'choice', 'long-context')])"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "77"}
    made = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    )
    here = [take(make(n), 7).id for n in ("tool-use", "choice", "long-context")]
    assert made.stdout.strip() == str(here)


def test_distinct_tasks_and_empty_sides() -> None:
    tasks = distinct(make("choice"), 50)
    assert len({task.key for task in tasks}) == 50
    narrow = make("exercises", {"families": ["first"], "words": list("abcdefghij")})
    with pytest.raises(TaskError, match=r"has only some|held out"):
        distinct(narrow, 50, held_out=True)


def test_baseline_of_constant_answers() -> None:
    answer, score = constant_baseline(make("choice"), count=200, seed=2)
    assert answer in {f"Answer: {c}" for c in "ABCD"} | set("ABCD") and 0.2 < score < 0.4
    declined, score = constant_baseline(make("abstention"), count=100)
    assert declined == "Answer: I do not know" and 0.3 < score < 0.7
    assert constant_baseline(make("structured"), count=10)[1] == 0.0


@pytest.mark.parametrize(
    ("name", "parameters", "error", "words"),
    [
        ("nothing", {}, TaskError, "no environment 'nothing'"),
        ("math", {"sise": 3}, ConfigError, "unknown key math.sise"),
        ("math", {"size": "big"}, ConfigError, "must be of type int"),
        ("math", {"kinds": ["poetry"]}, TaskError, "no kind of problem 'poetry'"),
        ("math", {"size": 1}, TaskError, "size is 1"),
        ("code", {"least": 5, "most": 2}, TaskError, "least 5 and most 2"),
        ("instructions", {"kinds": ["x"]}, TaskError, "no constraint 'x'"),
        ("instructions", {"most": 0}, TaskError, "most is 0"),
        ("tool-use", {"kinds": ["x"]}, TaskError, "no errand 'x'"),
        ("tool-use", {"failures": -1}, TaskError, "failures is -1"),
        ("structured", {"formats": ["xml"]}, TaskError, "no format 'xml'"),
        ("choice", {"options": 1}, TaskError, "options is 1"),
        ("long-context", {"words": 5}, TaskError, "words is 5"),
        ("abstention", {"people": 99}, TaskError, "people is 99"),
        ("abstention", {"penalty": 2.0}, TaskError, "penalty is 2"),
        ("judging", {"digits": 0}, TaskError, "digits is 0"),
        ("exercises", {"families": ["x"]}, TaskError, "no family of exercises 'x'"),
        ("exercises", {"words": ["a"]}, TaskError, "1 words are too few"),
    ],
)
def test_bad_parameters_are_refused(name: str, parameters, error, words: str) -> None:
    with pytest.raises(error, match=words):
        make(name, parameters)


def test_a_missing_package_is_named_with_its_extra() -> None:
    with pytest.raises(TaskError, match=r"no_such_thing is not installed .*aprium\[envs\]"):
        optional("no_such_thing")


def test_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["env", "list"]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in ENVIRONMENTS) and "size = 99" in listed
    assert "rows must be given, url" in listed
    assert main(["env", "list", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert listed["math-hard"]["parameters"] == {"size": 99} and listed["math"]["needs"] == []
    assert listed["nemo-gym"]["needs"] == ["rows"]
    assert main(["env", "show", "tool-use", "--count", "2", "--held-out"]) == 0
    assert "tools: " in capsys.readouterr().out
    assert main(["env", "show", "choice", "--json", "--set", "options=3"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert len(shown["data"]["options"]) == 3 and shown["id"].startswith("choice/")
    assert main(["env", "validate", "choice", "--baseline", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["tasks"] == 16 and report["gold_failed"] == [] and report["baseline"]["answer"]
    assert main(["env", "validate", "abstention"]) == 0
    assert "16 of 16 solutions get 1" in capsys.readouterr().out
    assert main(["env", "rows", "choice", "-n", "5", "--held-out", "--set", "options=3"]) == 0
    written = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len({row["task"]["key"] for row in written}) == 5
    assert all(row["agent_ref"]["name"] == "choice" for row in written)
    assert all(len(row["task"]["data"]["options"]) == 3 for row in written)
    # A reward for needless refusals is a reward for a wrong answer only if refusing is wrong.
    assert main(["env", "validate", "abstention", "--set", "unanswerable=x"]) != 0
    assert main(["env", "show", "nothing"]) != 0
    assert "no environment 'nothing'" in capsys.readouterr().err
