"""Shapes against `aprium info`, which counts every tensor, and against published sizes."""

import dataclasses
from pathlib import Path

import pytest

from aprium.base.errors import ConfigError
from aprium.checkpoint.hub import resolve
from aprium.checkpoint.info import model_info
from aprium.plan.competitors import COMPETITORS, competitor_shape
from aprium.plan.data import load_data
from aprium.plan.shapes import family_shape, precisions_of, target_shape

NAMES = ("nano", "super", "ultra", "lightning", "pico", "toy")
STORED = ("nano-nvfp4", "nano-fp8", "super-nvfp4", "super-fp8", "ultra-nvfp4", "lightning-nvfp4")


@pytest.mark.parametrize("name", (*NAMES, *STORED))
def test_counts_every_tensor_as_info_does(name: str) -> None:
    shape, facts = target_shape(name), model_info(name)
    assert shape.params() == facts["params_total"]
    assert shape.params(mtp=False) == facts["params_backbone"]
    assert shape.num_bytes() == facts["weights_bytes"]
    assert shape.active_params() == facts["params_active"]
    kept = sum(layer.state_values for layer in shape.layers) * 4
    kept += sum(layer.conv_values for layer in shape.layers) * 2
    assert kept == facts["state_bytes_per_sequence"]
    assert 2 * shape.kv_values_per_token() == facts["kv_bytes_per_token"]


def test_ultra_nvfp4_takes_the_published_bits() -> None:
    shape = target_shape("ultra-nvfp4")
    assert 8 * shape.num_bytes() / shape.params() == pytest.approx(5.02, abs=0.02)


@pytest.mark.parametrize(
    ("name", "billions", "with_head"),
    [
        ("nano", 31.578, 31.578),
        ("super", 120.67, 123.61),
        ("ultra", 549.31, 560.5),
        ("glm-5", 743.9, 753.9),
        ("kimi-k2", 1026.4, 1026.4),
        ("qwen-3.5", 396.3, 402.9),
        ("deepseek-v4", 1572.8, 1598.6),
    ],
)
def test_parameter_counts(name: str, billions: float, with_head: float) -> None:
    shape = target_shape(name)
    assert shape.params(mtp=False) / 1e9 == pytest.approx(billions, rel=1e-3)
    assert shape.params() / 1e9 == pytest.approx(with_head, rel=1e-3)
    if name in COMPETITORS:
        published = load_data("models")[name]["published_total"]
        assert shape.params() == pytest.approx(published, rel=1e-3)


@pytest.mark.parametrize(
    ("name", "billions"),
    [("nano", 3.23), ("super", 12.2), ("ultra", 55.0), ("glm-5", 40.8), ("kimi-k2", 31.7),
     ("qwen-3.5", 16.3), ("deepseek-v4", 48.7)],
)  # fmt: skip
def test_active_parameters(name: str, billions: float) -> None:
    active = target_shape(name).active_params(input_embedding=False)
    assert active / 1e9 == pytest.approx(billions, rel=0.005)


@pytest.mark.parametrize("row", load_data("published")["size"], ids=lambda r: r["model"])
def test_published_sizes(row: dict) -> None:
    shape = target_shape(row["model"], row.get("precision"))
    found = shape.num_bytes(mtp=not row.get("without_mtp", False)) / 2**30
    assert found == pytest.approx(row["gib"], rel=0.02)


def test_a_directory_is_read_exactly() -> None:
    path = Path(resolve("pico"))
    shape = target_shape(str(path))
    assert shape.exact
    # Headers and padding aside, the bytes of the tensors are those of the file.
    files = sum(file.stat().st_size for file in path.glob("*.safetensors"))
    assert shape.num_bytes() == pytest.approx(files, rel=0.05)
    counted = family_shape("pico", "bf16")
    assert shape.params() == counted.params()
    for read, made in zip(shape.layers, counted.layers, strict=True):
        # The same layers, weights apart, which are as the file stores them.
        assert dataclasses.replace(read, weights=()) == dataclasses.replace(made, weights=())


def test_cached_values_of_competitors() -> None:
    assert competitor_shape("glm-5").kv_values_per_token() == 44_928
    assert competitor_shape("kimi-k2").kv_values_per_token() == 35_136
    qwen = competitor_shape("qwen-3.5")
    assert qwen.kv_values_per_token() == 15_360
    assert sum(layer.state_values for layer in qwen.layers) * 4 == 180 << 20
    assert competitor_shape("deepseek-v4").kv_values_per_token() == pytest.approx(3964, rel=0.01)


def test_hub_ids_name_a_shape() -> None:
    found = target_shape("nvidia/NVIDIA-Nemotron-3-Ultra-550B-A55B-NVFP4")
    assert (found.base, found.precision) == ("ultra", "nvfp4")


def test_unpublished_precisions_say_so() -> None:
    assert "recipe" in family_shape("ultra", "fp8").notes[0]
    assert not family_shape("super", "fp8").notes


def test_unknown_names() -> None:
    with pytest.raises(ConfigError, match="'ultr' is neither"):
        target_shape("ultr")
    with pytest.raises(ConfigError, match="unknown precision 'int3'"):
        target_shape("nano", "int3")
    with pytest.raises(ConfigError, match="not published in 'bf16'"):
        competitor_shape("kimi-k2", "bf16")


def test_precisions_to_try() -> None:
    assert precisions_of("ultra") == ("bf16", "nvfp4")
    assert precisions_of("ultra-nvfp4") == ()
    assert set(COMPETITORS["glm-5"]) == set(precisions_of("glm-5"))
