"""What a request may ask for beside text: vectors, the best of many, a deadline, new weights."""

import math
import re

import pytest
import torch

from aprium import LLM, SamplingParams
from aprium.base.errors import CheckpointError, RequestError
from aprium.base.records import Guide, Request
from aprium.checkpoint.hub import PICO_DIR
from aprium.checkpoint.load import load_checkpoint
from aprium.checkpoint.save import save_checkpoint
from aprium.engine.config import EngineConfig
from aprium.engine.engine import Engine
from aprium.model.layout import Layout
from tests.engine.test_prefix import deltas_of

GREEDY = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
TOKENS = tuple(range(40, 140))


@pytest.fixture
def pico():
    return load_checkpoint(PICO_DIR)


@pytest.fixture(scope="module")
def llm():
    with LLM("pico", max_model_len=512, max_num_seqs=8) as model:
        yield model


def engine_of(checkpoint, **options):
    return Engine(EngineConfig(model="pico", max_model_len=512, **options), checkpoint)


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_vectors_are_the_models_own_and_do_not_depend_on_chunks(pico, pooling):
    found = []
    for options in ({}, {"max_num_batched_tokens": 7, "block_size": 3}):
        with LLM(pico, max_model_len=512, **options) as llm:
            llm.embed([TOKENS[:60]])
            vectors = llm.embed([TOKENS, TOKENS[:50]], pooling=pooling, normalize=False)
            found.append(vectors)
            assert llm.embed(TOKENS, pooling=pooling, normalize=False) == vectors[:1]
            (unit,) = llm.embed(TOKENS, pooling=pooling)
            assert math.isclose(math.hypot(*unit), 1, rel_tol=1e-6)
    assert found[0] == found[1]
    with torch.no_grad():
        hidden = pico.model(torch.tensor(TOKENS), Layout.packed([len(TOKENS)]))
    expected = hidden[-1] if pooling == "last" else hidden.mean(0)
    torch.testing.assert_close(torch.tensor(found[0][0]), expected, rtol=1e-4, atol=1e-4)


def test_pooling_generates_nothing(pico):
    engine = engine_of(pico)
    with pytest.raises(RequestError, match="generates nothing"):
        engine.add(Request(id="a", tokens=TOKENS, params=GREEDY, pooling="mean"))


def test_continuations_read_their_prompt_once(pico):
    for caching in (True, False):
        with LLM(pico, max_model_len=512, enable_prefix_caching=caching) as llm:
            params = SamplingParams(temperature=0.9, max_tokens=15, n=5, seed=4, ignore_eos=True)
            together = llm.generate([TOKENS], params)
            assert [c.reused for c in together] == [0] + [99] * 4
            assert llm.stats().prefix_tokens_reused == 4 * 99
            (first,) = llm.generate([TOKENS], SamplingParams(
                temperature=0.9, max_tokens=15, seed=4, ignore_eos=True))  # fmt: skip
            assert together[0].tokens == first.tokens
            assert len({c.tokens for c in together}) > 1
            assert llm.stats().num_snapshots == (0 if not caching else llm.stats().num_snapshots)


def test_the_best_of_many_are_given_best_first(llm):
    params = SamplingParams(temperature=1.0, max_tokens=12, n=6, seed=1, ignore_eos=True)
    made = llm.generate([TOKENS], params)
    best = llm.generate([TOKENS], SamplingParams(
        temperature=1.0, max_tokens=12, n=2, best_of=6, seed=1, ignore_eos=True))  # fmt: skip
    ranked = sorted(made, key=lambda c: -sum(c.logprobs) / 12)[:2]
    assert [c.tokens for c in best] == [c.tokens for c in ranked]
    assert [c.index for c in best] == [0, 1]
    with pytest.raises(RequestError, match="no more can be chosen"):
        SamplingParams(n=3, best_of=2)
    with pytest.raises(RequestError, match="do not stream"):
        llm.stream(TOKENS, SamplingParams(n=1, best_of=2))


