"""The search for formats under a budget."""

import dataclasses
import itertools

import pytest
import torch

from aprium.base.errors import QuantizeError
from aprium.checkpoint.hub import PICO_DIR
from aprium.checkpoint.load import load_checkpoint
from aprium.model.model import HybridModel
from aprium.model.presets import PRESETS
from aprium.quantize import auto, recipes


@pytest.fixture(scope="module")
def model() -> HybridModel:
    return load_checkpoint(PICO_DIR).model


def unit(name: str, weights: int) -> auto.Unit:
    return auto.Unit(
        name=name, layer=0, role="mlp", parameters=(name,), modules=(name,), weights=weights
    )


def test_units_cover_every_matrix_once():
    config = PRESETS["pico"]
    found = auto.units(config)
    modules = [module for u in found for module in u.modules]
    assert len(modules) == len(set(modules))
    assert set(modules) == set(recipes.formats_of(recipes.read("nvfp4-all"), config))
    assert sum("qkv" in u.name for u in found) == 2


@pytest.mark.parametrize("budget", [4.5, 4.75, 6.0, 9.9, 16.0])
def test_the_choice_is_the_best_there_is(budget):
    units = [unit(str(i), size) for i, size in enumerate((10, 30, 20, 5, 15))]
    generator = torch.Generator().manual_seed(2)
    table = [
        {"nvfp4": 10 * float(a), "fp8": float(b)}
        for a, b in torch.rand(5, 2, generator=generator).tolist()
    ]
    found = auto.solve(units, table, ("nvfp4", "fp8"), budget)
    total = sum(u.weights for u in units)

    def bits(choice):
        pairs = zip(units, choice, strict=True)
        return sum(recipes.BITS[f] * u.weights for u, f in pairs) / total

    def cost(choice):
        return sum(row.get(f, 0.0) for row, f in zip(table, choice, strict=True))

    options = itertools.product(("nvfp4", "fp8", None), repeat=5)
    best = min(cost(c) for c in options if bits(c) <= budget + 1e-9)
    assert bits(found) <= budget + 1e-9
    assert cost(found) == pytest.approx(best, abs=1e-9)


def test_measuring_leaves_the_model_as_it_was_and_finds_what_matters(model, samples):
    before = {name: p.clone() for name, p in model.named_parameters()}
    units = auto.units(model.config)[:6]
    recipe = recipes.read("nvfp4-all")
    table = auto.measure(model, samples[:4], units, ("w4a16_nvfp4", "fp8"), recipe)
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
    assert all(row["w4a16_nvfp4"] > row["fp8"] > 0 for row in table)


def test_search_meets_its_budget(model, samples):
    choices = auto.search(model, samples[:2], recipes.read("nvfp4-all"), 5.0)
    formats = auto.formats_of(choices)
    assert 4.8 < recipes.effective_bits(formats, model.config) <= 5.0
    assert "8.mixer.qkv_proj" in auto.render(choices)


def test_a_width_that_blocks_do_not_divide_takes_fp8_or_nothing():
    shape = dataclasses.replace(PRESETS["toy"], expert_intermediate_size=24)
    odd = HybridModel(shape)
    odd.init_weights(torch.Generator().manual_seed(0))
    choices = auto.search(odd, [[1, 2, 3, 4]], recipes.read("nvfp4-all"), 9.0)
    experts = [choice for choice in choices if choice.unit.role == "expert"]
    assert experts and all(choice.format in ("fp8", None) for choice in experts)
    assert any(choice.format == "w4a16_nvfp4" for choice in choices)
    assert "experts" in auto.render(choices)


def test_a_budget_that_cannot_be_met_is_refused(model, samples):
    with pytest.raises(QuantizeError, match=r"budget of 4\.0 bits is below the 4\.5 of NVFP4"):
        auto.search(model, samples[:1], recipes.read("nvfp4"), 4.0)
