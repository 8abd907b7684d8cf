"""What tests of the loop play: short exercises of pico, in very small runs."""

from pathlib import Path
from typing import Any

import pytest

from aprium.base.config import from_dict
from aprium.rl.loop import RlConfig

RECIPE: dict[str, Any] = {
    "domains": [
        {"name": "add", "family": "exercises", "options": {"families": ["add"]}, "max_tokens": 32},
        {
            "name": "next",
            "family": "exercises",
            "options": {"families": ["next"]},
            "thinking": False,
            "weight": 0.5,
        },
    ],
    "trainer": {"steps": 4, "log_every": 1, "checkpoint_every": 2, "threads": 1},
    "pipeline": {"groups_per_step": 3},
    "rollout": {"group_size": 4, "max_tokens": 12, "episode_tokens": 120},
    "optim": {"lr": 1e-4, "warmup_steps": 0},
    "loss": {"mtp_weight": 0.0, "balance_weight": 0.0, "bias_rate": 0.0},
    "evaluate": {"items": 3, "constants": 0, "max_tokens": 12, "episode_tokens": 120},
}


def recipe(output: Path, **changes: Any) -> RlConfig:
    """Return the recipe with other tables: `trainer={"steps": 2}` changes that key alone."""
    merged: dict[str, Any] = {"output": str(output), **RECIPE}
    for key, value in changes.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = merged[key] | value if both else value
    return from_dict(RlConfig, merged)


@pytest.fixture
def no_page(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw no curves, which takes longer than the steps of these runs."""
    monkeypatch.setattr("aprium.train.trainer.write_page", lambda *rest: None)


@pytest.fixture
def config(tmp_path: Path) -> RlConfig:
    return recipe(tmp_path / "out")