def test_an_answer_has_at_least_so_many_tokens(llm):
    """Neither its end token, nor a stop token, nor a stop string ends it before."""
    question = [{"role": "user", "content": "Spell the word paper."}]
    quiet = {"enable_thinking": False}

    def ask(**options):
        params = SamplingParams(temperature=0, max_tokens=60, **options)
        return llm.generate(question, params, chat_template_kwargs=quiet)[0]

    free = ask()
    assert free.finish == "stop" and len(free.tokens) < 40
    longer = ask(min_tokens=50)
    assert len(longer.tokens) >= 50
    assert longer.tokens[: len(free.tokens) - 1] == free.tokens[:-1]
    assert not set(longer.tokens[:50]) & {2, 11}
    letter = free.text[0]
    assert ask(stop=(letter,)).text == ""
    first = ask(stop=(letter,), min_tokens=1)
    at = free.text.find(letter, 1)
    assert at > 0 and first.text == free.text[:at] and first.stop_reason == letter
    for text in ("a choice", "b"):  # the form is complete: nothing may follow
        said = ask(min_tokens=30, guide=Guide(kind="choice", value=[text]))
        assert (said.text, said.finish) == (text, "stop")
    lines = Guide(kind="regex", value="([a-z]+ ){1,50}")
    said = ask(min_tokens=30, guide=lines)
    assert len(said.tokens) >= 30 and re.fullmatch("([a-z]+ )+[a-z]*", said.text)
    thought = SamplingParams(
        temperature=0, max_tokens=40, min_tokens=20, thinking_budget=0, stop_token_ids=(13,)
    )
    assert llm.encode("</think>") == (13,)
    (closed,) = llm.generate(question, thought)  # the tag is forced, and does not end it yet
    assert closed.tokens[0] == 13 and len(closed.tokens) > 20


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"min_tokens": 9, "max_tokens": 8}, "min_tokens is 9 and max_tokens is 8"),
        ({"min_tokens": -1}, "at least 0"),
        ({"min_tokens": 1.5}, "integer"),
    ],
)
def test_a_least_length_that_cannot_be_is_refused(options, said):
    with pytest.raises(RequestError, match=said) as caught:
        SamplingParams(**options)
    assert caught.value.param == "min_tokens"


def test_a_deadline_gives_a_request_up(llm):
    late = SamplingParams(temperature=0, max_tokens=400, ignore_eos=True)
    (completion,) = llm.generate([TOKENS], late, deadline_s=0.02)
    assert (completion.finish, completion.stop_reason) == ("abort", "deadline")
    assert 0 < len(completion.tokens) < 400 or not completion.tokens
    assert llm.stats().num_expired >= 1 and llm.stats().num_running == 0
    (completion,) = llm.generate([TOKENS], GREEDY, deadline_s=60)
    assert completion.finish == "length"
    with pytest.raises(RequestError, match="above 0"):
        llm.generate([TOKENS], GREEDY, deadline_s=0)


def halved(checkpoint):
    """Return some weights, changed, by published name."""
    parameters = dict(checkpoint.model.named_parameters())
    names = ("lm_head.weight", "backbone.layers.0.mixer.in_proj.weight", "backbone.norm_f.weight")
    return {name: parameters[name].detach() * 0.5 for name in names}


def test_new_weights_are_used_from_the_next_step_on(pico):
    other = load_checkpoint(PICO_DIR)
    changed = halved(other)
    engine_of(other).update_weights(changed)
    expected = deltas_of(engine_of(other), Request(id="a", tokens=TOKENS, params=GREEDY))
    engine = engine_of(pico)
    before = deltas_of(engine, Request(id="a", tokens=TOKENS, params=GREEDY))
    assert before[2].weight_version == 0
    assert engine.update_weights(changed) == 1
    after = deltas_of(engine, Request(id="b", tokens=TOKENS, params=GREEDY))
    assert after[:2] == expected[:2] != before[:2]
    assert after[2].weight_version == 1 and after[2].reused == 0  # old states are forgotten


