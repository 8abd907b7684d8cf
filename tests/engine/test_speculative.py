"""Drafting changes speed and nothing else: same tokens, log-probabilities and distribution."""

import dataclasses
import random

import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aprium.base.errors import ConfigError
from aprium.base.records import Request, SamplingParams
from aprium.checkpoint.hub import PICO_DIR
from aprium.checkpoint.load import load_checkpoint
from aprium.engine.config import EngineConfig
from aprium.engine.engine import Engine
from aprium.engine.memory import page_bytes
from aprium.engine.speculative import (
    Decision,
    DraftLength,
    SpeculativeConfig,
    count_accepted,
    look_up,
)
from aprium.model.layout import Layout
from aprium.text.chat import ChatTemplate
from aprium.text.messages import read_message
from aprium.text.tokenizer import Tokenizer
from tests.engine.test_engine import run

SPECS = [
    SpeculativeConfig(num_speculative_tokens=1, adaptive=False),
    SpeculativeConfig(num_speculative_tokens=3, adaptive=False),
    SpeculativeConfig(num_speculative_tokens=5, adaptive=False),
    SpeculativeConfig(num_speculative_tokens=4),
    SpeculativeConfig(method="ngram", num_speculative_tokens=4, prompt_lookup_min=1),
]
QUESTIONS = (
    "What is 27 + 58?",
    "Spell the word garden.",
    "Who are you?",
    "Sort these words: plum, apple, stone.",
    "Say: one two three one two three one two three one two",
)


@pytest.fixture(scope="module")
def pico():
    return load_checkpoint(PICO_DIR)


@pytest.fixture(scope="module")
def requests():
    tokenizer, template = Tokenizer.load(PICO_DIR), ChatTemplate.load(PICO_DIR)
    made = []
    for i, question in enumerate(QUESTIONS):
        text = template.render([read_message({"role": "user", "content": question})], ())
        params = SamplingParams(
            temperature=0 if i % 2 else 0.9, seed=i, max_tokens=50, logprobs=2, prompt_logprobs=0
        )
        made.append(Request(id=f"r{i}", tokens=tuple(tokenizer.encode(text)), params=params))
    return made


def engine_of(pico, spec, **options):
    options = {"max_num_seqs": 8, "max_model_len": 256, "block_size": 8} | options
    return Engine(EngineConfig(model="pico", speculative=spec, **options), pico)


@pytest.fixture(scope="module")
def plain(pico, requests):
    return run(engine_of(pico, None), requests)


@pytest.mark.parametrize("spec", SPECS, ids=lambda s: f"{s.method}-{s.num_speculative_tokens}")
@pytest.mark.parametrize(
    "options",
    [{}, {"max_num_batched_tokens": 7, "block_size": 5}, {"max_num_seqs": 2, "block_size": 3}],
    ids=str,
)
def test_same_tokens_and_logprobs(pico, requests, plain, spec, options):
    engine = engine_of(pico, spec, **options)
    assert run(engine, requests) == plain
    engine.reset_prefix_cache()
    stats = engine.stats()
    assert sum(stats.drafts_compared) > 0
    assert stats.pages_free == stats.pages_total and stats.slots_free == stats.slots_total
    assert stats.ring_bytes > 0


def test_a_least_length_is_the_same_with_drafts(pico, requests):
    """Its stop tokens are those that are said most, so that many of them are drafted."""
    free = run(engine_of(pico, None), requests)
    said = [t for entry in free.values() for t in entry["tokens"]]
    stops = tuple(sorted(set(said), key=said.count)[-6:])
    some = [
        dataclasses.replace(
            r, params=dataclasses.replace(r.params, min_tokens=8 + 3 * i, stop_token_ids=stops)
        )
        for i, r in enumerate(requests)
    ]
    expected = run(engine_of(pico, None), some)
    for i, request in enumerate(some):
        tokens = expected[request.id]["tokens"]
        assert len(tokens) >= 8 + 3 * i and not set(tokens[: 8 + 3 * i]) & {*stops}
    assert any(expected[r.id]["finish"] == "stop" for r in some)
    for spec in SPECS:
        engine = engine_of(pico, spec)
        assert run(engine, some) == expected
        assert sum(engine.stats().drafts_compared) > 0


def test_drafts_of_the_head_are_mostly_right_and_save_steps(pico, requests, plain):
    counts = []
    for spec in (None, SPECS[1]):
        engine = engine_of(pico, spec)
        for request in requests:
            assert run(engine, [request])[request.id] == plain[request.id]
        counts.append(engine.stats())
    assert counts[1].drafts_accepted[0] > 0.6 * counts[1].drafts_compared[0]
    assert counts[1].num_steps < 0.65 * counts[0].num_steps


