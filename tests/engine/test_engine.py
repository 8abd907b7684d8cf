"""The engine on the toy model: the same bits in every mix, honest refusals, exact accounting."""

import dataclasses
import random
from itertools import pairwise

import pytest
import torch

from aprium.base.errors import ConfigError, EngineError, RequestError
from aprium.base.records import Request, SamplingParams
from aprium.engine.config import EngineConfig
from aprium.engine.engine import Engine
from aprium.engine.memory import page_bytes
from aprium.model.layout import Layout
from aprium.ops.sample import sample

GREEDY = SamplingParams(
    temperature=0, max_tokens=12, ignore_eos=True, prompt_logprobs=2, logprobs=2
)
SAMPLED = SamplingParams(
    temperature=1.3, top_p=0.95, top_k=60, min_p=0.01, seed=7, max_tokens=9, ignore_eos=True
)
NO_END = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)


def make_engine(toy, **options):
    options = {"max_num_seqs": 8, "max_model_len": 256} | options
    return Engine(EngineConfig(model="toy", **options), toy)


def pages(toy, count, block_size):
    """The option that gives an engine `count` pages."""
    return count * page_bytes(toy.config, block_size, torch.float32)


def drain(engine, results=None):
    """Step until there is no work; returns per id its tokens, logprobs and the rest."""
    results = {} if results is None else results
    while engine.has_work:
        for delta in engine.step():
            entry = results.setdefault(delta.id, {"tokens": [], "logprobs": [], "top": []})
            entry["tokens"] += delta.tokens
            entry["logprobs"] += delta.logprobs
            entry["top"] += delta.top_logprobs
            if delta.prompt_logprobs is not None:
                assert "prompt" not in entry, "prompt log-probabilities come once"
                entry["prompt"] = (delta.prompt_logprobs, delta.prompt_top_logprobs)
            entry["finish"] = delta.finish
    engine.scheduler.check()
    return results


def run(engine, requests):
    for request in requests:
        engine.add(request)
    return drain(engine)


@pytest.fixture(scope="module")
def requests():
    """Prompts of many lengths; every third one sampled."""
    generator = random.Random(0)
    lengths = [1, 2, 5, 17, 33, 64, 65, 90]
    return [
        Request(
            id=f"r{i}",
            tokens=tuple(generator.randrange(272) for _ in range(length)),
            params=SAMPLED if i % 3 == 2 else GREEDY,
        )
        for i, length in enumerate(lengths)
    ]


@pytest.fixture(scope="module")
def alone(toy, requests):
    """What each request gives with the engine to itself, its prompt in one step."""
    return {r.id: run(make_engine(toy), [r])[r.id] for r in requests}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_num_batched_tokens": 1},
        {"max_num_batched_tokens": 7, "block_size": 5},
        {"max_num_batched_tokens": 33, "max_num_seqs": 3, "block_size": 1},
        {"max_num_batched_tokens": 256, "enable_chunked_prefill": False, "block_size": 256},
    ],
    ids=str,
)
def test_batch_mix_and_chunks_change_no_bit(toy, requests, alone, options):
    assert run(make_engine(toy, **options), requests) == alone


@pytest.mark.parametrize("seed", range(4))
def test_staggered_arrival_changes_no_bit(toy, requests, alone, seed):
    generator = random.Random(seed)
    engine = make_engine(toy, max_num_batched_tokens=generator.randrange(5, 60))
    results = {}
    for request in generator.sample(requests, len(requests)):
        engine.add(request)
        for _ in range(generator.randrange(4)):
            drain_once(engine, results)
    assert drain(engine, results) == alone


def drain_once(engine, results):
    """One step, booked as `drain` does."""

    class Once:
        has_work = True
        scheduler = engine.scheduler

        def step(self):
            self.has_work = False
            return engine.step()

    drain(Once(), results)


def test_preemption_changes_no_bit(toy, requests, alone):
    longest = max(len(r.tokens) + r.params.max_tokens for r in requests)
    engine = make_engine(
        toy,
        max_num_seqs=16,
        max_model_len=longest,
        block_size=1,
        kv_cache_bytes=pages(toy, longest, 1),
    )
    twice = [dataclasses.replace(r, id=f"{r.id}/{k}") for r in requests for k in (0, 1)]
    results = run(engine, twice)
    for request in requests:
        assert results[f"{request.id}/0"] == results[f"{request.id}/1"] == alone[request.id]
    assert engine.stats().num_preemptions >= 3
    engine.reset_prefix_cache()
    assert engine.stats().pages_free == longest


