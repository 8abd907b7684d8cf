"""Models that the family is compared with: counted from their configurations, layer by layer.

Latent attention (GLM-5.1, Kimi-K2.6), gated delta rule with full attention in between (Qwen-3.5),
compressed shared keys (DeepSeek-V4-Pro); all with gated experts. Weights that a configuration does
not settle are named in `data/models.toml` and move totals by less than 0.1 %.
"""

from typing import Any

from aprium.base.errors import ConfigError
from aprium.plan.data import load_data
from aprium.plan.shapes import Layer, Shape, Weight

# Bytes of one weight by format: NVFP4 has a scale a block of 16, INT4 one of 2 bytes a group of 32.
BYTES = {"bf16": 2.0, "fp8": 1.0, "fp8_block": 1 + 4 / 16384, "nvfp4": 0.5625, "int4": 0.5625}
BYTES |= {"mxfp4": 0.53125, "f32": 4.0}
# Precisions of each model's public files, the widest first, and the roles each of them encodes.
COMPETITORS: dict[str, tuple[str, ...]] = {
    "glm-5": ("bf16", "fp8", "nvfp4"),
    "kimi-k2": ("int4", "nvfp4"),
    "qwen-3.5": ("bf16", "fp8", "nvfp4"),
    "deepseek-v4": ("native", "nvfp4"),
}
_LINEAR = ("attention", "attention kv", "shared experts", "mlp", "delta")
_STORED: dict[str, dict[str, str]] = {
    "bf16": {},
    "fp8": dict.fromkeys((*_LINEAR, "routed experts"), "fp8_block"),
    "nvfp4": {"routed experts": "nvfp4"},
    "int4": {"routed experts": "int4"},
    "native": dict.fromkeys(_LINEAR, "fp8_block") | {"routed experts": "mxfp4"},
}


def competitor_shape(name: str, precision: str | None = None) -> Shape:
    """Return the shape of a competitor in one of its published precisions, NVFP4 by default.

    Raises ConfigError naming those it has.
    """
    known = COMPETITORS[name]
    precision = precision or "nvfp4"
    if precision not in known:
        raise ConfigError(f"{name} is not published in {precision!r}: it is in {', '.join(known)}")
    model = load_data("models")[name]
    layers = [_layer(model, i, precision) for i in range(model["layers"])]
    hidden, vocab = model["hidden"], model["vocab"]
    head: tuple[Layer, ...] = ()
    extra: tuple[Weight, ...] = ()
    if model["mtp"]:
        # The prediction head is one more sparse layer, kept as it was trained.
        stored = "bf16" if precision in ("bf16", "nvfp4", "int4") else precision
        head = (_layer(model, model["layers"] - 1, stored),)
        extra = (_weight("projection", 2 * hidden * hidden + 2 * hidden, "bf16"),)
    ends = (
        _weight("embedding", vocab * hidden, "bf16"),
        _weight("head", vocab * hidden, "bf16"),
        _weight("norms", hidden, "bf16"),
    )
    return Shape(
        name=f"{name}-{precision}",
        base=name,
        precision=precision,
        layers=tuple(layers),
        head_layers=head,
        head_extra=extra,
        ends=ends,
        hidden=hidden,
        vocab=vocab,
        experts=model["experts"],
        active=model["active"],
        expert_dim=hidden,
        expert_width=model["width"],
        num_groups=1,
        mamba_heads=model.get("delta_value_heads", 0),
        max_context=model["context"],
        kv_cache="fp8",
        ours=False,
        notes=tuple(f"not settled by the configuration: {t}" for t in model.get("unverified", ())),
    )


def _weight(role: str, params: int, fmt: str) -> Weight:
    return Weight(role, params, params * BYTES[fmt], "fp8" if fmt == "fp8_block" else fmt)


def _layer(model: dict[str, Any], index: int, precision: str) -> Layer:
    """Return layer `index`: its attention and its experts (one residual pair each)."""
    stored = _STORED[precision]
    hidden, width = model["hidden"], model["width"]
    counts = dict(_attention(model, index))
    counts["norms"] = counts.get("norms", 0) + 2 * hidden
    inner = 0
    if index < model.get("dense_layers", 0):
        counts["mlp"] = 3 * hidden * model["dense_width"]
        inner = model["dense_width"]
    else:
        counts["routed experts"] = model["experts"] * 3 * hidden * width
        counts["shared experts"] = model["shared"] * 3 * hidden * width
        counts["router"] = (hidden + (not model.get("shared_gate"))) * model["experts"]
        counts["router"] += hidden if model.get("shared_gate") else 0
        inner = model["active"] * width
    weights = tuple(_weight(r, n, stored.get(r, "bf16")) for r, n in counts.items() if n)
    return Layer(kind="pair", weights=weights, inner=inner, **_cache(model, index))


