"""Distillation: it helps, it keeps what it should, and the file holds what was trained."""

import dataclasses

import pytest
import torch

from aprium.base.errors import QuantizeError
from aprium.checkpoint.hub import PICO_DIR
from aprium.checkpoint.load import load_checkpoint
from aprium.model.linear import Matrix
from aprium.ops import nvfp4
from aprium.quantize import pipeline, recipes
from aprium.quantize.qad import FakeQuant, QadConfig, distil
from aprium.train import trainer


@pytest.mark.parametrize("scales", ["frozen", "dynamic"])
def test_lowers_the_divergence(scales, tmp_path, samples):
    recipe = recipes.read("nvfp4-all", {"rule": "max"})
    target = tmp_path / "out"
    result = pipeline.quantize(PICO_DIR, target, recipe, calibration=samples, heldout=samples)
    before = load_checkpoint(target).model
    config = QadConfig(steps=12, lr=3e-4, tokens_per_step=512, scales=scales)
    quality = distil(PICO_DIR, target, recipe.rule, config, samples=samples, heldout=samples)
    assert result.quality is not None
    assert quality["logit_kl"] < 0.8 * result.quality["logit_kl"]
    after = load_checkpoint(target)
    assert after.quant.formats == recipes.formats_of(recipe, after.config)
    same_scales = moved = 0
    for name, matrix in after.model.named_modules():
        if not isinstance(matrix, Matrix) or matrix.format is None:
            continue
        old = before.get_submodule(name)
        same_scales += torch.equal(
            old.weight_scale.view(torch.uint8), matrix.weight_scale.view(torch.uint8)
        )
        moved += not torch.equal(old.weight, matrix.weight)
    assert moved > 20
    assert (same_scales >= moved) if scales == "frozen" else (same_scales < moved)
    assert not list(tmp_path.glob(".*.qad"))
    for block in after.model.backbone.layers:
        if block.kind == "attention":
            parts = [getattr(block.mixer, n) for n in ("q_proj", "k_proj", "v_proj")]
            assert len({float(p.weight_scale_2) for p in parts}) == 1


def test_fake_quantisation_is_what_is_stored_and_passes_gradients():
    weight = torch.randn(8, 32, requires_grad=True)
    fake = FakeQuant("w4a16_nvfp4", "four_over_six", None)
    out = fake(weight)
    torch.testing.assert_close(
        out, nvfp4.dequantize(*nvfp4.encode(weight.detach(), "four_over_six")), rtol=1e-6, atol=1e-7
    )
    (out * torch.arange(32)).sum().backward()
    assert torch.equal(weight.grad, torch.arange(32).float().expand(8, 32))


def test_refuses_a_target_that_is_not_quantised(tmp_path, samples):
    with pytest.raises(QuantizeError, match="no quantised matrices"):
        distil(PICO_DIR, PICO_DIR, "max", QadConfig(), samples=samples, heldout=samples)


def test_goes_on_with_its_own_work_only(tmp_path, samples, monkeypatch):
    target = tmp_path / "out"
    recipe = recipes.read("nvfp4-all")
    config = QadConfig(steps=4, lr=1e-4, tokens_per_step=256)

    def run(**changes):
        pipeline.quantize(PICO_DIR, target, recipe, calibration=samples)
        wanted = dataclasses.replace(config, **changes)
        distil(PICO_DIR, target, recipe.rule, wanted, samples=samples, heldout=samples[:2])
        return (target / "model.safetensors").read_bytes()

    whole = run()
    begun: list[int] = []
    original = trainer.Trainer.train_step

    def step(self, batch, **options):
        begun.append(self.progress.step)
        if len(begun) == 3:
            raise KeyboardInterrupt
        return original(self, batch, **options)

    monkeypatch.setattr(trainer.Trainer, "train_step", step)
    with pytest.raises(KeyboardInterrupt):
        run()
    assert run() == whole
    assert begun == [0, 1, 2, 2, 3]
    begun.clear()
    with pytest.raises(KeyboardInterrupt):
        run()
    begun.append(-1)
    run(seed=1)
    assert begun[4:] == [0, 1, 2, 3]


def test_refuses_values_out_of_range():
    with pytest.raises(QuantizeError, match="steps is 0: it must be positive"):
        QadConfig(steps=0)