def test_abort_of_neighbours_changes_no_bit(toy, requests, alone):
    engine = make_engine(toy, max_num_batched_tokens=20)
    results = {}
    for i, request in enumerate(requests):
        engine.add(dataclasses.replace(request, id=f"noise{i}", params=NO_END))
        engine.add(request)
    for i in range(len(requests)):
        drain_once(engine, results)
        last = engine.abort(f"noise{i}")
        assert last is not None and last.finish == "abort"
    drain(engine, results)
    assert {k: v for k, v in results.items() if k in alone} == alone
    assert engine.abort("noise0") is None
    engine.reset_prefix_cache()
    stats = engine.stats()
    assert (stats.num_aborted, stats.num_finished) == (len(requests), len(requests))
    assert stats.pages_free == stats.pages_total and stats.slots_free == stats.slots_total


def test_greedy_tokens_and_scores_are_those_of_the_plain_forward(toy, requests, alone):
    for request in requests:
        if request.params is not GREEDY:
            continue
        got = alone[request.id]
        whole = [*request.tokens, *got["tokens"]]
        layout = Layout.packed([len(whole)])
        with torch.no_grad():
            hidden = toy.model(torch.tensor(whole), layout)
            logprobs = torch.log_softmax(toy.model.logits(hidden), -1)
        size = len(request.tokens)
        assert logprobs[size - 1 : -1].argmax(-1).tolist() == got["tokens"]
        exact = logprobs[:-1].gather(1, torch.tensor(whole[1:]).unsqueeze(1)).squeeze(1)
        prompt, tops = got["prompt"]
        assert prompt[0] is None and len(prompt) == size == len(tops)
        assert [*prompt[1:], *got["logprobs"]] == pytest.approx(exact.tolist(), abs=1e-4)
        best = logprobs.topk(2).indices.tolist()
        assert [list(t) for t in [*tops[1:], *got["top"]]] == best[:-1]


def test_max_tokens_zero_only_reads_the_prompt(toy):
    engine = make_engine(toy, max_model_len=20)
    params = SamplingParams(max_tokens=0, prompt_logprobs=0)
    requests = [Request(id=str(n), tokens=(5,) * n, params=params) for n in (1, 20)]
    results = run(engine, requests)
    for n in (1, 20):
        entry = results[str(n)]
        assert (entry["tokens"], entry["finish"]) == ([], "length")
        assert len(entry["prompt"][0]) == n and entry["prompt"][1] is None


def test_ends_of_text(toy):
    engine = make_engine(toy)
    free = run(engine, [Request(id="a", tokens=(1, 2, 3), params=NO_END)])["a"]["tokens"]
    position = next(i for i in range(3, len(free)) if free[i] not in free[:i])
    token = free[position]
    stop = dataclasses.replace(NO_END, stop_token_ids=(token,))
    entry = run(engine, [Request(id="b", tokens=(1, 2, 3), params=stop)])["b"]
    assert (entry["tokens"], entry["finish"]) == (free[: position + 1], "stop")
    ending = Engine(EngineConfig(model="toy", max_model_len=256), toy, [token])
    for ignore, expected in ((False, "stop"), (True, "length")):
        params = dataclasses.replace(NO_END, ignore_eos=ignore)
        entry = run(ending, [Request(id="c", tokens=(1, 2, 3), params=params)])["c"]
        assert entry["finish"] == expected


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("temperature", [0, 1.5])
@pytest.mark.parametrize("least", [1, 6, 24])
def test_no_stop_token_is_chosen_before_the_least_number(toy, native, temperature, least):
    """The oracle takes stop tokens out of the logits of a plain forward over all tokens so far."""
    stops = tuple(range(0, 272, 2))
    params = SamplingParams(
        temperature=temperature, seed=5, max_tokens=24, min_tokens=least, stop_token_ids=stops
    )
    expected = [4, 5, 6]
    while len(expected) < 27:
        with torch.no_grad():
            hidden = toy.model(torch.tensor(expected), Layout.packed([len(expected)]))
            logits = toy.model.logits(hidden[-1:]).clone()
        if len(expected) - 3 < least:
            logits[:, list(stops)] = -torch.inf
        expected.append(sample(logits, [params], [5], [len(expected)])[0].token)
        if len(expected) - 3 > least and expected[-1] in stops:
            break
    engine = make_engine(toy)
    if not native:
        engine.runner._pick = None
    entry = run(engine, [Request(id="a", tokens=(4, 5, 6), params=params)])["a"]
    assert entry["tokens"] == expected[3:]
    assert entry["finish"] == ("length" if len(expected) == 27 and least == 24 else "stop")
    assert not set(entry["tokens"][:least]) & set(stops)


