"""What a run watches: balance, roles, spikes."""

import pytest
import torch

from aprium.base.errors import ConfigError
from aprium.model.model import HybridModel, Routing
from aprium.model.presets import PRESETS
from aprium.train.monitor import (
    DivergenceError,
    Spikes,
    StabilityConfig,
    balance_experts,
    expert_loads,
    max_violations,
    role_of,
)
from tests.model.test_transformers import random_model

TOY = PRESETS["toy"]


def test_bias_moves_towards_underloaded_experts() -> None:
    model = random_model(TOY, 1)
    name = "backbone.layers.2.mixer"
    bias = model.get_parameter(f"{name}.gate.e_score_correction_bias")
    with torch.no_grad():
        bias.zero_()
    experts = torch.tensor([[0, 1, 2]] * 5 + [[0, 1, 3]])
    loads = expert_loads([Routing(name, torch.rand(6, 8), experts)])
    balance_experts(model, loads, 0.01)
    assert max_violations(loads) == {name: pytest.approx(6 / (18 / 8))}
    assert bias[0] < 0 < bias[7] and float(bias.sum()) == pytest.approx(0, abs=1e-6)


def test_loads_of_one_layer_add_up() -> None:
    one, two = (Routing("a", torch.rand(2, 4), torch.tensor([[0], [i]])) for i in (1, 2))
    assert expert_loads([one, two])["a"].tolist() == [2, 1, 1, 0]


def test_every_parameter_has_a_role() -> None:
    with torch.device("meta"):
        model = HybridModel(TOY)
    roles = {name: role_of(name) for name, _ in model.named_parameters()}
    assert "other" not in roles.values(), roles
    assert roles["backbone.layers.0.mixer.in_proj.weight"] == "mamba"
    assert roles["backbone.layers.0.norm.weight"] == "norm"


def test_spike_needs_patience_and_does_not_become_usual() -> None:
    spikes = Spikes(StabilityConfig(spike_ratio=2.0, patience=3, window=10))
    for _ in range(10):
        spikes.see(1.0)
    spikes.see(5.0)
    spikes.see(1.1)
    for _ in range(2):
        spikes.see(5.0)
    with pytest.raises(DivergenceError, match="2 times its median of 1"):
        spikes.see(5.0)


@pytest.mark.parametrize("window", [1, 2])
def test_the_shortest_windows_begin_with_a_step(window: int) -> None:
    spikes = Spikes(StabilityConfig(spike_ratio=2.0, patience=1, window=window))
    spikes.see(1.0)
    spikes.see(1.9)
    with pytest.raises(DivergenceError):
        spikes.see(4.0)


def test_bad_values_are_named() -> None:
    with pytest.raises(ConfigError, match=r"stability\.spike_ratio is 0\.5"):
        StabilityConfig(spike_ratio=0.5)
