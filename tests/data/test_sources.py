"""Sources: masks, cutting of documents, determinism, resuming, the mixture's shares."""

import dataclasses
import itertools
import json
import random
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from aprium.base.config import from_dict
from aprium.base.errors import ConfigError, DataError
from aprium.base.records import Sample
from aprium.data import sources
from aprium.data.loader import Alternation, Loader, Repeated
from aprium.data.rows import Rows
from aprium.data.sources import (
    ChatSource,
    DataConfig,
    Mixture,
    SampleSource,
    SourceConfig,
    Text,
    TextSource,
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
    chats = [
        [{"role": "user", "content": f"hi {i}"}, {"role": "assistant", "content": "hello"}]
        for i in range(20)
    ]
    (tmp_path / "chat.jsonl").write_text("\n".join(json.dumps({"messages": c}) for c in chats))
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


def test_long_documents_are_cut_and_every_token_predicted_once(text: Text, tmp_path: Path) -> None:
    document = "the quick brown fox " * 30
    (tmp_path / "t.jsonl").write_text(json.dumps({"text": document}))
    config = SourceConfig(kind="text", name="t", path=tmp_path / "t.jsonl")
    data = DataConfig(sources=(config,), max_length=16)
    pieces = TextSource(config, Rows([tmp_path / "t.jsonl"]), text, data).read(0)
    expected = [*text.tokenizer.encode(document), 2]
    assert all(len(s.tokens) <= 16 for s in pieces)
    assert sum(sum(s.ce_weight) for s in pieces) == len(expected) - 1
    joined = [pieces[0].tokens[0], *(t for s in pieces for t in s.tokens[1:])]
    assert joined == expected


def test_cutting_is_said_once(text: Text, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[str] = []
    monkeypatch.setattr(sources.log, "warning", lambda words, *args: found.append(words % args))
    rows = [{"text": "quick"}, *({"text": "quick brown " * 20} for _ in range(3))]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = SourceConfig(kind="text", name="t", path=tmp_path / "t.jsonl")
    for longest, said in ((16, 1), (400, 0)):
        found.clear()
        mixture = Mixture(DataConfig(sources=(config,), max_length=longest), text)
        [mixture.draw() for _ in range(30)]
        assert len(found) == said
        assert all("over max_length 16" in words and "t.jsonl, line" in words for words in found)


def test_long_documents_are_read_side_by_side(text: Text, tmp_path: Path) -> None:
    rows = [{"text": f"{i} " * 40} for i in range(6)]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = SourceConfig(kind="text", name="t", path=tmp_path / "t.jsonl")
    mixture = Mixture(DataConfig(sources=(config,), max_length=16), text)
    places = [mixture.draw()[0] for _ in range(60)]
    assert len(set(places)) == 60
    assert len({row for _, row, _ in places[:6]}) == 6
    parts: dict[int, list[int]] = {}
    for _, row, part in places:
        parts.setdefault(row, []).append(part)
    assert all(found == list(range(len(found))) for found in parts.values())


def sample_source(folder: Path, text: Text, rows: list[Any], **options: Any) -> SampleSource:
    (folder / "s.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = SourceConfig(kind="samples", name="s", path=folder / "s.jsonl", **options)
    data = DataConfig(sources=(config,), max_length=4)
    return SampleSource(config, Rows([folder / "s.jsonl"]), text, data)


def test_samples_are_what_was_written(text: Text, tmp_path: Path) -> None:
    rows = [{"tokens": [20, 30, 40], "weights": [1, 0, 0.5], "reward": 1.0}]
    (found,) = sample_source(tmp_path, text, rows).read(0)
    # Nothing predicts the first token.
    assert found == Sample(tokens=(20, 30, 40), ce_weight=(0.0, 0.0, 0.5), domain="s")
    assert not sample_source(tmp_path, text, [{"tokens": [20, 30], "weights": [1, 0]}]).read(0)
    long = [{"tokens": [20] * 5, "weights": [1] * 5}]
    assert not sample_source(tmp_path, text, long, too_long="skip").read(0)
    for row, words in (
        (long[0], "a sample of 5 tokens is over max_length 4"),
        ({"tokens": [20, 30], "weights": [1]}, "two lists of one length"),
        ({"text": "x"}, "two lists of one length"),
        ({"tokens": [20, 9999], "weights": [0, 1]}, "token 9999 is none of the"),
        ({"tokens": [20, True], "weights": [0, 1]}, "token True is none of the"),
        ({"tokens": [20, 30], "weights": [0, "1"]}, "line 1: weight '1' is not a number"),
        ({"tokens": [20, 30], "weights": [0, None]}, "weight None is not a number"),
        ({"tokens": [20, 30], "weights": [0, float("nan")]}, "weight nan is not a number"),
        ({"tokens": [20, 30], "weights": [-1, -1]}, r"weight -1 is not a number in 0\.\."),
        ({"tokens": [20, 30], "weights": [0, 1e300]}, r"weight 1e\+300 is not"),
        ({"tokens": [20, 30], "weights": [0, 10**400]}, "weight 10000"),
    ):
        with pytest.raises(DataError, match=words):
            sample_source(tmp_path, text, [row]).read(0)
    with pytest.raises(DataError, match="learn means nothing for kind 'samples'"):
        SourceConfig(kind="samples", name="s", path=tmp_path / "s.jsonl", learn="last")


def test_samples_are_drawn_like_any_other_source(text: Text, tmp_path: Path) -> None:
    rows = [{"tokens": [20, 30 + i], "weights": [0, 1]} for i in range(4)]
    (tmp_path / "s.jsonl").write_text("\n".join(map(json.dumps, rows)))
    path = tmp_path / "s.jsonl"
    source = SourceConfig(kind="samples", name="s", path=path, heldout=path)
    config = DataConfig(sources=(source,), max_length=4)
    mixture = Mixture(config, text)
    assert {mixture.draw()[1].tokens[1] for _ in range(4)} == {30, 31, 32, 33}
    assert len(heldout_samples(config, text)) == 4


CHAT = [
    {"role": "user", "content": "2?"},
    {"role": "assistant", "content": "4", "reasoning_content": "quick brown fox"},
    {"role": "user", "content": "3?"},
    {"role": "assistant", "content": "5", "reasoning_content": None},
]


def chat_source(folder: Path, text: Text, name: str = "c.jsonl", **options: Any) -> ChatSource:
    config = SourceConfig(kind="chat", name="c", path=folder / name, **options)
    data = DataConfig(sources=(config,), max_length=400)
    return ChatSource(config, Rows([folder / name]), text, data)


def test_chat_of_both_formats_is_the_same(text: Text, tmp_path: Path) -> None:
    tools = [{"type": "function", "function": {"name": "look", "parameters": {"properties": {}}}}]
    call = {"id": "1", "type": "function", "function": {"name": "look", "arguments": "{}"}}
    messages = [
        {"role": "user", "content": "2?", "tool_calls": None, "tool_call_id": None},
        {"role": "assistant", "content": None, "tool_calls": [call], "tool_call_id": None},
        {"role": "tool", "content": "4", "tool_calls": None, "tool_call_id": "1"},
        {"role": "assistant", "content": "It is 4.", "tool_calls": None, "tool_call_id": None},
    ]
    row = {"messages": messages, "tools": json.dumps(tools)}
    (tmp_path / "c.jsonl").write_text(json.dumps({"messages": messages, "tools": tools}))
    parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / "c.parquet")
    one, other = (chat_source(tmp_path, text, name).read(0) for name in ("c.jsonl", "c.parquet"))
    assert one == other and len(one) == 1
    shown = text.tokenizer.decode(one[0].tokens, skip_special_tokens=False)
    assert "<name>look</name>" in shown and "<function=look>" in shown
    learnt = [t for t, w in zip(one[0].tokens, one[0].ce_weight, strict=True) if w]
    said = text.tokenizer.decode(learnt, skip_special_tokens=False)
    assert "<function=look>" in said and "It is 4." in said and "tool_response" not in said


def test_other_columns_of_parquet_are_left_alone(text: Text, tmp_path: Path) -> None:
    rows = {"messages": [CHAT[:2]], "time": pyarrow.array([1], pyarrow.timestamp("ns"))}
    parquet.write_table(pyarrow.table(rows), tmp_path / "c.parquet")
    config = SourceConfig(kind="chat", name="c", path=tmp_path / "c.parquet")
    assert Mixture(DataConfig(sources=(config,)), text).draw()[1].domain == "c"
    config = dataclasses.replace(config, field="turns")
    with pytest.raises(DataError, match="it has no 'turns', but 'messages', 'time'"):
        Mixture(DataConfig(sources=(config,)), text).draw()


def test_shares_of_thinking_and_of_cut_reasoning(text: Text, tmp_path: Path) -> None:
    (tmp_path / "c.jsonl").write_text(json.dumps({"messages": CHAT[:2]}))
    close = text.tokenizer.id_of("</think>")

    def masked(source: ChatSource) -> list[bool]:
        """Return, for each conversation with an open tag, whether the closing one is masked."""
        found = []
        for number in range(300):
            (sample,) = source.read(number)
            assert source.read(number) == [sample]
            first = sample.ce_weight.index(1.0)
            if close in sample.tokens[first - 1 :]:
                place = sample.tokens.index(close, first - 1)
                found += [sample.ce_weight[place] == 0.0] * (place >= first or place == first - 1)
        return found

    assert masked(chat_source(tmp_path, text)) == [False] * 300
    assert 180 < sum(masked(chat_source(tmp_path, text, thinking=1.0, cut=0.75))) < 270
    off = chat_source(tmp_path, text, thinking=0.25)
    shown = [text.tokenizer.decode(off.read(i)[0].tokens, False) for i in range(300)]
    assert 45 < sum("quick brown" in t for t in shown) < 105
    assert all("<think></think>4" in t for t in shown if "quick brown" not in t)


def test_a_turn_of_weight_0_is_shown_and_not_learnt(text: Text, tmp_path: Path) -> None:
    messages = [CHAT[0], CHAT[1] | {"weight": 0}, *CHAT[2:]]
    (tmp_path / "c.jsonl").write_text(json.dumps({"messages": messages}))
    (sample,) = chat_source(tmp_path, text).read(0)
    learnt = [t for t, w in zip(sample.tokens, sample.ce_weight, strict=True) if w]
    assert text.tokenizer.decode(learnt) == "5"


def test_too_long_a_conversation_is_an_error_or_left_out(text: Text, tmp_path: Path) -> None:
    long = [CHAT[0] | {"content": "fox " * 500}, CHAT[1]]
    rows = [{"messages": m} for m in (CHAT[:2], long, CHAT[2:])]
    (tmp_path / "c.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(DataError, match=r"c.jsonl, line 2: .* over max_length 400"):
        [chat_source(tmp_path, text).read(i) for i in range(3)]
    source = chat_source(tmp_path, text, too_long="skip")
    assert sorted(len(source.read(i)) for i in range(3)) == [0, 1, 1]
    (tmp_path / "c.jsonl").write_text(json.dumps({"messages": long}))
    config = SourceConfig(kind="chat", name="c", path=tmp_path / "c.jsonl", too_long="skip")
    with pytest.raises(DataError, match="'c' has nothing to learn"):
        Mixture(DataConfig(sources=(config,), max_length=400), text).draw()


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


def test_other_weights_hold_from_where_the_run_goes_on(config: DataConfig, text: Text) -> None:
    def weighed(first: float) -> Loader:
        sources = zip(config.sources[::2], (first, 1 - first), strict=True)
        kept = tuple(dataclasses.replace(source, weight=weight) for source, weight in sources)
        data = dataclasses.replace(config, sources=kept, open_packs=1, shuffled_packs=0)
        return Loader(data, text, tokens_per_batch=500)

    def shares(loader: Loader) -> list[float]:
        """Return the share of the first source in blocks of 20 batches."""
        found = []
        for _ in range(3):
            samples = [sample for _ in range(20) for sample in loader.next_batch()]
            mine = sum(len(s.tokens) for s in samples if s.domain == "text")
            found.append(mine / sum(len(s.tokens) for s in samples))
        return found

    first, second, third = weighed(0.5), weighed(0.9), weighed(0.9)
    shares(first)
    state = json.loads(json.dumps(first.state_dict()))
    second.load_state_dict(state)
    assert shares(second) == pytest.approx([0.9] * 3, abs=0.06)
    third.load_state_dict(json.loads(json.dumps(second.state_dict())))
    assert third.next_batch() == second.next_batch()
    del state["mixture"]["weights"], state["mixture"]["since"]  # as runs of earlier versions wrote
    again = weighed(0.5)
    again.load_state_dict(state)
    assert [again.next_batch() for _ in range(9)] == [first.next_batch() for _ in range(9)]


@pytest.mark.parametrize("thinking", [0.0, 1.0])
def test_tasks_learn_the_answers_that_are_shown_as_given(
    config: DataConfig, text: Text, thinking: float
) -> None:
    tasks = dataclasses.replace(config.sources[2], thinking=thinking)
    mixture = Mixture(dataclasses.replace(config, sources=(tasks,), max_length=900), text)
    begins = text.tokenizer.encode("<|im_start|>assistant")
    turns = []
    for _ in range(60):
        _, sample = mixture.draw()
        weights = sample.ce_weight
        ends = [t for t, w in enumerate(weights) if w and not (*weights[t + 1 :], 0.0)[0]]
        assert ends[-1] == len(weights) - 1
        assert {sample.tokens[t] for t in ends} <= set(text.tokenizer.eos_token_ids)
        places = range(len(sample.tokens) - len(begins))
        turns.append(sum(list(sample.tokens[t : t + len(begins)]) == begins for t in places))
        assert len(ends) == (1 if thinking else turns[-1])
    assert max(turns) > 1 == min(turns)


def test_tasks_leave_out_earlier_ones_beyond_the_longest(config: DataConfig, text: Text) -> None:
    tasks = dataclasses.replace(config.sources[2], thinking=0.0, families=("add",))
    lengths = {}
    for longest in (150, 4000):
        data = dataclasses.replace(config, sources=(tasks,), max_length=longest)
        mixture = Mixture(data, text)
        lengths[longest] = [len(mixture.draw()[1].tokens) for _ in range(60)]
    assert max(lengths[150]) <= 150 < max(lengths[4000])
    # What fits stays as it is.
    for short, long in zip(lengths[150], lengths[4000], strict=True):
        assert short == long if long <= 150 else short < long


def test_heldout(config: DataConfig, text: Text) -> None:
    domains = {s.domain.split("/")[0] for s in heldout_samples(config, text)}
    assert domains == {"text", "tasks"}


def test_errors_name_file_and_line(config: DataConfig, text: Text, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"unknown key sources\[0\].typo"):
        from_dict(DataConfig, {"sources": [{"kind": "text", "name": "x", "typo": 1}]})
    with pytest.raises(DataError, match="'x': families means nothing for kind 'text'"):
        SourceConfig(kind="text", name="x", path=tmp_path, families=("add",))
    with pytest.raises(DataError, match=r"cut is 2.0: it must be in 0\.\.1"):
        SourceConfig(kind="chat", name="x", path=tmp_path, cut=2.0)
    with pytest.raises(DataError, match="no source has a weight"):
        DataConfig(sources=(dataclasses.replace(config.sources[0], weight=0.0),))
    bad = dataclasses.replace(config.sources[2], families=("juggle",))
    with pytest.raises(DataError, match="no task family 'juggle'"):
        Loader(DataConfig(sources=(bad,)), text, tokens_per_batch=500)
    with pytest.raises(DataError, match="no families are at hand"):
        bare = Text(text.tokenizer, text.template)
        Loader(config, bare, tokens_per_batch=500)
    with pytest.raises(DataError, match="needs path"):
        SourceConfig(kind="text", name="x")
    for name, rows, message in (
        ("text", '{"text": "a"}\n{', "bad.jsonl, line 2: not JSON"),
        ("text", '{"txt": "a"}', "bad.jsonl, line 1: it has no 'text', but 'txt'"),
        ("text", '{"text": 1}', "bad.jsonl, line 1: the text is '1', not a string"),
        ("chat", '\n{"messages": "a"}', "bad.jsonl, line 2: messages must be a list"),
        ("chat", '{"messages": [{"content": "a"}]}', "bad.jsonl, line 1: .* has no role"),
        (
            "chat",
            '{"messages": [{"role": "assistant", "tool_calls": [{"function": "f"}]}]}',
            "bad.jsonl, line 1: tool call {'function': 'f'} has no function name",
        ),
        ("chat", '{"messages": [], "tools": "{"}', "bad.jsonl, line 1: tools are not JSON"),
        ("chat", '{"messages": [{"role": "user"}]}', "line 1: a conversation has no assistant"),
    ):
        (tmp_path / "bad.jsonl").write_text(rows)
        source = SourceConfig(kind=name, name="x", path=tmp_path / "bad.jsonl")  # type: ignore[arg-type]
        with pytest.raises(DataError, match=message):
            mixture = Mixture(DataConfig(sources=(source,)), text)
            [mixture.draw() for _ in range(2)]


def test_other_data_than_the_run_began_with_is_refused(
    config: DataConfig, text: Text, tmp_path: Path
) -> None:
    state = Loader(config, text, tokens_per_batch=500).state_dict()
    with (tmp_path / "text.jsonl").open("a") as file:
        file.write('\n{"text": "one more"}')
    with pytest.raises(DataError, match="was started with the sources"):
        Loader(config, text, tokens_per_batch=500).load_state_dict(state)


@pytest.mark.parametrize("name", ["seed", "max_length"])
def test_a_place_in_the_data_is_of_one_seed_and_length(
    config: DataConfig, text: Text, name: str
) -> None:
    state = Loader(config, text, tokens_per_batch=500).state_dict()
    other = dataclasses.replace(config, **{name: getattr(config, name) + 1})
    with pytest.raises(DataError, match=f"started with data.{name}"):
        Loader(other, text, tokens_per_batch=501).load_state_dict(state)


@pytest.mark.parametrize(("name", "value"), [("learn", "last"), ("thinking", 0.5), ("cut", 0.5)])
def test_a_run_keeps_how_its_samples_are_made(
    config: DataConfig, text: Text, name: str, value: Any
) -> None:
    state = json.loads(json.dumps(Loader(config, text, tokens_per_batch=500).state_dict()))
    chat = dataclasses.replace(config.sources[1], **{name: value})
    other = dataclasses.replace(config, sources=(config.sources[0], chat, config.sources[2]))
    with pytest.raises(DataError, match=f"started with {name} .* of source 'chat' and this is"):
        Loader(other, text, tokens_per_batch=500).load_state_dict(state)
    del state["mixture"]["styles"]  # as runs of earlier versions wrote
    Loader(other, text, tokens_per_batch=500).load_state_dict(state)


def test_empty_documents_are_no_samples(text: Text, tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text('{"text": ""}\n{"text": ""}')
    source = SourceConfig(kind="text", name="x", path=tmp_path / "empty.jsonl")
    with pytest.raises(DataError, match="nothing to learn"):
        Mixture(DataConfig(sources=(source,)), text).draw()


def test_given_samples_come_again_in_another_order_and_resume() -> None:
    samples = [Sample(tokens=(i, i), ce_weight=(0.0, 1.0), domain="d") for i in range(7)]

    def repeated(count: int = 7) -> Repeated:
        return Repeated(samples[:count], tokens_per_batch=4, open_packs=2, seed=1)

    straight = repeated()
    batches = [straight.next_batch() for _ in range(40)]
    drawn = [sample.tokens[0] for batch in batches for sample in batch]
    counts = [drawn.count(i) for i in range(7)]
    assert max(counts) - min(counts) <= 2 and drawn[:7] != drawn[7:14]
    first = repeated()
    for _ in range(13):
        first.next_batch()
    state = json.loads(json.dumps(first.state_dict()))
    second = repeated()
    second.load_state_dict(state)
    assert [second.next_batch() for _ in range(27)] == batches[13:]
    with pytest.raises(DataError, match="started with 7 samples and these are 6"):
        repeated(6).load_state_dict(state)
    with pytest.raises(DataError, match="no samples"):
        repeated(0)


def test_batches_of_two_loaders_are_never_mixed(config: DataConfig, text: Text) -> None:
    common = dataclasses.replace(config, sources=config.sources[:1], max_length=100)
    rare = dataclasses.replace(config, sources=config.sources[2:])

    def alternation() -> Alternation:
        loaders = [Loader(c, text, tokens_per_batch=500) for c in (common, rare)]
        return Alternation(*loaders, share=0.08)

    straight = alternation()
    batches = [straight.next_batch() for _ in range(100)]
    kinds = [{s.domain.split("/")[0] for s in batch} for batch in batches]
    assert all(len(kind) == 1 for kind in kinds)
    rare_at = [i for i, kind in enumerate(kinds) if kind == {"tasks"}]
    assert len(rare_at) == 8 and max(b - a for a, b in itertools.pairwise(rare_at)) <= 13
    cut = random.Random(0).randrange(100)
    first = alternation()
    for _ in range(cut):
        first.next_batch()
    second = alternation()
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert [second.next_batch() for _ in range(100 - cut)] == batches[cut:]
