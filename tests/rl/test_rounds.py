"""Runs of rounds: in order, once, gone on with after failures, stops and kills; and their page."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from aprium.base.errors import CheckpointError, ConfigError, EngineError, TaskError
from aprium.cli import main
from aprium.rl import rounds
from aprium.rl.lineage import RoundsConfig, read_state
from aprium.rl.rounds import Job, jobs_of, run_config
from aprium.rl.stages import Made, Stage
from tests.rl.test_lineage import TOY, recipe

MERGES: dict[str, Any] = {
    "a": {"kind": "merge", "members": ["pico", "pico"]},
    "b": {"kind": "merge", "members": ["a", "pico"], "weights": [3, 1]},
    "c": {"kind": "merge", "members": ["a", "pico"]},
    "d": {"kind": "merge", "members": ["b", "c"]},
}
QUIET = {"items": 2, "max_tokens": 8, "episode_tokens": 128}


def merges(output: Path, nodes: dict[str, Any] | None = None, **more: Any) -> RoundsConfig:
    values = nodes or {name: {**node, "evaluate": False} for name, node in MERGES.items()}
    return recipe(values, output=str(output), evaluate=QUIET, **more)


class Stages:
    """Stands for `run_stage`, and notes what was run; what is in `broken` fails, "stop" stops."""

    def __init__(self, broken: dict[str, str] | None = None) -> None:
        self.ran: list[tuple[str, int]] = []
        self.broken = broken or {}

    def __call__(self, stage: Stage) -> Made | None:
        self.ran.append((stage.name, stage.seed))
        how = self.broken.get(stage.name)
        if how == "stop":
            return None
        if how is not None:
            raise TaskError(how)
        return Made(checkpoint=Path("pico"))


@pytest.fixture
def stages(monkeypatch: pytest.MonkeyPatch) -> Stages:
    found = Stages()
    monkeypatch.setattr(rounds, "run_stage", found)
    return found


def test_every_node_is_run_once_after_those_it_needs(tmp_path: Path, stages: Stages) -> None:
    nodes = {name: {**node, "evaluate": False} for name, node in MERGES.items()}
    nodes["a"]["once"] = True
    config = merges(tmp_path, nodes, seeds=[5, 6])
    assert jobs_of(config) == [
        Job("a", 5), Job("b", 5), Job("c", 5), Job("d", 5), Job("b", 6), Job("c", 6), Job("d", 6)
    ]  # fmt: skip
    assert run_config(config) is not None
    assert stages.ran == [tuple(job) for job in jobs_of(config)]
    assert run_config(config) is not None and len(stages.ran) == 7
    states = [read_state(config.place("d", seed)) for seed in (5, 6)]
    assert all(state is not None and state.status == "done" for state in states)
    first, second = states
    assert first is not None and second is not None and first.run != second.run
    shared = read_state(config.place("a", 5))
    b = read_state(config.place("b", 6))
    assert shared is not None and b is not None and b.parents == {"a": shared.run}


def test_only_what_a_node_needs_is_run_until_it(tmp_path: Path, stages: Stages) -> None:
    config = merges(tmp_path)
    run_config(config, until="b")
    assert [name for name, _ in stages.ran] == ["a", "b"]
    run_config(config)
    assert [name for name, _ in stages.ran] == ["a", "b", "c", "d"]
    with pytest.raises(ConfigError, match="no node 'e'"):
        run_config(config, until="e")
    with pytest.raises(ConfigError, match="jobs is 0"):
        run_config(config, jobs=0)


def test_a_failure_is_named_and_gone_on_from(tmp_path: Path, stages: Stages) -> None:
    stages.broken = {"c": "there is no plum"}
    config = merges(tmp_path)
    with pytest.raises(TaskError, match="node 'c' of seed 0: there is no plum"):
        run_config(config)
    state = read_state(config.place("c", 0))
    assert state is not None and (state.status, state.error) == (
        "failed", "TaskError: there is no plum"
    )  # fmt: skip
    stages.broken, stages.ran = {}, []
    assert run_config(config) is not None
    assert [name for name, _ in stages.ran] == ["c", "d"]


def test_a_stop_is_gone_on_from(tmp_path: Path, stages: Stages) -> None:
    stages.broken = {"b": "stop"}
    config = merges(tmp_path)
    assert run_config(config) is None
    state = read_state(config.place("b", 0))
    assert state is not None and state.status == "begun"
    stages.broken, begun = {}, state.run
    assert run_config(config) is not None
    state = read_state(config.place("b", 0))
    assert state is not None and state.run == begun  # it is the same run of the node


def test_processes_side_by_side_make_the_same_and_say_what_failed(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    good = {name: {**MERGES["a"], "weights": w} for name, w in (("a", [1, 3]), ("b", [2, 1]))}
    bad = {"kind": "merge", "members": ["a", "b", str(tmp_path / "empty")]}
    nodes = {n: {**node, "evaluate": False} for n, node in {**good, "bad": bad}.items()}
    one, two = merges(tmp_path / "one", nodes), merges(tmp_path / "two", nodes)
    for config, jobs in ((one, 1), (two, 2)):
        with pytest.raises(CheckpointError, match=r"node .bad. of seed 0: .*empty"):
            run_config(config, jobs=jobs)
        state = read_state(config.place("bad", 0))
        assert state is not None and state.status == "failed"
    for name in good:
        assert same_weights(one.place(name, 0) / "model", two.place(name, 0) / "model")


def test_errors_are_what_they_were() -> None:
    assert isinstance(rounds._error("TaskError", "x"), TaskError)
    assert isinstance(rounds._error("SessionError", "x"), EngineError)
    assert isinstance(rounds._error("NoSuchError", "x"), EngineError)


def test_nodes_and_start_are_evaluated_and_shown(tmp_path: Path) -> None:
    nodes = {"a": MERGES["a"], "b": {**MERGES["b"], "evaluate": False}}
    config = merges(tmp_path, nodes)
    found = run_config(config)
    assert found is not None and set(found["scores"]) == {"start", "a"}
    assert found["scores"]["a"] == found["scores"]["start"]  # a is pico's mean with itself
    assert json.loads((tmp_path / "rounds.json").read_text()) == found
    page = (tmp_path / "report.html").read_text()
    assert not re.search(r"(src|href)=['\"]?(https?:)?//", page)  # it needs nothing else
    for text in ("<svg", "id='b'", "merge, done", "Held-out accuracy", "pico", "&plusmn;"):
        assert text in page
    # With other tasks, nodes stay as they are and are evaluated again.
    other = merges(tmp_path, nodes | {"a": MERGES["a"]}, domains=[
        {"name": "next", "family": "exercises", "options": {"families": ["next"]}}
    ])  # fmt: skip
    again = run_config(other)
    assert again is not None and set(again["scores"]["a"]) == {"next"}


def test_the_command_shows_the_graph_and_runs_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ["--set", f"output={tmp_path / 'out'}", "--seeds", "1,2"]
    assert main(["mopd", str(TOY), "--show", *settings]) == 0
    said = capsys.readouterr().out
    assert "mopd2" in said and "all, 2 seeds" in said and "0 of 2" in said
    assert main(["mopd", str(TOY), "--show", "--until", "rlvr", *settings]) == 0
    assert "mopd2" not in capsys.readouterr().out
    assert main(["mopd", str(TOY), "--seeds", "one", "--show"]) == 2
    assert "write whole numbers" in capsys.readouterr().err
    assert main(["mopd", str(TOY), "--until", "nothing", *settings]) == 1
    assert "no node 'nothing'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def same_weights(one: Path, two: Path) -> bool:
    first, second = (load_file(path / "model.safetensors") for path in (one, two))
    same = (bool((first[key] == second[key]).all()) for key in first)
    return first.keys() == second.keys() and all(same)


KILLED = """
checkpoint = "pico"
domains = [{{ name = "add", family = "exercises", options = {{ families = ["add"] }} }}]
output = "{output}"
evaluate = {{ items = 4, max_tokens = 32, episode_tokens = 96 }}
rollout = {{ group_size = 2, max_tokens = 32, episode_tokens = 96 }}
support = {{ rollouts = 2 }}

