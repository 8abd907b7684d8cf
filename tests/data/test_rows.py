"""Rows of files by number, errors that say where, and an order that takes each row once."""

import json
from pathlib import Path

import pyarrow
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from aprium.base.errors import DataError
from aprium.data import rows as rows_module
from aprium.data.rows import Order, Rows, find_files, read_all


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two JSONL files with blank lines and one Parquet file of three row groups: rows 0..24."""
    lines = [json.dumps({"n": i, "text": "é" * i}) for i in range(15)]
    (tmp_path / "a.jsonl").write_text("\n" + "\n\n".join(lines[:6]) + "\n", encoding="utf-8")
    (tmp_path / "b.jsonl").write_text("\n".join(lines[6:]), encoding="utf-8")
    table = pyarrow.table({"n": list(range(15, 25)), "text": ["é" * i for i in range(15, 25)]})
    parquet.write_table(table, tmp_path / "c.parquet", row_group_size=4)
    return tmp_path


def test_rows_of_all_files_by_number(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows_module, "LINES_PER_BLOCK", 4)
    rows = Rows([folder / "[ab].jsonl", folder / "c.parquet"])
    assert rows.blocks == [4, 2, 4, 4, 1, 4, 4, 2]
    for number in (*range(25), 3, 24, 15):
        assert rows[number].data == {"n": number, "text": "é" * number}
    for number in (-1, 25):
        with pytest.raises(IndexError):
            rows[number]
    assert [row["n"] for row in read_all(folder / "b.jsonl")] == list(range(6, 15))
    assert find_files(folder / "*.jsonl") == [folder / "a.jsonl", folder / "b.jsonl"]


def odd_columns() -> pyarrow.Table:
    """Return a column of text beside four whose values have no form in Python."""
    offsets = pyarrow.py_buffer(b"\0\0\0\0\1\0\0\0\2\0\0\0")
    bad = pyarrow.Array.from_buffers(
        pyarrow.string(), 2, [None, offsets, pyarrow.py_buffer(b"\xff\xfe")]
    )
    columns = {
        "text": ["a", "b"],
        "time": pyarrow.array([1, 2], pyarrow.timestamp("ns")),
        "span": pyarrow.array([1, 2], pyarrow.duration("ns")),
        "far": pyarrow.array([10**12, 2], pyarrow.timestamp("s")),
        "bad": bad,
    }
    return pyarrow.table(columns)


def test_columns_that_are_not_used_do_not_matter(tmp_path: Path) -> None:
    parquet.write_table(odd_columns(), tmp_path / "a.parquet")
    rows = Rows([tmp_path / "a.parquet"], ("text", "tools"))
    assert [rows[i].data for i in range(2)] == [{"text": "a"}, {"text": "b"}]
    assert rows[0].unread == ("time", "span", "far", "bad")
    assert Rows([tmp_path / "a.parquet"], ("other",))[1].data == {}
    for column in rows[0].unread:
        with pytest.raises(DataError, match=r"a\.parquet, row 1: "):
            Rows([tmp_path / "a.parquet"], (column,))[0]


def test_where_names_file_and_line(folder: Path) -> None:
    rows = Rows([folder / "a.jsonl", folder / "c.parquet"])
    assert rows[0].where == f"{folder / 'a.jsonl'}, line 2"
    assert rows[5].where == f"{folder / 'a.jsonl'}, line 12"
    assert rows[7].where == f"{folder / 'c.parquet'}, row 2"


def test_bad_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n\n{\n[1]\n')
    rows = Rows([tmp_path / "bad.jsonl"])
    with pytest.raises(DataError, match=r"bad.jsonl, line 3: not JSON"):
        rows[1]
    with pytest.raises(DataError, match=r"bad.jsonl, line 4: not a JSON object"):
        rows[2]
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "bad.parquet").write_text("not parquet")
    for name, message in (
        ("none.jsonl", "no such file"),
        ("*.csv", "no file matches"),
        ("x**.jsonl", r"x\*\*\.jsonl is no glob pattern: .*entire path component"),
        ("", "it is a directory"),
        ("empty.jsonl", "no rows"),
        ("bad.parquet", "as Parquet"),
    ):
        with pytest.raises(DataError, match=message):
            Rows([tmp_path / name])


@given(st.lists(st.integers(1, 30), min_size=1, max_size=40), st.integers(0, 3))
def test_order_takes_each_row_once_each_time(blocks: list[int], epoch: int) -> None:
    total = sum(blocks)
    order = Order(blocks, "key")
    taken = [order.row(epoch * total + i) for i in range(total)]
    assert sorted(taken) == list(range(total))
    again = Order(blocks, "key")
    assert [again.row(epoch * total + i) for i in reversed(range(total))] == taken[::-1]


def test_orders_differ_by_epoch_and_key() -> None:
    def taken(key: str, epoch: int) -> list[int]:
        order = Order([100] * 20, key)
        return [order.row(epoch * 2000 + i) for i in range(2000)]

    first = taken("a", 0)
    assert first != taken("a", 1) and first != taken("b", 0)
    # A window of eight blocks is mixed: neighbours come from different blocks.
    assert len({row // 100 for row in first[:40]}) == 8
