"""Snapshots beyond the slots: in main memory, and in a directory that outlives the process.

A snapshot is the recurrent state after a prefix, and the keys and values since the snapshot before
it on the same path; so what conversations share is stored once. A file is a line of JSON, the
tensors as safetensors, and a digest of both; it appears under its name when it is complete. Every
byte read is checked against the digest, and the line against what is known, so a damaged file is
one that is not there, and nothing waits for the disk: what is lost is computed again. Files of
other weights, precisions or kernels are in other directories.
"""

import contextlib
import json
import os
import queue
import threading
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple

import safetensors.torch
import torch
from torch import Tensor

from aprium.base.errors import ConfigError
from aprium.base.log import get_logger
from aprium.engine.prefix import Meta
from aprium.model.linear import Matrix
from aprium.model.model import HybridModel

_DIGEST_BYTES = 32
_SUFFIX = ".snapshot"
_PER_TOKEN = ("keys", "values")
_WAITING = 8  # snapshots that may wait to be written
_logger = get_logger("engine")

# Tensors of a snapshot by name; see `HybridState.export`.
Tensors = dict[str, Tensor]


class Part(NamedTuple):
    """One snapshot on the path to another: keys and values from token `start` on."""

    start: int
    tensors: Tensors


def pack(meta: Meta, tensors: Tensors) -> bytes:
    """Return a snapshot as bytes that `unpack` checks."""
    body = json.dumps(meta._asdict()).encode() + b"\n" + safetensors.torch.save(tensors)
    return body + blake2b(body, digest_size=_DIGEST_BYTES).digest()


def unpack(data: bytes) -> tuple[Meta, Tensors] | None:
    """Return what `pack` was given; None where a byte is wrong or missing."""
    body, digest = data[:-_DIGEST_BYTES], data[-_DIGEST_BYTES:]
    if blake2b(body, digest_size=_DIGEST_BYTES).digest() != digest:
        return None
    line, _, rest = body.partition(b"\n")
    meta = _meta(line)
    return None if meta is None else (meta, safetensors.torch.load(rest))


def join(parts: Sequence[Part]) -> Tensors:
    """Return the snapshot that `parts` lead to with all keys and values from the first token on."""
    whole = {name: torch.cat([p.tensors[name] for p in parts], 1) for name in _PER_TOKEN
             if name in parts[-1].tensors}  # fmt: skip
    return parts[-1].tensors | whole


