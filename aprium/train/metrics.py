"""The figures of a run as JSON lines: appended step by step, cut when resuming, read for the page.

What grows with a run is kept here alone, so that checkpoints stay small and a resumed run finds all
of it. A line is {"kind": "train" | "heldout" | "rollback", "step": N, ...}.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from aprium.base.files import sync


class MetricsFile:
    """The file `metrics.jsonl` of the run under `output`; all raise OSError."""

    def __init__(self, output: Path) -> None:
        self._path = output / "metrics.jsonl"

    def append(self, kind: str, figures: Mapping[str, Any]) -> None:
        """Write the figures of a step, which have its number as "step"."""
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"kind": kind, **figures}) + "\n")

    def read(self, kind: str) -> list[dict[str, Any]]:
        """Return the figures of a kind, oldest first."""
        rows = [row for row in map(_row, self._lines()) if row is not None]
        return [
            {k: v for k, v in row.items() if k != "kind"} for row in rows if row["kind"] == kind
        ]

    def cut(self, step: int) -> None:
        """Drop what is of steps after number `step`, and what a fault left of a line."""
        rows = ((line, _row(line)) for line in self._lines())
        kept = [line for line, row in rows if row is not None and row["step"] <= step]
        partial = self._path.with_suffix(".partial")
        partial.write_text("".join(kept), encoding="utf-8")
        sync(partial)
        partial.replace(self._path)

    def flush(self) -> None:
        """Bring to the disk what was written; a checkpoint that says it is there comes after."""
        if self._path.exists():
            sync(self._path)

    def _lines(self) -> list[str]:
        if not self._path.exists():
            return []
        return self._path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)


def _row(line: str) -> dict[str, Any] | None:
    """Return what a line says; None for one that was not written to its end."""
    try:
        row = json.loads(line) if line.endswith("}\n") else None
    except ValueError:
        return None
    return row if isinstance(row, dict) and {"kind", "step"} <= row.keys() else None
