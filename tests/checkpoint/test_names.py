"""Names, counts and sizes against the published files, and names against the model."""

import dataclasses
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from aprium.checkpoint.names import Naming, matrices, parameter_of, tensor_table, tensors_of
from aprium.model.model import HybridModel
from aprium.model.presets import PRESETS
from aprium.model.quant_presets import QUANT_PRESETS, quant_preset

COUNTS = {"nano": 6_243, "lightning": 6_513, "super": 42_683, "ultra": 51_023}
PARAMETERS = {
    "nano": 31_577_940_288,
    "lightning": 32_913_266_240,
    "super": 123_611_033_088,
    "ultra": 560_524_603_904,
}
QUANTISED_COUNTS = {
    "nano-nvfp4": 24_147,
    "super-nvfp4": 165_860,
    "lightning-nvfp4": 18_487,
    "ultra-nvfp4": 198_887,
}


def table_of(name: str):
    preset = QUANT_PRESETS[name]
    config = PRESETS[preset.base]
    return tensor_table(config, quant_preset(name), router_dtype=preset.router_dtype)


@pytest.mark.parametrize("name", COUNTS)
def test_counts_and_sizes_of_the_published_bf16_files(name):
    table = tensor_table(PRESETS[name])
    assert len(table) == COUNTS[name]
    total = 0
    for spec in table.values():
        assert spec.dtypes[0] in ("BF16", "F32")
        total += spec.num_bytes // (2 if spec.dtypes[0] == "BF16" else 4)
    assert total == PARAMETERS[name]


@pytest.mark.parametrize("name", QUANTISED_COUNTS)
def test_counts_of_the_published_nvfp4_files(name):
    assert len(table_of(name)) == QUANTISED_COUNTS[name]


@pytest.mark.parametrize(
    ("name", "wanted"), [("nano-nvfp4", 19_339_781_632), ("super-nvfp4", 80_297_329_824)]
)
def test_bytes_of_the_published_nvfp4_files(name, wanted):
    assert sum(spec.num_bytes for spec in table_of(name).values()) == wanted


def test_bytes_that_are_published_roughly():
    sizes = {
        name: sum(spec.num_bytes for spec in table_of(name).values())
        for name in ("lightning-nvfp4", "ultra-nvfp4")
    }
    assert round(sizes["lightning-nvfp4"] / 1e9, 1) == 21.6
    assert round(sizes["ultra-nvfp4"] / 1e9, 1) == 351.9


def test_published_examples():
    ultra, nano = tensor_table(PRESETS["ultra"]), table_of("nano-nvfp4")
    shapes = {
        "backbone.embeddings.weight": (131072, 8192),
        "lm_head.weight": (131072, 8192),
        "backbone.norm_f.weight": (8192,),
        "backbone.layers.0.norm.weight": (8192,),
        "backbone.layers.0.mixer.in_proj.weight": (35072, 8192),
        "backbone.layers.0.mixer.conv1d.weight": (18432, 1, 4),
        "backbone.layers.0.mixer.conv1d.bias": (18432,),
        "backbone.layers.0.mixer.A_log": (256,),
        "backbone.layers.0.mixer.norm.weight": (16384,),
        "backbone.layers.0.mixer.out_proj.weight": (8192, 16384),
        "backbone.layers.7.mixer.q_proj.weight": (8192, 8192),
        "backbone.layers.7.mixer.k_proj.weight": (256, 8192),
        "backbone.layers.1.mixer.gate.weight": (512, 8192),
        "backbone.layers.1.mixer.gate.e_score_correction_bias": (512,),
        "backbone.layers.1.mixer.experts.511.up_proj.weight": (5120, 2048),
        "backbone.layers.1.mixer.experts.0.down_proj.weight": (2048, 5120),
        "backbone.layers.1.mixer.shared_experts.up_proj.weight": (10240, 8192),
        "backbone.layers.1.mixer.fc1_latent_proj.weight": (2048, 8192),
        "backbone.layers.1.mixer.fc2_latent_proj.weight": (8192, 2048),
        "mtp.layers.0.enorm.weight": (8192,),
        "mtp.layers.0.eh_proj.weight": (8192, 16384),
        "mtp.layers.1.final_layernorm.weight": (8192,),
    }
    assert {name: ultra[name].shape for name in shapes} == shapes
    assert sum(name.startswith("mtp.") for name in ultra) == 1040
    expert = "backbone.layers.1.mixer.experts.3.up_proj."
    found = {n.removeprefix(expert): (s.shape, s.dtypes[0]) for n, s in nano.items() if expert in n}
    assert found == {
        "weight": ((1856, 1344), "U8"),
        "weight_scale": ((1856, 168), "F8_E4M3"),
        "weight_scale_2": ((), "F32"),
        "input_scale": ((), "F32"),
    }
    assert nano["backbone.layers.4.mixer.in_proj.weight"].dtypes[0] == "BF16"
    assert nano["backbone.layers.2.mixer.in_proj.weight"].dtypes[0] == "U8"


