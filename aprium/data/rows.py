"""Rows of JSONL and Parquet files by number, read when asked for, and the order to take them in.

Files may be far larger than memory: of a JSONL file only the offsets of its lines are kept, eight
bytes each, and of Parquet the few row groups in use. Rows come in blocks (a row group, or so many
lines). Each time through, blocks are shuffled, and rows within windows of a few blocks, so that
reading stays local and the place in the order is one number. Nothing here knows what rows hold.
"""

import bisect
import hashlib
import itertools
import json
import random
from array import array
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from aprium.base.errors import DataError

if TYPE_CHECKING:
    from pyarrow import Table

LINES_PER_BLOCK = 4096
BLOCKS_PER_WINDOW = 8
_PARQUET_END = 1 << 16


class Row(NamedTuple):
    """A row of data, the function that says where it is, and columns that were not read."""

    data: dict[str, Any]
    place: Callable[[], str]
    unread: tuple[str, ...] = ()

    @property
    def where(self) -> str:
        """File and line, or file and number, for messages."""
        return self.place()


class Rows:
    """The rows of several files, one file after the other.

    `paths` may hold glob patterns, whose matches are taken in the order of their names. Files that
    end in .parquet are Parquet, all others have a JSON object a line. Of Parquet only `columns` are
    read, if given, those of them that are there. `blocks` are the sizes of blocks in rows; `digest`
    tells other contents apart. Raises DataError for files that are not there, not readable or
    empty.
    """

    def __init__(self, paths: Sequence[Path], columns: Sequence[str] | None = None) -> None:
        self.files = [file for path in paths for file in find_files(path)]
        self._parts: list[_File] = [
            _ParquetFile(file, columns) if file.suffix == ".parquet" else _JsonLines(file)
            for file in self.files
        ]
        self.blocks = [size for part in self._parts for size in part.blocks]
        self._ends = list(itertools.accumulate(sum(part.blocks) for part in self._parts))
        whole = hashlib.blake2b("".join(part.digest for part in self._parts).encode())
        self.digest = whole.hexdigest()[:16]
        if not len(self):
            raise DataError(f"{', '.join(map(str, paths))}: no rows")

    def __len__(self) -> int:
        """Rows in all files."""
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, number: int) -> Row:
        """Return row `number`; raises DataError naming file and line for a bad one."""
        if not 0 <= number < len(self):
            raise IndexError(number)
        which = bisect.bisect_right(self._ends, number)
        return self._parts[which].row(number - (self._ends[which - 1] if which else 0))


def find_files(path: Path) -> list[Path]:
    """Return `path`, or what it matches as a glob pattern, by name; raises DataError for none."""
    if path.is_file():
        return [path]
    pattern = str(path)
    if not any(mark in pattern for mark in "*?["):
        reason = "it is a directory: give files in it, as in DIR/*.jsonl" if path.is_dir() else None
        raise DataError(f"cannot read {path}: {reason or 'no such file'}")
    parts = path.parts
    first = next(i for i, part in enumerate(parts) if any(mark in part for mark in "*?["))
    try:
        matches = list(Path(*parts[:first]).glob(str(Path(*parts[first:]))))
    except ValueError as error:
        raise DataError(f"{path} is no glob pattern: {error}") from error
    found = sorted(match for match in matches if match.is_file())
    if not found:
        raise DataError(f"no file matches {path}")
    return found


def read_all(path: Path) -> list[dict[str, Any]]:
    """Return all rows of `path`; raises DataError as `Rows` does."""
    return [row.data for row in Rows([path])]


class _File(Protocol):
    blocks: list[int]
    digest: str

    def row(self, number: int) -> Row:
        """Return row `number` of this file."""
        ...


