"""What a model costs, known before it is loaded: parameters, bytes, cache and state sizes.

Answers for a preset (`ultra`), a published quantised file (`ultra-nvfp4`) or a checkpoint
directory, whose own headers are read then. Presets need no torch, so `aprium info ultra` is quick.
"""

import functools
import json
import math
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

from aprium.base.errors import CheckpointError
from aprium.checkpoint.names import ITEM_BYTES, TensorSpec, tensor_table
from aprium.model.config import NVFP4_BLOCK, ModelConfig, QuantConfig
from aprium.model.presets import PRESETS
from aprium.model.quant_presets import QUANT_PRESETS, quant_preset

# Part of a tensor's name -> role, tried in order; the rest of a layer is its mixer's kind.
_ROLES = (
    ("embeddings", "embedding"),
    ("lm_head", "head"),
    ("shared_experts", "shared experts"),
    (".experts.", "routed experts"),
    (".gate.", "router"),
    ("latent_proj", "latent projections"),
    ("norm_f", "norms"),
    (".norm.weight", "norms"),
)
# Last parts of the names of tensors that hold parameters.
_WEIGHTS = frozenset(
    (
        *("weight", "weight_packed", "bias", "A_log", "D", "dt_bias", "e_score_correction_bias"),
        *("up_proj", "down_proj"),  # stacked experts
    )
)
_BF16 = 2
# Roles whose matrices quantisers encode, and bits of one weight of them by precision.
_QUANTISABLE = (
    "routed experts",
    "shared experts",
    "latent projections",
    "mamba",
    "attention",
    "mlp",
)
_BITS = {"bf16": 16, "fp8": 8, "nvfp4": 4.5}


class _Stored(NamedTuple):
    """One tensor as a file has it: values it stands for, and bytes by storage format."""

    role: str
    num_params: int
    num_bytes: int
    format: str


def model_info(target: str) -> dict[str, Any]:
    """Return the facts of a preset, quantised preset or checkpoint directory as plain values.

    Sizes are bytes. `params_total` counts every stored weight, the prediction head (`params_mtp`)
    included; `params_active` those that work on one token in the backbone, both embeddings
    included. KV is counted at 2 bytes a value and at the checkpoint's own cache format; the
    recurrent state has float32 SSM states and 2-byte convolution tails; the keys with `float32`
    say what generation with float32 activations holds on a CPU. A directory also has `load`, where
    its weights would be here, and `transposed`. Raises CheckpointError
    when `target` is none of the three.
    """
    here: dict[str, Any] = {}
    if target in PRESETS:
        config, quant, table = PRESETS[target], QuantConfig(), tensor_table(PRESETS[target])
    elif target in QUANT_PRESETS:
        preset = QUANT_PRESETS[target]
        config, quant = PRESETS[preset.base], quant_preset(target)
        table = tensor_table(config, quant, router_dtype=preset.router_dtype)
    elif Path(target).is_dir():
        config, quant, table, here = _read_directory(Path(target))
    else:
        raise CheckpointError(
            f"{target!r} is neither a checkpoint directory nor a preset: the presets are "
            f"{', '.join((*PRESETS, *QUANT_PRESETS))}"
        )
    return here | _facts(target, config, quant, [_stored(n, s, config) for n, s in table.items()])


def _read_directory(
    path: Path,
) -> tuple[ModelConfig, QuantConfig, dict[str, TensorSpec], dict[str, Any]]:
    """Read the configuration and the tensor headers of a checkpoint, published names.

    The last are facts of this machine: where "auto" would load the weights, and whether down
    projections lie by columns.
    """
    from aprium.checkpoint.load import choose_load, read_plan
    from aprium.checkpoint.transposed import read_transposed

    plan = read_plan(path)
    table = {name: TensorSpec(t.shape, (t.dtype,)) for name, t in plan.tensors.items()}
    size = sum(t.end - t.start for t in plan.tensors.values())
    here = {
        "load": choose_load(size),
        "transposed": bool(read_transposed(path, plan.tensors)),
    }
    return plan.config, plan.quant, table, here


