"""What is shown of a mixture is what the loader gives, marked by weight; figures add up."""

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from aprium import cli
from aprium.base.errors import ApriumError
from aprium.data.inspect import inspect, read, styled
from aprium.data.loader import Loader
from aprium.data.sources import Text
from aprium.envs import families
from aprium.text.chat import ChatTemplate
from aprium.text.tokenizer import Tokenizer
from tests.family import write_tokenizer

RECIPE = """
tokenizer = "{0}"
tokens_per_step = 300
[data]
max_length = 100
shuffled_packs = 1
[[data.sources]]
kind = "chat"
name = "chat"
weight = 3.0
path = "{0}/chat.jsonl"
[[data.sources]]
kind = "text"
name = "text"
path = "{0}/text.jsonl"
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    write_tokenizer(tmp_path)
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"what is {i}?"},
                {"role": "assistant", "content": f"lazy dog {i}"},
            ]
        }
        for i in range(40)
    ]
    (tmp_path / "chat.jsonl").write_text("\n".join(map(json.dumps, rows)))
    texts = [json.dumps({"text": f"quick brown fox {i}"}) for i in range(40)]
    (tmp_path / "text.jsonl").write_text("\n".join(texts))
    (tmp_path / "recipe.toml").write_text(RECIPE.format(tmp_path))
    return tmp_path / "recipe.toml"


def test_recipe(recipe: Path) -> None:
    plan = read(recipe)
    console = Console(record=True, width=200, file=io.StringIO())
    found = inspect(plan, families, packs=2, measure=30, console=console)["data"]
    assert found["packs"] == 30 and 0.8 < found["efficiency"] <= 1
    assert found["sources"]["chat"]["share"] == pytest.approx(0.75, abs=0.05)
    assert found["sources"]["chat"]["wanted"] == 0.75
    assert sum(s["tokens"] for s in found["sources"].values()) == found["tokens"]
    shown = console.export_text()
    folder = recipe.parent
    text = Text(Tokenizer.load(folder), ChatTemplate.load(folder), families)
    first = Loader(plan.mixtures["data"], text, tokens_per_batch=300).next_batch()
    place = 0
    for sample in first:
        assert (place := shown.index(styled(sample, text.tokenizer).plain.splitlines()[0], place))
        spans = styled(sample, text.tokenizer).spans
        green = [s for s in spans if "green" in str(s.style)]
        said = [styled(sample, text.tokenizer).plain[s.start : s.end] for s in green]
        if sample.domain == "chat":
            assert len(said) == 1 and said[0].startswith("lazy dog") and "<|im_end|>" in said[0]


def test_command(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = recipe.parent
    file = str(folder / "chat.jsonl")
    options = ["--tokenizer", str(folder), "--measure", "5", "--tokens", "400"]
    assert cli.main(["data", "inspect", file, *options, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["data"]
    assert found["packs"] == 5 and list(found["sources"]) == ["chat"]
    assert cli.main(["data", "inspect", str(recipe), "--packs", "1", "--measure", "2"]) == 0
    assert "pack 1" in capsys.readouterr().out


def test_a_file_of_tokens_and_weights(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = recipe.parent / "written.jsonl"
    rows = [{"tokens": [20, 21, 30 + i], "weights": [0, 0, 1], "reward": 1.0} for i in range(40)]
    file.write_text("\n".join(map(json.dumps, rows)))
    options = ["--tokenizer", str(recipe.parent), "--measure", "3", "--tokens", "30", "--json"]
    assert cli.main(["data", "inspect", str(file), *options]) == 0
    found = json.loads(capsys.readouterr().out)["data"]
    assert found["tokens"] == 90 and found["sources"]["written"]["learnt"] == 30


def test_names_of_sources_may_hold_a_slash(recipe: Path) -> None:
    (recipe.parent / "words.txt").write_text(" ".join(f"word{c}" for c in "abcdefghijkl"))
    text = recipe.read_text().replace('name = "chat"', 'name = "a/b"')
    tasks = '[[data.sources]]\nkind = "tasks"\nname = "a"\nfamilies = ["add"]\nwords = "{}"\n'
    recipe.write_text(text + tasks.format(recipe.parent / "words.txt"))
    plan = read(recipe, tokens=600, overrides={"data.max_length": 500})
    found = inspect(plan, families, packs=0, measure=20, console=Console())["data"]
    for source in found["sources"].values():
        assert source["learnt"] > 0
        assert source["share"] == pytest.approx(source["wanted"], abs=0.1)
    assert sum(s["tokens"] for s in found["sources"].values()) == found["tokens"]


def test_what_is_missing_is_named(recipe: Path) -> None:
    folder = recipe.parent
    (folder / "odd.jsonl").write_text('{"a": 1}')
    (folder / "empty.toml").write_text("x = 1")
    for file, options, message in (
        ("chat.jsonl", {}, "give --tokenizer"),
        ("odd.jsonl", {"tokenizer": str(folder)}, "line 1: it has neither"),
        ("empty.toml", {}, "no table data"),
        ("recipe.toml", {"max_length": 5}, "--set data.max_length"),
        ("chat.jsonl", {"overrides": {"a": 1}}, "is no recipe"),
        ("recipe.toml", {"overrides": {"data.typo": 1}}, "unknown key data.typo"),
        ("recipe.toml", {"overrides": {"tokens_per_step": "x"}}, "must be an integer"),
    ):
        with pytest.raises(ApriumError, match=message):
            read(folder / file, **options)
