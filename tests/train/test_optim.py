"""Schedules, roles of parameters, and Muon's update."""

import pytest
import torch

from aprium.base.errors import ConfigError
from aprium.model.model import HybridModel
from aprium.model.presets import PRESETS
from aprium.train.optim import (
    Muon,
    OptimConfig,
    build_optimisers,
    orthogonalise,
    schedule_factor,
    uses_muon,
)


def test_wsd_schedule() -> None:
    config = OptimConfig(warmup_steps=10, decay_fraction=0.25, final_fraction=0.0)
    factors = [schedule_factor(step, 100, config) for step in range(101)]
    assert factors[0] == pytest.approx(0.1) and factors[9] == 1.0
    assert set(factors[10:75]) == {1.0}
    # Minus-sqrt: a quarter into the decay the rate has halved.
    assert factors[75 + 25 // 4] == pytest.approx(1 - (6 / 25) ** 0.5)
    assert factors[100] == pytest.approx(0.0)


def test_cosine_schedule() -> None:
    config = OptimConfig(schedule="cosine", warmup_steps=0, final_fraction=0.1)
    assert schedule_factor(0, 50, config) == pytest.approx(1.0)
    assert schedule_factor(25, 50, config) == pytest.approx(0.55)
    assert schedule_factor(50, 50, config) == pytest.approx(0.1)


def test_every_trainable_parameter_has_one_optimiser_and_vectors_no_decay() -> None:
    model = HybridModel(PRESETS["toy"], dtype=torch.float32)
    seen: dict[int, float] = {}
    for optimiser in build_optimisers(model, OptimConfig()):
        for group in optimiser.param_groups:
            for parameter in group["params"]:
                assert id(parameter) not in seen
                seen[id(parameter)] = group["weight_decay"]
    for name, parameter in model.named_parameters():
        if "e_score_correction_bias" in name:
            assert id(parameter) not in seen
            continue
        vector = parameter.dim() == 1 or "conv1d" in name
        assert (seen[id(parameter)] == 0.0) == vector, name
    assert uses_muon("backbone.layers.0.mixer.in_proj.weight", torch.empty(2, 2))
    assert not uses_muon("backbone.embeddings.weight", torch.empty(2, 2))


@pytest.mark.parametrize("shape", [(3, 8, 20), (2, 30, 6), (1, 5, 5)])
def test_orthogonalise_brings_singular_values_near_one(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    values = torch.linalg.svdvals(orthogonalise(torch.randn(shape, generator=generator)))
    assert float(values.min()) > 0.4 and float(values.max()) < 1.4


def test_muon_treats_stacked_matrices_as_independent() -> None:
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(4, 6, 10, generator=generator)
    gradient = torch.randn(4, 6, 10, generator=generator)
    stacked = torch.nn.Parameter(start.clone())
    single = [torch.nn.Parameter(m.clone()) for m in start]
    for parameters, gradients in (([stacked], [gradient]), (single, list(gradient))):
        optimiser = Muon(parameters, lr=0.1, momentum=0.9, weight_decay=0.1)
        for parameter, grad in zip(parameters, gradients, strict=True):
            parameter.grad = grad.clone()
        optimiser.step()
    torch.testing.assert_close(stacked.data, torch.stack([p.data for p in single]))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"decay_fraction": 1.5}, "decay_fraction is 1.5"),
        ({"muon_lr": 0.0}, "muon_lr is 0.0"),
        ({"lr": float("nan")}, "lr is nan"),
        ({"betas": (0.9, 1.0)}, r"betas\[1\] is 1.0"),
        ({"muon_momentum": -0.1}, "muon_momentum is -0.1"),
        ({"eps": 0.0}, "eps is 0.0"),
        ({"warmup_steps": -1}, "warmup_steps is -1"),
        ({"weight_decay": -1.0}, "weight_decay is -1.0"),
    ],
)
def test_bad_values_are_named(values: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        OptimConfig(**values)  # type: ignore[arg-type]
