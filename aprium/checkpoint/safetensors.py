"""Safetensors files in and out: strict headers, mapped tensors, streamed writing.

A header is believed only when every byte of the file is accounted for. Tensors are read into an
`Arena`, so that a model costs its own size and not twice that, or are views of a mapped file.
Writing holds one tensor at a time. Nothing here knows
what the names mean. Source: the format description of the safetensors project.
"""

import contextlib
import json
import math
import mmap
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from aprium.base.errors import CheckpointError

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_DROP_BYTES = 1 << 28  # of a file read before its cache is dropped
_METADATA = "__metadata__"
_MAX_HEADER_BYTES = 100_000_000
_LINE = 64  # bytes of a cache line
_HEADER_ALIGNMENT = 8


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where a tensor lies: bytes [start, end) of `file`."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def read_header(file: Path) -> dict[str, StoredTensor]:
    """Return the tensors of one file in the order of their bytes.

    Raises CheckpointError naming the file, and where there is one the tensor, when the file cannot
    be read, is truncated, or its header does not account for every byte.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            head = stream.read(8)
            length = int.from_bytes(head, "little")
            if len(head) < 8:
                raise CheckpointError(f"{file}: truncated: {size} bytes do not hold a header")
            if length > _MAX_HEADER_BYTES:
                raise CheckpointError(f"{file}: not a safetensors file (header of {length} bytes)")
            text = stream.read(length)
    except OSError as error:
        raise CheckpointError(f"cannot read {file}: {error.strerror}") from error
    if len(text) < length:
        raise CheckpointError(f"{file}: truncated: the header alone has {length} bytes")
    try:
        header = json.loads(text, object_pairs_hook=lambda pairs: _unique(file, pairs))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise CheckpointError(f"{file}: the header is not valid JSON: {error}") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{file}: the header is not a JSON object")
    header.pop(_METADATA, None)
    stored = [_read_entry(file, name, entry, 8 + length) for name, entry in header.items()]
    stored.sort(key=lambda tensor: (tensor.start, tensor.end))
    _check_coverage(file, stored, 8 + length, size)
    return {tensor.name: tensor for tensor in stored}


def read_metadata(file: Path) -> dict[str, str]:
    """Return the free text that a file's header carries; raises CheckpointError if unreadable."""
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(min(length, _MAX_HEADER_BYTES)))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read the header of {file}: {error}") from error
    found = header.get(_METADATA) if isinstance(header, dict) else None
    return found if isinstance(found, dict) else {}


def _unique(file: Path, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))
        raise CheckpointError(f"{file}: the header names {twice!r} twice")
    return found


