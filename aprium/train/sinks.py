"""Where figures of a run go besides its own files: TensorBoard and Weights & Biases, by choice."""

import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from aprium.base.errors import ConfigError

Sink = Callable[[int, Mapping[str, float]], None]


def open_sinks(
    names: tuple[str, ...], output: Path, recipe: Mapping[str, Any], step: int = 0
) -> list[Sink]:
    """Return a function (step, figures by name) for each of `names`.

    "tensorboard" writes event files under `output`/tensorboard, in which what an earlier run said
    of steps after `step` is no longer shown; "wandb" logs a run named after `output`, the same one
    when continued, with "step" as the axis, by that package's own settings. Raises ConfigError for
    what is not installed, or does not start.
    """
    return [_open(name, output, recipe, step) for name in names]


def _open(name: str, output: Path, recipe: Mapping[str, Any], step: int) -> Sink:
    try:
        if name == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter

            return _tensorboard(SummaryWriter(str(output / name), purge_step=step + 1))
        if name == "wandb":
            import wandb  # type: ignore[import-not-found]

            return _wandb(wandb, output, recipe)
    except ImportError as error:
        raise ConfigError(
            f"trainer.sinks names {name!r}, which is not installed: pip install {name}"
        ) from error
    raise ConfigError(f"trainer.sinks names {name!r}: use tensorboard or wandb")


def _tensorboard(writer: Any) -> Sink:
    def write(step: int, figures: Mapping[str, float]) -> None:
        for key, value in figures.items():
            writer.add_scalar(key, value, step)
        writer.flush()

    return write


def _wandb(wandb: Any, output: Path, recipe: Mapping[str, Any]) -> Sink:
    # A step may come twice, after a rollback, and W&B's own counter never goes back.
    file = output / "wandb-run"
    identity = file.read_text(encoding="utf-8") if file.exists() else uuid.uuid4().hex[:8]
    file.write_text(identity, encoding="utf-8")
    try:
        run = wandb.init(
            dir=str(output), name=output.name, config=dict(recipe), id=identity, resume="allow"
        )
    except wandb.Error as error:  # no login, no connection, settings that it does not know
        raise ConfigError(
            f"trainer.sinks names 'wandb', which does not start ({error}): log in with wandb "
            "login, set WANDB_MODE=offline, or leave it out"
        ) from error
    run.define_metric("*", step_metric="step")
    return lambda step, figures: run.log({"step": step, **figures})


def flatten(figures: Mapping[str, Any], prefix: str) -> dict[str, float]:
    """Return nested figures as `prefix/name/inner`: number."""
    found: dict[str, float] = {}
    for key, value in figures.items():
        if isinstance(value, Mapping):
            found |= flatten(value, f"{prefix}/{key}")
        else:
            found[f"{prefix}/{key}"] = float(value)
    return found
