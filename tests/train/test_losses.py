"""Losses against their definitions, written out one document at a time."""

import pytest
import torch

from aprium.base.records import Sample
from aprium.model.layout import Layout
from aprium.model.model import HybridModel, Routing
from aprium.model.presets import PRESETS
from aprium.train.batch import collate
from aprium.train.losses import LossConfig, compute_losses, sum_balance
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


def test_balance_loss_is_one_per_layer_when_balanced_and_larger_otherwise() -> None:
    layout = Layout.packed([4, 2])
    scores = torch.full((6, 4), 0.5)
    even = torch.tensor([[0, 1], [2, 3], [0, 1], [2, 3], [0, 1], [2, 3]])
    assert float(sum_balance([Routing("a", scores, even)] * 2, layout)) == pytest.approx(2.0)
    skewed = scores.clone()
    skewed[:, :2] = 0.9
    one_sided = torch.tensor([[0, 1]] * 6)
    assert float(sum_balance([Routing("a", skewed, one_sided)], layout)) > 1.2
