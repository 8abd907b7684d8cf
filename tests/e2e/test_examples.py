"""The programs in examples/ run as they stand, on the bundled model or the toy shape."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("name", "shows"),
    [
        ("chat", "answer:"),
        ("lora", "after: Blue plums"),
        ("mopd", "student      add"),
        ("plan", "cheapest"),
        ("quantise", "perplexity"),
        ("rollouts", "rewards [1.0"),
        ("serve", "\n"),
        ("sessions", "came from disk"),
        ("train", "held-out loss"),
    ],
)
def test_example(name: str, shows: str, tmp_path: Path) -> None:
    arguments = [str(tmp_path)] if name in ("train", "quantise", "lora", "mopd") else []
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / f"{name}.py"), *arguments],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    assert shows in done.stdout


def test_examples_are_short() -> None:
    for file in (ROOT / "examples").glob("*.py"):
        assert len(file.read_text().splitlines()) <= 80, file.name