def test_drafting_starts_at_a_page_of_its_own_after_a_pause(pico, requests, plain, monkeypatch):
    """On and off at random: the head reads on from a page's beginning."""
    generator = random.Random(0)
    state = {"left": 0, "on": True}

    def choose(self, elapsed_s):
        if not state["left"]:
            state["left"], state["on"] = generator.randrange(1, 20), not state["on"]
        state["left"] -= 1
        return Decision(3 if state["on"] else 0, generator.choice([0.0, 0.6]))

    monkeypatch.setattr(DraftLength, "choose", choose)
    engine = engine_of(pico, SPECS[1], block_size=4)
    assert run(engine, requests) == plain
    stats = engine.stats()
    assert stats.drafts_compared[0] > 5 and stats.drafts_accepted[0] > 0


def test_preemption_and_abort_with_drafts(pico, requests, plain):
    longest = max(len(r.tokens) for r in requests) + 50
    pages = -(-longest // 4) + 6
    engine = engine_of(
        pico,
        SPECS[2],
        block_size=4,
        max_model_len=longest,
        kv_cache_bytes=pages * page_bytes(pico.config, 4, torch.float32),
    )
    for request in requests:
        engine.add(request)
    engine.add(dataclasses.replace(requests[1], id="gone"))
    found = {r.id: [] for r in [*requests, *[dataclasses.replace(requests[1], id="gone")]]}
    steps = 0
    while engine.has_work:
        for delta in engine.step():
            found[delta.id] += delta.tokens
        engine.scheduler.check()
        steps += 1
        if steps == 12:
            engine.abort("gone")
    assert engine.stats().num_preemptions > 0
    for request in requests:
        assert found[request.id] == plain[request.id]["tokens"]


def test_completions_say_what_was_drafted(pico, requests):
    from aprium import LLM

    with LLM(pico, max_model_len=256, speculative=SPECS[1]) as llm:
        (completion,) = llm.generate([list(requests[1].tokens)], requests[1].params)
        (stopped,) = llm.generate(
            [list(requests[1].tokens)], dataclasses.replace(requests[1].params, stop=("r",))
        )
    assert 0 < completion.accepted <= completion.drafted
    assert "r" in completion.text and "r" not in stopped.text and stopped.finish == "stop"


def test_sampling_keeps_the_distribution(pico, requests):
    """The second token, chosen where a draft was verified, against the model's probabilities."""
    prompt = requests[4].tokens
    spec = SpeculativeConfig(num_speculative_tokens=2, adaptive=False)
    engine = engine_of(pico, spec, max_num_seqs=64)
    params = SamplingParams(temperature=1.6, max_tokens=4, ignore_eos=True)
    drawn = [
        Request(id=str(i), tokens=prompt, params=dataclasses.replace(params, seed=i))
        for i in range(1500)
    ]
    found = run(engine, drawn)
    assert engine.stats().drafts_compared[0] > 1000
    pairs = [tuple(entry["tokens"][:2]) for entry in found.values()]
    first = max({a for a, _ in pairs}, key=lambda a: sum(x == a for x, _ in pairs))
    seconds = [b for a, b in pairs if a == first]
    tokens = torch.tensor([*prompt, first])
    with torch.inference_mode():
        model = pico.model
        logits = model.logits(model(tokens, Layout.packed([len(tokens)]))[-1:])[0].double()
    expected = (logits / 1.6).softmax(-1) * len(seconds)
    counts = torch.bincount(torch.tensor(seconds), minlength=len(expected)).double()
    common = expected >= 5
    observed = [*counts[common].tolist(), float(counts[~common].sum())]
    wanted = [*expected[common].tolist(), float(expected[~common].sum())]
    assert len(seconds) > 200
    assert scipy.stats.chisquare(observed, wanted).pvalue > 1e-3


def test_n_gram_look_up():
    tokens = [1, 2, 3, 4, 9, 1, 2, 3, 5, 7, 2, 3]
    assert look_up(tokens, 3, 4, 2) == (5, 7, 2)
    assert look_up(tokens, 1, 4, 1) == (5,)
    assert look_up([1, 2, 3], 3, 4, 1) == ()
    assert look_up([7, 7, 7], 2, 2, 1) == (7,)
    assert look_up(tokens, 0, 4, 2) == ()


@settings(max_examples=200)
@given(
    st.lists(st.sampled_from([0, 1, 256, 65537, 16777216]), min_size=1, max_size=24),
    st.integers(0, 4),
    st.integers(1, 4),
    st.integers(1, 4),
)
def test_n_gram_look_up_equals_the_slow_one(tokens, count, longest, shortest):
    """Tokens whose bytes overlap: only whole ones match."""
    expected = ()
    for size in range(min(longest, len(tokens) - 1), shortest - 1, -1):
        places = [
            begin
            for begin in range(len(tokens) - size)
            if tokens[begin : begin + size] == tokens[-size:]
        ]
        if places:
            expected = tuple(tokens[places[-1] + size : places[-1] + size + count])
            break
    assert look_up(tokens, count, longest, shortest) == (expected if count else ())


def test_accepted_are_the_drafts_before_the_first_wrong_one():
    assert count_accepted((1, 2, 3), [1, 2, 4, 5]) == 2
    assert count_accepted((), [4]) == 0
    assert count_accepted((1, 2), [1, 2, 9]) == 2


def simulate(step, draft, rate, sequences, steps=4000, seed=0):
    """Let a `DraftLength` decide over steps that cost `step(tokens)` and `draft` a pass.

    Costs are noisy, and a step in twenty is interrupted. Returns what share of the steps drafted,
    and how many times as fast the whole was as without drafts.
    """
    length = DraftLength(SpeculativeConfig(num_speculative_tokens=4))
    generator = random.Random(seed)
    drafts = drafted_steps = tokens = 0
    elapsed = 0.0
    rest = 0
    for _ in range(steps):
        decision = length.choose(elapsed) if not rest else Decision(0, rest=rest)
        rest, quiet = max(decision.rest - 1, 0), decision.rest
        verified = drafts
        kept = 0
        while kept < verified and generator.random() < rate:
            kept += 1
        noise = generator.uniform(0.9, 1.1) * (5 if generator.random() < 0.05 else 1)
        step_s = step(sequences * (1 + verified)) * noise
        drafts = decision.length
        draft_s = draft * drafts * noise
        elapsed += step_s + draft_s
        tokens += sequences * (1 + kept)
        drafted_steps += drafts > 0
        if quiet:
            continue
        for _ in range(sequences):
            if verified:
                length.note_accepted(verified, kept)
            if drafts:
                length.note_drafts(drafts, drafts)
        counts = sequences * (1 + verified), sequences * (1 + kept), sequences * drafts
        length.note_step(sequences, *counts, step_s, draft_s)
    return drafted_steps / steps, tokens / elapsed * step(sequences) * 1.2 / sequences


@pytest.mark.parametrize("sequences", [1, 8])
@pytest.mark.parametrize(
    ("step", "draft", "rate", "drafts"),
    [
        (lambda n: 1.0 + 0.01 * n, 0.02, 0.9, True),  # steps cost the same whatever is in them
        (lambda n: 0.01 + 1.0 * n, 0.02, 0.9, False),  # every token costs as much as a step
        (lambda n: 1.0 + 0.01 * n, 0.02, 0.02, False),  # nothing is accepted
        (lambda n: 1.0 + 0.01 * n, 3.0, 0.9, False),  # drafting costs more than it saves
    ],
)
def test_drafting_follows_cost_and_acceptance(step, draft, rate, drafts, sequences):
    share, gain = simulate(step, draft, rate, sequences)
    if drafts:
        assert share > 0.9 and gain > 1.5
    else:
        assert share < 0.5 and gain > 0.93


def test_a_draft_has_to_promise_what_it_costs():
    """The length and the least probability follow from the cost of a draft against a token's."""
    chosen = []
    generator = random.Random(0)
    for draft in (0.001, 0.3):
        length = DraftLength(SpeculativeConfig(num_speculative_tokens=4))
        for _ in range(800):
            made = generator.randrange(1, 5)
            length.choose(0.0)
            length.note_drafts(4, made)
            length.note_accepted(made, made)
            length.note_step(1, 1 + made, 1 + made, made, 1 + 0.001 * made, draft * made)
        length._set_best()
        chosen.append(length._best)
    cheap, dear = chosen
    assert cheap.length == 4 and cheap.least == 0.05
    assert 0.2 < dear.least < 0.9


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"method": "eagle"}, "speculative method is 'eagle'"),
        ({"num_speculative_tokens": 0}, "num_speculative_tokens is 0"),
        ({"prompt_lookup_min": 5}, "prompt_lookup_min is 5"),
    ],
)
def test_bad_configurations_are_refused(options, match):
    with pytest.raises(ConfigError, match=match):
        SpeculativeConfig(**options)


def test_combinations_that_cannot_be_had_are_refused(pico):
    with pytest.raises(ConfigError, match="mamba_ssm_cache_dtype is 'float16'"):
        engine_of(pico, SPECS[0], mamba_ssm_cache_dtype="float16")
    bare = dataclasses.replace(pico, config=pico.config.without_mtp())
    with pytest.raises(ConfigError, match="no prediction head"):
        engine_of(bare, SPECS[0])