[base]
rl = {{ trainer = {trainer}, pipeline = {{ groups_per_step = 2 }}, optim = {{ lr = 1e-3 }} }}
mopd = {{ trainer = {trainer}, pipeline = {{ groups_per_step = 2 }}, optim = {{ lr = 1e-3 }} }}
sft = {{ trainer = {trainer}, tokens_per_step = 96 }}

[nodes]
adder = {{ kind = "rl", evaluate = false }}
copy = {{ kind = "sft", teachers = {{ add = "adder" }}, rollouts = 4, evaluate = false }}
mopd1 = {{ kind = "mopd", parent = "copy", teachers = {{ add = "adder" }} }}
"""


def command(folder: Path) -> list[str]:
    trainer = "{ steps = 4, log_every = 1, checkpoint_every = 2, threads = 1 }"
    folder.mkdir(exist_ok=True)
    recipe_file = folder / "recipe.toml"
    recipe_file.write_text(KILLED.format(output=folder / "out", trainer=trainer))
    return [sys.executable, "-m", "aprium.cli", "mopd", str(recipe_file)]


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_a_run_that_is_killed_ends_as_if_it_had_not_been(tmp_path: Path) -> None:
    """For real, killed in the middle of each of three kinds of nodes."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    subprocess.run(command(whole), check=True)
    for name in ("adder", "copy", "mopd1"):
        process = subprocess.Popen(command(killed), start_new_session=True)
        file = killed / "out/seed-0" / name / "metrics.jsonl"
        while not file.exists() and process.poll() is None:
            time.sleep(0.02)
        assert process.poll() is None, "it was to be killed while it ran"
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        state = read_state(killed / "out/seed-0" / name)
        assert state is not None and state.status == "begun"
    states = {file: file.read_text() for file in killed.glob("out/seed-0/*/node.json")}
    before = {file: text for file, text in states.items() if '"status": "done"' in text}
    assert len(before) == 2
    subprocess.run(command(killed), check=True)
    assert all(file.read_text() == text for file, text in before.items())
    for name in ("adder", "copy", "mopd1"):
        one, two = (root / "out/seed-0" / name / "model" for root in (whole, killed))
        assert same_weights(one, two), name
    first, second = (root / "out/rounds.json" for root in (whole, killed))
    assert json.loads(first.read_text()) == json.loads(second.read_text())
