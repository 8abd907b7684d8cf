"""Files that are whole or not there."""

import os
from pathlib import Path

import pytest

from aprium.base.files import remove_durably, write_durably


def test_a_file_is_replaced_whole_and_is_its_owners(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"before")
    write_durably(path, b"after")
    assert path.read_bytes() == b"after" and path.stat().st_mode & 0o777 == 0o600
    remove_durably(path, tmp_path / "missing")
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_what_cannot_be_written_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "no space left")

    path = tmp_path / "a"
    path.write_bytes(b"before")
    monkeypatch.setattr(os if call == "fsync" else Path, call, fail)
    with pytest.raises(OSError, match="no space"):
        write_durably(path, b"after")
    monkeypatch.undo()
    assert path.read_bytes() == b"before" and [*tmp_path.iterdir()] == [path]
