"""Text of a continuation: whole characters, no part of a stop string, tokens cut with the text."""

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from aprium.base.records import Delta
from aprium.engine.assemble import Assembler, held_back


class Letters:
    """A decoder whose token i is `pieces[i]`; holds back a trailing "~" like half a character."""

    def __init__(self, pieces):
        self.pieces = pieces
        self.held = ""

    def push(self, ids):
        text = self.held + "".join(self.pieces[i] for i in ids)
        self.held = "~" if text.endswith("~") else ""
        return text.removesuffix("~")

    def flush(self):
        return self.held.replace("~", "?")


def assembled(pieces, stop=(), finish="length", per_delta=1, min_tokens=0):
    """Push all pieces; returns the assembler and every text shown on the way."""
    stream = Letters(pieces)
    assembler = Assembler(
        prompt_tokens=(1,), stop=tuple(stop), stream=stream, min_tokens=min_tokens
    )
    shown = []
    ids = list(range(len(pieces)))
    for begin in range(0, len(ids), per_delta):
        part = tuple(ids[begin : begin + per_delta])
        last = begin + per_delta >= len(ids)
        delta = Delta(
            id="r",
            tokens=part,
            logprobs=tuple(-float(i) for i in part),
            top_logprobs=tuple({i: -float(i)} for i in part),
            finish=finish if last else None,
            stop_reason=part[-1] if last and finish == "stop" else None,
        )
        assembler.push(delta)
        shown.append(assembler.completion().text)
    return assembler, shown


def test_a_stop_string_across_tokens_cuts_text_and_tokens():
    assembler, shown = assembled(["ab", "cEN", "D", "more"], ["END"])
    done = assembler.completion()
    assert (done.text, done.finish, done.stop_reason) == ("abc", "stop", "END")
    assert assembler.cut
    assert done.tokens == (0, 1, 2) and len(done.logprobs) == len(done.top_logprobs) == 3
    assert shown == ["ab", "abc", "abc", "abc"]


@given(
    st.lists(st.sampled_from(["a", "b", "ab", "ba~", "~"]), min_size=1, max_size=12),
    st.integers(0, 12),
    st.integers(1, 4),
)
def test_a_stop_string_ends_no_text_before_the_least_number_of_tokens(pieces, least, per_delta):
    assembler, _ = assembled(pieces, ["ab"], per_delta=per_delta, min_tokens=least)
    done = assembler.completion()
    stream = Letters(pieces)
    texts = [""]
    for i in range(len(pieces)):
        texts.append(texts[-1] + stream.push((i,)))
    ends = (
        n for n in range(least + 1, len(texts)) if "ab" in texts[n][max(len(texts[n - 1]) - 1, 0) :]
    )
    end = next(ends, None)
    if end is None:
        assert (done.finish, len(done.tokens)) == ("length", len(pieces))
        return
    assert (done.finish, done.stop_reason, len(done.tokens)) == ("stop", "ab", end)
    at = texts[end].index("ab", max(len(texts[end - 1]) - 1, 0))
    assert done.text == texts[end][:at] and assembler.cut


def test_a_held_back_end_is_shown_when_it_was_innocent():
    assembler, shown = assembled(["ab", "EN", "T", "E"], ["END"])
    assert shown == ["ab", "ab", "abENT", "abENTE"]
    assert not assembler.cut and assembler.finish == "length"


def test_the_stop_token_is_kept_and_its_text_left_out():
    assembler, _ = assembled(["a", "b", "</s>"], finish="stop")
    done = assembler.completion()
    assert (done.text, done.tokens, done.stop_reason) == ("ab", (0, 1, 2), 2)
    assert not assembler.cut


def test_what_the_decoder_holds_comes_at_the_end():
    _, shown = assembled(["a", "b~", "c", "d~"])
    assert shown == ["a", "ab", "ab~c", "ab~cd?"]


def test_a_stop_string_that_ends_with_the_flush_counts():
    assembler, _ = assembled(["a", "b~"], ["b?"])
    assert assembler.completion().text == "a" and assembler.finish == "stop"


def test_the_first_complete_of_several_wins_and_of_those_the_longest():
    assert assembled(["xabcy"], ["abc", "bc", "y"])[0].completion().stop_reason == "abc"
    assert assembled(["xabcy"], ["bcy", "abc"])[0].completion().stop_reason == "abc"


def test_without_a_tokenizer_the_text_is_empty():
    assembler = Assembler(prompt_tokens=(), stop=(), stream=None)
    assembler.push(Delta(id="r", tokens=(3,), logprobs=(-1.0,), finish="length"))
    assert (assembler.completion().text, assembler.completion().tokens) == ("", (3,))


def test_deltas_after_the_end_are_ignored():
    assembler, _ = assembled(["aEND"], ["END"])
    before = assembler.completion()
    assembler.push(Delta(id="r", tokens=(0,), logprobs=(-1.0,)))
    assert assembler.completion() == before


def whole_text(text, stop):
    """The specification: read letter by letter, end at the first complete stop string."""
    for end in range(1, len(text) + 1):
        matches = [s for s in stop if text[:end].endswith(s)]
        if matches:
            longest = max(matches, key=len)
            return text[: end - len(longest)], longest
    return text, None


@given(
    st.lists(st.text("ab", max_size=4), min_size=1, max_size=12),
    st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
    st.integers(1, 4),
)
def test_any_split_gives_the_same_text_and_never_a_part_of_a_stop_string(pieces, stop, per_delta):
    expected, reason = whole_text("".join(pieces), stop)
    assembler, shown = assembled(pieces, stop, per_delta=per_delta)
    done = assembler.completion()
    assert (done.text, done.stop_reason) == (expected, reason)
    assert (done.finish, assembler.cut) == (("stop", True) if reason else ("length", False))
    for text in shown:
        assert expected.startswith(text)
    for earlier, later in pairwise(shown):
        assert later.startswith(earlier)


@given(st.text("ab", max_size=8), st.lists(st.text("ab", min_size=1, max_size=5), max_size=3))
def test_exactly_the_beginnings_of_stop_strings_are_held_back(text, stop):
    sizes = [n for s in stop for n in range(1, len(s)) if text.endswith(s[:n])]
    assert held_back(text, stop) == max(sizes, default=0)
