"""Reading config.json in every spelling, and refusing what cannot be run."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from aprium.base.errors import CheckpointError, ConfigError
from aprium.model.config import ModelConfig
from aprium.model.presets import PRESETS, preset


@pytest.mark.parametrize("name", PRESETS)
def test_round_trip(name: str) -> None:
    data = json.loads(json.dumps(PRESETS[name].to_hf()))
    assert ModelConfig.from_hf(data) == PRESETS[name]


@pytest.mark.parametrize(
    ("name", "kinds", "attention"),
    [
        ("nano", (23, 23, 6), (5, 12, 19, 26, 33, 42)),
        ("lightning", (23, 23, 6), (5, 12, 19, 26, 33, 42)),
        ("super", (40, 40, 8), (7, 16, 25, 36, 47, 58, 69, 78)),
        ("ultra", (48, 48, 12), (7, 14, 23, 32, 39, 48, 57, 64, 73, 82, 89, 98)),
    ],
)
def test_published_patterns(name: str, kinds: tuple[int, ...], attention: tuple[int, ...]) -> None:
    layers = PRESETS[name].layers
    assert tuple(layers.count(kind) for kind in ("mamba", "moe", "attention")) == kinds
    assert tuple(i for i, kind in enumerate(layers) if kind == "attention") == attention


def hf(**changes: Any) -> dict[str, Any]:
    """A published-looking configuration with some keys changed; None removes a key."""
    data = PRESETS["toy"].to_hf() | {"expand": 2, "rope_theta": 10000, "use_mamba_kernels": True}
    data |= changes
    return {key: value for key, value in data.items() if value is not None}


def test_spellings_of_the_pattern() -> None:
    kinds = ("mamba", "moe", "attention", "mlp")
    spellings = (
        {"hybrid_override_pattern": "ME*-", "layers_block_type": None, "num_hidden_layers": 4},
        {"layers_block_type": list(kinds), "num_hidden_layers": None},
        {
            "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"],
            "num_hidden_layers": None,
        },
        {
            "layers_block_type": None,
            "layer_types": ["linear_attention", "moe", "full_attention", "mlp"],
            "num_hidden_layers": 4,
        },
    )
    for spelling in spellings:
        assert ModelConfig.from_hf(hf(**spelling)).layers == kinds


@pytest.mark.parametrize(
    "limit", [[0.0, math.inf], [0.0, 1e308], [0.0, {"__float__": "Infinity"}], None]
)
def test_spellings_of_infinity(limit: Any) -> None:
    assert ModelConfig.from_hf(hf(time_step_limit=limit)).time_step_limit == (0.0, math.inf)


def test_bare_infinity_in_a_file(tmp_path: Path) -> None:
    text = json.dumps(hf()).replace("1e+308", "Infinity")
    assert "Infinity" in text
    (tmp_path / "config.json").write_text(text)
    assert ModelConfig.load(tmp_path) == PRESETS["toy"]


def test_aliases() -> None:
    aliases = {
        "n_groups": "mamba_n_groups",
        "conv_kernel": "mamba_d_conv",
        "chunk_size": "mamba_chunk_size",
        "n_routed_experts": "num_local_experts",
        "use_conv_bias": "mamba_conv_bias",
        "layer_norm_epsilon": "norm_eps",
    }
    data = hf()
    for old, new in aliases.items():
        data[new] = data.pop(old)
    assert ModelConfig.from_hf(data) == PRESETS["toy"]
    assert ModelConfig.from_hf(hf(num_key_value_heads=None)).num_kv_heads == 4
    assert ModelConfig.from_hf(hf(eos_token_id=[2, 11])).eos_token_id == (2, 11)


def test_prediction_head_spellings() -> None:
    by_pattern = hf(mtp_layers_block_type=None, mtp_hybrid_override_pattern="*E")
    assert ModelConfig.from_hf(by_pattern) == PRESETS["toy"]
    none = ModelConfig.from_hf(hf(num_nextn_predict_layers=None))
    assert none == PRESETS["toy"].without_mtp()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llama"}, "model_type is 'llama'"),
        ({"mlp_hidden_act": "gelu"}, "mlp_hidden_act is 'gelu'"),
        ({"layers_block_type": None}, "neither layers_block_type"),
        ({"layers_block_type": ["mamba", "magic"]}, "unknown layer type 'magic'"),
        ({"layers_block_type": None, "hybrid_override_pattern": "MX"}, "unknown letter 'X'"),
        ({"num_hidden_layers": 7}, "num_hidden_layers is 7"),
        ({"hidden_size": None}, "lacks the key for hidden_size"),
        ({"hidden_size": "wide"}, "hidden_size is 'wide'"),
        ({"num_key_value_heads": 3}, "num_heads 4 is not a multiple"),
        ({"n_groups": 3}, "mamba_num_heads 4 is not a multiple"),
        ({"num_experts_per_tok": 9}, "num_experts_per_tok 9 is not in 1..8"),
        ({"n_group": 3}, "n_routed_experts 8 is not a multiple"),
        ({"chunk_size": 0}, "chunk_size is 0: it must be at least 1"),
        ({"conv_kernel": 0}, "conv_kernel is 0: it must be"),
        ({"ssm_state_size": 0}, "ssm_state_size is 0: it must be"),
        ({"mamba_num_heads": 0}, "mamba_num_heads is 0: it must be"),
        ({"mamba_head_dim": -1}, "mamba_head_dim is -1: it must be"),
        ({"intermediate_size": 0}, "intermediate_size is 0: it must be"),
        ({"moe_intermediate_size": 0}, "expert_intermediate_size is 0: it must be"),
        ({"moe_shared_expert_intermediate_size": 0}, "shared_.*_size is 0: it must be"),
        ({"moe_latent_size": 0}, "latent_size is 0: it must be at least 1, or none"),
    ],
)
def test_errors_name_the_value(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ModelConfig.from_hf(hf(**changes))


def test_sizes_of_layers_that_are_not_there_do_not_matter() -> None:
    absent = {"ssm_state_size": 0, "chunk_size": 0, "moe_intermediate_size": 0}
    layers = {"layers_block_type": ["attention", "mlp"], "num_hidden_layers": 2}
    config = ModelConfig.from_hf(hf(**layers, **absent, num_nextn_predict_layers=0))
    assert config.chunk_size == 0 and config.layers == ("attention", "mlp")


def test_damaged_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot read"):
        ModelConfig.load(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="not valid JSON"):
        ModelConfig.load(tmp_path)
    with pytest.raises(ConfigError, match="unknown preset 'mega'"):
        preset("mega")
