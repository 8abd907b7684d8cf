"""Files that are there whole or not at all, also after the power has gone.

What is acknowledged to somebody must not be lost, so bytes and names are on the disk before a
function here returns. What can be computed again has no need of this, and does without.
"""

import contextlib
import os
import uuid
from pathlib import Path


def write_durably(path: Path, data: bytes) -> None:
    """Write a file for its owner alone, in place of any of that name; raises OSError."""
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}.partial")
    try:
        with open(partial, "xb", opener=_private) as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise
    sync(path.parent)


def remove_durably(*paths: Path) -> None:
    """Remove files of one directory, of which any may be missing; raises OSError."""
    for path in paths:
        path.unlink(missing_ok=True)
    sync(paths[0].parent)


def sync(path: Path) -> None:
    """Bring the bytes of a file, or the names in a directory, to the disk; raises OSError."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)
