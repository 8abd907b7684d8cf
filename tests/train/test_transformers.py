"""One training step equals transformers' model with the same weights and batch, in float32."""

from dataclasses import replace

import pytest
import torch

from aprium.base.records import Sample
from aprium.model.presets import PRESETS
from aprium.train.batch import collate
from aprium.train.losses import LossConfig, compute_losses
from tests.model.test_transformers import random_model, to_transformers

TOY = replace(PRESETS["toy"], num_mtp_layers=0, mtp_layers=())


def test_loss_gradients_and_updated_weights_are_equal() -> None:
    ours = random_model(TOY, 3)
    theirs = to_transformers(ours)
    tokens = torch.randint(0, TOY.vocab_size, (3, 40), generator=torch.Generator().manual_seed(0))
    weights = (0.0,) + (1.0,) * 39
    samples = [Sample(tokens=tuple(r), ce_weight=weights, domain="") for r in tokens.tolist()]
    config = LossConfig(mtp_weight=0.0, balance_weight=0.0)
    found = compute_losses(ours, collate(samples), config)
    wanted = theirs(input_ids=tokens, labels=tokens, use_cache=False).loss
    assert found.ce == pytest.approx(float(wanted.detach()), rel=1e-5)
    found.total.backward()
    wanted.backward()
    theirs_by_name = dict(theirs.named_parameters())
    for name, parameter in ours.named_parameters():
        if parameter.grad is None:
            continue
        key = name.replace("backbone.", "model.")
        if ".mixer.experts." in key:
            key = key.removesuffix(".weight")
        grad = theirs_by_name.pop(key).grad
        assert grad is not None, name
        scale = float(grad.abs().max())
        close = torch.allclose(parameter.grad / scale, grad / scale, rtol=1e-4, atol=1e-4)
        assert close, name
    rest = [name for name, p in theirs_by_name.items() if p.grad is not None and p.grad.any()]
    assert not rest
    for model in (ours, theirs):
        optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
        optimiser.step()
    later = compute_losses(ours, collate(samples), config)
    again = theirs(input_ids=tokens, labels=tokens, use_cache=False).loss
    assert later.ce == pytest.approx(float(again.detach()), rel=1e-4)