def _stored(name: str, spec: TensorSpec, config: ModelConfig) -> _Stored:
    return _Stored(role_of(name, config), *measure(name.rpartition(".")[2], spec))


@functools.cache  # the experts of a large model repeat a few cases 200,000 times
def measure(leaf: str, spec: TensorSpec) -> tuple[int, int, str]:
    """Return the parameters a tensor stands for, its bytes and its format."""
    dtype = spec.dtypes[0]
    count = math.prod(spec.shape)
    fmt = {"F8_E4M3": "fp8", "U8": "nvfp4"}.get(dtype, dtype.lower())
    if leaf == "weight_scale" and dtype == "F8_E4M3":
        fmt = "nvfp4"
    num_params = count if leaf in _WEIGHTS else 0  # scales are part of their matrix
    if dtype == "U8":
        num_params *= 2
    return num_params, count * ITEM_BYTES[dtype], fmt


def role_of(name: str, config: ModelConfig) -> str:
    """Return the role of the tensor with published `name`."""
    if name.startswith("mtp."):
        return "mtp"
    for part, role in _ROLES:
        if part in name:
            return role
    return config.layers[int(name.split(".")[2])]


def _facts(
    target: str, config: ModelConfig, quant: QuantConfig, tensors: list[_Stored]
) -> dict[str, Any]:
    params, sizes, formats = Counter[str](), Counter[str](), Counter[str]()
    for tensor in tensors:
        params[tensor.role] += tensor.num_params
        sizes[tensor.role] += tensor.num_bytes
        formats[tensor.format] += tensor.num_bytes
    active = {role: count for role, count in params.items() if role != "mtp"}
    if "routed experts" in active:
        share = active["routed experts"] * config.num_active_experts
        active["routed experts"] = share // config.num_experts
    total, num_bytes = sum(params.values()), sum(sizes.values())
    return {
        "model": target,
        "pattern": config.pattern,
        "layers": list(config.layers),
        "mtp_layers": list(config.mtp_layers) * config.num_mtp_layers,
        "params_total": total,
        "params_backbone": total - params["mtp"],
        "params_active": sum(active.values()),
        "params_active_without_input_embedding": sum(active.values()) - active["embedding"],
        "params_mtp": params["mtp"],
        "params_by_role": dict(params),
        "params_active_by_role": active,
        "num_tensors": len(tensors),
        "weights_bytes": num_bytes,
        "weights_bytes_by_role": dict(sizes),
        "weights_bytes_by_format": dict(formats),
        "weights_bytes_by_precision": _by_precision(params),
        "bits_per_parameter": round(8 * num_bytes / total, 3),
        "kv_bytes_per_token": kv_bytes_per_token(config),
        "kv_bytes_per_token_fp8": kv_bytes_per_token(config, 1),
        "kv_bytes_per_token_mtp": kv_bytes_per_token(config, mtp=True) - kv_bytes_per_token(config),
        "state_bytes_per_sequence": state_bytes_per_sequence(config),
        "kv_bytes_per_token_float32": kv_bytes_per_token(config, 4, mtp=True),
        "state_bytes_per_sequence_float32": state_bytes_per_sequence(config, 4),
        "max_position_embeddings": config.max_position_embeddings,
        "quantization": _describe(quant),
    }


def _by_precision(params: Counter[str]) -> dict[str, int]:
    """Return what the weights would take with every block's matrices in one precision.

    Embeddings, head, router, norms and prediction head stay BF16, as in published files.
    """
    blocks = sum(params[role] for role in _QUANTISABLE)
    rest = sum(params.values()) - blocks
    return {name: int(blocks * bits / 8) + rest * _BF16 for name, bits in _BITS.items()}


def kv_bytes_per_token(config: ModelConfig, item_bytes: int = _BF16, *, mtp: bool = False) -> int:
    """Return the bytes of keys and values that one token adds, over the attention layers.

    `mtp` includes those of the prediction head.
    """
    layers = config.num_attention_caches if mtp else config.layers.count("attention")
    return 2 * layers * config.num_kv_heads * config.head_dim * item_bytes


