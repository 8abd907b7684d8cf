"""Losses against their definitions, written out one document at a time."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from aprium.base.errors import ConfigError, DataError
from aprium.base.records import Sample
from aprium.model.layout import Layout
from aprium.model.model import HybridModel, Routing
from aprium.model.presets import PRESETS
from aprium.train.batch import collate
from aprium.train.losses import LossConfig, Losses, Whole, compute_losses, sum_balance
from aprium.train.policy_loss import FIGURES, PolicyLossConfig
from tests.model.test_transformers import random_model

TOY = PRESETS["toy"]


@pytest.fixture(scope="module")
def model() -> HybridModel:
    return random_model(TOY, 0)


def documents(lengths: list[int]) -> list[Sample]:
    generator = torch.Generator().manual_seed(0)
    samples = []
    for length in lengths:
        tokens = torch.randint(0, TOY.vocab_size, (length,), generator=generator).tolist()
        weights = torch.randint(0, 3, (length,), generator=generator).double().tolist()
        samples.append(
            Sample(tokens=tuple(tokens), ce_weight=(0.0, *weights[1:]), domain=f"d{length % 2}")
        )
    return samples


def test_ce_and_mtp_equal_definition(model: HybridModel) -> None:
    samples = documents([7, 1, 12, 2, 3])
    found = compute_losses(model, collate(samples), LossConfig(mtp_depths=2))
    ce, drafted, norm = 0.0, [0.0, 0.0], 0.0
    with torch.no_grad():
        for sample in samples:
            tokens = torch.tensor(sample.tokens)
            layout = Layout.packed([len(tokens)])
            hidden = model(tokens, layout)
            norm += sum(sample.ce_weight)
            logs = model.logits(hidden).log_softmax(-1)
            for t in range(1, len(tokens)):
                ce -= sample.ce_weight[t] * float(logs[t - 1, tokens[t]])
            for depth in (1, 2):
                hidden = model.predict(hidden, tokens.roll(-depth), layout)
                logs = model.logits(hidden).log_softmax(-1)
                for t in range(depth + 1, len(tokens)):
                    drafted[depth - 1] -= sample.ce_weight[t] * float(
                        logs[t - depth - 1, tokens[t]]
                    )
    assert found.ce == pytest.approx(ce / norm, rel=1e-4)
    assert found.mtp == pytest.approx(sum(drafted) / 2 / norm, rel=1e-4)
    total = found.ce + 0.1 * found.mtp + 1e-4 * found.balance
    assert float(found.total.detach()) == pytest.approx(total, rel=1e-5)


def test_z_loss_equals_its_definition_and_its_parts_add_up(model: HybridModel) -> None:
    samples, config = documents([7, 1, 12]), LossConfig(mtp_weight=0.0, z_weight=0.5)
    found = compute_losses(model, collate(samples), config)
    z, norm = 0.0, 0.0
    with torch.no_grad():
        for sample in samples:
            layout = Layout.packed([len(sample.tokens)])
            logits = model.logits(model(torch.tensor(sample.tokens), layout))
            norm += sum(sample.ce_weight)
            for t in range(1, len(sample.tokens)):
                z += sample.ce_weight[t] * float(logits[t - 1].logsumexp(-1)) ** 2
    assert found.z == pytest.approx(z / norm, rel=1e-4)
    total = found.ce + 0.5 * found.z + config.balance_weight * found.balance
    assert float(found.total.detach()) == pytest.approx(total, rel=1e-5)
    whole = Whole.of([collate(samples)], config, model.mesh)
    parts = [compute_losses(model, collate([s]), config, whole=whole) for s in samples]
    assert sum(part.z for part in parts) == pytest.approx(found.z, rel=1e-5)


def test_balance_loss_is_one_per_layer_when_balanced_and_larger_otherwise() -> None:
    layout = Layout.packed([4, 2])
    scores = torch.full((6, 4), 0.5)
    even = torch.tensor([[0, 1], [2, 3], [0, 1], [2, 3], [0, 1], [2, 3]])
    assert float(sum_balance([Routing("a", scores, even)] * 2, layout)) == pytest.approx(2.0)
    skewed = scores.clone()
    skewed[:, :2] = 0.9
    one_sided = torch.tensor([[0, 1]] * 6)
    assert float(sum_balance([Routing("a", skewed, one_sided)], layout)) > 1.2


def episodes(lengths: list[int], *, teacher: bool = True) -> list[Sample]:
    """Return trajectories of two domains, whose first two tokens are a prompt."""
    generator = torch.Generator().manual_seed(1)
    samples = []
    for number, length in enumerate(lengths):
        draw = torch.rand(5, length, generator=generator).double().tolist()
        tokens = torch.randint(0, TOY.vocab_size, (length,), generator=generator).tolist()
        sampled = [float(t >= 2) for t in range(length)]

        def masked(values: list[float], on: list[float] = sampled) -> tuple[float, ...]:
            return tuple(value * s for value, s in zip(values, on, strict=True))

        top = tuple(
            {(token + k) % TOY.vocab_size: math.log(0.5 / (k + 1)) for k in range(3)} if s else {}
            for token, s in zip(tokens, sampled, strict=True)
        )
        samples.append(
            Sample(
                tokens=tuple(tokens),
                ce_weight=(0.0,) * length,
                domain=f"d{number % 2}",
                rl_weight=masked([1.0 + number % 2] * length),
                advantage=masked([4 * x - 2 for x in draw[0]]),
                behaviour_logprob=masked([-5 - 2 * x for x in draw[1]]),
                prox_logprob=masked([-5 - 2 * x for x in draw[2]]) if number else (),
                kl_weight=masked([0.5 + x for x in draw[3]]) if teacher else (),
                teacher_logprob=masked([-4 - 3 * x for x in draw[4]]) if teacher else (),
                teacher_top=top if teacher else (),
            )
        )
    return samples


def logits_of(model: HybridModel, sample: Sample) -> torch.Tensor:
    """Return log-probabilities [T, V] of what follows each token of one sample alone."""
    with torch.no_grad():
        hidden = model(torch.tensor(sample.tokens), Layout.packed([len(sample.tokens)]))
        return model.logits(hidden).double().log_softmax(-1)


OPEN = PolicyLossConfig(mismatch="icepop", mismatch_low=0.4, mismatch_high=2.5, sequence_bound=None)


def test_policy_loss_equals_its_definition(model: HybridModel) -> None:
    samples = episodes([9, 5, 2, 12, 3])
    found = compute_losses(model, collate(samples), LossConfig(policy=OPEN))
    total = norm = 0.0
    sums: dict[str, list[float]] = {"d0": [], "d1": []}
    for sample in samples:
        logs = logits_of(model, sample)
        for t, weight in enumerate(sample.rl_weight):
            if not weight:
                continue
            logp = float(logs[t - 1, sample.tokens[t]])
            prox = sample.prox_logprob[t] if sample.prox_logprob else logp
            c = math.exp(prox - sample.behaviour_logprob[t])
            c = c if 0.4 <= c <= 2.5 else 0.0
            a = sample.advantage[t] + sample.kl_weight[t] * (sample.teacher_logprob[t] - prox)
            r = math.exp(logp - prox)
            total -= weight * c * min(r * a, min(max(r, 0.8), 1.28) * a)
            norm += weight
            sums[sample.domain].append(math.exp(abs(prox - sample.behaviour_logprob[t])))
    assert found.ce == found.kl == 0.0
    assert found.rl == pytest.approx(total / norm, rel=1e-4)
    place = FIGURES.index("mismatch")
    for name, values in sums.items():
        assert float(found.policy[name][0, place]) == pytest.approx(sum(values), rel=1e-4)
        assert float(found.policy[name][1, place]) == len(values)


@pytest.mark.parametrize("direction", ["reverse", "forward"])
@pytest.mark.parametrize("form", ["k3", "top_k", "full"])
def test_divergences_equal_their_definitions(model: HybridModel, form: Any, direction: Any) -> None:
    samples, other = episodes([9, 5, 4]), random_model(TOY, 7)
    policy = PolicyLossConfig(distillation=form, direction=direction)
    config = LossConfig(mtp_weight=0.0, balance_weight=0.0, kl_weight=0.5, policy=policy)
    found = compute_losses(model, collate(samples), config, other if form == "full" else None)
    total = norm = 0.0
    for sample in samples:
        logs, theirs = logits_of(model, sample), logits_of(other, sample)
        for t, weight in enumerate(sample.kl_weight):
            if not weight:
                continue
            mine, norm = logs[t - 1], norm + weight
            if form == "k3":
                gap = sample.teacher_logprob[t] - float(mine[sample.tokens[t]])
                total += weight * (math.exp(gap) - gap - 1)
                continue
            if form == "full":
                pairs = (mine, theirs[t - 1])
            else:
                named = sample.teacher_top[t]
                ends = [float(mine[i].exp()) for i in named], [math.exp(x) for x in named.values()]
                pairs = tuple(torch.tensor([*e, 1 - sum(e)]).double().log() for e in ends)
            first, second = pairs if direction == "reverse" else pairs[::-1]
            total += weight * float((first.exp() * (first - second)).sum())
    assert found.kl == pytest.approx(total / norm, rel=1e-4)
    assert float(found.total.detach()) == pytest.approx(found.rl + 0.5 * found.kl, rel=1e-5)


@pytest.mark.parametrize("normalise", ["tokens", "sequences", "fixed"])
@pytest.mark.parametrize("form", ["sampled", "k3", "top_k"])
def test_parts_of_a_step_add_up(model: HybridModel, normalise: Any, form: Any) -> None:
    samples = [*episodes([9, 5, 2, 12, 3]), *documents([6, 4])]
    fixed = 5 if normalise == "fixed" else None
    policy = PolicyLossConfig(distillation=form, normalise=normalise, fixed_length=fixed)
    config = LossConfig(policy=policy)
    once = compute_losses(model, collate(samples), config)
    gradients = torch.autograd.grad(once.total, model.head_weight)
    batches = [collate(samples[:2]), collate(samples[2:3]), collate(samples[3:])]
    whole = Whole.of(batches, config, model.mesh)
    parts = [compute_losses(model, batch, config, whole=whole) for batch in batches]
    for name in ("ce", "kl", "rl", "mtp", "balance"):
        added = sum(getattr(part, name) for part in parts)
        assert getattr(once, name) == pytest.approx(added, rel=1e-4, abs=1e-6), name
    added = torch.autograd.grad(sum((p.total for p in parts), torch.zeros(())), model.head_weight)
    torch.testing.assert_close(added[0], gradients[0], rtol=1e-4, atol=1e-6)
    for name, sums in once.policy.items():
        together = sum((p.policy[name] for p in parts if name in p.policy), torch.zeros(2, 6))
        torch.testing.assert_close(together.double(), sums, rtol=1e-4, atol=1e-4)


def test_each_domain_has_its_teacher(model: HybridModel) -> None:
    samples, one, other = episodes([9, 5, 4, 7]), random_model(TOY, 7), random_model(TOY, 8)
    config = LossConfig(policy=PolicyLossConfig(distillation="full"))
    both = compute_losses(model, collate(samples), config, {"d0": one, "d1": other})
    norm, total = sum(sum(s.kl_weight) for s in samples), 0.0
    for teacher, own in ((one, samples[::2]), (other, samples[1::2])):
        alone = compute_losses(model, collate(own), config, teacher)
        total += alone.kl * sum(sum(s.kl_weight) for s in own)
    assert both.kl == pytest.approx(total / norm, rel=1e-4)
    with pytest.raises(ConfigError, match="no teacher has domain 'd1'"):
        compute_losses(model, collate(samples), config, {"d0": one})
    # Samples that do not say how much the teacher counts are distilled as they would be learnt.
    texts = documents([7, 5])
    given = [replace(s, kl_weight=s.ce_weight) for s in texts]
    assert compute_losses(model, collate(texts), config, one).kl == pytest.approx(
        compute_losses(model, collate(given), config, one).kl
    )


@pytest.mark.parametrize(
    ("form", "lacking"),
    [("sampled", "teacher_logprob"), ("k3", "teacher_logprob"), ("top_k", "teacher_top")],
)
def test_what_no_teacher_scored_is_refused(model: HybridModel, form: Any, lacking: str) -> None:
    whole, other = episodes([5, 6])
    samples = [whole, replace(other, **{lacking: ()})]
    config = LossConfig(policy=PolicyLossConfig(distillation=form))
    with pytest.raises(DataError, match=f"no {lacking}"):
        compute_losses(model, collate(samples), config)


def test_detached_head_learns_alone_and_from_sampled_tokens(model: HybridModel) -> None:
    samples = episodes([9, 5], teacher=False)
    silent = [replace(s, advantage=(0.0,) * len(s.tokens)) for s in samples]
    config = LossConfig(balance_weight=0.0, mtp_detach=True)
    found = compute_losses(model, collate(silent), config)
    model.zero_grad()
    found.total.backward()
    learns = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert learns and all(name.startswith("mtp.") for name in learns)
    attached = compute_losses(model, collate(silent), replace(config, mtp_detach=False))
    assert attached.mtp == pytest.approx(found.mtp)
    texts = [Sample(tokens=s.tokens, ce_weight=s.rl_weight) for s in samples]
    assert compute_losses(model, collate(texts), config).mtp == pytest.approx(found.mtp)
    model.zero_grad()


def test_samples_without_any_weight_are_nothing(model: HybridModel) -> None:
    empty = Sample(tokens=(5, 6, 7), ce_weight=(0.0,) * 3)
    found: Losses = compute_losses(model, collate([empty]), LossConfig(balance_weight=0.0))
    assert float(found.total.detach()) == 0.0
    found.total.backward()
    model.zero_grad()
    samples: Sequence[Sample] = episodes([9, 5])
    config = LossConfig(balance_weight=0.0)
    with_it = compute_losses(model, collate([*samples, empty]), config)
    alone = compute_losses(model, collate(samples), config)
    assert with_it.rl == pytest.approx(alone.rl) and with_it.mtp == pytest.approx(alone.mtp)
