"""Finding a checkpoint: directories, the bundled model, hub ids, and what is said otherwise."""

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from aprium.base.errors import CheckpointError
from aprium.checkpoint import hub
from aprium.checkpoint.load import load_checkpoint


def test_a_directory_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "name").mkdir(parents=True)
    assert hub.resolve("owner/name").samefile(tmp_path / "owner" / "name")
    (tmp_path / "pico").mkdir()
    assert hub.resolve("pico").samefile(tmp_path / "pico")


def test_pico_is_in_the_package(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub, "PICO_DIR", tmp_path / "files")
    with pytest.raises(CheckpointError, match="not in this installation"):
        hub.resolve("pico")
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "config.json").write_text("{}")
    assert hub.resolve("pico") == tmp_path / "files"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("nano", "preset without weights"),
        ("no-such", "neither a directory, nor 'pico', nor a hub id"),
        ("a/b/c", "neither a directory"),
        ("/no/such", "neither a directory"),
    ],
)
def test_names_that_lead_nowhere(name, words):
    with pytest.raises(CheckpointError, match=words):
        load_checkpoint(name)


def test_a_file_is_not_a_checkpoint(tmp_path):
    (tmp_path / "x.safetensors").write_text("")
    with pytest.raises(CheckpointError, match="is a file"):
        hub.resolve(tmp_path / "x.safetensors")


def test_dummy_of_an_unknown_preset():
    with pytest.raises(CheckpointError, match=r"'nono'.*nano-nvfp4"):
        load_checkpoint("nono", load_format="dummy")


def test_offline_is_one_sentence(monkeypatch):
    def refuse(*args, **kwargs):
        raise LocalEntryNotFoundError("a long story\nover several lines")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(CheckpointError, match=r"cannot download 'owner/name'.*go online") as raised:
        hub.resolve("owner/name")
    assert "\n" not in str(raised.value)


def test_only_weights_and_texts_are_downloaded(monkeypatch, tmp_path):
    asked = {}

    def download(repo_id, **kwargs):
        asked[repo_id] = kwargs["allow_patterns"]
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert hub.resolve("owner/name") == tmp_path
    assert sorted(asked["owner/name"]) == ["*.jinja", "*.json", "*.safetensors", "*.txt"]
