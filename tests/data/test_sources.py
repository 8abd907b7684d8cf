"""Sources: masks, cutting of documents, determinism, resuming, the mixture's shares."""

import dataclasses
import json
from pathlib import Path

import pytest

from aprium.base.config import from_dict
from aprium.base.errors import ConfigError, DataError
from aprium.base.records import Message
from aprium.data.loader import Loader
from aprium.data.sources import (
    DataConfig,
    SourceConfig,
    Text,
    TextSource,
    conversation,
    heldout_samples,
)
from aprium.envs import families
from aprium.text.chat import ChatTemplate
from aprium.text.tokenizer import Tokenizer
from tests.family import write_tokenizer

RECIPE = Path(__file__).parents[2] / "recipes" / "pico"


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Text:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return Text(Tokenizer.load(folder), ChatTemplate.load(RECIPE), families)


@pytest.fixture
def config(tmp_path: Path) -> DataConfig:
    rows = [{"text": f"document {i} " + "word " * (i % 40)} for i in range(30)]
    (tmp_path / "text.jsonl").write_text("\n".join(map(json.dumps, rows)))
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    (tmp_path / "chat.jsonl").write_text(json.dumps({"messages": chat}))
    (tmp_path / "words.txt").write_text(" ".join(f"word{c}" for c in "abcdefghijkl"))
    data = {
        "max_length": 400,
        "heldout_samples": 5,
        "sources": [
            {
                "kind": "text",
                "name": "text",
                "weight": 0.5,
                "path": str(tmp_path / "text.jsonl"),
                "heldout": str(tmp_path / "text.jsonl"),
            },
            {"kind": "chat", "name": "chat", "weight": 0.1, "path": str(tmp_path / "chat.jsonl")},
            {
                "kind": "tasks",
                "name": "tasks",
                "weight": 0.4,
                "words": str(tmp_path / "words.txt"),
                "families": ["add", "sort", "words"],
            },
        ],
    }
    return from_dict(DataConfig, data)


def learnt(sample, text: Text) -> tuple[str, str]:
    """Return the text before the weighted tokens and the weighted text."""
    split = sample.ce_weight.index(1.0)
    assert set(sample.ce_weight[split:]) == {1.0}
    tokenizer, tokens = text.tokenizer, list(sample.tokens)
    return tuple(
        tokenizer.decode(part, skip_special_tokens=False)
        for part in (tokens[:split], tokens[split:])
    )


def test_masks_and_thinking_forms(text: Text) -> None:
    user = Message(role="user", content="2+2?")
    worked = Message(role="assistant", content="4", reasoning="2+2=4")
    plain = Message(role="assistant", content="4")
    start = (
        "<|im_start|>system\n<|im_end|>\n<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n"
    )
    cases = (
        (worked, True, "<think>\n", "2+2=4</think>4<|im_end|>\n"),
        (plain, True, "<think>\n", "</think>4<|im_end|>\n"),
        (plain, False, "<think></think>", "4<|im_end|>\n"),
    )
    for reply, thinking, tail, target in cases:
        sample = conversation([user, reply], text, "d", thinking=thinking)
        assert learnt(sample, text) == (start + tail, target)
    # Only the last turn is learnt, and the one before has lost its reasoning.
    sample = conversation([user, worked, user, worked], text, "d")
    before, target = learnt(sample, text)
    assert "<think></think>4<|im_end|>" in before and target == "2+2=4</think>4<|im_end|>\n"
    with pytest.raises(DataError, match="must end with an assistant turn"):
        conversation([user], text, "d")


def test_long_documents_are_cut_and_every_token_predicted_once(text: Text, tmp_path: Path) -> None:
    document = "the quick brown fox " * 30
    (tmp_path / "t.jsonl").write_text(json.dumps({"text": document}))
    source = TextSource("t", tmp_path / "t.jsonl", text, max_length=16, seed=0)
    expected = [*text.tokenizer.encode(document), 2]
    pieces = sorted((source.sample(i) for i in range(len(source))), key=lambda s: s.tokens)
    assert all(len(s.tokens) <= 16 for s in pieces)
    assert sum(sum(s.ce_weight) for s in pieces) == len(expected) - 1


def test_stream_is_deterministic_and_resumes_exactly(config: DataConfig, text: Text) -> None:
    straight = Loader(config, text, tokens_per_batch=500)
    batches = [straight.next_batch() for _ in range(12)]
    first = Loader(config, text, tokens_per_batch=500)
    for _ in range(5):
        first.next_batch()
    state = json.loads(json.dumps(first.state_dict()))
    second = Loader(config, text, tokens_per_batch=500)
    second.load_state_dict(state)
    assert [second.next_batch() for _ in range(7)] == batches[5:]
    assert all(sum(len(s.tokens) for s in b) <= 500 for b in batches)


def test_shares_are_of_tokens(config: DataConfig, text: Text) -> None:
    loader = Loader(config, text, tokens_per_batch=500)
    counts: dict[str, int] = {}
    for _ in range(100):
        for sample in loader.next_batch():
            source = sample.domain.split("/")[0]
            counts[source] = counts.get(source, 0) + len(sample.tokens)
    total = sum(counts.values())
    for source, share in (("text", 0.5), ("chat", 0.1), ("tasks", 0.4)):
        assert counts[source] / total == pytest.approx(share, abs=0.02)


def test_heldout(config: DataConfig, text: Text) -> None:
    domains = {s.domain.split("/")[0] for s in heldout_samples(config, text)}
    assert domains == {"text", "tasks"}


def test_errors_name_file_and_line(config: DataConfig, text: Text, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"unknown key sources\[0\].typo"):
        from_dict(DataConfig, {"sources": [{"kind": "text", "name": "x", "typo": 1}]})
    bad = dataclasses.replace(config.sources[2], families=("juggle",))
    with pytest.raises(DataError, match="no task family 'juggle'"):
        Loader(DataConfig(sources=(bad,)), text, tokens_per_batch=500)
    with pytest.raises(DataError, match="no families are at hand"):
        bare = Text(text.tokenizer, text.template)
        Loader(config, bare, tokens_per_batch=500)
    with pytest.raises(DataError, match="needs path"):
        SourceConfig(kind="text", name="x")
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n{')
    with pytest.raises(DataError, match=r"bad.jsonl, line 2"):
        TextSource("x", tmp_path / "bad.jsonl", text, 16, 0)
    with pytest.raises(DataError, match="cannot read"):
        TextSource("x", tmp_path / "none.jsonl", text, 16, 0)
