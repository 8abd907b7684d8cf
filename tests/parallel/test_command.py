"""`torchrun` and the command line: a recipe trained by two processes, exported as by one."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from aprium.checkpoint.load import load_checkpoint
from aprium.model.model import HybridModel
from tests.train.test_pretrain import write_recipe
from tests.train.test_sft import write_recipe as write_sft_recipe

SETTINGS = ("trainer.threads=1", "optim.lr=1e-4", "optim.muon_lr=1e-4")


def test_torchrun_trains_and_exports_what_one_process_does(tmp_path: Path) -> None:
    command = _command(write_recipe(tmp_path))
    _run([*command, "--set", f"output={tmp_path}/one"])
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    lines = _run([*launcher, *command, "--set", "parallel.ep=2"])
    assert lines.count("step 2/2") == 1
    one, two = (_read(tmp_path / name / "model") for name in ("one", "out"))
    for (name, a), b in zip(one.named_parameters(), two.named_parameters(), strict=True):
        torch.testing.assert_close(a, b[1], rtol=1e-2, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
    assert _metrics(tmp_path / "one") == _metrics(tmp_path / "out")


@pytest.mark.slow
def test_torchrun_fine_tunes_what_one_process_does(tmp_path: Path) -> None:
    recipe = write_sft_recipe(tmp_path)
    command = ["-m", "aprium.cli", "sft", "--recipe", str(recipe), "--set", "optim.lr=1e-4"]
    _run([*command, "--set", f"output={tmp_path}/one"])
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    _run([*launcher, *command, "--set", "parallel.tp=2"])
    one, two = (json.loads((tmp_path / n / "heldout.json").read_text()) for n in ("one", "out"))
    for side in ("before", "after"):
        assert math.isclose(one[side]["loss"], two[side]["loss"], rel_tol=1e-4)
    assert two["after"]["loss"] < two["before"]["loss"]
    for name, a in _read(tmp_path / "one/model").named_parameters():
        b = _read(tmp_path / "out/model").get_parameter(name)
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


def test_mesh_that_does_not_fit_is_one_line(tmp_path: Path) -> None:
    command = [*_command(write_recipe(tmp_path)), "--set", "parallel.tp=2"]
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    assert "torchrun --nproc-per-node" in done.stderr and "Traceback" not in done.stderr


def _command(recipe: Path) -> list[str]:
    settings = [part for setting in SETTINGS for part in ("--set", setting)]
    return ["-m", "aprium.cli", "pretrain", "--recipe", str(recipe), *settings]


def _run(arguments: list[str]) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        timeout=200,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    return done.stderr


def _read(directory: Path) -> HybridModel:
    model = load_checkpoint(directory).model
    assert isinstance(model, HybridModel)
    return model


def _metrics(output: Path) -> list[tuple[float, ...]]:
    lines = (output / "metrics.jsonl").read_text().splitlines()
    found = [json.loads(line) for line in lines]
    return [(f["step"], round(f["loss"], 3)) for f in found]
