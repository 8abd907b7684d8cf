"""What the quantisation files of ModelOpt and compressed-tensors mean."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aprium.base.errors import CheckpointError
from aprium.checkpoint.names import matrices
from aprium.checkpoint.quant_config import read_quant, to_hf
from aprium.model.config import QuantConfig
from aprium.model.presets import PRESETS
from aprium.model.quant_presets import quant_preset

TOY = PRESETS["toy"]
MODULES = list(matrices(TOY))
EIGHT = {"num_bits": 8, "type": "float", "dynamic": False}
FOUR = {"num_bits": 4, "type": "float", "dynamic": False, "group_size": 16}


def read(directory, *, modelopt=None, config=None, shape=TOY):
    hf = {"model_type": "nemotron_h"}
    if config is not None:
        hf["quantization_config"] = config
    (directory / "config.json").write_text(json.dumps(hf))
    if modelopt is not None:
        data = {"producer": {"name": "modelopt"}, "quantization": modelopt}
        (directory / "hf_quant_config.json").write_text(json.dumps(data))
    return read_quant(directory, shape)


def test_no_quantisation(tmp_path):
    assert read(tmp_path) is None


def test_uniform_with_exceptions(tmp_path):
    body = {"quant_algo": "NVFP4", "group_size": 16, "kv_cache_quant_algo": "FP8"}
    body["exclude_modules"] = ["lm_head", "mtp*", "backbone.layers.3.mixer", "*.gate", "*latent*"]
    found = read(tmp_path, modelopt=body)
    assert found is not None and found.source == "hf_quant_config.json"
    left = {"lm_head", *(n for n in MODULES if n.startswith("mtp") or "latent" in n)}
    left |= {n for n in MODULES if n.startswith("backbone.layers.3.")}
    assert found.quant.formats == {n: "nvfp4" for n in MODULES if n not in left}
    assert found.quant.kv_cache == "fp8" and found.quant.layout == "modelopt"


@pytest.mark.parametrize("prefix", ["backbone.", "model.", "language_model.model."])
def test_prefixes_of_names_in_lists(tmp_path, prefix):
    body = {
        "quant_algo": "FP8",
        "exclude_modules": [f"{prefix}layers.0*", "language_model.lm_head"],
    }
    found = read(tmp_path, modelopt=body)
    assert found is not None
    left = {"lm_head", *(n for n in MODULES if n.startswith("backbone.layers.0."))}
    assert left == set(MODULES) - found.quant.formats.keys()


def test_a_parent_does_not_cover_a_longer_number(tmp_path):
    body = {"quant_algo": "FP8", "exclude_modules": ["backbone.layers.1"]}
    found = read(tmp_path, modelopt=body, shape=PRESETS["nano"])
    assert found is not None
    assert not any(n.startswith("backbone.layers.1.") for n in found.quant.formats)
    assert any(n.startswith("backbone.layers.10.") for n in found.quant.formats)


def test_mixed_lists_what_is_quantised(tmp_path):
    layers = {
        "backbone.layers.0.mixer.in_proj": {"quant_algo": "FP8"},
        "backbone.layers.2.mixer.experts": {"quant_algo": "NVFP4", "group_size": 16},
        "backbone.layers.*.mixer.shared_experts.*": {"quant_algo": "W4A16_NVFP4", "group_size": 16},
    }
    found = read(tmp_path, modelopt={"quant_algo": "MIXED_PRECISION", "quantized_layers": layers})
    assert found is not None
    formats = found.quant.formats
    assert formats["backbone.layers.0.mixer.in_proj"] == "fp8"
    assert formats["backbone.layers.2.mixer.experts.7.down_proj"] == "nvfp4"
    assert formats["backbone.layers.2.mixer.shared_experts.up_proj"] == "w4a16_nvfp4"
    assert "backbone.layers.0.mixer.out_proj" not in formats and "lm_head" not in formats


def test_config_json_of_modelopt(tmp_path):
    groups = {
        "group_0": {"weights": FOUR, "input_activations": FOUR, "targets": ["lm_head"]},
        "group_1": {"weights": FOUR, "targets": ["backbone.layers.2.mixer.experts.0.up_proj"]},
        "group_2": {"weights": EIGHT, "input_activations": EIGHT, "targets": ["*.in_proj"]},
    }
    scheme = {"dynamic": False, "num_bits": 8, "type": "float"}
    config = {"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION", "config_groups": groups}
    found = read(tmp_path, config=config | {"kv_cache_scheme": scheme, "ignore": ["*.4.*in_proj"]})
    assert found is not None and found.source == "config.json"
    assert found.quant.formats == {
        "lm_head": "nvfp4",
        "backbone.layers.2.mixer.experts.0.up_proj": "w4a16_nvfp4",
        "backbone.layers.0.mixer.in_proj": "fp8",
    }
    assert found.quant.kv_cache == "fp8"


def test_compressed_tensors(tmp_path):
    config = {
        "quant_method": "compressed-tensors",
        "format": "nvfp4-pack-quantized",
        "config_groups": {"group_0": {"weights": FOUR, "targets": ["Linear"]}},
        "ignore": ["lm_head", "re:model.layers.[03].*", "re:mtp"],
    }
    found = read(tmp_path, config=config)
    assert found is not None and found.quant.layout == "compressed-tensors"
    left = {n for n in MODULES if n == "lm_head" or n.startswith("mtp")}
    left |= {n for n in MODULES if n.startswith(("backbone.layers.0.", "backbone.layers.3."))}
    assert found.quant.formats == {n: "w4a16_nvfp4" for n in MODULES if n not in left}


CT = {"quant_method": "compressed-tensors", "format": "float-quantized"}


def group(**changes):
    return {"config_groups": {"group_0": {"weights": EIGHT, "targets": ["Linear"]} | changes}}


REFUSED = {
    "unknown algorithm": (
        {"modelopt": {"quant_algo": "FP3"}},
        ["unknown", "'FP3'", "NVFP4, W4A16"],
    ),
    "known, unsupported": (
        {"modelopt": {"quant_algo": "NVFP4_AWQ"}},
        ["hf_quant_config.json", "unsupported", "'NVFP4_AWQ'"],
    ),
    "one layer": (
        {
            "modelopt": {
                "quant_algo": "MIXED_PRECISION",
                "quantized_layers": {"lm_head": {"quant_algo": "MXFP8"}},
            }
        },
        ["'lm_head'", "unsupported", "'MXFP8'"],
    ),
    "group size": ({"modelopt": {"quant_algo": "NVFP4", "group_size": 32}}, ["group_size is 32"]),
    "KV cache": (
        {"modelopt": {"quant_algo": "FP8", "kv_cache_quant_algo": "INT8"}},
        ["KV-cache", "'INT8'"],
    ),
    "mixed, unsaid": ({"modelopt": {"quant_algo": "MIXED_PRECISION"}}, ["quantized_layers"]),
    "method": ({"config": {"quant_method": "gptq"}}, ["config.json", "'gptq'", "compressed"]),
    "packing": ({"config": CT | {"format": "int-quantized"}}, ["'int-quantized'"]),
    "INT4": ({"config": CT | group(weights={"num_bits": 4, "type": "int"})}, ["4-bit int"]),
    "per channel": ({"config": CT | group(weights=EIGHT | {"strategy": "channel"})}, ["channel"]),
    "dynamic": (
        {"config": CT | group(input_activations=EIGHT | {"dynamic": True})},
        ["input scale"],
    ),
    "bad pattern": (
        {"config": CT | group(input_activations=EIGHT) | {"ignore": ["re:("]}},
        ["bad module pattern 're:('"],
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(tmp_path, case):
    arguments, words = REFUSED[case]
    with pytest.raises(CheckpointError) as raised:
        read(tmp_path, **arguments)
    for word in words:
        assert word in str(raised.value)


@settings(max_examples=30)
@given(
    formats=st.dictionaries(
        st.sampled_from(MODULES), st.sampled_from(["fp8", "nvfp4", "w4a16_nvfp4"]), min_size=1
    ),
    layout=st.sampled_from(["modelopt", "compressed-tensors"]),
    kv_cache=st.sampled_from([None, "fp8"]),
)
def test_what_is_written_is_read(tmp_path_factory, formats, layout, kv_cache):
    quant = QuantConfig(formats=formats, layout=layout, kv_cache=kv_cache)
    body, embedded = to_hf(quant, TOY)
    directory = tmp_path_factory.mktemp("quant")
    found = read(directory, config=embedded)
    assert found is not None and found.quant == quant
    assert (body is None) == (layout == "compressed-tensors")
    if body is not None:
        found = read(directory, modelopt=body["quantization"])
        assert found is not None and found.quant == quant


@pytest.mark.parametrize("name", ["lightning-nvfp4", "ultra-nvfp4"])
def test_large_lists_are_read(tmp_path, name):
    quant, config = quant_preset(name), PRESETS[name.split("-")[0]]
    body, _ = to_hf(quant, config)
    assert body is not None
    found = read(tmp_path, modelopt=body["quantization"], shape=config)
    assert found is not None and found.quant.formats == quant.formats
