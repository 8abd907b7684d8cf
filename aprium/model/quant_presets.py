"""How the matrices of each published quantised checkpoint are stored, as rules.

Every file's own list decides when it is loaded; these presets answer questions about a file that
is not there (`aprium info ultra-nvfp4`). No torch. Source: docs/architecture.md (quantised
checkpoints): the published quantisation configurations, recipes, tensor counts and byte totals.
"""

from collections.abc import Callable
from typing import NamedTuple

from aprium.base.errors import ConfigError
from aprium.model.config import ModelConfig, QuantConfig
from aprium.model.presets import PRESETS

MATRICES = {
    "mamba": ("in_proj", "out_proj"),
    "attention": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "mlp": ("up_proj", "down_proj"),
    "moe": ("shared_experts.up_proj", "shared_experts.down_proj"),
}
# What a rule says of a matrix of layer `index`: (kind, leaf, index) -> format or None. Routed
# experts have the leaf "experts"; leaves of other matrices are as in MATRICES.
_Rule = Callable[[str, str, int], str | None]


class QuantPreset(NamedTuple):
    """A published quantised file: the shape it belongs to and how its matrices are stored."""

    base: str
    rule: _Rule
    head: str | None = None
    kv_scales: bool = False
    router_dtype: str = "BF16"


def _nano_mamba(index: int, fmt: str) -> str | None:
    """Mamba layers that feed an attention layer stay unquantised in both Nano files."""
    layers = PRESETS["nano"].layers
    return None if layers[index + 1 : index + 2] == ("attention",) else fmt


def _nano(fmt: str) -> _Rule:
    def rule(kind: str, leaf: str, index: int) -> str | None:
        if kind == "mamba":
            return _nano_mamba(index, fmt)
        return fmt if kind == "moe" else None

    return rule


def _lightning(kind: str, leaf: str, index: int) -> str | None:
    return {"mamba": "fp8", "moe": "w4a16_nvfp4"}.get(kind)


def _ultra(kind: str, leaf: str, index: int) -> str | None:
    if kind == "moe" and "latent" not in leaf:
        return "nvfp4" if leaf == "experts" else "fp8"
    return "fp8" if kind == "mamba" else None


def _super_fp8(kind: str, leaf: str, index: int) -> str | None:
    quantised = kind == "mamba" or (kind == "moe" and "latent" not in leaf)
    return "fp8" if quantised else None


_SUPER_LAYERS = PRESETS["super"].layers
_SUPER_MAMBA = [i for i, kind in enumerate(_SUPER_LAYERS) if kind == "mamba"]
_SUPER_MOE = [i for i, kind in enumerate(_SUPER_LAYERS) if kind == "moe"]
# FP8 matrices by leaf: 40 + 13 + 54 + 30 + 2 = 139.
_SUPER_FP8 = {
    "in_proj": frozenset(_SUPER_MAMBA),
    "out_proj": frozenset([i for i in _SUPER_MAMBA if i != 6][:13]),
    "o_proj": frozenset((69, 78)),
    "shared_experts.up_proj": frozenset(_SUPER_MOE[1:28]),
    "shared_experts.down_proj": frozenset(_SUPER_MOE[1:28]),
    "fc1_latent_proj": frozenset(_SUPER_MOE[:16]),
    "fc2_latent_proj": frozenset(_SUPER_MOE[1:15]),
}


def _super_nvfp4(kind: str, leaf: str, index: int) -> str | None:
    """Place Super's formats in a way that meets every published fact.

    The released placement came from a per-layer search and is known in part: routed experts and
    layer 1's shared down projection are NVFP4; of layer 6 only the Mamba input projection, of
    layer 1 only the first latent projection, and two output projections of attention (69 is one)
    are FP8; 139 matrices in all are FP8, and the tensors take 80,297,329,824 bytes. Which other
    layers have FP8 is a choice made here that gives this count and this total.
    """
    if leaf == "experts" or (leaf == "shared_experts.down_proj" and index == 1):
        return "nvfp4"
    return "fp8" if index in _SUPER_FP8.get(leaf, ()) else None


QUANT_PRESETS: dict[str, QuantPreset] = {
    "nano-nvfp4": QuantPreset("nano", _nano("nvfp4"), router_dtype="F32"),
    "nano-fp8": QuantPreset("nano", _nano("fp8")),
    "lightning-nvfp4": QuantPreset(
        "lightning", _lightning, head="w4a16_nvfp4", kv_scales=True, router_dtype="F32"
    ),
    "super-nvfp4": QuantPreset("super", _super_nvfp4, kv_scales=True),
    "super-fp8": QuantPreset("super", _super_fp8),
    "ultra-nvfp4": QuantPreset("ultra", _ultra, kv_scales=True),
}


def quant_preset(name: str) -> QuantConfig:
    """Return how the published file called `name` ("nano-nvfp4", ...) stores its matrices.

    Prediction heads are unquantised in all of them, and KV caches FP8. Raises ConfigError listing
    the known names.
    """
    if name not in QUANT_PRESETS:
        known = ", ".join(QUANT_PRESETS)
        raise ConfigError(f"unknown quantised preset {name!r}: the known ones are {known}")
    preset = QUANT_PRESETS[name]
    config = PRESETS[preset.base]
    formats: dict[str, str] = {}
    for index, kind in enumerate(config.layers):
        formats |= layer_formats(config, preset.rule, kind, index)
    if preset.head is not None:
        formats["lm_head"] = preset.head
    return QuantConfig(formats=formats, kv_cache="fp8", kv_scales=preset.kv_scales)


def layer_formats(config: ModelConfig, rule: _Rule, kind: str, index: int) -> dict[str, str]:
    """Return the formats that `rule` gives to the matrices of layer `index`, by module name."""
    mixer = f"backbone.layers.{index}.mixer"
    leaves = MATRICES[kind]
    if kind == "moe" and config.latent_size is not None:
        leaves = (*leaves, "fc1_latent_proj", "fc2_latent_proj")
    found = {f"{mixer}.{leaf}": rule(kind, leaf, index) for leaf in leaves}
    if kind == "moe":
        fmt = rule(kind, "experts", index)
        for expert in range(config.num_experts):
            found[f"{mixer}.experts.{expert}.up_proj"] = fmt
            found[f"{mixer}.experts.{expert}.down_proj"] = fmt
    return {name: fmt for name, fmt in found.items() if fmt is not None}
