"""A trained tokenizer keeps every text, splits as it should, and opens in transformers as here."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aprium import cli
from aprium.base.errors import DataError
from aprium.base.records import Message
from aprium.data.bpe import SPECIAL, read_texts, train
from aprium.text.chat import ChatTemplate
from aprium.text.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bpe")
    lines = [f"The quick brown fox jumpsOver the lazy dog {i} times, don't it?" for i in range(300)]
    (folder / "a.txt").write_text("\n".join(lines), encoding="utf-8")
    rows = [{"text": f"naïve café number {i}"} for i in range(150)]
    rows += [{"messages": [{"role": "user", "content": f"hello {i}"}]} for i in range(50)]
    (folder / "b.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    arguments = ["data", "tokenizer", str(folder / "a.txt"), str(folder / "*.jsonl")]
    assert cli.main([*arguments, "--vocab-size", "320", "--output", str(folder / "out")]) == 0
    return folder / "out"


@given(text=st.text(alphabet=st.characters(exclude_categories=["Cs"])))
def test_round_trip(text: str, folder: Path) -> None:
    tokenizer = Tokenizer.load(folder)
    assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=False) == text


def test_tokens_and_template(folder: Path) -> None:
    tokenizer = Tokenizer.load(folder)
    assert tokenizer.vocab_size == 320 and tokenizer.eos_token_ids == (2, 11)
    assert [tokenizer.id_of(token) for token in SPECIAL] == list(range(16))
    pieces = [tokenizer.decode([i]) for i in tokenizer.encode(" quick 2024")]
    assert pieces == [" quick", " ", "2", "0", "2", "4"]
    # A change of case begins a token, though the two stood together in all of the text.
    camel = [tokenizer.decode([i]) for i in tokenizer.encode("jumpsOver")]
    assert "".join(camel) == "jumpsOver"
    assert any("".join(camel[:i]) == "jumps" for i in range(len(camel)))
    prompt = ChatTemplate.load(folder).render([Message(role="user", content="hi")])
    assert prompt.endswith("<|im_start|>assistant\n<think>\n")


def test_transformers_agrees(folder: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    other, mine = PreTrainedTokenizerFast.from_pretrained(folder), Tokenizer.load(folder)
    text = "The quick café 123<|im_end|>\n<think>"
    assert other.encode(text, add_special_tokens=False) == mine.encode(text)
    assert other.eos_token_id == 11
    messages = [{"role": "user", "content": "hi"}]
    shown = other.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert shown == ChatTemplate.load(folder).render([Message(role="user", content="hi")])


def test_limits_and_errors(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("abc\n" * 10)
    (tmp_path / "b.jsonl").write_text('{"text": "de"}\n{"a": 1}')
    assert list(read_texts([tmp_path / "b.jsonl"], max_bytes=2)) == ["de"]
    with pytest.raises(DataError, match=r"b\.jsonl, line 2: it has neither"):
        list(read_texts([tmp_path / "b.jsonl"]))
    with pytest.raises(DataError, match="vocab_size is 271: it must be at least 272"):
        train([tmp_path / "a.txt"], tmp_path / "out", vocab_size=271)
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(DataError, match="no text to train on"):
        train([tmp_path / "a.txt"], tmp_path / "out", vocab_size=300)


def test_output_that_cannot_be_written_is_told(folder: Path) -> None:
    with pytest.raises(DataError, match="cannot write the tokenizer"):
        train([folder.parent / "a.txt"], folder / "tokenizer.json", vocab_size=300)
