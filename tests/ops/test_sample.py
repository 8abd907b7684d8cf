"""Sampling: right distribution, right filters, and the same choice in any company."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aprium.base.errors import RequestError
from aprium.base.records import SamplingParams
from aprium.ops.sample import derive_seed, draw, filtered, sample, score, uniform


def rows(count, vocab, seed=0, spread=3.0):
    return torch.randn(count, vocab, generator=torch.Generator().manual_seed(seed)) * spread


def slow_filter(logits, params):
    """The filters of one row, token by token in float64: the specification."""
    x = logits.double() / params.temperature
    p = torch.softmax(x, -1).tolist()
    order = sorted(range(len(p)), key=lambda i: -p[i])
    if params.top_k:
        order = order[: params.top_k]
    if params.top_p < 1:
        total, kept = sum(p[i] for i in order), []
        for i in order:
            kept.append(i)
            if sum(p[j] for j in kept) >= params.top_p * total:
                break
        order = kept
    order = [i for i in order if p[i] >= params.min_p * max(p[j] for j in order)]
    total = sum(p[i] for i in order)
    return {i: p[i] / total for i in order}


params_strategy = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.3, 0.7, 1.0, 1.7]),
    top_k=st.sampled_from([0, 1, 2, 5, 40, 1000]),
    top_p=st.sampled_from([1.0, 0.999, 0.9, 0.5, 0.05]),
    min_p=st.sampled_from([0.0, 0.01, 0.2, 1.0]),
    logprobs=st.sampled_from([None, 0, 1, 4]),
)


@settings(max_examples=60)
@given(params_strategy, st.integers(0, 1000), st.integers(2, 60))
def test_filters_equal_the_slow_ones(params, seed, vocab):
    if params.temperature == 0:
        return
    logits = rows(1, vocab, seed)
    weights = filtered(logits, [params])[0]
    expected = slow_filter(logits[0], params)
    got = (weights / weights.sum()).tolist()
    assert {i for i, w in enumerate(got) if w} == set(expected)
    for i, p in expected.items():
        assert got[i] == pytest.approx(p, rel=1e-4)


@settings(max_examples=40)
@given(
    st.lists(params_strategy, min_size=2, max_size=9),
    st.sampled_from([7, 272, 1009, 2048, 5003]),
    st.integers(0, 1000),
    st.randoms(use_true_random=False),
)
def test_a_row_is_the_same_in_any_batch(params, vocab, seed, random):
    count = len(params)
    logits = rows(count, vocab, seed)
    seeds = [random.getrandbits(62) for _ in range(count)]
    positions = [random.randrange(4000) for _ in range(count)]
    together = sample(logits, params, seeds, positions)
    order = random.sample(range(count), count)
    cuts = sorted(random.sample(range(1, count), random.randrange(count)))
    for begin, end in itertools.pairwise([0, *cuts, count]):
        part = order[begin:end]
        got = sample(
            logits[part],
            [params[i] for i in part],
            [seeds[i] for i in part],
            [positions[i] for i in part],
        )
        assert got == [together[i] for i in part]  # tokens and floats, bit for bit


def bits_of(allowed, vocab):
    mask = bytearray(-(-vocab // 32) * 4)
    for token in allowed:
        mask[token // 8] |= 1 << token % 8
    return bytes(mask)


def picked(logits):
    """What the kernel gives, in PyTorch."""
    best = logits.max(-1)
    mass = (logits - best.values.unsqueeze(1)).exp().sum(-1).log()
    return list(zip(best.indices.tolist(), best.values.tolist(), mass.tolist(), strict=True))


@settings(max_examples=60)
@given(
    st.lists(params_strategy, min_size=1, max_size=5),
    st.sampled_from([7, 272, 1009]),
    st.integers(0, 1000),
    st.randoms(use_true_random=False),
)
def test_a_mask_is_as_if_there_were_no_other_tokens(params, vocab, seed, random):
    """Only its tokens are chosen, as from a vocabulary of them; log-probabilities are of all."""
    count = len(params)
    logits = rows(count, vocab, seed)
    seeds, positions = [random.getrandbits(62) for _ in range(count)], list(range(count))
    allowed = [sorted(random.sample(range(vocab), random.randrange(1, vocab))) for _ in params]
    masks = [bits_of(tokens, vocab) if random.random() < 0.8 else None for tokens in allowed]
    together = sample(logits, params, seeds, positions, masks=masks)
    logprobs = torch.log_softmax(logits, -1)
    for i, choice in enumerate(together):
        only = allowed[i] if masks[i] is not None else list(range(vocab))
        small = sample(logits[i : i + 1, only], [params[i]], [seeds[i]], [positions[i]])[0]
        assert choice.token == only[small.token]
        assert choice.logprob == logprobs[i, choice.token]
        one = sample(logits[i : i + 1], [params[i]], [seeds[i]], [positions[i]], masks=[masks[i]])
        assert one == [choice]
    kernel = sample(logits, params, seeds, positions, picked, masks)
    assert [c.token for c in kernel] == [c.token for c in together]
    for mine, theirs in zip(kernel, together, strict=True):
        assert mine.logprob == pytest.approx(theirs.logprob, abs=1e-5)


@settings(max_examples=40)
@given(
    st.lists(params_strategy, min_size=2, max_size=9),
    st.integers(0, 1000),
    st.randoms(use_true_random=False),
)
def test_with_a_kernel_a_row_is_the_same_in_any_batch(params, seed, random):
    count, vocab = len(params), 272
    logits = rows(count, vocab, seed)
    found = picked(logits)
    masks = [bits_of(range(3, 90), vocab) if random.random() < 0.4 else None for _ in params]
    seeds = [random.getrandbits(62) for _ in range(count)]
    together = sample(logits, params, seeds, range(count), lambda _: found, masks)
    for i, choice in enumerate(together):
        row, one = logits[i : i + 1], found[i : i + 1]
        (alone,) = sample(row, params[i : i + 1], [seeds[i]], [i], lambda _, o=one: o, [masks[i]])
        assert alone == choice
        if not params[i].temperature and masks[i] is None:
            assert choice.token == one[0][0] and choice.logprob == -one[0][2]


def test_a_large_vocabulary_is_also_independent_of_the_batch():
    logits = rows(5, 131072, spread=2.0)
    params = [SamplingParams(temperature=1.0, top_p=p, logprobs=3) for p in (0.5, 0.9, 0.99, 1, 1)]
    together = sample(logits, params, range(5), range(5))
    alone = [sample(logits[i : i + 1], params[i : i + 1], [i], [i])[0] for i in range(5)]
    assert together == alone


def test_the_distribution_is_the_asked_one():
    logits = torch.tensor([[0.0, 1.0, 2.0, -1.0, 0.5]])
    params = SamplingParams(temperature=0.8, top_p=0.95)
    expected = slow_filter(logits[0], params)
    count = 20_000
    many = logits.expand(count, -1).contiguous()
    numbers = [uniform(5, position) for position in range(count)]
    drawn = draw(many, [params] * count, numbers).bincount(minlength=5).double()
    chi2 = sum((drawn[i].item() - count * p) ** 2 / (count * p) for i, p in expected.items())
    assert drawn.sum() == sum(drawn[i] for i in expected)
    assert chi2 < 20  # 4 degrees of freedom or fewer: exceeded with probability < 0.0005


def test_random_numbers_are_uniform_over_seeds_and_positions():
    by_position = torch.tensor([uniform(0, i) for i in range(4096)])
    by_seed = torch.tensor([uniform(i, 7) for i in range(-2048, 2048)])
    for numbers in (by_position, by_seed):
        assert 0 <= numbers.min() and numbers.max() < 1
        counts = torch.histc(numbers, 16, 0, 1)
        assert ((counts - 256) ** 2 / 256).sum() < 45  # 15 degrees of freedom
    assert abs(torch.corrcoef(torch.stack((by_position, by_seed)))[0, 1]) < 0.06


def test_seeds_of_continuations_differ_and_stay_in_range():
    seeds = [
        derive_seed(seed, index) for seed in (-(2**63), -1, 0, 1, 2**63 - 1) for index in range(50)
    ]
    assert len(set(seeds)) == len(seeds)
    assert all(-(2**63) <= s < 2**63 for s in seeds)
    assert derive_seed(123, 0) == 123


def test_greedy_takes_the_first_of_equals_and_ignores_filters():
    logits = torch.tensor([[1.0, 3.0, 3.0], [5.0, 0.0, 5.0]])
    params = [SamplingParams(temperature=0, top_p=0.1), SamplingParams(temperature=0, top_k=1)]
    assert [c.token for c in sample(logits, params, [0, 0], [0, 0])] == [1, 0]


def test_a_tiny_temperature_is_greedy_not_nan():
    logits = rows(1, 100)
    (choice,) = sample(logits, [SamplingParams(temperature=1e-30)], [1], [1])
    assert choice.token == int(logits.argmax())


def test_logprobs_are_of_the_unmodified_distribution():
    logits = rows(2, 50)
    params = [SamplingParams(temperature=0.2, top_k=1, logprobs=3), SamplingParams(temperature=0)]
    choices = sample(logits, params, [0, 0], [0, 0])
    exact = torch.log_softmax(logits.double(), -1)
    for row, choice in enumerate(choices):
        assert choice.logprob == pytest.approx(exact[row, choice.token].item(), abs=1e-5)
    best = exact[0].topk(3)
    assert list(choices[0].alternatives) == best.indices.tolist()
    assert list(choices[0].alternatives.values()) == pytest.approx(best.values.tolist(), abs=1e-5)
    assert choices[1].alternatives == {}


def test_score_reads_the_targets():
    logits = rows(3, 20)
    values, alternatives = score(logits, [4, 0, 19], 2)
    exact = torch.log_softmax(logits, -1)
    assert values == [exact[0, 4].item(), exact[1, 0].item(), exact[2, 19].item()]
    assert [len(a) for a in alternatives] == [2, 2, 2]
    assert score(logits, [1, 2, 3], 0)[1] == [{}, {}, {}]


@pytest.mark.parametrize("number", [0.0, 1 - 2**-48])
def test_the_ends_of_the_unit_interval_choose_a_possible_token(number):
    logits = torch.tensor([[-torch.inf, 0.0, -200.0, 0.1, -torch.inf]])
    token = draw(logits, [SamplingParams(temperature=1.0)], [number])
    assert token.item() == (1 if number == 0 else 3)


def test_no_rows_no_choices():
    assert sample(torch.empty(0, 5), [], [], []) == []


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_numbers_show_in_the_logprob(temperature):
    logits = torch.tensor([[0.0, torch.nan, 1.0], [0.0, 1.0, 2.0]])
    params = SamplingParams(temperature=temperature, top_p=0.9, top_k=2)
    bad, good = sample(logits, [params, params], [0, 0], [0, 0])
    assert 0 <= bad.token < 3 and math.isnan(bad.logprob)
    assert not math.isnan(good.logprob)


@pytest.mark.parametrize("pick", [None, picked])
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_biases_are_as_if_the_logits_were_such(pick, temperature):
    logits = rows(6, 40, seed=3)
    bias = {3: 5.0, 7: -100.0, 39: 0.25}
    plain = SamplingParams(temperature=temperature)
    biased = SamplingParams(temperature=temperature, logit_bias=bias)
    assert biased.logit_bias == ((3, 5.0), (7, -100.0), (39, 0.25))
    shifted = logits.clone()
    for token, value in bias.items():
        shifted[:, token] += value
    params = [biased, plain] * 3
    seeds, positions = range(6), range(6)
    found = sample(logits, params, seeds, positions, pick)
    for i, choice in enumerate(found):
        source = shifted if i % 2 == 0 else logits
        (wanted,) = sample(source[i : i + 1], [plain], [seeds[i]], [positions[i]])
        assert choice.token == wanted.token
        expected = torch.log_softmax(logits[i], -1)[choice.token]
        assert choice.logprob == pytest.approx(float(expected), abs=1e-5)


@pytest.mark.parametrize("bias", [5, {"x": 1}, {1: "y"}, {1: 101}, {1: math.nan}, [1]])
def test_biases_that_are_none(bias):
    with pytest.raises(RequestError, match="logit_bias") as caught:
        SamplingParams(logit_bias=bias)
    assert caught.value.param == "logit_bias"
