"""The books of a run: what is written is read again, also after a cut; what is settled shrinks."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aprium.base.errors import CheckpointError
from aprium.base.records import Group, TeacherScores, Trajectory
from aprium.rl.ledger import Item, Ledger, read_group, write_group


def trajectory(number: int = 0, sampled: tuple[bool, ...] = (False, True, True)) -> Trajectory:
    return Trajectory(
        task=f"d/{number}",
        domain="d",
        tokens=tuple(range(number, number + len(sampled))),
        sampled=sampled,
        logprobs=tuple(-1 / (i + 3) if s else 0.0 for i, s in enumerate(sampled)),
        reward=0.1 + number,
        parts={"correct": 0.3},
        weight_spans=((4, sum(sampled)),) if any(sampled) else (),
        num_turns=1,
        defects=((1, len(sampled), "no answer"),) if sampled else (),
    )


def group(number: int) -> Group:
    return Group(task=f"d/{number}", trajectories=(trajectory(number),))


def fill(ledger: Ledger, numbers: range) -> None:
    for number in numbers:
        ledger.issue(Item(number=number, domain="d", index=number), version=number // 2)
        ledger.finish(number, group(number))


@given(st.lists(st.booleans(), max_size=12))
def test_a_group_comes_back_as_it_was(sampled: list[bool]) -> None:
    one = trajectory(3, tuple(sampled))
    failed = Trajectory(
        task="d/3", domain="d", tokens=(), sampled=(), logprobs=(), stop="error", error="no"
    )
    wanted = Group(task="d/3", trajectories=(one, failed))
    assert read_group(json.loads(json.dumps(write_group(wanted)))) == wanted


def test_everything_is_there_after_opening_again(tmp_path: Path) -> None:
    scores = (TeacherScores(teacher="t", logprobs=(0.0, -1.5, -0.1), top=({}, {3: -0.5}, {})),)
    ledger = Ledger(tmp_path)
    fill(ledger, range(5))
    ledger.score(0, scores)
    ledger.score(1, (None,))
    ledger.take(0, [1, 3])
    ledger.drop(4, "too old")
    ledger.issue(Item(number=5, domain="e", index=0), version=7)
    before = dict(ledger.entries)
    ledger.close()
    again = Ledger(tmp_path)
    assert again.batches == {0: (1, 3)} and again.num_issued == 6
    assert again.num_issued_by == ledger.num_issued_by == {0: 5}
    assert {entry.item.number: entry for entry in again.open_entries()} == before
    assert again.entries[0].scores == scores and again.entries[1].scores == (None,)
    assert again.entries[3].group == group(3)  # of a batch: it may be trained on again
    assert [entry.item.number for entry in again.open_entries()] == [0, 2, 5]
    again.close()


def test_a_line_that_was_cut_is_dropped_and_written_over(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    fill(ledger, range(2))
    ledger.close()
    whole = ledger.path.read_bytes()
    for size in (1, 20, len(whole.splitlines()[-1])):
        ledger.path.write_bytes(whole[:-size])
        again = Ledger(tmp_path)
        assert again.entries[1].group is None and again.entries[0].group == group(0)
        again.finish(1, group(1))
        again.close()
        assert ledger.path.read_bytes() == whole


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    fill(ledger, range(2))
    ledger.close()
    lines = ledger.path.read_bytes().splitlines(keepends=True)
    lines[1] = lines[1].replace(b"trajectories", b"trajector")
    ledger.path.write_bytes(b"".join(lines))
    with pytest.raises(CheckpointError, match=r"line 2 of .*ledger.jsonl is not what was written"):
        Ledger(tmp_path)


def test_compacting_keeps_what_is_open_and_what_became_of_the_rest(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    fill(ledger, range(8))
    ledger.drop(7, "too old")
    for step in range(3):
        ledger.take(step, [2 * step, 2 * step + 1])
    before = ledger.path.stat().st_size
    ledger.compact(2)
    assert ledger.path.stat().st_size < before / 2
    ledger.issue(Item(number=8, domain="d", index=8), version=3)  # the file goes on
    ledger.close()
    again = Ledger(tmp_path)
    assert again.batches == {0: (0, 1), 1: (2, 3), 2: (4, 5)} and again.num_issued == 9
    assert sorted(again.entries) == [4, 5, 6, 8]
    assert again.entries[4].group == group(4)
    size = again.path.stat().st_size
    again.compact(2)  # nothing more to forget
    assert again.path.stat().st_size == size
    again.close()


def test_one_process_at_a_time(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    fill(ledger, range(2))
    ledger.take(0, [0, 1])
    ledger.compact(1)
    with pytest.raises(CheckpointError, match="in use by another process"):
        Ledger(tmp_path)
    ledger.close()
    Ledger(tmp_path).close()


WRITER = """
import sys
from pathlib import Path
from aprium.rl.ledger import Item, Ledger
from tests.rl.test_ledger import group
ledger = Ledger(Path(sys.argv[1]))
step = max(ledger.batches, default=-1) + 1
for entry in ledger.open_entries():
    if entry.group is None:
        ledger.finish(entry.item.number, group(entry.item.number))
print("begun", flush=True)
while True:
    numbers = [entry.item.number for entry in ledger.open_entries()]
    while len(numbers) < 4:
        number = ledger.num_issued
        ledger.issue(Item(number=number, domain="d", index=number), step)
        ledger.finish(number, group(number))
        numbers.append(number)
    ledger.take(step, numbers[:4])
    step += 1
    if step % 8 == 0:
        ledger.compact(step - 4)
"""


def test_killed_at_any_moment_no_item_is_lost_or_counts_twice(tmp_path: Path) -> None:
    for round_ in range(4):
        process = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(tmp_path)],
            stdout=subprocess.PIPE,
            cwd=Path(__file__).parents[2],
        )
        assert process.stdout is not None and process.stdout.readline() == b"begun\n"
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.02 + 0.03 * round_)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()
        ledger = Ledger(tmp_path)
        taken = [n for step in sorted(ledger.batches) for n in ledger.batches[step]]
        assert sorted(ledger.batches) == list(range(len(ledger.batches)))
        left = [entry.item.number for entry in ledger.open_entries()]
        assert sorted(taken + left) == list(range(ledger.num_issued))
        ledger.close()
    assert len(ledger.batches) > 8
