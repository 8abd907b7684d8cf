"""A trained tokenizer keeps every text, splits as it should, and opens in transformers as here."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aprium import cli
from aprium.base.errors import DataError
from aprium.base.records import Message
from aprium.data.bpe import SPECIAL, _hold_out, read_texts, train
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
    assert list(read_texts([tmp_path / "b.jsonl"], max_bytes=1)) == ["d"]
    (tmp_path / "c.txt").write_text("aé")
    assert list(read_texts([tmp_path / "c.txt"], max_bytes=2)) == ["a"]
    with pytest.raises(DataError, match=r"b\.jsonl, line 2: it has neither"):
        list(read_texts([tmp_path / "b.jsonl"]))
    with pytest.raises(DataError, match="vocab_size is 271: it must be at least 272"):
        train([tmp_path / "a.txt"], tmp_path / "out", vocab_size=271)
    with pytest.raises(DataError, match="vocab_size is 1000000000000000: it must be at most"):
        train([tmp_path / "a.txt"], tmp_path / "out", vocab_size=10**15)
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(DataError, match="no text to train on"):
        train([tmp_path / "a.txt"], tmp_path / "out", vocab_size=300)


def by_hash(text: str) -> bool:
    """Return whether `text` is one to be held out."""
    held: list[str] = []
    list(_hold_out(["first", "second", text, "last"], held))
    return text in held


def test_a_small_plain_text_is_learnt_and_measured(tmp_path: Path) -> None:
    held = next(text for i in range(999) if by_hash(text := f"jumping {i} " * 40))
    (tmp_path / "a.txt").write_text(held)
    found = train([tmp_path / "a.txt"], tmp_path / "out", vocab_size=300)
    assert found["vocab_size"] > 272 and "bytes_per_token" not in found
    (tmp_path / "a.txt").write_text("jumping over\n" * 700)
    found = train([tmp_path / "a.txt"], tmp_path / "out", vocab_size=300)
    assert found["vocab_size"] > 272 and found["bytes_per_token"] > 1.5


@given(st.lists(st.text(max_size=3) | st.sampled_from(list(filter(by_hash, map(str, range(999)))))))
def test_no_text_is_lost_between_what_is_learnt_and_held_out(texts: list[str]) -> None:
    held: list[str] = []
    learnt = list(_hold_out(iter(texts), held))
    assert sorted(learnt + held) == sorted(texts)
    assert bool(learnt) == bool(texts) and bool(held) == (len(texts) > 1)


def test_lone_surrogates_are_read_as_the_tokenizer_reads_them(tmp_path: Path) -> None:
    rows = ['{"text": "a\\ud800b"}', '{"messages": [{"content": "\\ud800"}]}', '{"text": ""}']
    (tmp_path / "a.jsonl").write_text("\n".join(rows))
    assert list(read_texts([tmp_path / "a.jsonl"])) == ["a?b", "?"]
    found = train([tmp_path / "a.jsonl"], tmp_path / "out", vocab_size=300)
    assert found["texts"] == 2 and found["bytes"] == 4


def test_output_that_cannot_be_written_is_told(folder: Path) -> None:
    with pytest.raises(DataError, match="cannot write the tokenizer"):
        train([folder.parent / "a.txt"], folder / "tokenizer.json", vocab_size=300)
