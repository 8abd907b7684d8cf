"""Average checkpoints of one run, so that a constant learning rate ends as if it had decayed.

Averaging the last k + 1 checkpoints weighs the updates between them: the one that ends interval j
counts as much as the weights of the checkpoints after it, summed. So any decay of the rate has
weights that emulate it: "minus-sqrt" those of 1 - sqrt(p), "uniform" those of 1 - p, a plain mean.
Checkpoints are exported directories, or `step-N` of a run, which are written in the layout of an
exported one. Tensors go through memory one at a time. Source: arXiv 2507.17634 (decay by merging).
"""

import itertools
import json
import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from aprium.base.errors import ApriumError, CheckpointError, ConfigError
from aprium.checkpoint.hub import resolve
from aprium.checkpoint.load import Plan, read_plan
from aprium.checkpoint.names import parameter_of
from aprium.checkpoint.safetensors import (
    DTYPES,
    Entry,
    MappedFiles,
    StoredTensor,
    read_directory,
    write_directory,
)
from aprium.checkpoint.save import DEFAULT_SHARD_BYTES, assembled, write_texts
from aprium.train import checkpoint

Decay = Literal["minus-sqrt", "uniform"]
_DECAYS: dict[str, Callable[[float], float]] = {
    "minus-sqrt": lambda p: 1 - math.sqrt(p),
    "uniform": lambda p: 1 - p,
}
_AVERAGED = ("BF16", "F16", "F32", "F64")


def decay_weights(count: int, decay: Decay) -> list[float]:
    """Return the weights of `count` checkpoints, oldest first; they add up to 1.

    The sum of those from number j on is what the decay leaves of the rate at j / count.
    """
    factors = [1.0, *(_DECAYS[decay](j / count) for j in range(1, count)), 0.0]
    return [before - after for before, after in itertools.pairwise(factors)]


def merge(
    directories: Sequence[Path],
    output: Path,
    *,
    window: int | None = None,
    decay: Decay = "minus-sqrt",
    weights: Sequence[float] | None = None,
    like: str | Path | None = None,
) -> list[tuple[Path, float]]:
    """Write the average of the newest `window` checkpoints (None: of all) to `output`.

    `directories` are checkpoints, oldest first, or runs, which stand for their `step-N`. `weights`,
    one each, stand in the place of those of `decay`; they are divided by their sum. `like` is
    the exported checkpoint whose layout, dtypes and texts the result has: by default the first one
    that is exported itself, or the one the run started from or wrote. Returns what was averaged
    with which weight. Raises CheckpointError for checkpoints that are not of one model.
    """
    found = [path for directory in directories for path in _checkpoints(directory)]
    if window is not None and window > len(found):
        raise CheckpointError(f"the window is {window} and there are {len(found)} checkpoints")
    found = found[-window:] if window is not None else found
    if len(found) < 2:
        raise CheckpointError(f"{len(found)} checkpoint to average: give two or more")
    plan = read_plan(resolve(like) if like is not None else _find_like(found))
    members = [_read(path, plan) for path in found]
    shares = decay_weights(len(found), decay) if weights is None else _shares(weights, len(found))
    entries = [Entry(t.name, t.dtype, t.shape) for t in plan.tensors.values()]
    for entry in entries:
        if entry.dtype not in _AVERAGED:
            raise CheckpointError(
                f"tensor {entry.name!r} is {entry.dtype}: quantised checkpoints cannot be "
                "averaged; merge the BF16 ones and quantise the result"
            )
    by_name = {entry.name: entry for entry in entries}

    def fetch(name: str) -> Tensor:
        entry = by_name[name]
        total = torch.zeros(entry.shape, dtype=torch.float64)
        for member, weight in zip(members, shares, strict=True):
            total.add_(member(name).reshape(entry.shape).double(), alpha=weight)
        return total.to(DTYPES[entry.dtype])

    try:
        with assembled(output) as complete:
            write_texts(plan.path, complete, plan.quant, plan.config)
            write_directory(complete, entries, fetch, DEFAULT_SHARD_BYTES)
    except (OSError, shutil.Error) as error:
        raise CheckpointError(f"cannot write {output}: {error}") from error
    return list(zip(found, shares, strict=True))


def _shares(weights: Sequence[float], count: int) -> list[float]:
    if len(weights) != count or sum(weights) == 0:
        raise ConfigError(
            f"weights is {list(weights)} and there are {count} checkpoints: give one each, not all "
            "of them 0"
        )
    return [weight / sum(weights) for weight in weights]


def _checkpoints(directory: Path) -> list[Path]:
    """Return `directory`, or the checkpoints of the run that it is, oldest first."""
    if (directory / "config.json").exists() or directory.name.startswith("step-"):
        return [directory]
    steps = checkpoint.complete(directory)
    if not steps:
        raise CheckpointError(f"{directory} is neither a checkpoint nor a run with step-N in it")
    return steps


def _find_like(found: Sequence[Path]) -> Path:
    for path in found:
        if (path / "config.json").exists():
            return path
    run = found[-1].parent
    if (run / "model" / "config.json").exists():
        return run / "model"
    try:
        recipe = json.loads((run / "recipe.json").read_text(encoding="utf-8"))
        return resolve(recipe["checkpoint"])
    except (OSError, ValueError, KeyError, TypeError, ApriumError) as error:
        raise CheckpointError(
            f"{found[-1]} does not say what model it is of: name an exported checkpoint of the "
            "same shape with --like"
        ) from error


def _read(path: Path, plan: Plan) -> Callable[[str], Tensor]:
    """Return the function that reads a tensor of checkpoint `path` by its name in `plan`."""
    if (path / "shards").exists():
        raise CheckpointError(
            f"{path} was written by many processes, and is not read here: continue its run with "
            "one process for a step, or merge exported checkpoints"
        )
    stored = read_directory(path)
    files = MappedFiles()
    published = {tensor.name: name for name, tensor in plan.tensors.items()}
    trained = not (path / "config.json").exists()

    def locate(name: str) -> tuple[StoredTensor, int | None]:
        if not trained:
            return stored[name], None
        parameter, expert = parameter_of(published[name])
        return stored[parameter], expert

    def read(name: str) -> Tensor:
        tensor, expert = locate(name)
        values = files.tensor(tensor)
        return values if expert is None else values[expert]

    _check(path, plan, stored, locate)
    return read


def _check(
    path: Path,
    plan: Plan,
    stored: Mapping[str, StoredTensor],
    locate: Callable[[str], tuple[StoredTensor, int | None]],
) -> None:
    """Check that `path` has every tensor of `plan` in its shape, and no other."""
    used = set()
    for tensor in plan.tensors.values():
        try:
            mine, expert = locate(tensor.name)
        except KeyError as error:
            raise CheckpointError(
                f"{path} has no tensor {error}, which {plan.path} has: they are not of one model"
            ) from error
        used.add(mine.name)
        shape = mine.shape if expert is None else mine.shape[1:]
        if math.prod(shape) != math.prod(tensor.shape):
            raise CheckpointError(
                f"{path}: tensor {mine.name!r} is {list(shape)}, and in {plan.path} it is "
                f"{list(tensor.shape)}: they are not of one model"
            )
    if more := stored.keys() - used:
        raise CheckpointError(f"{path} has tensor {min(more)!r}, which {plan.path} does not have")