class SnapshotStore:
    """Snapshots by key: up to `ram_bytes` in memory, up to `disk_bytes` (None: any) in `directory`.

    The oldest go first, with what depends on them. Files are written by a thread of its own, for
    which `close` waits. Belongs to one thread, as the engine does. Raises ConfigError where the
    directory cannot be used.
    """

    def __init__(
        self, *, ram_bytes: int, directory: Path | None = None, disk_bytes: int | None = None
    ) -> None:
        self.ram_bytes, self.disk_bytes = ram_bytes, disk_bytes
        self._ram: OrderedDict[str, Tensors] = OrderedDict()
        self._disk: OrderedDict[str, int] = OrderedDict()  # bytes
        self._metas: dict[str, Meta] = {}
        self._children: dict[str, set[str]] = {}
        self.ram_used = self.disk_used = 0
        self.num_saved = self.num_damaged = 0
        self._directory: Path | None = None
        self._queue: queue.Queue[tuple[Path, Meta | None, Tensors] | None] = queue.Queue(_WAITING)
        self._unwritten: dict[str, Tensors] = {}
        self._writer: threading.Thread | None = None
        if directory is not None:
            self.open(directory)

    def open(self, directory: Path) -> None:
        """Go on in `directory`, with the snapshots in it."""
        self.close()
        try:
            directory.mkdir(parents=True, exist_ok=True, mode=0o700)
            paths = sorted(directory.glob(f"*{_SUFFIX}"), key=lambda p: p.stat().st_mtime)
        except OSError as error:
            raise ConfigError(f"prefix_cache_dir {directory} cannot be used: {error}") from error
        self._directory = directory
        found: dict[str, tuple[Meta, int]] = {}
        for path in paths:
            with contextlib.suppress(OSError), path.open("rb") as file:
                meta = _meta(file.readline())
                if meta is not None and meta.key == path.stem:
                    found[meta.key] = meta, path.stat().st_size
        for key, (meta, size) in found.items():
            if _rooted(meta, found):
                self._note(meta)
                self._disk[key] = size
                self.disk_used += size
        self._writer = threading.Thread(target=self._write_all, name="aprium-store", daemon=True)
        self._writer.start()

    def reset(self, directory: Path | None) -> None:
        """Forget everything in memory, and go on in another `directory`: the weights changed."""
        self.close()
        for table in (self._ram, self._disk, self._metas, self._children, self._unwritten):
            table.clear()
        self.ram_used = self.disk_used = 0
        self._directory = None
        if directory is not None:
            try:
                self.open(directory)
            except ConfigError as error:
                _logger.error("snapshots are no longer kept on disk: %s", error)

    def close(self) -> None:
        """Wait until what was put is written."""
        if self._writer is not None:
            self._queue.put(None)
            self._writer.join()
            self._writer = None
            self._shrink()

    def has(self, key: str) -> bool:
        """Whether `key` was saved and not given up since."""
        return key in self._metas

    def entries(self) -> Iterable[Meta]:
        """Return what is there, parents first."""
        return sorted(self._metas.values(), key=lambda meta: meta.length)

    def touch(self, key: str) -> None:
        """Count `key`, and what it needs, as used now; the longest counts as the oldest of them."""
        path: str | None = key
        while path is not None and path in self._metas:
            if path in self._ram:
                self._ram.move_to_end(path)
            if path in self._disk:
                self._disk.move_to_end(path)
                with contextlib.suppress(OSError):
                    os.utime(self._path(path))
            path = self._metas[path].parent

    def put(self, meta: Meta, tensors: Tensors) -> None:
        """Keep a snapshot; what it builds on must be there. Waits where the disk is slow."""
        if meta.key in self._metas or (meta.parent is not None and meta.parent not in self._metas):
            return
        size = _size(tensors)
        if self._directory is None and size > self.ram_bytes:
            return
        self._note(meta)
        self.num_saved += 1
        self._ram[meta.key] = tensors
        self.ram_used += size
        if self._directory is not None:
            self._unwritten[meta.key] = tensors
            self._queue.put((self._path(meta.key), meta, tensors))
        self.touch(meta.key)
        self._shrink()

    def fetch(self, key: str) -> tuple[Part, ...] | None:
        """Return the parts that lead to `key`, the last with its state, each one checked.

        None, and the snapshots concerned are dropped, where one is damaged.
        """
        parts: list[Part] = []
        path: str | None = key
        while path is not None:
            meta = self._metas[path]
            tensors = self._ram.get(path)
            if tensors is None:
                tensors = self._unwritten.get(path)
            if tensors is None:
                tensors = self._read(meta)
            if tensors is None:
                self.num_damaged += 1
                self.drop(path)
                return None
            parts.append(Part(meta.start, tensors))
            path = meta.parent
        self.touch(key)
        self._shrink()
        return tuple(reversed(parts))

    def drop(self, key: str) -> None:
        """Give up `key` and everything that builds on it."""
        waiting = [key]
        while waiting:
            key = waiting.pop()
            waiting += self._children.pop(key, ())
            meta = self._metas.pop(key, None)
            if meta is not None and meta.parent in self._children:
                self._children[meta.parent].discard(key)
            if key in self._ram:
                self.ram_used -= _size(self._ram.pop(key))
            if key in self._disk:
                self.disk_used -= self._disk.pop(key)
                if self._writer is not None:  # after what is to be written before
                    self._queue.put((self._path(key), None, {}))
                else:
                    self._path(key).unlink(missing_ok=True)

    def _note(self, meta: Meta) -> None:
        self._metas[meta.key] = meta
        if meta.parent is not None:
            self._children.setdefault(meta.parent, set()).add(meta.key)

    def _read(self, meta: Meta) -> Tensors | None:
        """Read a file into memory; None where it is damaged or gone."""
        path = self._path(meta.key)
        try:
            found = unpack(path.read_bytes())
        except OSError:
            found = None
        if found is None or found[0] != meta:
            _logger.warning("%s is damaged: what it held is computed again", path)
            return None
        self._ram[meta.key] = found[1]
        self.ram_used += _size(found[1])
        return found[1]

    def _shrink(self) -> None:
        """Give up the oldest beyond the budgets; a parent that is needed is never the oldest."""
        self._settle()
        while self.ram_used > self.ram_bytes and self._ram:
            key, tensors = self._ram.popitem(last=False)
            self.ram_used -= _size(tensors)
            if key not in self._disk and key not in self._unwritten:
                self.drop(key)
        limit = self.disk_bytes
        while limit is not None and self.disk_used > limit and self._disk:
            self.drop(next(iter(self._disk)))

    def _settle(self) -> None:
        """Book the files that the writer has finished."""
        for key in [*self._unwritten]:
            with contextlib.suppress(OSError):
                size = self._path(key).stat().st_size
                del self._unwritten[key]
                if key in self._metas:
                    self._disk[key] = size
                    self.disk_used += size
                else:  # given up meanwhile
                    self._path(key).unlink()

    def _write_all(self) -> None:
        while (order := self._queue.get()) is not None:
            path, meta, tensors = order
            partial = path.with_suffix(".partial")
            try:
                if meta is None:
                    path.unlink(missing_ok=True)
                    continue
                with open(partial, "wb", opener=_private) as file:
                    file.write(pack(meta, tensors))
                partial.replace(path)
            except Exception as error:  # of whatever kind: the thread has to go on
                _logger.warning("%s cannot be written, and is not kept: %r", path, error)
                with contextlib.suppress(OSError):
                    partial.unlink(missing_ok=True)
                self._unwritten.pop(path.stem, None)

    def _path(self, key: str) -> Path:
        assert self._directory is not None
        return self._directory / f"{key}{_SUFFIX}"


