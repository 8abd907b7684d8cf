"""What a model of the family is: its shape, read from and written to a HF `config.json`.

Covers Nemotron 3 Nano, Super, Ultra and 3.5 Lightning and any other `nemotron_h` configuration,
in each of the spellings that published files and transformers use (layer patterns as a string or
as a list, aliases, infinities). Keys that published files carry and no implementation reads
(`expand`, `rope_theta`, ...) are ignored. No torch here: `aprium info` must start in milliseconds.
Source: the published `config.json` files; arXiv 2606.15007 for MTP.
"""

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aprium.base.errors import CheckpointError, ConfigError

PATTERN_KINDS = {"M": "mamba", "E": "moe", "*": "attention", "-": "mlp"}
NVFP4_BLOCK = 16
# Layout -> names of the packed codes, the global weight scale and the global input scale.
NVFP4_TENSORS = {
    "modelopt": ("weight", "weight_scale_2", "input_scale"),
    "compressed-tensors": ("weight_packed", "weight_global_scale", "input_global_scale"),
}
KIND_LETTERS = {kind: letter for letter, kind in PATTERN_KINDS.items()}
_LIST_KINDS = {
    "mamba": "mamba",
    "linear_attention": "mamba",
    "moe": "moe",
    "attention": "attention",
    "full_attention": "attention",
    "mlp": "mlp",
}
# Kind of layer -> sizes that it needs.
_SIZES = {
    "all": ("vocab_size", "hidden_size", "num_heads", "num_kv_heads", "head_dim"),
    "mamba": (
        "mamba_num_heads",
        "mamba_head_dim",
        "ssm_state_size",
        "num_groups",
        "conv_kernel",
        "chunk_size",
    ),
    "moe": ("num_experts", "expert_intermediate_size", "shared_expert_intermediate_size"),
    "mlp": ("intermediate_size",),
}


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Shape of one hybrid model; all sizes in elements. See docs/architecture.md for the letters.

    `layers` and `mtp_layers` hold "mamba", "attention", "moe" or "mlp"; `mtp_layers` is the
    pattern of one prediction depth. `latent_size` None means that experts act on the full width.
    """

    vocab_size: int
    hidden_size: int
    layers: tuple[str, ...]
    mtp_layers: tuple[str, ...] = ()
    num_mtp_layers: int = 0
    num_heads: int = 32
    num_kv_heads: int = 2
    head_dim: int = 128
    mamba_num_heads: int = 64
    mamba_head_dim: int = 64
    ssm_state_size: int = 128
    num_groups: int = 8
    conv_kernel: int = 4
    chunk_size: int = 128
    intermediate_size: int = 1856
    num_experts: int = 128
    num_active_experts: int = 6
    expert_intermediate_size: int = 1856
    shared_expert_intermediate_size: int = 3712
    num_shared_experts: int = 1
    latent_size: int | None = None
    routed_scaling_factor: float = 1.0
    norm_topk_prob: bool = True
    num_router_groups: int = 1
    num_active_router_groups: int = 1
    norm_eps: float = 1e-5
    time_step_limit: tuple[float, float] = (0.0, math.inf)
    time_step_min: float = 1e-3
    time_step_max: float = 0.1
    time_step_floor: float = 1e-4
    conv_bias: bool = True
    mamba_proj_bias: bool = False
    mlp_bias: bool = False
    tie_embeddings: bool = False
    max_position_embeddings: int = 262144
    bos_token_id: int | None = 1
    eos_token_id: int | tuple[int, ...] | None = 2
    pad_token_id: int | None = 0
    initializer_range: float = 0.02
    rescale_prenorm_residual: bool = True

    def __post_init__(self) -> None:
        """Check that the sizes fit together; raise ConfigError naming the one that does not."""
        for name in ("layers", "mtp_layers"):
            for kind in getattr(self, name):
                if kind not in KIND_LETTERS:
                    raise ConfigError(f"{name} has unknown layer kind {kind!r}")
        if not self.layers:
            raise ConfigError("the model has no layers: give a layer pattern")
        if "mamba" in self.mtp_layers:
            raise ConfigError("mtp_layers has a mamba layer: prediction heads keep no such state")
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if f.type is int and (isinstance(value, bool) or not isinstance(value, int)):
                raise ConfigError(f"{f.name} is {value!r}: it must be an integer")
        self._check_sizes()
        self._check_divisible("num_heads", self.num_heads, "num_kv_heads", self.num_kv_heads)
        if self._has("mamba"):
            heads = self.mamba_num_heads
            self._check_divisible("mamba_num_heads", heads, "n_groups", self.num_groups)
        if self._has("moe"):
            self._check_router()

    def _has(self, kind: str) -> bool:
        return kind in self.layers or (self.num_mtp_layers > 0 and kind in self.mtp_layers)

    def _check_sizes(self) -> None:
        """Check the sizes that the model has layers for; files may have 0 for the others."""
        for kind, names in _SIZES.items():
            for name in names if kind == "all" or self._has(kind) else ():
                value = getattr(self, name)
                if value < 1:
                    raise ConfigError(f"{name} is {value}: it must be at least 1")
        latent = self.latent_size
        if latent is not None and (type(latent) is not int or latent < 1):
            raise ConfigError(f"latent_size is {latent!r}: it must be at least 1, or none")

    def _check_divisible(self, name: str, value: int, by: str, divisor: int) -> None:
        if divisor < 1 or value % divisor:
            raise ConfigError(f"{name} {value} is not a multiple of {by} {divisor}")

    def _check_router(self) -> None:
        groups = self.num_router_groups
        self._check_divisible("n_routed_experts", self.num_experts, "n_group", groups)
        if not 1 <= self.num_active_router_groups <= groups:
            raise ConfigError(f"topk_group {self.num_active_router_groups} is not in 1..{groups}")
        eligible = self.num_experts // groups * self.num_active_router_groups
        if not 1 <= self.num_active_experts <= eligible:
            raise ConfigError(
                f"num_experts_per_tok {self.num_active_experts} is not in 1..{eligible}, "
                "the number of experts that may be chosen"
            )

    @property
    def mamba_inner(self) -> int:
        """Width of the Mamba mixer: heads x head dim."""
        return self.mamba_num_heads * self.mamba_head_dim

    @property
    def conv_dim(self) -> int:
        """Channels of the Mamba convolution: x, B and C side by side."""
        return self.mamba_inner + 2 * self.num_groups * self.ssm_state_size

    @property
    def in_proj_dim(self) -> int:
        """Rows of the Mamba input projection: z, xBC and dt."""
        return self.mamba_inner + self.conv_dim + self.mamba_num_heads

    @property
    def expert_dim(self) -> int:
        """Width that routed experts read and write: the latent size, or the full width."""
        return self.latent_size or self.hidden_size

    @property
    def active_matrix_params(self) -> int:
        """Weights that multiply one token in the backbone's layers: no embedding, no head."""
        dim, inner, shared = (
            self.hidden_size,
            self.mamba_inner,
            self.shared_expert_intermediate_size,
        )
        latent = 2 * dim * self.latent_size if self.latent_size else 0
        experts = 2 * self.num_active_experts * self.expert_dim * self.expert_intermediate_size
        each = {
            "mamba": dim * (self.in_proj_dim + inner),
            "attention": 2 * dim * self.head_dim * (self.num_heads + self.num_kv_heads),
            "mlp": 2 * dim * self.intermediate_size,
            "moe": dim * self.num_experts + latent + experts + 2 * dim * shared,
        }
        return sum(each[kind] for kind in self.layers)

    @property
    def pattern(self) -> str:
        """The layers as letters: M Mamba-2, E MoE, * attention, - MLP."""
        return "".join(KIND_LETTERS[kind] for kind in self.layers)

    @property
    def num_attention_caches(self) -> int:
        """Attention layers that keep KV: those of the backbone, then those of one MTP depth."""
        mtp = self.mtp_layers.count("attention") if self.num_mtp_layers else 0
        return self.layers.count("attention") + mtp

    def without_mtp(self) -> "ModelConfig":
        """Return this shape with no prediction head."""
        return dataclasses.replace(self, mtp_layers=(), num_mtp_layers=0)

    @staticmethod
    def from_hf(data: Mapping[str, Any]) -> "ModelConfig":
        """Read a `config.json` of model type `nemotron_h`.

        Raises ConfigError naming a key that is missing, contradictory or not supported.
        """
        return _from_hf(data)

    @staticmethod
    def load(path: str | Path) -> "ModelConfig":
        """Read `config.json` at `path` (the file, or the directory that holds it)."""
        return ModelConfig.from_hf(read_hf_config(path))

    def to_hf(self) -> dict[str, Any]:
        """Return the `config.json` keys of this shape, as the newest published files spell them."""
        return _to_hf(self)


