"""Where figures of a run go besides its own files: TensorBoard and Weights & Biases, by choice."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from aprium.base.errors import ConfigError

Sink = Callable[[int, Mapping[str, float]], None]


def open_sinks(names: tuple[str, ...], output: Path, recipe: Mapping[str, Any]) -> list[Sink]:
    """Return a function (step, figures by name) for each of `names`.

    "tensorboard" writes event files under `output`/tensorboard; "wandb" logs a run named after
    `output`, by that package's own settings. Raises ConfigError for what is not installed.
    """
    return [_open(name, output, recipe) for name in names]


def _open(name: str, output: Path, recipe: Mapping[str, Any]) -> Sink:
    try:
        if name == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter

            writer = SummaryWriter(str(output / "tensorboard"))

            def write(step: int, figures: Mapping[str, float]) -> None:
                for key, value in figures.items():
                    writer.add_scalar(key, value, step)
                writer.flush()

            return write
        if name == "wandb":
            import wandb  # type: ignore[import-not-found]

            run = wandb.init(dir=str(output), name=output.name, config=dict(recipe))
            return lambda step, figures: run.log(dict(figures), step=step)
    except ImportError as error:
        raise ConfigError(
            f"trainer.sinks names {name!r}, which is not installed: pip install {name}"
        ) from error
    raise ConfigError(f"trainer.sinks names {name!r}: use tensorboard or wandb")


def flatten(figures: Mapping[str, Any], prefix: str) -> dict[str, float]:
    """Return nested figures as `prefix/name/inner`: number."""
    found: dict[str, float] = {}
    for key, value in figures.items():
        if isinstance(value, Mapping):
            found |= flatten(value, f"{prefix}/{key}")
        else:
            found[f"{prefix}/{key}"] = float(value)
    return found
