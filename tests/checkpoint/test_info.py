"""Counts and sizes against the published ones."""

import json

import pytest

from aprium.base.errors import CheckpointError
from aprium.checkpoint.info import model_info, render_info

# name: tensors, backbone parameters, prediction head, active with and without input embedding
PUBLISHED = {
    "nano": (6_243, 31_577_940_288, 0, 3.58e9, 3.23e9),
    "lightning": (6_513, 31_577_940_288, 1_335_325_952, 3.58e9, 3.23e9),
    "super": (42_683, 120_668_707_840, 2_942_325_248, 12.77e9, 12.23e9),
    "ultra": (51_023, 549_308_993_536, 11_215_610_368, 56.06e9, 54.99e9),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters(name: str) -> None:
    tensors, backbone, head, active, without = PUBLISHED[name]
    facts = model_info(name)
    assert facts["num_tensors"] == tensors
    assert facts["params_backbone"] == backbone
    assert facts["params_mtp"] == head
    assert facts["params_total"] == backbone + head
    assert facts["params_active"] == pytest.approx(active, rel=1e-3)
    assert facts["params_active_without_input_embedding"] == pytest.approx(without, rel=1e-3)
    assert sum(facts["params_by_role"].values()) == facts["params_total"]
    assert sum(facts["weights_bytes_by_role"].values()) == facts["weights_bytes"]
    assert sum(facts["weights_bytes_by_format"].values()) == facts["weights_bytes"]


@pytest.mark.parametrize(
    ("name", "tensors", "num_bytes", "tolerance"),
    [
        ("nano-nvfp4", 24_147, 19_339_781_632, 0),
        ("super-nvfp4", 165_860, 80_297_329_824, 0),
        ("lightning-nvfp4", 18_487, 21.6e9, 5e-3),
        ("ultra-nvfp4", 198_887, 351.9e9, 1e-3),
    ],
)
def test_quantised_files(name: str, tensors: int, num_bytes: float, tolerance: float) -> None:
    facts = model_info(name)
    assert facts["num_tensors"] == tensors
    assert facts["weights_bytes"] == pytest.approx(num_bytes, rel=tolerance or 1e-12)
    assert facts["params_total"] == model_info(name.split("-")[0])["params_total"]
    assert facts["quantization"]["layout"] == "modelopt"


@pytest.mark.parametrize(
    ("name", "kv", "ssm_mib"), [("nano", 6144, 46), ("super", 8192, 160), ("ultra", 12288, 384)]
)
def test_cache_and_state(name: str, kv: int, ssm_mib: int) -> None:
    facts = model_info(name)
    assert facts["kv_bytes_per_token"] == kv
    assert facts["state_bytes_per_sequence"] == pytest.approx(ssm_mib * 2**20, rel=0.03)
    assert facts["state_bytes_per_sequence"] > ssm_mib * 2**20


def test_rendering() -> None:
    facts = json.loads(render_info("ultra", as_json=True))
    assert facts["layers"][:3] == ["mamba", "moe", "mamba"] and len(facts["layers"]) == 108
    table = render_info("ultra-nvfp4", as_json=False)
    assert "327.72 GiB" in table and "49,152 nvfp4" in table
    with pytest.raises(CheckpointError, match="'megatron' is neither"):
        model_info("megatron")