@dataclass(frozen=True, kw_only=True)
class QuantConfig:
    """How the matrices of a checkpoint are stored.

    `formats` maps a module's name on disk (`backbone.layers.1.mixer.experts.0.up_proj`) to "fp8",
    "nvfp4" or "w4a16_nvfp4"; a module that is not there is stored unquantised. `kv_scales` tells
    whether attention layers carry `k_scale` and `v_scale`. `layout` is the writer's convention:
    "modelopt" or "compressed-tensors".
    """

    formats: Mapping[str, str] = field(default_factory=dict)
    kv_cache: str | None = None
    kv_scales: bool = False
    layout: str = "modelopt"


def read_hf_config(path: str | Path) -> dict[str, Any]:
    """Read the JSON of `config.json` at `path` (the file, or its directory)."""
    file = Path(path)
    file = file / "config.json" if file.is_dir() else file
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"cannot read {file}: {error.strerror}") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{file} does not hold a JSON object")
    return data


# HF key (first the published spelling, then aliases) -> field, for values copied as they are.
_KEYS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("vocab_size", ("vocab_size",)),
    ("hidden_size", ("hidden_size",)),
    ("num_heads", ("num_attention_heads",)),
    ("num_kv_heads", ("num_key_value_heads",)),
    ("head_dim", ("head_dim", "attention_head_dim")),
    ("mamba_num_heads", ("mamba_num_heads",)),
    ("mamba_head_dim", ("mamba_head_dim",)),
    ("ssm_state_size", ("ssm_state_size",)),
    ("num_groups", ("n_groups", "mamba_n_groups")),
    ("conv_kernel", ("conv_kernel", "mamba_d_conv")),
    ("chunk_size", ("chunk_size", "mamba_chunk_size")),
    ("intermediate_size", ("intermediate_size",)),
    ("num_experts", ("n_routed_experts", "num_local_experts")),
    ("num_active_experts", ("num_experts_per_tok",)),
    ("expert_intermediate_size", ("moe_intermediate_size",)),
    ("shared_expert_intermediate_size", ("moe_shared_expert_intermediate_size",)),
    ("num_shared_experts", ("n_shared_experts",)),
    ("latent_size", ("moe_latent_size",)),
    ("routed_scaling_factor", ("routed_scaling_factor",)),
    ("norm_topk_prob", ("norm_topk_prob",)),
    ("num_router_groups", ("n_group",)),
    ("num_active_router_groups", ("topk_group",)),
    ("norm_eps", ("layer_norm_epsilon", "norm_eps", "rms_norm_eps")),
    ("time_step_min", ("time_step_min", "mamba_dt_min")),
    ("time_step_max", ("time_step_max", "mamba_dt_max")),
    ("time_step_floor", ("time_step_floor", "mamba_dt_init_floor")),
    ("conv_bias", ("use_conv_bias", "mamba_conv_bias")),
    ("mamba_proj_bias", ("use_bias", "mamba_proj_bias")),
    ("mlp_bias", ("mlp_bias",)),
    ("tie_embeddings", ("tie_word_embeddings",)),
    ("num_mtp_layers", ("num_nextn_predict_layers",)),
    ("max_position_embeddings", ("max_position_embeddings",)),
    ("bos_token_id", ("bos_token_id",)),
    ("pad_token_id", ("pad_token_id",)),
    ("initializer_range", ("initializer_range",)),
    ("rescale_prenorm_residual", ("rescale_prenorm_residual",)),
)
_NULLABLE = {"latent_size", "bos_token_id", "pad_token_id"}


