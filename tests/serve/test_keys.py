"""Keys are kept as hashes, and read from files."""

import pickle
from pathlib import Path

import pytest
from starlette.datastructures import Headers

from aprium.base.errors import ConfigError
from aprium.serve.keys import Keys, key_of, read_keys, share_of


def test_keys_are_not_kept() -> None:
    keys = Keys(["secret-one", "schlüssel"])
    assert keys.admits("secret-one") and keys.admits("schlüssel")
    assert not keys.admits("secret-on") and not keys.admits("")
    assert b"secret" not in pickle.dumps(vars(keys))
    assert not Keys([]) and not Keys([]).admits("")
    assert not Keys([""]).admits("")


def test_where_a_key_is() -> None:
    assert key_of(Headers({"authorization": "bearer  k "})) == "k"
    assert key_of(Headers({"x-api-key": "k"})) == "k"
    assert key_of(Headers({"authorization": "Basic x", "x-api-key": "k"})) == "k"
    assert key_of(Headers({})) == ""
    one, same = (
        share_of(Headers({"authorization": "Bearer k"})),
        share_of(Headers({"x-api-key": "k"})),
    )
    assert one == same != ""
    assert share_of(Headers({})) == ""


def test_key_files(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# people\na \n\n b\n")
    assert read_keys(file) == ("a", "b")
    file.write_text("# nobody\n")
    with pytest.raises(ConfigError, match="has no key"):
        read_keys(file)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_keys(tmp_path / "gone")
