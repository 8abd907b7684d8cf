"""Training checkpoints on disk: written whole or not at all, and checked when read.

A checkpoint is a directory `step-N` with `model.safetensors`, `optimiser.safetensors` and
`state.json`, which holds the digests of the other two and of the rest of itself. It is written
beside its name, flushed to the disk and renamed into place, so that a fault at any moment leaves
the previous one whole.
"""

import contextlib
import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from aprium.base.errors import CheckpointError
from aprium.base.files import sync
from aprium.parallel.collectives import any_true, gather_objects
from aprium.parallel.mesh import Axis

_MODEL, _OPTIMISER, _STATE = "model.safetensors", "optimiser.safetensors", "state.json"


def complete(output: Path) -> list[Path]:
    """Return the checkpoints under `output`, oldest first."""
    names = {path: path.name.removeprefix("step-") for path in output.glob("step-*")}
    return sorted((path for path, name in names.items() if name.isdecimal()), key=_number)


def _number(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def write(
    output: Path,
    step: int,
    weights: Mapping[str, Tensor],
    optimiser: Mapping[str, Tensor],
    state: Mapping[str, Any],
) -> Path:
    """Write checkpoint `step-N` under `output`, unless it is there; returns its directory.

    Raises CheckpointError where the disk is full or cannot be written; earlier ones stay as they
    are.
    """
    final = output / f"step-{step:06d}"
    if final.exists():
        return final
    partial = output / f"{final.name}.partial"
    with explained(final, partial):
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        save_file(dict(weights), partial / _MODEL)
        save_file(dict(optimiser), partial / _OPTIMISER)
        digests = {name: digest(partial / name) for name in (_MODEL, _OPTIMISER)}
        write_state(partial / _STATE, state, digests)
        for name in (_MODEL, _OPTIMISER, _STATE):
            sync(partial / name)
        sync(partial)
        partial.rename(final)
        sync(output)
    return final


def write_state(file: Path, state: Mapping[str, Any], digests: Mapping[str, str]) -> None:
    """Write the state of a checkpoint, with the digests of its other files and its own."""
    whole = {**state, "digests": digests}
    text = json.dumps({**whole, "digest": _digest_state(whole)})
    file.write_text(text, encoding="utf-8")


def _digest_state(state: Mapping[str, Any]) -> str:
    return hashlib.blake2b(json.dumps(state).encode()).hexdigest()


def read_state(directory: Path, axis: Axis) -> dict[str, Any]:
    """Return the state of a checkpoint, after its files are found to be what was written.

    Every process of `axis` looks at some of the files, and all raise where one does: OSError,
    ValueError or KeyError for a damaged one.
    """
    state = json.loads((directory / _STATE).read_text(encoding="utf-8"))
    # Checkpoints of earlier versions have no digest of the state itself.
    own = state.pop("digest", None) if isinstance(state, dict) else ""
    if own is not None and own != _digest_state(state):
        raise ValueError(f"{_STATE} is not what was written")
    digests = state.pop("digests")
    if not isinstance(digests, dict):
        raise ValueError(f"{_STATE} is not what was written: digests is {digests!r}")
    damaged = ""
    for name, wanted in sorted(digests.items())[axis.index :: axis.size]:
        file = directory / name
        if not file.exists() or digest(file) != wanted:
            damaged = name
    if any_true(bool(damaged), axis):
        raise ValueError(f"{damaged or 'a file that another process read'} is not what was written")
    return state


def require_same(directory: Path, stored: Any, identity: Mapping[str, Any]) -> None:
    """Raise CheckpointError where a checkpoint was made with another `identity` than this one.

    Only what is `stored` is compared: checkpoints of earlier versions say less, or nothing.
    """
    now = json.loads(json.dumps(identity))  # as it is read back
    found = [
        f"{key}: {old!r} then, {new!r} now" for key, old, new in differences(stored or {}, now)
    ]
    if found:
        raise CheckpointError(
            f"{directory} is of another run ({'; '.join(found)}): set that back, or begin in "
            "another output"
        )


def differences(stored: Any, now: Any, where: str = "") -> list[tuple[str, Any, Any]]:
    """Return dotted keys of `stored` that are other ones `now`, with both values."""
    if isinstance(stored, Mapping) and isinstance(now, Mapping):
        return [
            row
            for key, value in stored.items()
            for row in differences(value, now.get(key), f"{where}.{key}" if where else key)
        ]
    return [] if stored == now else [(where, stored, now)]


def changed_keys(file: Path, recipe: str) -> list[str]:
    """Return the dotted keys of a run's `recipe` that are others in `file`; none without one."""
    try:
        old, new = json.loads(file.read_text(encoding="utf-8")), json.loads(recipe)
    except (OSError, ValueError):
        return []
    return sorted({key for key, _, _ in differences(old, new) + differences(new, old)})


def digest_weights(directory: Path, axis: Axis) -> str:
    """Return the digest of the weights in `directory`; processes of `axis` share the reading."""
    files = sorted(directory.glob("*.safetensors"))[axis.index :: axis.size]
    parts = gather_objects({file.name: digest(file) for file in files}, axis)
    found = sorted(item for part in parts for item in part.items())
    return hashlib.blake2b(json.dumps(found).encode(), digest_size=16).hexdigest()


def replace_state(directory: Path, state: Mapping[str, Any]) -> None:
    """Replace the state of a checkpoint, and leave its tensors."""
    file, partial = directory / _STATE, directory / f"{_STATE}.partial"
    with explained(directory, partial):
        digests = json.loads(file.read_text(encoding="utf-8"))["digests"]
        write_state(partial, state, digests)
        sync(partial)
        partial.replace(file)
        sync(directory)


@contextlib.contextmanager
def explained(final: Path, partial: Path) -> Iterator[None]:
    """Raise CheckpointError for what stops `final` from being written, and remove `partial`."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        if partial.is_dir():
            shutil.rmtree(partial, ignore_errors=True)
        else:
            partial.unlink(missing_ok=True)
        raise CheckpointError(
            f"checkpoint {final} cannot be written ({error}): earlier ones are whole; make room "
            "and give the same command again"
        ) from error


def digest(file: Path) -> str:
    """Return the digest of a file's bytes, in hexadecimal."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "blake2b").hexdigest()