def _from_hf(data: Mapping[str, Any]) -> ModelConfig:
    model_type = data.get("model_type")
    if model_type != "nemotron_h":
        raise ConfigError(
            f"model_type is {model_type!r}: only 'nemotron_h' checkpoints (Nemotron 3 Nano, "
            "Super, Ultra, 3.5 Lightning) can be run"
        )
    for key, wanted in (("mlp_hidden_act", "relu2"), ("mamba_hidden_act", "silu")):
        if data.get(key, wanted) != wanted:
            raise ConfigError(f"{key} is {data[key]!r}: this family uses {wanted!r}")
    values: dict[str, Any] = {}
    for name, keys in _KEYS:
        key = next((k for k in keys if k in data), None)
        if key is not None and (data[key] is not None or name in _NULLABLE):
            values[name] = data[key]
    values.setdefault("num_kv_heads", values.get("num_heads"))
    for required in ("vocab_size", "hidden_size", "num_heads"):
        if values.get(required) is None:
            raise ConfigError(f"config.json lacks the key for {required}")
    values["layers"] = _read_layers(data)
    values["mtp_layers"] = _read_mtp_layers(data) if values.get("num_mtp_layers") else ()
    limit = data.get("time_step_limit", data.get("mamba_dt_limit"))
    if limit is not None:
        values["time_step_limit"] = (_read_float(limit[0]), _read_float(limit[1]))
    eos = data.get("eos_token_id", 2)
    values["eos_token_id"] = tuple(eos) if isinstance(eos, list) else eos
    return ModelConfig(**values)


