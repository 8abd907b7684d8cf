"""What became of every item of a run, as JSON lines: issued, finished, scored, trained or dropped.

The file is only appended to, and a batch is on the disk before anything is trained on it. So a run
that was killed at any moment trains the recorded batches again in their order, goes on with what
was finished, and plays anew what was not: no item counts twice, and none is lost. Once no
checkpoint needs the episodes of a batch any more, `compact` leaves the line of the batch alone.
"""

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, groupby
from pathlib import Path
from typing import Any

from aprium.base.errors import CheckpointError
from aprium.base.files import sync
from aprium.base.records import Group, TeacherScores, Trajectory

Scores = tuple[TeacherScores | None, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """A task to be played by a group: number `index` of `domain`, item `number` of the run."""

    number: int
    domain: str
    index: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """What the ledger knows of an item; `version` is of the weights when it was issued.

    `group` is there once it was played, `scores` (one a trajectory) once teachers were asked.
    """

    item: Item
    version: int
    group: Group | None = None
    scores: Scores | None = None


class Ledger:
    """The file `ledger.jsonl` of the run under `output`, which one process at a time may have open.

    `batches` are the items of each step, in order, `num_issued_by` how many items of the run were
    issued by the time they were made. `entries` are the other items, and those that this process
    found in batches. Raises CheckpointError for a file that is damaged, in use, or
    cannot be written.
    """

    def __init__(self, output: Path) -> None:
        self.path = output / "ledger.jsonl"
        self.batches: dict[int, tuple[int, ...]] = {}
        self.entries: dict[int, Entry] = {}
        self.num_issued = 0
        self.num_issued_by: dict[int, int] = {}
        self._dropped: set[int] = set()
        self._compacted = 0  # batches before this step have lost what was played
        with self._explained():
            output.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("ab")
            try:
                self._lock()
                self._read()
            except BaseException:
                self._file.close()
                raise

    def issue(self, item: Item, version: int) -> None:
        """Note that `item` is going to be played, under weights of `version` or later ones."""
        self._write({"event": "issued", "item": item.number, "version": version} | _place(item))
        self.entries[item.number] = Entry(item=item, version=version)
        self.num_issued = max(self.num_issued, item.number + 1)

    def finish(self, number: int, group: Group) -> None:
        """Note what was played."""
        self._write({"event": "finished", "item": number, "group": write_group(group)})
        self.entries[number] = replace(self.entries[number], group=group)

    def score(self, number: int, scores: Scores) -> None:
        """Note what teachers made of it."""
        self._write({"event": "scored", "item": number, "scores": [*map(_write_scores, scores)]})
        self.entries[number] = replace(self.entries[number], scores=scores)

    def drop(self, number: int, why: str) -> None:
        """Note that an item will never be trained on."""
        self._write({"event": "dropped", "item": number, "why": why})
        del self.entries[number]
        self._dropped.add(number)

    def take(self, step: int, numbers: Sequence[int]) -> None:
        """Note that items are trained on in `step`; they are on the disk when this returns.

        Of what was played, the file alone keeps it from now on.
        """
        assert step not in self.batches, "a step has one batch"
        self._write({"event": "trained", "step": step, "items": list(numbers)})
        with self._explained():
            os.fsync(self._file.fileno())
        self.batches[step] = tuple(numbers)
        self.num_issued_by[step] = self.num_issued
        for number in numbers:
            del self.entries[number]

    def open_entries(self) -> list[Entry]:
        """Return what is neither dropped nor in a batch, in the order of numbers."""
        taken = {number for numbers in self.batches.values() for number in numbers}
        return [self.entries[n] for n in sorted(self.entries) if n not in taken]

    def compact(self, step: int) -> None:
        """Forget what was played for batches before `step`, but not what became of the items."""
        due = [at for at in self.batches if self._compacted <= at < step]
        if not due:
            return
        self._compacted = step
        settled = {n for at, items in self.batches.items() if at < step for n in items}
        settled |= self._dropped
        self.entries = {n: entry for n, entry in self.entries.items() if n not in settled}
        with self._explained():
            partial = self.path.with_suffix(".partial")
            with self.path.open("rb") as old, partial.open("wb") as new:
                new.writelines(line for line in old if _decides(line) or _item(line) not in settled)
            sync(partial)
            kept = partial.open("ab")
            fcntl.flock(kept, fcntl.LOCK_EX)  # before the name leads there
            partial.replace(self.path)
            sync(self.path.parent)
            self._file.close()
            self._file = kept

    def close(self) -> None:
        """Write what is buffered, and let another process have the file."""
        with self._explained():
            self._file.close()

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise CheckpointError(
                f"{self.path} is in use by another process: wait for it, or use another output"
            ) from None

    def _write(self, event: Mapping[str, Any]) -> None:
        # In one call and unbuffered beyond it: a killed process leaves whole lines, or a last one
        # that is cut, which reading removes.
        with self._explained():
            self._file.write(json.dumps(event).encode() + b"\n")
            self._file.flush()

    def _read(self) -> None:
        data = self.path.read_bytes()
        whole = data.rfind(b"\n") + 1
        if whole < len(data):
            os.truncate(self.path, whole)
        for number, line in enumerate(data[:whole].splitlines(), 1):
            try:
                self._book(json.loads(line))
            except (ValueError, KeyError, TypeError, AssertionError) as error:
                raise CheckpointError(
                    f"line {number} of {self.path} is not what was written ({error!r}): use "
                    "another output"
                ) from error

    def _book(self, event: Mapping[str, Any]) -> None:
        kind = event["event"]
        if kind == "trained":
            items = tuple(event["items"])
            self.batches[event["step"]] = items
            self.num_issued = max(self.num_issued, *(n + 1 for n in items), 0)
            self.num_issued_by[event["step"]] = self.num_issued
            return
        number = event["item"]
        self.num_issued = max(self.num_issued, number + 1)
        if kind == "issued":
            item = Item(number=number, domain=event["domain"], index=event["index"])
            self.entries[number] = Entry(item=item, version=event["version"])
        elif kind == "finished":
            self.entries[number] = replace(self.entries[number], group=read_group(event["group"]))
        elif kind == "scored":
            scores = tuple(map(_read_scores, event["scores"]))
            self.entries[number] = replace(self.entries[number], scores=scores)
        else:
            assert kind == "dropped", f"no event {kind!r}"
            self.entries.pop(number, None)
            self._dropped.add(number)

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise CheckpointError(
                f"{self.path} cannot be written ({error.strerror}): make room and give the same "
                "command again"
            ) from error


def _decides(line: bytes) -> bool:
    """Tell whether a line of the file says what became of items in the end."""
    return line.startswith((b'{"event": "trained"', b'{"event": "dropped"'))


def _item(line: bytes) -> int:
    """Return the item of a line, of which nothing else is read."""
    return int(line[:60].partition(b'"item": ')[2].split(b",")[0])


def _place(item: Item) -> dict[str, Any]:
    return {"domain": item.domain, "index": item.index}


def write_group(group: Group) -> dict[str, Any]:
    """Return a group as plain values."""
    return {"task": group.task, "trajectories": [*map(_write_trajectory, group.trajectories)]}


def read_group(data: Mapping[str, Any]) -> Group:
    """Return the group that `write_group` wrote."""
    trajectories = (_read_trajectory(data["task"], found) for found in data["trajectories"])
    return Group(task=data["task"], trajectories=tuple(trajectories))


def _write_trajectory(trajectory: Trajectory) -> dict[str, Any]:
    """Return a trajectory as plain values; who wrote the tokens as lengths of runs in turns."""
    runs = [(written, len([*run])) for written, run in groupby(trajectory.sampled)]
    pairs = zip(trajectory.logprobs, trajectory.sampled, strict=True)
    return {
        "domain": trajectory.domain,
        "tokens": trajectory.tokens,
        "runs": [0, *(n for _, n in runs)] if runs and runs[0][0] else [n for _, n in runs],
        "logprobs": [logprob for logprob, written in pairs if written],
        "reward": trajectory.reward,
        "parts": dict(trajectory.parts),
        "stop": trajectory.stop,
        "error": trajectory.error,
        "weight_spans": trajectory.weight_spans,
        "num_turns": trajectory.num_turns,
        "defects": trajectory.defects,
    }


def _read_trajectory(task: str, data: Mapping[str, Any]) -> Trajectory:
    runs = data["runs"]
    sampled = tuple(bool(i % 2) for i, count in enumerate(runs) for _ in range(count))
    places = accumulate(sampled, initial=0)
    logprobs = data["logprobs"]
    return Trajectory(
        task=task,
        domain=data["domain"],
        tokens=tuple(data["tokens"]),
        sampled=sampled,
        logprobs=tuple(logprobs[i] if s else 0.0 for i, s in zip(places, sampled, strict=False)),
        reward=data["reward"],
        parts=data["parts"],
        stop=data["stop"],
        error=data["error"],
        weight_spans=tuple((version, count) for version, count in data["weight_spans"]),
        num_turns=data["num_turns"],
        defects=tuple((begin, end, what) for begin, end, what in data["defects"]),
    )


def _write_scores(scores: TeacherScores | None) -> Any:
    if scores is None:
        return None
    top = [[*position.items()] for position in scores.top]
    return {"teacher": scores.teacher, "logprobs": scores.logprobs, "top": top}


def _read_scores(data: Any) -> TeacherScores | None:
    if data is None:
        return None
    return TeacherScores(
        teacher=data["teacher"],
        logprobs=tuple(data["logprobs"]),
        top=tuple(dict(position) for position in data["top"]),
    )
