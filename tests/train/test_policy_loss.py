"""The policy's losses against their formulas, written out token by token in plain Python."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aprium.base.errors import ConfigError
from aprium.train.policy_loss import (
    FIGURES,
    PolicyLossConfig,
    PolicyTokens,
    k3,
    loss_weights,
    policy_losses,
    top_k_divergence,
)

PLAIN = PolicyLossConfig(
    mismatch="none", sequence_bound=None, advantage_clip=None, eps_low=0.2, eps_high=0.28
)
LENGTHS = (4, 1, 6, 3)
# Two tokens whose mismatch is large, so that every treatment of it has something to do.
FIXED: dict[str, list[float]] = {
    "logprobs": [
        -0.9,
        -2.1,
        -0.3,
        -1.7,
        -0.6,
        -1.1,
        -0.2,
        -3.0,
        -0.8,
        -1.4,
        -0.5,
        -2.2,
        -0.4,
        -1.0,
    ],
    "prox": [-1.0, -1.6, -0.35, -2.2, -0.6, -1.0, -0.5, -2.4, -0.9, -1.1, -0.45, -2.0, -0.9, -1.0],
    "behaviour": [-1.1, -1.5, -0.4, -4.4, -0.6, -0.9, -0.5, -0.6, -1.0, -1.2, -0.4, -1.9, -1, -1.1],
    "advantages": [1.5, 1.5, 1.5, -5.0, -0.7, 0.4, 0.4, 0.4, 0.4, -9.0, -9.0, -1.2, -1.2, 2.0],
    "kl_weights": [0.0, 1.0, 1.0, 0.5, 0.0, 0.0, 1.0, 1.0, 2.0, 0.0, 1.0, 1.0, 1.0, 1.0],
    "teacher": [0.0, -1.2, -0.1, -9.0, 0.0, 0.0, -0.6, -0.4, -1.9, 0.0, -0.5, -30.0, -0.2, -1.1],
}
WEIGHTS = [1.0, 1.0, 2.0, 1.0, 1.0, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 1.0, 1.0, 1.0]
SEQUENCES = [i for i, n in enumerate(LENGTHS) for _ in range(n)]


def tokens(**changes: Any) -> PolicyTokens:
    streams = {**FIXED, **changes}
    made = {name: torch.tensor(values, dtype=torch.float64) for name, values in streams.items()}
    made["logprobs"].requires_grad_()
    return PolicyTokens(sequences=torch.tensor(SEQUENCES), num_sequences=len(LENGTHS), **made)


def loss(made: PolicyTokens, config: PolicyLossConfig) -> torch.Tensor:
    weights, norm = loss_weights(
        torch.tensor(WEIGHTS, dtype=torch.float64), made.sequences, made.num_sequences, config
    )
    return (policy_losses(made, config)[0] * weights).sum() / norm


def by_hand(logprobs: list[float], config: PolicyLossConfig, streams: dict[str, Any]) -> float:
    """Return the loss; what has no gradient is made of the log-probabilities in `streams`."""
    fixed, prox = streams["logprobs"], list(streams["prox"])
    behaviour = list(streams["behaviour"])
    for t, value in enumerate(fixed):
        prox[t] = value if math.isnan(prox[t]) else prox[t]
        behaviour[t] = prox[t] if math.isnan(behaviour[t]) else behaviour[t]
    near = behaviour if config.proximal == "behaviour" else prox
    total = norm = 0.0
    for sequence in range(len(LENGTHS)):
        mine = [t for t, s in enumerate(SEQUENCES) if s == sequence]
        errors = [math.exp(abs(prox[t] - behaviour[t])) for t in mine]
        drop = config.sequence_bound is not None
        drop = drop and sum(errors) / len(mine) > (config.sequence_bound or 0)
        if config.geometric_band is not None:
            geometric = math.exp(sum(prox[t] - behaviour[t] for t in mine) / len(mine))
            low, high = config.geometric_band
            drop = drop or not low <= geometric <= high
        weight = sum(WEIGHTS[t] for t in mine)
        norm += weight if config.normalise == "tokens" else weight / len(mine)
        share = {"tokens": 1.0, "sequences": 1 / len(mine)}.get(config.normalise, 0.0)
        share = 1 / config.fixed_length if config.fixed_length is not None else share
        for t in mine:
            c = math.exp(prox[t] - behaviour[t])
            inside = config.mismatch_low <= c <= config.mismatch_high
            if config.mismatch == "none" or config.proximal == "behaviour":
                c = 1.0
            elif config.mismatch == "truncate":
                c = min(max(c, config.mismatch_low), config.mismatch_high)
            elif not inside:
                c = 0.0
            bound = config.advantage_clip or math.inf
            a = min(max(streams["advantages"][t], -bound), bound)
            if config.distillation == "sampled" and streams["kl_weights"][t]:
                gap = streams["teacher"][t] - prox[t]
                a += streams["kl_weights"][t] * min(max(gap, -bound), bound)
            if config.ratio == "token":
                r = math.exp(logprobs[t] - near[t])
            elif config.ratio == "off":
                r = math.exp(logprobs[t] - fixed[t])
            else:
                mean = sum(fixed[u] - near[u] for u in mine) / len(mine)
                r = math.exp(mean) * math.exp(logprobs[t] - fixed[t])
            low, high = 1 - config.eps_low, 1 + config.eps_high
            if config.surrogate == "cispo":
                still = {"token": fixed[t] - near[t], "off": 0.0}
                still = math.exp(
                    still.get(config.ratio, sum(fixed[u] - near[u] for u in mine) / len(mine))
                )
                gain = min(max(still, low), high) * a * logprobs[t]
            else:
                gain = min(r * a, min(max(r, low), high) * a)
                if config.dual_clip is not None and a < 0:
                    gain = max(gain, config.dual_clip * a)
            total -= 0.0 if drop else WEIGHTS[t] * share * c * gain
    return total / norm


CASES: dict[str, PolicyLossConfig] = {
    "plain": PLAIN,
    "published": PolicyLossConfig(),
    "reinforce": replace(PLAIN, ratio="off"),
    "behaviour": replace(PLAIN, proximal="behaviour"),
    "behaviour-sequence": replace(PLAIN, proximal="behaviour", ratio="sequence", eps_high=1.0),
    "dual": replace(PLAIN, dual_clip=1.5),
    "wide": replace(PLAIN, eps_low=1.0, eps_high=9.0),
    "gspo": replace(PLAIN, ratio="sequence", normalise="sequences", eps_low=3e-3, eps_high=4e-3),
    "gspo-wide": replace(PLAIN, ratio="sequence", normalise="sequences", eps_high=1.0),
    "cispo": replace(PLAIN, surrogate="cispo", eps_low=1.0, eps_high=0.1),
    "cispo-sequence": replace(PLAIN, surrogate="cispo", ratio="sequence"),
    "truncate": replace(PLAIN, mismatch="truncate", mismatch_low=0.5, mismatch_high=2.0),
    "icepop": replace(PLAIN, mismatch="icepop", mismatch_low=0.5, mismatch_high=5.0),
    "bound": replace(PLAIN, sequence_bound=2.0),
    "band": replace(PLAIN, geometric_band=(0.95, 1.1)),
    "sequences": replace(PLAIN, normalise="sequences"),
    "fixed": replace(PLAIN, normalise="fixed", fixed_length=7),
    "clipped-advantage": replace(PLAIN, advantage_clip=1.0),
    "no-teacher": replace(PLAIN, distillation="top_k"),
}


@pytest.mark.parametrize("prox", [True, False], ids=["prox", "on-policy"])
@pytest.mark.parametrize("behaviour", [True, False], ids=["behaviour", "none"])
@pytest.mark.parametrize("name", CASES)
def test_value_and_gradient_equal_the_formula(name: str, prox: bool, behaviour: bool) -> None:
    config, nothing = CASES[name], [math.nan] * len(SEQUENCES)
    streams = dict(FIXED)
    streams |= {} if prox else {"prox": nothing}
    streams |= {} if behaviour else {"behaviour": nothing}
    made = tokens(**streams)
    found = loss(made, config)
    assert float(found.detach()) == pytest.approx(by_hand(FIXED["logprobs"], config, streams))
    (gradient,) = torch.autograd.grad(found, made.logprobs)
    slopes = []
    for t in range(len(SEQUENCES)):
        values = []
        for step in (1e-6, -1e-6):
            moved = list(FIXED["logprobs"])
            moved[t] += step
            values.append(by_hand(moved, config, streams))
        slopes.append((values[0] - values[1]) / 2e-6)
    numpy.testing.assert_allclose(gradient.numpy(), slopes, rtol=1e-6, atol=1e-8)


def test_the_cases_do_what_they_are_for() -> None:
    """Each option changes the loss of the fixed arrays, or its test would show nothing."""
    plain = float(loss(tokens(), PLAIN).detach())
    for name, config in CASES.items():
        assert name == "plain" or float(loss(tokens(), config).detach()) != plain, name


def test_figures_are_of_the_tokens_they_are_of() -> None:
    config = replace(PLAIN, mismatch="icepop", distillation="sampled")
    behaviour = [math.nan, *FIXED["behaviour"][1:]]
    made = tokens(behaviour=behaviour)
    figures = policy_losses(made, config)[1].numpy()
    column = dict(zip(FIGURES, figures.T, strict=True))
    prox, kl = numpy.array(FIXED["prox"]), numpy.array(FIXED["kl_weights"])
    expected = numpy.exp(numpy.abs(prox - numpy.array(behaviour)))
    numpy.testing.assert_allclose(column["mismatch"], expected)
    ratio = numpy.exp(prox - numpy.array(FIXED["behaviour"]))
    outside = (ratio < config.mismatch_low) | (ratio > config.mismatch_high)
    outside[0] = False
    assert outside.any() and column["masked"].tolist() == outside.astype(float).tolist()
    numpy.testing.assert_allclose(column["entropy"], -numpy.array(FIXED["logprobs"]))
    gap = numpy.where(kl != 0, prox - numpy.array(FIXED["teacher"]), numpy.nan)
    numpy.testing.assert_allclose(column["teacher_gap"], gap)
    r = numpy.exp(numpy.array(FIXED["logprobs"]) - prox)
    a = column["advantage"]
    active = ((r < 0.8) & (a < 0)) | ((r > 1.28) & (a > 0))
    assert active.any() and column["clipped"].tolist() == active.astype(float).tolist()


logs = st.floats(-6, -0.01)


@settings(max_examples=50)
@given(data=st.data(), name=st.sampled_from(list(CASES)))
def test_one_policy_has_no_mismatch_and_the_plain_gradient(data: st.DataObject, name: str) -> None:
    """Where all three policies are one, nothing is masked and d loss / d logp = -w A / norm."""
    draw = lambda values: data.draw(st.lists(values, min_size=14, max_size=14))  # noqa: E731
    same, advantages = draw(logs), draw(st.floats(-3, 3))
    config = replace(CASES[name], advantage_clip=None, eps_low=0.2)
    made = tokens(
        logprobs=same, prox=same, behaviour=same, advantages=advantages, kl_weights=[0.0] * 14
    )
    losses, figures = policy_losses(made, config)
    (gradient,) = torch.autograd.grad(losses.sum(), made.logprobs)
    numpy.testing.assert_allclose(gradient.numpy(), -numpy.array(advantages), atol=1e-12)
    assert figures[:, FIGURES.index("mismatch")].tolist() == [1.0] * 14
    assert not figures[:, FIGURES.index("masked")].any()
    assert not figures[:, FIGURES.index("clipped")].any()


@pytest.mark.parametrize("name", ["published", "sequences", "fixed", "gspo", "band"])
def test_processes_with_other_tokens_of_a_sequence_make_up_the_whole(name: str) -> None:
    """Two halves of the tokens, whose means over sequences are joined, give the same losses."""
    config, whole = CASES[name], tokens()
    expected, figures = policy_losses(whole, config)
    halves = [slice(0, 8), slice(8, 14)]
    sums: list[list[torch.Tensor]] = [[], []]

    def part(number: int, gather: Callable[[torch.Tensor], torch.Tensor]) -> Any:
        names = ("logprobs", "advantages", "behaviour", "prox", "kl_weights", "teacher")
        streams = {n: getattr(whole, n).detach()[halves[number]] for n in names}
        mine = replace(whole, sequences=whole.sequences[halves[number]], **streams)
        return policy_losses(mine, config, gather)

    for number in (0, 1):  # what each says of its own
        part(number, lambda x, number=number: (sums[number].append(x), torch.ones_like(x))[1])
    # The first sum, the counts, does not depend on others; join it, then what is made of it.
    assert len(sums[0]) == len(sums[1]) >= 1
    for number in (0, 1):
        joined = iter([a + b for a, b in zip(*sums, strict=True)])
        losses, seen = part(number, lambda x, joined=joined: next(joined))
        torch.testing.assert_close(losses, expected.detach()[halves[number]])
        torch.testing.assert_close(seen, figures[halves[number]], equal_nan=True)


def test_k3_is_its_formula() -> None:
    mine, other = [-1.0, -2.0, -0.1], [-1.5, -0.5, -0.1]
    expected = [math.exp(b - a) - (b - a) - 1 for a, b in zip(mine, other, strict=True)]
    found = k3(torch.tensor(mine), torch.tensor(other))
    assert found.tolist() == pytest.approx(expected, abs=1e-6)


def divergence(mine: numpy.ndarray, theirs: numpy.ndarray, reverse: bool) -> float:
    first, second = (mine, theirs) if reverse else (theirs, mine)
    return sum(math.exp(a) * (a - b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("reverse", [True, False])
def test_top_k_equals_buckets_by_hand_and_the_whole_where_all_are_named(reverse: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    shape = (5, 9)
    mine, theirs = (
        (2 * torch.randn(shape, generator=generator, dtype=torch.float64)).log_softmax(-1)
        for _ in range(2)
    )
    ids = theirs.topk(4, -1).indices
    named = theirs.gather(1, ids)
    named[0, 3] = -math.inf  # one teacher named fewer
    found = top_k_divergence(mine.gather(1, ids), named, reverse=reverse)
    for row in range(5):
        kept = [k for k, value in zip(ids[row].tolist(), named[row], strict=True) if value > -99]
        rest = [k for k in range(9) if k not in kept]
        a, b = (
            [*x[row, kept].tolist(), math.log(x[row, rest].exp().sum())] for x in (mine, theirs)
        )
        expected = divergence(numpy.array(a), numpy.array(b), reverse)
        assert float(found[row]) == pytest.approx(expected)
        whole = divergence(mine[row].numpy(), theirs[row].numpy(), reverse)
        assert float(found[row]) <= whole + 1e-12
        every = top_k_divergence(mine[row : row + 1], theirs[row : row + 1], reverse=reverse)
        assert float(every) == pytest.approx(whole, rel=1e-4)


@pytest.mark.parametrize("reverse", [True, False])
def test_top_k_gradient(reverse: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(3, 7, generator=generator, dtype=torch.float64, requires_grad=True)
    theirs = torch.randn(3, 7, generator=generator, dtype=torch.float64).log_softmax(-1)
    values, ids = theirs.topk(3, -1)
    values[1, 2] = -math.inf

    def of(x: torch.Tensor) -> torch.Tensor:
        return top_k_divergence(x.log_softmax(-1).gather(1, ids), values, reverse=reverse)

    assert torch.autograd.gradcheck(of, (logits,))


CLIPS: dict[str, dict[str, Any]] = {
    "ppo": {},
    "dual": {"dual_clip": 1.5},
    "gspo": {"ratio": "sequence", "eps_low": 0.05, "eps_high": 0.05},
    "cispo": {"surrogate": "cispo", "eps_low": 1.0, "eps_high": 0.1},
}


@pytest.mark.parametrize("mismatch", ["none", "truncate"])
@pytest.mark.parametrize("prox", [True, False], ids=["prox", "on-policy"])
@pytest.mark.parametrize("name", CLIPS)
def test_behaviour_as_proximal_policy_puts_the_whole_change_under_the_clips(
    name: str, prox: bool, mismatch: Any
) -> None:
    """The formula in numpy: r = p / b, c = 1, m by the policy at the start, no teacher."""
    config = replace(PLAIN, proximal="behaviour", mismatch=mismatch, **CLIPS[name])
    config = replace(config, sequence_bound=2.0, distillation="top_k")
    made = tokens(**({} if prox else {"prox": [math.nan] * len(SEQUENCES)}))
    p, b, a = (numpy.array(FIXED[name]) for name in ("logprobs", "behaviour", "advantages"))
    start = numpy.array(FIXED["prox"]) if prox else p
    ids, weights = numpy.array(SEQUENCES), numpy.array(WEIGHTS)

    def mean(values: numpy.ndarray) -> numpy.ndarray:
        return (numpy.bincount(ids, values) / numpy.bincount(ids))[ids]

    kept = mean(numpy.exp(numpy.abs(start - b))) <= 2.0
    assert kept.any() and not kept.all()
    ratio = numpy.exp(mean(p - b)) if name == "gspo" else numpy.exp(p - b)
    clipped = numpy.clip(ratio, 1 - config.eps_low, 1 + config.eps_high)
    if name == "cispo":
        gain, slope = clipped * a * p, clipped * a
    else:
        gain = numpy.minimum(ratio * a, clipped * a)
        slope = numpy.where(gain == ratio * a, ratio * a, 0.0)
        if name == "dual":
            floor = numpy.where(a < 0, 1.5 * a, -numpy.inf)
            gain, slope = numpy.maximum(gain, floor), numpy.where(gain < floor, 0.0, slope)
    assert (slope[kept] != (ratio * a)[kept]).any()  # something is clipped
    found = loss(made, config)
    total = weights.sum()
    assert float(found.detach()) == pytest.approx(-(weights * kept * gain).sum() / total)
    (gradient,) = torch.autograd.grad(found, made.logprobs)
    numpy.testing.assert_allclose(gradient.numpy(), -weights * kept * slope / total, atol=1e-12)


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({"proximal": "behaviour", "mismatch": "icepop"}, "bound the ratio by eps_low"),
        ({"eps_low": 1.5}, "eps_low"),
        ({"eps_high": -0.1}, "eps_high"),
        ({"dual_clip": 1.0}, "above 1"),
        ({"dual_clip": 3.0, "surrogate": "cispo"}, "dual_clip"),
        ({"mismatch_low": 1.5}, "must lie between"),
        ({"sequence_bound": 0.5}, "never below 1"),
        ({"geometric_band": (1.1, 1.2)}, "must lie between"),
        ({"normalise": "fixed"}, "fixed_length"),
        ({"fixed_length": 7}, "fixed_length"),
        ({"normalise": "fixed", "fixed_length": 0}, "positive"),
        ({"advantage_clip": 0.0}, "positive"),
    ],
)
def test_what_makes_no_sense_is_refused(wrong: dict[str, Any], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        PolicyLossConfig(**wrong)