def _read_float(value: Any) -> float:
    """Read a number, or an infinity as `Infinity`, `1e+308` or {"__float__": "Infinity"}."""
    if isinstance(value, Mapping):
        value = value.get("__float__")
    number = float(value)
    return math.inf if number >= 1e300 else number


def _read_layers(data: Mapping[str, Any]) -> tuple[str, ...]:
    kinds = data.get("layers_block_type") or data.get("layer_types")
    pattern = data.get("hybrid_override_pattern")
    if kinds:
        layers = _kinds_from_list(kinds)
    elif pattern:
        layers = _kinds_from_pattern(pattern)
    else:
        raise ConfigError("config.json has neither layers_block_type nor hybrid_override_pattern")
    count = data.get("num_hidden_layers")
    if count is not None and count != len(layers):
        raise ConfigError(f"num_hidden_layers is {count} but the pattern has {len(layers)} layers")
    return layers


def _read_mtp_layers(data: Mapping[str, Any]) -> tuple[str, ...]:
    kinds = data.get("mtp_layers_block_type")
    pattern = data.get("mtp_hybrid_override_pattern")
    if kinds:
        return _kinds_from_list(kinds)
    return _kinds_from_pattern(pattern or "*E")


def _kinds_from_list(kinds: list[str]) -> tuple[str, ...]:
    for kind in kinds:
        if kind not in _LIST_KINDS:
            raise ConfigError(f"unknown layer type {kind!r}: known are {', '.join(_LIST_KINDS)}")
    return tuple(_LIST_KINDS[kind] for kind in kinds)


def _kinds_from_pattern(pattern: str) -> tuple[str, ...]:
    for letter in pattern:
        if letter not in PATTERN_KINDS:
            raise ConfigError(f"layer pattern {pattern!r} has unknown letter {letter!r}")
    return tuple(PATTERN_KINDS[letter] for letter in pattern)


def _to_hf(config: ModelConfig) -> dict[str, Any]:
    data: dict[str, Any] = {"architectures": ["NemotronHForCausalLM"], "model_type": "nemotron_h"}
    data |= {keys[0]: getattr(config, name) for name, keys in _KEYS}
    eos = config.eos_token_id
    data["eos_token_id"] = list(eos) if isinstance(eos, tuple) else eos
    data["num_hidden_layers"] = len(config.layers)
    data["layers_block_type"] = list(config.layers)
    if config.num_mtp_layers:
        data["mtp_layers_block_type"] = list(config.mtp_layers)
    # transformers derives its dt clamp from this key alone; a finite bound keeps it valid JSON.
    low, high = config.time_step_limit
    data["time_step_limit"] = [low, high if math.isfinite(high) else 1e308]
    data |= {"mlp_hidden_act": "relu2", "mamba_hidden_act": "silu", "residual_in_fp32": False}
    data |= {"mamba_proj_bias": config.mamba_proj_bias, "attention_bias": False}
    data |= {"mamba_ssm_cache_dtype": "float32"}
    data["dtype"] = "bfloat16"
    return data
