"""The smallest cut of the experiment on pico, as a user runs it: every stage does its part."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

RECIPE = Path(__file__).parents[2] / "recipes" / "mopd-pico-ci.toml"


@pytest.mark.timeout(1500)
def test_specialists_are_distilled_into_one_student(tmp_path: Path) -> None:
    output = tmp_path / "run"
    command = [sys.executable, "-m", "aprium.cli", "mopd", str(RECIPE), "--set", f"output={output}"]
    command += ["--jobs", "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads((output / "rounds.json").read_text())
    scores = {
        name: {domain: one["mean"] for domain, one in row.items()}
        for name, row in found["scores"].items()
    }
    mean = {name: sum(row.values()) / len(row) for name, row in scores.items() if len(row) == 2}
    taught = {
        name.split("-")[1]: row for name, row in scores.items() if name.startswith("teacher-")
    }
    assert len(taught) == 2
    teachers = sum(row[domain] for domain, row in taught.items()) / 2
    # Wide margins: one seed, few steps and 100 tasks a domain.
    assert mean["start"] < 0.1 < mean["student"] < 0.9
    assert teachers > mean["rlvr"] + 0.15
    assert mean["mopd1"] > mean["rlvr"] + 0.05
    assert mean["mopd2"] > mean["rlvr"] + 0.1
    assert found["recovery"]["mopd2"]["all"]["value"] > 0.3
    page = (output / "report.html").read_text()
    assert "Recovery" in page and "teacher2-swap" in page
    # Finished nodes are not run again.
    again = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert again.returncode == 0 and " begins" not in again.stderr
    assert json.loads((output / "rounds.json").read_text()) == found