def test_a_running_request_says_which_weights_made_what(pico):
    expected = load_checkpoint(PICO_DIR)
    changed = halved(expected)
    with LLM(pico, max_model_len=512) as llm:
        stream = llm.stream(TOKENS, SamplingParams(temperature=0, max_tokens=200, ignore_eos=True))
        first = next(stream)
        llm.update_weights(changed, recompute=True)
        *_, last = stream
    (version, count), (second, rest) = last.weight_spans
    assert (version, second, count + rest) == (0, 1, 200) and count >= len(first.tokens)
    assert last.weight_version == 1
    # What came after is what the new weights say to the same tokens.
    engine_of(expected).update_weights(changed)
    tokens = (*TOKENS, *last.tokens[:count])
    params = SamplingParams(temperature=0, max_tokens=rest, ignore_eos=True)
    found = deltas_of(engine_of(expected), Request(id="a", tokens=tokens, params=params))
    assert tuple(found[0]) == last.tokens[count:] and tuple(found[1]) == last.logprobs[count:]


def test_weights_come_from_a_checkpoint_too(pico, tmp_path):
    other = load_checkpoint(PICO_DIR)
    engine_of(other).update_weights(halved(other))
    save_checkpoint(other, tmp_path / "new")
    engine = engine_of(pico)
    engine.update_weights(tmp_path / "new")
    found = deltas_of(engine, Request(id="a", tokens=TOKENS, params=GREEDY))
    expected = deltas_of(engine_of(other), Request(id="a", tokens=TOKENS, params=GREEDY))
    assert found[:2] == expected[:2]


def test_weights_that_do_not_fit_change_nothing(pico):
    engine = engine_of(pico)
    before = deltas_of(engine, Request(id="a", tokens=TOKENS, params=GREEDY))
    good = halved(pico)
    for wrong, said in (
        ({"nothing.weight": torch.zeros(1)}, "belongs to no parameter"),
        ({"lm_head.weight": torch.zeros(3, 3)}, "the model has"),
    ):
        with pytest.raises(CheckpointError, match=said):
            engine.update_weights(good | wrong)
    again = deltas_of(engine, Request(id="b", tokens=TOKENS, params=GREEDY))
    assert again[:2] == before[:2] and engine.stats().weight_version == 0


def test_weights_of_mapped_files_are_not_replaced():
    engine = engine_of(load_checkpoint(PICO_DIR, load="mmap"))
    with pytest.raises(CheckpointError, match="load 'memory'"):
        engine.update_weights({})


@pytest.mark.parametrize("salt", ["\ud800", "x" * 300, None])
def test_a_salt_that_is_no_text_is_refused(llm, salt):
    with pytest.raises(RequestError, match="256 bytes"):
        llm.generate([TOKENS], GREEDY, cache_salt=salt)
    assert llm.generate([TOKENS], GREEDY)[0].finish == "length"


def test_what_was_generated_must_leave_room(pico):
    engine = engine_of(pico)
    with pytest.raises(RequestError, match="none left"):
        engine.add(Request(id="a", tokens=TOKENS, params=GREEDY, generated=TOKENS[:20]))


def test_only_the_continuations_of_a_request_are_told_to_finish(pico):
    engine = engine_of(pico)
    told = []

    class Told:
        def finish_thinking(self):
            told.append(1)
            return True

    for id in ("chat-a-0-0", "chat-a-0-1", "chat-b-1-0"):
        engine.add(Request(id=id, tokens=TOKENS, params=GREEDY))
        engine.scheduler.sequences[id].guide = Told()
    assert engine.finish_thinking("chat") == 0
    assert engine.finish_thinking("chat-a") == 2 and engine.finish_thinking("chat-b-1-0") == 1
