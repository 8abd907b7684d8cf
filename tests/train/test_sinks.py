"""Where figures go: what a continued run says replaces what was said of the same steps."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from aprium.base.errors import ConfigError
from aprium.train.sinks import open_sinks


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tensorboard_shows_a_step_once_after_going_back(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (first,) = open_sinks(("tensorboard",), tmp_path, {})
    for step in (1, 2, 3):
        first(step, {"train/loss": 10.0 * step})
    (second,) = open_sinks(("tensorboard",), tmp_path, {}, 1)
    for step in (2, 3):
        second(step, {"train/loss": 1.0 * step})
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    shown = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert shown == [(1, 10.0), (2, 2.0), (3, 3.0)]


def test_a_login_that_is_missing_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Error(Exception):
        pass

    class UsageError(Error):
        pass

    def init(**options: object) -> None:
        raise UsageError("api_key not configured (no-tty)")

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init, Error=Error))
    with pytest.raises(ConfigError, match=r"api_key not configured .* wandb login"):
        open_sinks(("wandb",), tmp_path, {})


def test_unknown_sink_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="mlflow"):
        open_sinks(("mlflow",), tmp_path, {})