def test_known_facts_of_the_super_file():
    formats = quant_preset("super-nvfp4").formats
    assert formats["backbone.layers.1.mixer.shared_experts.down_proj"] == "nvfp4"
    assert formats["backbone.layers.6.mixer.in_proj"] == "fp8"
    assert "backbone.layers.6.mixer.out_proj" not in formats
    assert formats["backbone.layers.1.mixer.fc1_latent_proj"] == "fp8"
    assert "backbone.layers.1.mixer.fc2_latent_proj" not in formats
    attention = {
        name for name in formats if name.endswith(("q_proj", "k_proj", "v_proj", "o_proj"))
    }
    assert len(attention) == 2 and "backbone.layers.69.mixer.o_proj" in attention


@pytest.mark.parametrize("name", [*PRESETS, *QUANT_PRESETS])
def test_table_and_model_name_the_same_parameters(name):
    quantised = name in QUANT_PRESETS
    config = PRESETS[QUANT_PRESETS[name].base if quantised else name]
    quant = quant_preset(name) if quantised else None
    with torch.device("meta"):
        model = HybridModel(config, quant)
    filled: dict[str, list[tuple[int | None, tuple[int, ...]]]] = {}
    for tensor, spec in tensor_table(config, quant).items():
        parameter, expert = parameter_of(tensor)
        filled.setdefault(parameter, []).append((expert, spec.shape))
    wanted = {parameter: tuple(value.shape) for parameter, value in model.named_parameters()}
    assert filled.keys() == wanted.keys()
    for parameter, parts in filled.items():
        shape = wanted[parameter]
        if parts[0][0] is None:
            assert parts == [(None, shape)], parameter
        else:
            assert parts == [(e, shape[1:]) for e in range(shape[0])], parameter


NAMINGS = st.builds(
    Naming,
    wrapper=st.sampled_from(["", "language_model."]),
    backbone=st.sampled_from(["backbone.", "model."]),
    embeddings=st.sampled_from(["embeddings", "embedding"]),
    stacked_experts=st.booleans(),
)


@given(naming=NAMINGS)
def test_spellings_round_trip(naming):
    config = PRESETS["toy"]
    table = tensor_table(config, naming=naming)
    published = {naming.to_published(name) for name in table}
    assert {naming.to_disk(name) for name in published} == table.keys()
    assert len(published) == len(table)
    assert Naming.detect(table) == naming
    plain = tensor_table(config)
    if not naming.stacked_experts:
        assert published == plain.keys()
    filled = {parameter_of(name)[0] for name in published}
    assert filled == {parameter_of(name)[0] for name in plain}


@pytest.mark.parametrize("stacked", [False, True])
def test_parameters_and_tensors_are_inverse(stacked):
    config = PRESETS["toy"]
    table = tensor_table(config, naming=Naming(stacked_experts=stacked))
    parameters = dict.fromkeys(parameter_of(name)[0] for name in table)
    found = [t for p in parameters for t in tensors_of(p, config.num_experts, stacked)]
    assert sorted(found) == sorted(table)


def test_tied_embeddings_have_no_head():
    config = dataclasses.replace(PRESETS["toy"], tie_embeddings=True)
    assert "lm_head.weight" not in tensor_table(config)
    assert "lm_head" not in matrices(config)


def test_no_torch_is_imported():
    code = (
        "import sys; from aprium.checkpoint.names import tensor_table; "
        "from aprium.checkpoint.quant_config import read_quant; "
        "from aprium.model.presets import PRESETS; "
        "from aprium.model.quant_presets import quant_preset; "
        "assert len(tensor_table(PRESETS['ultra'], quant_preset('ultra-nvfp4'))) == 198887; "
        "sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