def fingerprint(model: HybridModel, *settings: object) -> str:
    """Return a name for all bytes of `model`'s weights, and `settings` its numbers depend on."""
    tensors = [(name, p.detach()) for name, p in sorted(model.named_parameters())]
    for name, module in model.named_modules():  # experts of mapped files
        for leaf, parts in module.parts.items() if isinstance(module, Matrix) else ():
            tensors += [(f"{name}.{leaf}.{i}", part) for i, part in enumerate(parts)]
    digest = blake2b(repr((repr(model.config), settings)).encode(), digest_size=16)
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        for (name, tensor), found in zip(tensors, pool.map(_digest, tensors), strict=True):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode() + found)
    return digest.hexdigest()


def _digest(named: tuple[str, Tensor]) -> bytes:
    data = named[1].contiguous().reshape(-1).view(torch.uint8)
    view = memoryview(data.numpy())  # pyright: ignore[reportArgumentType] - an array is a buffer
    return blake2b(view, digest_size=16).digest()


def _rooted(meta: Meta, found: dict[str, tuple[Meta, int]]) -> bool:
    """Whether everything that `meta` builds on was found, in the lengths that it counts on."""
    while meta.parent is not None:
        if not meta.edge or meta.parent not in found or found[meta.parent][0].length != meta.start:
            return False
        meta = found[meta.parent][0]
    return meta.start == 0


def _meta(line: bytes) -> Meta | None:
    """Read the first line of a file; None where it is not one."""
    try:
        fields = json.loads(line)
        meta = Meta(**{**fields, "edge": tuple(fields["edge"])})
    except (ValueError, TypeError, KeyError):
        return None
    whole = isinstance(meta.length, int) and all(type(t) is int and t >= 0 for t in meta.edge)
    texts = isinstance(meta.key, str) and isinstance(meta.salt, str)
    return meta if whole and texts and isinstance(meta.parent, str | None) else None


def _size(tensors: Tensors) -> int:
    return sum(t.numel() * t.element_size() for t in tensors.values())


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)