def test_max_tokens_none_fills_the_context(toy):
    engine = make_engine(toy, max_model_len=30, block_size=8)
    params = SamplingParams(max_tokens=None, temperature=0, ignore_eos=True)
    entry = run(engine, [Request(id="a", tokens=(1,) * 10, params=params)])["a"]
    assert len(entry["tokens"]) == 20 and entry["finish"] == "length"


def test_seeds(toy):
    engine = make_engine(toy, seed=3)

    def tokens(engine, seed, name):
        params = SamplingParams(max_tokens=8, seed=seed, ignore_eos=True, temperature=2.0)
        return run(engine, [Request(id=name, tokens=(4, 5), params=params)])[name]["tokens"]

    assert tokens(engine, 1, "a") == tokens(engine, 1, "b") != tokens(engine, 2, "c")
    unseeded = [tokens(engine, None, f"u{i}") for i in range(3)]
    assert len({tuple(t) for t in unseeded}) == 3
    again = make_engine(toy, seed=3)
    assert [tokens(again, None, f"u{i}") for i in range(3)] == unseeded


@pytest.mark.parametrize(
    ("tokens", "params", "match"),
    [
        ((), {}, "empty"),
        ((1, 272), {}, "272 is not in the vocabulary of 272"),
        ((-1,), {}, "-1 is not in"),
        ((1, "x"), {}, "'x' is not an integer"),
        ((True,), {}, "True is not an integer"),
        ((1,) * 40, {"max_tokens": None}, "40 tokens"),
        ((1,) * 41, {"max_tokens": 0}, "41 tokens"),
        ((1,) * 30, {"max_tokens": 11}, "max_tokens is 11"),
        ((1,), {"max_tokens": 1, "stop_token_ids": (999,)}, "999"),
        ((1,) * 30, {"max_tokens": None, "min_tokens": 11}, "min_tokens is 11 .* leaves 10"),
    ],
)
def test_impossible_requests_are_refused_up_front(toy, tokens, params, match):
    engine = make_engine(toy, max_model_len=40)
    request = Request(id="r", tokens=tokens, params=SamplingParams(**params))
    with pytest.raises(RequestError, match=match):
        engine.add(request)
    assert not engine.has_work


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"max_num_seqs": 0}, "max_num_seqs is 0"),
        ({"dtype": "float64"}, "float64"),
        ({"block_size": -4}, "block_size is -4"),
        ({"load_format": "gguf"}, "gguf"),
        ({"kv_cache_bytes": 0}, "kv_cache_bytes is 0"),
        ({"max_model_len": 100, "kv_cache_bytes": 1000}, "kv_cache_bytes is 1000"),
        ({"max_num_batched_tokens": 8, "enable_chunked_prefill": False}, "chunked"),
    ],
)
def test_bad_configurations_are_refused(toy, options, match):
    with pytest.raises(ConfigError, match=match):
        make_engine(toy, **options)


def test_numbers_that_are_none_are_an_error(toy):
    engine = make_engine(toy)
    broken = {"hidden": lambda tokens, layout, state: torch.full((len(tokens), 48), torch.nan)}

    class Broken:
        logits = staticmethod(toy.model.logits)

        def __call__(self, *args):
            return broken["hidden"](*args)

    engine.runner.model = Broken()
    engine.add(Request(id="r", tokens=(1, 2), params=NO_END))
    with pytest.raises(EngineError, match=r"request r, positions 0 to 2.*float32"):
        engine.step()


def test_times_are_told_in_order(toy):
    engine = make_engine(toy)
    engine.add(Request(id="r", tokens=(1, 2), params=GREEDY))
    deltas = []
    while engine.has_work:
        deltas += engine.step()
    for earlier, later in pairwise(deltas):
        assert earlier.timings.total_s < later.timings.total_s
    last = deltas[-1].timings
    assert 0 <= last.queue_s < last.first_token_s < last.total_s


def test_what_recycled_slots_and_pages_held_does_not_matter(toy, requests, alone):
    engine = make_engine(toy, max_num_batched_tokens=30)
    state = engine.runner.state
    for buffers in (state.conv, state.ssm, state.keys, state.values):
        for buffer in buffers:
            buffer.fill_(torch.nan)
    assert run(engine, requests) == alone


def test_bfloat16_activations_run(toy):
    engine = Engine(
        EngineConfig(model="toy", load_format="dummy", dtype="bfloat16", max_model_len=64)
    )
    assert engine.runner.state.keys[0].dtype == torch.bfloat16
    entry = run(engine, [Request(id="a", tokens=(1, 2, 3), params=GREEDY)])["a"]
    assert len(entry["tokens"]) == 12