def _attention(model: dict[str, Any], index: int) -> dict[str, int]:
    hidden, heads = model["hidden"], model.get("heads", 0)
    kind = model["attention"]
    if kind == "mla":
        q, kv, rope = model["q_lora"], model["kv_lora"], model["rope"]
        nope, value = model["nope"], model["value"]
        own = hidden * q + q + q * heads * (nope + rope) + heads * value * hidden
        narrow = hidden * (kv + rope) + kv + kv * heads * (nope + value)
        if "index_heads" in model:
            own += q * model["index_heads"] * model["index_dim"]
            own += hidden * (model["index_dim"] + model["index_heads"]) + 2 * model["index_dim"]
        return {"attention": own, "attention kv": narrow}
    if kind == "gqa":
        if index % model["attention_every"] == model["attention_every"] - 1:
            dim = model["head_dim"]
            wide = heads * dim * (2 if model["output_gate"] else 1)
            own = hidden * wide + heads * dim * hidden + 2 * dim
            return {"attention": own, "attention kv": 2 * hidden * model["kv_heads"] * dim}
        dim, values = model["delta_dim"], model["delta_value_heads"]
        mixed = 2 * model["delta_key_heads"] * dim + values * dim
        own = hidden * (mixed + values * dim) + 2 * hidden * values + model["conv"] * mixed
        return {"delta": own + 2 * values + dim + values * dim * hidden}
    return {"attention": _compressed(model, index)}


def _compressed(model: dict[str, Any], index: int) -> int:
    """Count DeepSeek-V4's attention: grouped output, compressor, and an indexer in near layers."""
    hidden, heads, dim, q = (model[k] for k in ("hidden", "heads", "head_dim", "q_lora"))
    own = hidden * q + q + q * heads * dim + hidden * dim + dim
    own += heads * dim * model["o_lora"] + model["o_groups"] * model["o_lora"] * hidden
    near = index >= model["far_layers"]
    own += (4 if near else 2) * hidden * dim
    if near:
        own += q * model["index_heads"] * model["index_dim"] + hidden * model["index_heads"]
        own += 4 * hidden * model["index_dim"]
    streams = model["streams"]
    return own + 2 * (streams * hidden) * (2 * streams + streams * streams)


def _cache(model: dict[str, Any], index: int) -> dict[str, Any]:
    """Return the fields of a layer that describe what it caches and how it reads it."""
    kind = model["attention"]
    if kind == "mla":
        width = model["heads"] * (2 * model["kv_lora"] + model["rope"]) / 2
        found: dict[str, Any] = {"kv_values": model["kv_lora"] + model["rope"]}
        found["query_width"] = width
        if "index_heads" in model:
            found["kv_top"] = model["index_top"]
            found["index_bytes"] = model["index_dim"] + 4
            found["index_ops"] = 2.0 * model["index_heads"] * model["index_dim"]
        return found
    if kind == "gqa":
        if index % model["attention_every"] == model["attention_every"] - 1:
            dim, narrow = model["head_dim"], model["kv_heads"]
            return {
                "kv_values": 2 * narrow * dim,
                "kv_heads": narrow,
                "query_width": model["heads"] * dim,
            }
        dim, values = model["delta_dim"], model["delta_value_heads"]
        mixed = 2 * model["delta_key_heads"] * dim + values * dim
        return {
            "state_values": values * dim * dim,
            "conv_values": (model["conv"] - 1) * mixed,
            "scan_ops": 8.0 * values * dim * dim,
        }
    near = index >= model["far_layers"]
    ratio = model["near_ratio"] if near else model["far_ratio"]
    found = {"kv_values": model["head_dim"] / ratio, "query_width": model["heads"] * 512 / ratio}
    found["kv_fixed"] = model["window"] * model["head_dim"]
    if near:
        found["index_bytes"] = model["index_dim"] / ratio
        found["index_ops"] = 2.0 * model["index_heads"] * model["index_dim"] / ratio
        found["kv_top"] = model["index_top"] * ratio
    return found