def _read_entry(file: Path, name: str, entry: Any, base: int) -> StoredTensor:
    """Check one header entry; `base` is where the data begin."""
    try:
        dtype, shape, (start, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        sizes = (*shape, start, end)
    except (TypeError, KeyError, ValueError) as error:
        raise CheckpointError(f"{file}: tensor {name!r}: malformed header entry") from error
    if any(isinstance(n, bool) or not isinstance(n, int) or n < 0 for n in sizes):
        raise CheckpointError(f"{file}: tensor {name!r}: malformed shape or offsets")
    if not isinstance(dtype, str) or dtype not in DTYPES:
        known = ", ".join(DTYPES)
        raise CheckpointError(f"{file}: tensor {name!r}: unknown dtype {dtype!r} (known: {known})")
    wanted = math.prod(shape) * DTYPES[dtype].itemsize
    if end - start != wanted:
        raise CheckpointError(
            f"{file}: tensor {name!r}: {dtype} {list(shape)} takes {wanted} bytes, "
            f"but its offsets span {end - start}"
        )
    return StoredTensor(name, file, dtype, tuple(shape), base + start, base + end)


def _check_coverage(file: Path, stored: list[StoredTensor], base: int, size: int) -> None:
    """Check that the tensors follow each other without gap or overlap up to the file's end."""
    position = base
    for tensor in stored:
        if tensor.start != position:
            kind = "overlaps the one before" if tensor.start < position else "leaves a gap before"
            raise CheckpointError(f"{file}: tensor {tensor.name!r} {kind} it: damaged header")
        if tensor.end > size:
            raise CheckpointError(
                f"{file}: truncated: tensor {tensor.name!r} ends at byte {tensor.end}, "
                f"the file has {size}; fetch the file again"
            )
        position = tensor.end
    if position != size:
        raise CheckpointError(f"{file}: {size - position} bytes after the last tensor")


def read_directory(directory: Path) -> dict[str, StoredTensor]:
    """Return all tensors of a checkpoint directory, file by file in the order of their bytes.

    With an index, the files it names must hold exactly the tensors it lists. Raises
    CheckpointError naming file and tensor.
    """
    index = directory / INDEX_NAME
    if index.exists():
        return _read_sharded(directory, _read_weight_map(index))
    files = sorted(directory.glob("*.safetensors"))
    if (directory / SINGLE_NAME) in files:
        files = [directory / SINGLE_NAME]
    if not files:
        raise CheckpointError(f"{directory} holds no .safetensors file: no weights to read")
    if len(files) > 1:
        raise CheckpointError(f"{directory} holds {len(files)} .safetensors files, no {INDEX_NAME}")
    return read_header(files[0])


def _read_weight_map(index: Path) -> dict[str, str]:
    try:
        data = json.loads(index.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"cannot read {index}: {error}") from error
    weight_map = data.get("weight_map") if isinstance(data, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: no weight_map")
    for name, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file:
            raise CheckpointError(f"{index}: tensor {name!r} lies in {file!r}: not a file name")
    return weight_map


def _read_sharded(directory: Path, weight_map: Mapping[str, str]) -> dict[str, StoredTensor]:
    by_file: dict[str, set[str]] = {}
    for name, file in weight_map.items():
        by_file.setdefault(file, set()).add(name)
    stored: dict[str, StoredTensor] = {}
    for file, listed in sorted(by_file.items()):
        path = directory / file
        if not path.exists():
            raise CheckpointError(
                f"{path} is missing: the index puts {len(listed)} tensors there, "
                f"for example {min(listed)!r}"
            )
        found = read_header(path)
        if found.keys() != listed:
            name = min(found.keys() ^ listed)
            where = "the index, not in the file" if name in listed else "the file, not in the index"
            raise CheckpointError(f"{path}: tensor {name!r} is in {where}")
        stored.update(found)
    return stored


class MappedFile:
    """A file mapped into memory; tensors are views of it and keep it mapped.

    The mapping is private: writing to a view would not reach the file.
    """

    def __init__(self, file: Path) -> None:
        try:
            with file.open("rb") as stream:
                self._map = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"cannot map {file}: {error}") from error

    def tensor(self, stored: StoredTensor) -> Tensor:
        """Return the values of `stored` without copying (but for a misaligned tensor)."""
        dtype = DTYPES[stored.dtype]
        if stored.start == stored.end:
            return torch.empty(stored.shape, dtype=dtype, device="cpu")
        size = stored.end - stored.start
        raw = torch.frombuffer(self._map, dtype=torch.uint8, count=size, offset=stored.start)
        if stored.start % dtype.itemsize:
            raw = raw.clone()
        return raw.view(dtype).view(stored.shape)


class MappedFiles:
    """Several files, each mapped when a tensor of it is first asked for."""

    def __init__(self) -> None:
        self._files: dict[Path, MappedFile] = {}

    def tensor(self, stored: StoredTensor) -> Tensor:
        """Return the values of `stored`, as `MappedFile.tensor` does."""
        if stored.file not in self._files:
            self._files[stored.file] = MappedFile(stored.file)
        return self._files[stored.file].tensor(stored)


class Arena:
    """Anonymous memory for many tensors in one piece, in huge pages where the system allows.

    Takes `num_bytes` in all; each tensor is aligned to a cache line, which `size_of` accounts for.
    """

    def __init__(self, num_bytes: int) -> None:
        self._map = mmap.mmap(-1, max(num_bytes, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with contextlib.suppress(OSError):  # a kernel without them
                self._map.madvise(mmap.MADV_HUGEPAGE)
        self._taken = 0

    @staticmethod
    def size_of(shape: Sequence[int], dtype: torch.dtype) -> int:
        """Return the bytes that a tensor takes of an arena."""
        return -(-math.prod(shape) * dtype.itemsize // _LINE) * _LINE

    def tensor(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Return the next tensor, zeros."""
        size, start = math.prod(shape) * dtype.itemsize, self._taken
        self._taken += self.size_of(shape, dtype)
        if not size:
            return torch.empty(tuple(shape), dtype=dtype, device="cpu")
        raw = torch.frombuffer(self._map, dtype=torch.uint8, count=size, offset=start)
        return raw.view(dtype).view(tuple(shape))


class FileReader:
    """Reads tensors of one file into memory that is there; safe to call from several threads.

    With `forget` the system drops what it caches of the file soon after it is read, so that memory
    stays free to be had in huge pages.
    """

    def __init__(self, file: Path, *, forget: bool) -> None:
        self._file, self._forget = file, forget
        self._dropped = 0  # where what is cached begins
        try:
            self._stream = file.open("rb", buffering=0)
        except OSError as error:
            raise CheckpointError(f"cannot read {file}: {error.strerror}") from error

    def read(self, stored: StoredTensor, target: Tensor) -> None:
        """Fill contiguous `target` with the bytes of `stored`."""
        view = target.view(-1).view(torch.uint8).numpy().data
        done, size = 0, stored.end - stored.start
        while done < size:
            try:
                count = os.preadv(self._stream.fileno(), [view[done:]], stored.start + done)
            except OSError as error:
                raise CheckpointError(f"cannot read {self._file}: {error.strerror}") from error
            if not count:
                raise CheckpointError(
                    f"{self._file}: truncated while tensor {stored.name!r} was read"
                )
            done += count
        if self._forget and stored.start > self._dropped + _DROP_BYTES:
            # All from the start: the system keeps a large page that a range covers in part.
            self._dropped = stored.start
            os.posix_fadvise(self._stream.fileno(), 0, stored.start, os.POSIX_FADV_DONTNEED)

    def close(self) -> None:
        """Close the file."""
        if self._forget:
            os.posix_fadvise(self._stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        self._stream.close()


class Entry(NamedTuple):
    """A tensor to be written."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Size of the data in bytes."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


def write_file(
    file: Path,
    entries: Iterable[Entry],
    fetch: Callable[[str], Tensor],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write one file; `fetch(name)` gives each tensor when its turn comes.

    Wide types come first, so that every tensor is aligned to its item, otherwise the order is kept.
    Raises CheckpointError when the file cannot be written.
    """
    ordered = sorted(entries, key=lambda entry: -DTYPES[entry.dtype].itemsize)
    header: dict[str, Any] = {_METADATA: {"format": "pt", **(metadata or {})}}
    position = 0
    for entry in ordered:
        end = position + entry.num_bytes
        shape = list(entry.shape)
        header[entry.name] = {
            "dtype": entry.dtype,
            "shape": shape,
            "data_offsets": [position, end],
        }
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _HEADER_ALIGNMENT)
    try:
        with file.open("wb") as stream:
            stream.write(len(text).to_bytes(8, "little") + text)
            for entry in ordered:
                tensor = fetch(entry.name).detach().cpu().contiguous()
                assert (DTYPE_NAMES[tensor.dtype], tensor.shape) == (entry.dtype, entry.shape)
                stream.write(tensor.view(-1).view(torch.uint8).numpy().data)
    except OSError as error:
        raise CheckpointError(f"cannot write {file}: {error.strerror}") from error


def write_directory(
    directory: Path,
    entries: Sequence[Entry],
    fetch: Callable[[str], Tensor],
    max_shard_bytes: int,
) -> None:
    """Write `entries` to files of at most `max_shard_bytes` each, with an index if several.

    A tensor larger than that gets a file of its own. `directory` must exist.
    """
    shards: list[list[Entry]] = [[]]
    filled = 0
    for entry in entries:
        if shards[-1] and filled + entry.num_bytes > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(entry)
        filled += entry.num_bytes
    if len(shards) == 1:
        write_file(directory / SINGLE_NAME, shards[0], fetch)
        return
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_file(directory / name, shard, fetch)
        weight_map |= {entry.name: name for entry in shard}
    total = sum(entry.num_bytes for entry in entries)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    text = json.dumps(index, indent=2, sort_keys=True) + "\n"
    (directory / INDEX_NAME).write_text(text, encoding="utf-8")
