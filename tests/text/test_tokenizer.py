"""The tokenizer against the library it wraps, and its incremental decoder against the whole."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models

from aprium.base.errors import CheckpointError
from aprium.text.tokenizer import Tokenizer
from tests import family


@given(st.text())
def test_text_round_trips(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=False) == text


@given(st.lists(st.integers(0, 420)), st.data())
def test_stream_equals_whole_and_library(
    tokenizer: Tokenizer, directory: Path, ids: list[int], data: st.DataObject
) -> None:
    stream, text, rest = tokenizer.stream(), "", list(ids)
    while rest:
        size = data.draw(st.integers(1, len(rest)))
        text += stream.push(rest[:size])
        rest = rest[size:]
    text += stream.flush()
    assert text == tokenizer.decode(ids)
    backend = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    assert tokenizer.decode(ids, False) == backend.decode(ids, skip_special_tokens=False)


def test_stream_holds_back_half_a_character(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("€")
    assert len(ids) == 3
    stream = tokenizer.stream()
    assert [stream.push([id]) for id in ids] == ["", "", "€"]
    assert stream.push(ids[:1]) == ""
    assert stream.flush() == "\ufffd"


def test_special_ids_and_tags(tokenizer: Tokenizer) -> None:
    names = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", *family.TAGS]
    assert [tokenizer.id_of(name) for name in names] == [0, 1, 2, 10, 11, 12, 13, 14, 15]
    ids = tokenizer.encode("<|im_start|>a<think>b</think><tool_call>c</tool_call><|im_end|>")
    assert tokenizer.decode(ids) == "a<think>b</think><tool_call>c</tool_call>"
    assert tokenizer.id_of("no such token") is None


def test_end_tokens_are_the_union(tokenizer: Tokenizer, tmp_path: Path) -> None:
    assert tokenizer.eos_token_ids == (2, 11)
    family.write_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 2}))
    assert Tokenizer.load(tmp_path).eos_token_ids == (2, 11)
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": "2"}))
    with pytest.raises(CheckpointError, match="eos_token_id is '2'"):
        Tokenizer.load(tmp_path)


def test_vocabularies_are_compared_token_by_token(tokenizer: Tokenizer, tmp_path: Path) -> None:
    assert tokenizer.first_difference(tokenizer) is None
    family.write_tokenizer(tmp_path, vocab_size=tokenizer.vocab_size - 3)
    shorter = Tokenizer.load(tmp_path)
    assert tokenizer.first_difference(shorter) == shorter.vocab_size
    assert shorter.first_difference(tokenizer) == shorter.vocab_size


def test_a_lone_surrogate_is_replaced(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode(tokenizer.encode("a\ud800b")) == "a?b"


def test_missing_and_damaged_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"tokenizer\.json does not exist: copy"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json cannot be read"):
        Tokenizer.load(tmp_path)
    family.write_tokenizer(tmp_path)
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(CheckpointError, match=r"config\.json holds a list"):
        Tokenizer.load(tmp_path)


def test_other_decoders_are_refused() -> None:
    backend = tokenizers.Tokenizer(models.BPE())
    backend.decoder = decoders.Metaspace()
    with pytest.raises(CheckpointError, match="Metaspace"):
        Tokenizer(backend)


def test_import_is_light() -> None:
    code = (
        "import sys, aprium.text.tokenizer, aprium.text.chat, aprium.text.parse\n"
        "print([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