def state_bytes_per_sequence(config: ModelConfig, conv_item_bytes: int = _BF16) -> int:
    """Return the bytes of recurrent state of one sequence: float32 SSM plus convolution tails."""
    ssm = config.mamba_inner * config.ssm_state_size * 4
    conv = (config.conv_kernel - 1) * config.conv_dim * conv_item_bytes
    return config.layers.count("mamba") * (ssm + conv)


def _describe(quant: QuantConfig) -> dict[str, Any] | None:
    if not quant.formats:
        return None
    return {
        "layout": quant.layout,
        "matrices": dict(Counter(quant.formats.values())),
        "kv_cache": quant.kv_cache,
        "group_size": NVFP4_BLOCK if any("nvfp4" in f for f in quant.formats.values()) else None,
    }


def render_info(target: str, *, as_json: bool) -> str:
    """Return the facts of `target` as JSON, or as a table for people."""
    facts = model_info(target)
    return json.dumps(facts, indent=2) if as_json else _table(facts)


def _table(facts: dict[str, Any]) -> str:
    kinds = Counter(facts["layers"])
    lines = [
        f"{facts['model']}: {len(facts['layers'])} layers "
        f"({', '.join(f'{count} {kind}' for kind, count in kinds.items())})",
        f"  pattern  {facts['pattern']}"
        + (f"   prediction head  {', '.join(facts['mtp_layers'])}" if facts["mtp_layers"] else ""),
        "",
        f"  {'role':<20}{'parameters':>18}{'active per token':>18}{'bytes':>12}",
    ]
    for role, count in sorted(facts["params_by_role"].items(), key=lambda item: -item[1]):
        active = facts["params_active_by_role"].get(role, 0)
        size = _size(facts["weights_bytes_by_role"][role])
        lines.append(f"  {role:<20}{count:>18,}{active:>18,}{size:>12}")
    total, active = facts["params_total"], facts["params_active"]
    lines.append(f"  {'total':<20}{total:>18,}{active:>18,}{_size(facts['weights_bytes']):>12}")
    formats = facts["weights_bytes_by_format"]
    split = ", ".join(f"{name} {_size(size)}" for name, size in formats.items())
    bits = facts["bits_per_parameter"]
    lines += ["", f"  weights       {split}; {bits} bits per parameter"]
    by_precision = facts["weights_bytes_by_precision"].items()
    split = ", ".join(f"{name} {_size(size)}" for name, size in by_precision)
    lines.append(f"  by precision  {split} if all blocks were stored so")
    lines.append(
        f"  KV cache      {facts['kv_bytes_per_token']:,} bytes per token in BF16, "
        f"{facts['kv_bytes_per_token_fp8']:,} in FP8"
    )
    state = facts["state_bytes_per_sequence"]
    lines.append(f"  state         {state:,} bytes per sequence ({_size(state)})")
    kv, state = facts["kv_bytes_per_token_float32"], facts["state_bytes_per_sequence_float32"]
    lines.append(f"  on a CPU      {kv:,} bytes per token and {state:,} per sequence in float32")
    if "load" in facts:
        where = {"memory": "read into memory", "mmap": "mapped: memory is short"}[facts["load"]]
        columns = "; down projections by columns" if facts["transposed"] else ""
        lines.append(f"  here          {where}{columns}")
    lines.append(
        f"  context       {facts['max_position_embeddings']:,} tokens in the configuration"
    )
    quant = facts["quantization"]
    if quant is None:
        found = "none"
    else:
        counts = ", ".join(f"{n:,} {fmt}" for fmt, n in quant["matrices"].items())
        found = f"{counts} matrices ({quant['layout']}); KV cache {quant['kv_cache'] or 'BF16'}"
    lines.append(f"  quantisation  {found}")
    return "\n".join(lines)


def _size(num_bytes: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.4g} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.2f} GiB"
