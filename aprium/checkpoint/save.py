"""Save a checkpoint: the tensors in the layout they came in, and the files beside them.

A loaded `Checkpoint` is written back name for name, dtype for dtype and shape for shape; a bare
`HybridModel` gets the published layout and a configuration of its own. Everything is written to a
temporary directory beside the target and moved into place when it is complete.
"""

import contextlib
import json
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from aprium.base.errors import CheckpointError
from aprium.checkpoint.load import Checkpoint
from aprium.checkpoint.names import Naming, parameter_of, tensor_table
from aprium.checkpoint.quant_config import QUANT_FILE, to_hf
from aprium.checkpoint.safetensors import (
    DTYPE_NAMES,
    DTYPES,
    INDEX_NAME,
    Entry,
    write_directory,
)
from aprium.model.config import ModelConfig, QuantConfig, read_hf_config
from aprium.model.model import HybridModel

DEFAULT_SHARD_BYTES = 5_000_000_000
_COPIED_SUFFIXES = (".json", ".jinja", ".txt")


def save_checkpoint(
    source: Checkpoint | HybridModel,
    directory: str | Path,
    *,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
) -> None:
    """Write `source` to `directory`, replacing the weights that are there.

    A `Checkpoint` keeps its layout and takes its JSON, template and text files along; other files
    of an existing directory stay. Trainable weights of a bare model are written as `dtype` where
    one is given. Raises CheckpointError when something cannot be written.
    """
    if max_shard_bytes < 1:
        raise CheckpointError(f"max_shard_bytes is {max_shard_bytes}: it must be at least 1")
    if isinstance(source, Checkpoint) and source.load == "mmap":
        raise CheckpointError(
            f"{source.path} is mapped, not in memory: copy its files, or load it with "
            'load="memory" before saving'
        )
    if isinstance(source, Checkpoint) and source.transposed:
        raise CheckpointError(
            f"{source.path} was loaded with its down projections by columns: copy its files, or "
            "load it with transposed=False before saving"
        )
    target = Path(directory)
    try:
        with assembled(target) as complete:
            if isinstance(source, HybridModel):
                _write_model(source, complete, dtype, max_shard_bytes)
            else:
                _write_checkpoint(source, complete, max_shard_bytes)
    except OSError as error:
        raise CheckpointError(f"cannot write {target}: {error.strerror or error}") from error


def _write_checkpoint(source: Checkpoint, directory: Path, max_shard_bytes: int) -> None:
    if source.path is not None:
        copy_texts(source.path, directory)
    if source.entries:
        _write_tensors(source.model, source.naming, source.entries, directory, max_shard_bytes)
    else:  # random weights: no file says how they were stored
        _write_model(source.model, directory, None, max_shard_bytes)


def _write_model(
    model: HybridModel, directory: Path, dtype: torch.dtype | None, max_shard_bytes: int
) -> None:
    written = dtype or model.backbone.embeddings.weight.dtype
    config = model.config.to_hf() | {"dtype": str(written).removeprefix("torch.")}
    if model.quant.formats:
        quantisation, embedded = to_hf(model.quant, model.config)
        config["quantization_config"] = embedded
        if quantisation is not None:
            _write_json(directory / QUANT_FILE, quantisation)
    _write_json(directory / "config.json", config)
    _write_tensors(model, Naming(), _entries(model, dtype), directory, max_shard_bytes)


def _entries(model: HybridModel, dtype: torch.dtype | None) -> Sequence[Entry]:
    """Return the published layout of `model` in its own dtypes, or `dtype` where trainable."""
    parameters = dict(model.named_parameters())
    entries = []
    for name, spec in tensor_table(model.config, model.quant).items():
        parameter = parameters[parameter_of(name)[0]]
        stored = dtype if dtype is not None and parameter.requires_grad else parameter.dtype
        entries.append(Entry(name, DTYPE_NAMES[stored], spec.shape))
    return entries


def _write_tensors(
    model: HybridModel,
    naming: Naming,
    entries: Sequence[Entry],
    directory: Path,
    max_shard_bytes: int,
) -> None:
    by_name = {entry.name: entry for entry in entries}
    parameters = dict(model.named_parameters())

    def fetch(name: str) -> Tensor:
        entry = by_name[name]
        parameter, expert = parameter_of(naming.to_published(name))
        value = parameters[parameter].detach()
        value = value if expert is None else value[expert]
        return value.to(DTYPES[entry.dtype]).reshape(entry.shape)

    write_directory(directory, entries, fetch, max_shard_bytes)


def write_texts(source: Path, directory: Path, quant: QuantConfig, config: ModelConfig) -> None:
    """Copy the texts of checkpoint `source`, with `quant` declared in place of its own formats."""
    copy_texts(source, directory)
    (directory / QUANT_FILE).unlink(missing_ok=True)
    data = read_hf_config(source)
    data.pop("quantization_config", None)
    if quant.formats:
        first, data["quantization_config"] = to_hf(quant, config)
        if first is not None:
            _write_json(directory / QUANT_FILE, first)
    _write_json(directory / "config.json", data)


def _write_json(file: Path, data: dict[str, Any]) -> None:
    file.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def copy_texts(source: Path, directory: Path) -> None:
    """Copy the JSON, template and text files of checkpoint `source` as they are."""
    for file in source.iterdir():
        if file.suffix in _COPIED_SUFFIXES and file.name != INDEX_NAME and file.is_file():
            shutil.copyfile(file, directory / file.name)


@contextlib.contextmanager
def assembled(target: Path) -> Iterator[Path]:
    """Give an empty directory beside `target`, which takes its place once it is filled."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as name:
        complete = Path(name) / "complete"
        complete.mkdir()
        yield complete
        move_directory(complete, target)


def move_directory(complete: Path, target: Path) -> None:
    """Put directory `complete` in the place of `target`, or its files into an existing one.

    In an existing directory each file changes at once and old weights go last.
    """
    if not target.exists():
        complete.rename(target)
        return
    stale = {*target.glob("*.safetensors"), target / INDEX_NAME, target / QUANT_FILE}
    for file in sorted(complete.iterdir()):
        file.replace(target / file.name)
        stale.discard(target / file.name)
    for file in stale:
        file.unlink(missing_ok=True)
