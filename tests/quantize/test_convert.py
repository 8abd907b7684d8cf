"""Conversion between layouts: codes stay, values stay, and other libraries' rules hold."""

import json

import pytest
import torch
from safetensors.torch import load_file

from aprium.base.errors import QuantizeError
from aprium.checkpoint.hub import PICO_DIR
from aprium.checkpoint.load import load_checkpoint
from aprium.model.linear import Matrix
from aprium.quantize import pipeline, recipes
from aprium.quantize.convert import convert


@pytest.fixture(scope="module", params=["nvfp4", "nano-nvfp4", "fp8", "lightning-nvfp4"])
def quantised(request, tmp_path_factory, samples):
    path = tmp_path_factory.mktemp("quantised") / request.param
    recipe = recipes.read(request.param)
    pipeline.quantize(PICO_DIR, path, recipe, calibration=samples)
    return path


def dense(path) -> dict[str, torch.Tensor]:
    model = load_checkpoint(path).model
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, Matrix):
            stack = module.pick("weight_scale").dim() == 3 if module.format else False
            count = getattr(model.config, "num_experts", 0) if stack or ".experts" in name else 0
            experts = (
                range(count)
                if name.endswith(("experts.up_proj", "experts.down_proj"))
                and ("shared" not in name)
                else (None,)
            )
            found[name] = torch.stack([module.dense(torch.float32, e) for e in experts])
    return found


def test_there_and_back_keeps_codes_and_values(quantised, tmp_path):
    convert(quantised, tmp_path / "ct", "compressed-tensors")
    convert(tmp_path / "ct", tmp_path / "back", "modelopt")
    there = load_checkpoint(tmp_path / "ct")
    assert there.quant.layout == "compressed-tensors"
    assert there.quant.formats == load_checkpoint(quantised).quant.formats
    first, last = (load_file(p / "model.safetensors") for p in (quantised, tmp_path / "back"))
    assert first.keys() == last.keys()
    for name, value in first.items():
        if value.dtype == torch.float32:
            torch.testing.assert_close(last[name].reshape(value.shape), value, rtol=2e-7, atol=0)
        else:
            assert torch.equal(last[name].view(torch.uint8), value.view(torch.uint8)), name
    for name, values in dense(quantised).items():
        torch.testing.assert_close(dense(tmp_path / "ct")[name], values, rtol=3e-7, atol=0)


def test_bf16_is_the_decoded_values(quantised, tmp_path):
    convert(quantised, tmp_path / "plain", "bf16")
    loaded = load_checkpoint(tmp_path / "plain")
    assert not loaded.quant.formats
    assert not (tmp_path / "plain" / "hf_quant_config.json").exists()
    config = json.loads((tmp_path / "plain" / "config.json").read_text())
    assert "quantization_config" not in config
    plain = dense(tmp_path / "plain")
    for name, values in dense(quantised).items():
        assert torch.equal(plain[name], values.bfloat16().float()), name


def test_tokenizer_and_template_come_along(quantised, tmp_path):
    convert(quantised, tmp_path / "ct", "compressed-tensors")
    assert (tmp_path / "ct" / "tokenizer.json").exists()
    assert (tmp_path / "ct" / "chat_template.jinja").exists()


def test_what_cannot_be_converted_is_refused(tmp_path):
    with pytest.raises(QuantizeError, match="not quantised"):
        convert(PICO_DIR, tmp_path / "out", "modelopt")
    with pytest.raises(QuantizeError, match="unknown layout 'gguf'"):
        convert(PICO_DIR, tmp_path / "out", "gguf")
