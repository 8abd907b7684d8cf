"""What is learnt of a conversation is what the model has to write after the served prompt."""

import dataclasses
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aprium.base.errors import DataError
from aprium.base.records import Message, Sample, ToolCall
from aprium.data.conversation import Style, conversation
from aprium.text.chat import ChatTemplate
from aprium.text.tokenizer import Tokenizer
from tests.family import write_generation_config, write_tokenizer

PICO = Path(__file__).parents[2] / "recipes" / "pico"
TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {"properties": {}}}}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    write_generation_config(folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer.load(folder)


@pytest.fixture(scope="module", params=["pico", "family"])
def template(request: pytest.FixtureRequest, folder: Path) -> ChatTemplate:
    return ChatTemplate.load(PICO if request.param == "pico" else folder)


TEXT = st.text(alphabet="abc 2?é\n", min_size=1, max_size=12).filter(lambda t: t.strip() == t)


@st.composite
def conversations(draw: st.DrawFn) -> list[Message]:
    """Turns of users, replies with and without reasoning, and calls with their results."""
    messages = [Message(role="system", content=draw(TEXT))] if draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        messages.append(Message(role="user", content=draw(TEXT)))
        for _ in range(draw(st.integers(0, 2))):
            reasoning = draw(st.none() | TEXT)
            call = ToolCall(name="look", arguments='{"at": "b"}')
            messages.append(Message(role="assistant", reasoning=reasoning, tool_calls=(call,)))
            messages.append(Message(role="tool", content=draw(TEXT)))
        messages.append(
            Message(role="assistant", content=draw(TEXT), reasoning=draw(st.none() | TEXT))
        )
    return messages


def learnt_spans(samples: list[Sample]) -> list[tuple[list[int], list[int]]]:
    """Return (tokens before, tokens learnt) of each run of weighted tokens."""
    spans = []
    for sample in samples:
        tokens, weights = list(sample.tokens), sample.ce_weight
        begin = 0
        while begin < len(tokens):
            end = begin
            while end < len(tokens) and weights[end] == weights[begin]:
                end += 1
            if weights[begin]:
                spans.append((tokens[:begin], tokens[begin:end]))
            begin = end
    return spans


@settings(max_examples=60)
@given(messages=conversations(), thinking=st.sampled_from([None, True, False]), skip=st.sets(
    st.integers(0, 9)))  # fmt: skip
def test_learnt_is_what_follows_the_served_prompt(
    messages: list[Message],
    thinking: bool | None,
    skip: set[int],
    tokenizer: Tokenizer,
    template: ChatTemplate,
) -> None:
    style = Style(thinking=thinking)
    samples = conversation(messages, tokenizer, template, "d", tools=TOOLS, style=style, skip=skip)
    turns = [i for i, m in enumerate(messages) if m.role == "assistant" and i not in skip]
    spans = learnt_spans(samples)
    assert len(spans) == len(turns)
    for i, (before, learnt) in zip(turns, spans, strict=True):
        shown = messages[:i]
        if thinking is False:
            shown = [dataclasses.replace(m, reasoning=None) for m in shown]
        reasoning = messages[i].reasoning
        on = bool(reasoning) if thinking is None else thinking
        # The tokens before are the prompt that a server renders and encodes for this turn.
        assert before == tokenizer.encode(template.render(shown, TOOLS, enable_thinking=on))
        # The engine stops with the end token, and not before.
        assert learnt[-1] in tokenizer.eos_token_ids
        assert not set(learnt[:-1]) & set(tokenizer.eos_token_ids)
        text = tokenizer.decode(learnt, skip_special_tokens=False).removesuffix("<|im_end|>")
        content = messages[i].content or ""
        if on:
            thought, _, text = text.partition("</think>")
            assert thought == (reasoning or "")
        assert text.lstrip("\n").startswith(content or "<tool_call>")
    # Nothing that no turn needs is in the samples.
    assert all(sample.ce_weight[-1] == 1.0 for sample in samples)


def test_turns_share_a_sample_where_the_prompt_goes_on(
    tokenizer: Tokenizer, template: ChatTemplate
) -> None:
    user = Message(role="user", content="2?")
    plain, worked = (Message(role="assistant", content="a", reasoning=r) for r in (None, "b"))
    call = dataclasses.replace(worked, tool_calls=(ToolCall(name="look", arguments="{}"),))
    result = Message(role="tool", content="c")
    for messages, count in (
        ([user, plain, user, plain, user, worked], 1),
        ([user, worked, user, plain], 2),  # serving shows the first without its reasoning
        ([user, call, result, worked], 1),  # and keeps it as long as no user has spoken
    ):
        assert len(conversation(messages, tokenizer, template, "d", tools=TOOLS)) == count
    last = Style(learn="last")
    (sample,) = conversation([user, worked, user, worked], tokenizer, template, "d", style=last)
    assert len(learnt_spans([sample])) == 1
    with pytest.raises(DataError, match="must end with an assistant turn"):
        conversation([user, plain, user], tokenizer, template, "d", style=last)


@given(cut=st.floats(0, 1, exclude_max=True), words=st.integers(1, 9))
def test_cut_reasoning_masks_the_closing_tag(cut: float, words: int, tokenizer: Tokenizer) -> None:
    template = ChatTemplate.load(PICO)
    user = Message(role="user", content="2?")
    worked = Message(role="assistant", content="4", reasoning="quick brown fox " * words + "end")
    (whole,) = conversation([user, worked], tokenizer, template, "d")
    (sample,) = conversation([user, worked], tokenizer, template, "d", style=Style(cut=cut))
    close = tokenizer.id_of("</think>")
    assert close is not None
    place, full = (s.tokens.index(close, s.ce_weight.index(1.0) - 1) for s in (sample, whole))
    begin = len(tokenizer.encode(template.render([user])))
    assert place == begin + int(cut * (full - begin))
    assert sample.ce_weight[place] == 0.0 and whole.ce_weight[full] == 1.0
    assert sample.tokens == whole.tokens[:place] + whole.tokens[full:]
    assert all(w == (t >= begin and t != place) for t, w in enumerate(sample.ce_weight))


def test_what_cannot_be_learnt_is_refused(tokenizer: Tokenizer) -> None:
    template = ChatTemplate.load(PICO)
    user = Message(role="user", content="hi")
    with pytest.raises(DataError, match="no assistant turn"):
        conversation([user], tokenizer, template, "d")
    with pytest.raises(DataError, match="goes on after its end token"):
        quoted = Message(role="assistant", content="a<|im_end|>b")
        conversation([user, quoted], tokenizer, template, "d")
    odd = ChatTemplate({"default": "{{ messages | length }}"})
    with pytest.raises(DataError, match="does not continue its own prompt"):
        conversation([user, Message(role="assistant", content="a")], tokenizer, odd, "d")