class _JsonLines:
    """A file of a JSON object a line; blank lines are no rows."""

    def __init__(self, file: Path) -> None:
        self._file, self._offsets, position = file, array("Q"), 0
        content = hashlib.blake2b()
        try:
            with file.open("rb") as stream:
                for line in stream:
                    content.update(line)
                    if not line.isspace():
                        self._offsets.append(position)
                    position += len(line)
        except OSError as error:
            raise DataError(f"cannot read {file}: {error.strerror}") from error
        whole, rest = divmod(len(self._offsets), LINES_PER_BLOCK)
        self.blocks = [LINES_PER_BLOCK] * whole + [rest] * bool(rest)
        self.digest = content.hexdigest()

    def row(self, number: int) -> Row:
        try:
            with self._file.open("rb") as stream:
                stream.seek(self._offsets[number])
                line = stream.readline()
        except OSError as error:
            raise DataError(f"cannot read {self._file}: {error.strerror}") from error
        try:
            data = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{self._where(number)}: not JSON: {error}") from error
        if not isinstance(data, dict):
            raise DataError(f"{self._where(number)}: not a JSON object")
        return Row(data, lambda: self._where(number))

    def _where(self, number: int) -> str:
        """Name the line, counting the blank ones before it too."""
        with self._file.open("rb") as stream:
            left, count = self._offsets[number], 1
            while left > 0 and (chunk := stream.read(min(left, 1 << 20))):
                count += chunk.count(b"\n")
                left -= len(chunk)
        return f"{self._file}, line {count}"


class _ParquetFile:
    """A Parquet file; a few of its row groups are kept as they were read.

    Its digest is of its last bytes, where the sizes and statistics of all columns stand.
    """

    def __init__(self, file: Path, columns: Sequence[str] | None) -> None:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile

        self._file = file
        try:
            self._parquet = ParquetFile(file)
            with file.open("rb") as stream:
                size = stream.seek(0, 2)
                stream.seek(max(0, size - _PARQUET_END))
                self.digest = hashlib.blake2b(b"%d " % size + stream.read()).hexdigest()
        except (OSError, ArrowException) as error:
            raise DataError(f"cannot read {file} as Parquet: {error}") from error
        metadata = self._parquet.metadata
        sizes = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
        self._groups = [i for i, size in enumerate(sizes) if size]
        self.blocks = [size for size in sizes if size]
        self._ends = list(itertools.accumulate(self.blocks))
        names = self._parquet.schema_arrow.names
        self._columns = [name for name in names if columns is None or name in columns]
        self._unread = tuple(name for name in names if name not in self._columns)
        self._read = lru_cache(maxsize=BLOCKS_PER_WINDOW)(self._read_group)

    def _read_group(self, group: int) -> "Table":
        return self._parquet.read_row_group(group, columns=self._columns)

    def row(self, number: int) -> Row:
        from pyarrow import ArrowException

        block = bisect.bisect_right(self._ends, number)
        inside = number - (self._ends[block - 1] if block else 0)
        try:
            data = self._read(self._groups[block]).slice(inside, 1).to_pylist()[0]
        # Dates beyond Python's, nanoseconds and text that is not UTF-8 have no value in Python.
        except (OSError, ArrowException, ValueError, OverflowError) as error:
            raise DataError(f"{self._file}, row {number + 1}: {error}") from error
        return Row(data, lambda: f"{self._file}, row {number + 1}", self._unread)


class Order:
    """In which order to take rows: each once, then each again in another order, and so on.

    `blocks` are their sizes. The order is a function of `key` alone.
    """

    def __init__(self, blocks: Sequence[int], key: str) -> None:
        self._blocks, self._key = list(blocks), key
        self._begins = [0, *itertools.accumulate(blocks)]
        self._epoch = self._window = -1
        self._order: list[int] = []
        self._ends: list[int] = []
        self._rows: list[int] = []

    def row(self, number: int) -> int:
        """Return the row to take as `number`-th."""
        epoch, place = divmod(number, self._begins[-1])
        if epoch != self._epoch:
            self._epoch, self._window = epoch, -1
            self._order = list(range(len(self._blocks)))
            random.Random(f"{self._key} {epoch}").shuffle(self._order)
            sizes = itertools.accumulate(self._blocks[block] for block in self._order)
            ends = list(sizes)
            last = len(ends) - 1
            step = BLOCKS_PER_WINDOW
            self._ends = [ends[min(i + step - 1, last)] for i in range(0, len(ends), step)]
        window = bisect.bisect_right(self._ends, place)
        if window != self._window:
            self._window = window
            blocks = self._order[window * BLOCKS_PER_WINDOW : (window + 1) * BLOCKS_PER_WINDOW]
            rows = (range(self._begins[b], self._begins[b + 1]) for b in blocks)
            self._rows = list(itertools.chain.from_iterable(rows))
            random.Random(f"{self._key} {epoch} {window}").shuffle(self._rows)
        return self._rows[place - (self._ends[window - 1] if window else 0)]
