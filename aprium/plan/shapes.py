"""What a model is for planning: layers with weights by role and format, caches, and work per token.

A `Shape` comes from a preset and a precision, from the headers of a checkpoint directory or a GGUF
file (exact bytes then), or from `competitors`. Counting walks the tensors of one expert a layer and
multiplies, so that Ultra's 198,887 tensors take milliseconds. Bytes are those of the files.
"""

import dataclasses
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from aprium.base.errors import ConfigError
from aprium.checkpoint.info import measure, role_of
from aprium.checkpoint.names import TensorSpec, tensor_table
from aprium.model.config import ModelConfig, QuantConfig
from aprium.model.presets import PRESETS
from aprium.model.quant_presets import QUANT_PRESETS, QuantPreset, layer_formats

PRECISIONS = ("bf16", "fp8", "nvfp4")
# Names on the hub, for launch commands and as names to plan for.
HUB_IDS = {
    ("nano", "bf16"): "nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16",
    ("nano", "fp8"): "nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-FP8",
    ("nano", "nvfp4"): "nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-NVFP4",
    ("super", "bf16"): "nvidia/NVIDIA-Nemotron-3-Super-120B-A12B-BF16",
    ("super", "fp8"): "nvidia/NVIDIA-Nemotron-3-Super-120B-A12B-FP8",
    ("super", "nvfp4"): "nvidia/NVIDIA-Nemotron-3-Super-120B-A12B-NVFP4",
    ("ultra", "bf16"): "nvidia/NVIDIA-Nemotron-3-Ultra-550B-A55B-BF16",
    ("ultra", "nvfp4"): "nvidia/NVIDIA-Nemotron-3-Ultra-550B-A55B-NVFP4",
    ("lightning", "nvfp4"): "nvidia/NVIDIA-Nemotron-3.5-Lightning-30B-A3B-NVFP4",
}
EXPERT_ROLES = ("routed experts", "router")  # one expert's tensors times the number of experts


class Weight(NamedTuple):
    """Weights of one role in one layer: how many, their bytes, and the format of their products."""

    role: str
    params: int
    num_bytes: float
    format: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """One layer. Sizes in values of the cache, whose bytes the deployment decides.

    `kv_values` are cached a token, over `kv_heads` heads that tensor parallelism can part;
    `kv_fixed` a sequence (a window). `index_bytes` a token serve a sparse selection of the
    `kv_top` entries read. `query_width` times 4 are the operations of one token with one entry of
    the cache, `scan_ops` those of one token with the recurrent state.
    """

    kind: str
    weights: tuple[Weight, ...] = ()
    kv_values: float = 0
    kv_heads: int = 1
    kv_fixed: float = 0
    kv_top: int | None = None
    index_bytes: float = 0
    index_ops: float = 0
    query_width: float = 0
    state_values: int = 0
    conv_values: int = 0
    scan_ops: float = 0
    inner: int = 0  # the widest activation of one token

    @property
    def num_bytes(self) -> float:
        """Bytes of the layer's weights."""
        return sum(w.num_bytes for w in self.weights)

    def bytes_of(self, *roles: str) -> float:
        """Bytes of the weights of `roles`."""
        return sum(w.num_bytes for w in self.weights if w.role in roles)


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A model with the precision it is stored in."""

    name: str
    base: str
    precision: str
    layers: tuple[Layer, ...]
    head_layers: tuple[Layer, ...]  # of the prediction head
    head_extra: tuple[Weight, ...]  # its projection and norms
    ends: tuple[Weight, ...]  # embedding, last norm, vocabulary projection
    hidden: int
    vocab: int
    experts: int
    active: int
    expert_dim: int
    expert_width: int
    num_groups: int
    mamba_heads: int
    max_context: int
    kv_cache: str
    exact: bool = False  # bytes were read from a file's headers
    ours: bool = True  # of the family: Aprium can run it
    notes: tuple[str, ...] = ()

    def weights(self, *, mtp: bool = True) -> Iterable[Weight]:
        """Yield all weights, those of the prediction head last and only on demand."""
        yield from self.ends
        for layer in self.layers:
            yield from layer.weights
        if mtp:
            yield from self.head_extra
            for layer in self.head_layers:
                yield from layer.weights

    def params(self, *, mtp: bool = True) -> int:
        """Return the number of weights."""
        return sum(w.params for w in self.weights(mtp=mtp))

    def num_bytes(self, *, mtp: bool = True) -> float:
        """Return the bytes of the weights."""
        return sum(w.num_bytes for w in self.weights(mtp=mtp))

    def active_params(self, *, input_embedding: bool = True) -> int:
        """Return the weights that work on one token, prediction head left out."""
        total = 0
        for weight in self.weights(mtp=False):
            if weight.role == "embedding" and not input_embedding:
                continue
            share = self.active / self.experts if weight.role == "routed experts" else 1
            total += round(weight.params * share)
        return total

    def bytes_by_role(self, *, mtp: bool = True) -> dict[str, float]:
        """Return the bytes of the weights by role."""
        found: defaultdict[str, float] = defaultdict(float)
        for weight in self.weights(mtp=False):
            found[weight.role] += weight.num_bytes
        if mtp and (self.head_layers or self.head_extra):
            found["mtp"] = self.num_bytes() - self.num_bytes(mtp=False)
        return dict(found)

    @property
    def num_moe_layers(self) -> int:
        """Layers with routed experts, prediction head left out."""
        return sum(bool(layer.bytes_of("routed experts")) for layer in self.layers)

    def kv_values_per_token(self, *, mtp: bool = False) -> float:
        """Return the values cached a token."""
        layers = (*self.layers, *self.head_layers) if mtp else self.layers
        return sum(layer.kv_values for layer in layers)


def family_shape(base: str, precision: str, config: ModelConfig | None = None) -> Shape:
    """Return the shape of a preset in `precision`: bf16, fp8, nvfp4, or a GGUF type.

    fp8 and nvfp4 are the published files where there are, else Super's FP8 and Ultra's NVFP4
    recipe. Raises ConfigError naming the known precisions.
    """
    config = config or PRESETS[base]
    if config.num_experts > 1 and "moe" in (*config.layers, *config.mtp_layers):
        one = dataclasses.replace(
            config, num_experts=1, num_active_experts=1, num_router_groups=1
        )  # fmt: skip
        one = dataclasses.replace(one, num_active_router_groups=1)
    else:
        one = config
    notes: tuple[str, ...] = ()
    if precision == "bf16":
        quant, router = QuantConfig(), "BF16"
    elif precision in ("fp8", "nvfp4"):
        name = f"{base}-{precision}"
        if name not in QUANT_PRESETS:
            name = {"fp8": "super-fp8", "nvfp4": "ultra-nvfp4"}[precision]
            notes = (f"{base} in {precision} was not published: stored by the recipe of {name}",)
        found = QUANT_PRESETS[name]
        quant, router = _formats(one, found), found.router_dtype
    else:
        from aprium.plan.gguf import family_weights  # a rare case

        return assemble(base, precision, config, family_weights(one, precision))
    table = tensor_table(one, quant, router_dtype=router)
    shape = assemble(base, precision, config, _measured(table, one))
    return dataclasses.replace(shape, notes=notes)


def _formats(config: ModelConfig, preset: QuantPreset) -> QuantConfig:
    formats: dict[str, str] = {}
    for index, kind in enumerate(config.layers):
        formats |= layer_formats(config, preset.rule, kind, index)
    if preset.head is not None:
        formats["lm_head"] = preset.head
    return QuantConfig(formats=formats, kv_cache="fp8", kv_scales=preset.kv_scales)


def directory_shape(path: Path) -> Shape:
    """Return the shape of a checkpoint directory, bytes as its headers have them."""
    from aprium.checkpoint.load import read_plan

    plan = read_plan(path)
    table = {name: TensorSpec(t.shape, (t.dtype,)) for name, t in plan.tensors.items()}
    formats = Counter(plan.quant.formats.values())
    precision = formats.most_common(1)[0][0] if formats else "bf16"
    precision = "nvfp4" if "nvfp4" in precision else precision
    measured = _measured(table, plan.config)
    shape = assemble(path.name, precision, plan.config, measured, stacked=True)
    return dataclasses.replace(shape, name=str(path), exact=True)


class Tensor(NamedTuple):
    """One tensor of a file: where it belongs and what it takes."""

    layer: int | None  # None: embedding, head, last norm
    mtp: bool
    role: str
    params: int
    num_bytes: float
    format: str


def _measured(table: Mapping[str, TensorSpec], config: ModelConfig) -> Iterable[Tensor]:
    for name, spec in table.items():
        parts = name.split(".")
        mtp = parts[0] == "mtp"
        layer = int(parts[2]) if mtp or parts[1] == "layers" else None
        role = mtp_role(name, config, layer) if mtp else role_of(name, config)
        if role == "attention" and parts[-2] in ("k_proj", "v_proj"):
            role = "attention kv"
        params, num_bytes, fmt = measure(parts[-1], spec)
        yield Tensor(layer, mtp, role, params, num_bytes, fmt)


def mtp_role(name: str, config: ModelConfig, layer: int | None) -> str:
    """Return the role of a tensor of the prediction head as if it were in the backbone."""
    assert layer is not None
    if "eh_proj" in name or "norm" in name.rsplit(".", 2)[-2]:
        return "projection"
    kind = config.mtp_layers[layer % len(config.mtp_layers)]
    first = config.layers.index(kind) if kind in config.layers else 0
    return role_of(name.replace(f"mtp.layers.{layer}", f"backbone.layers.{first}"), config)


def assemble(
    base: str,
    precision: str,
    config: ModelConfig,
    tensors: Iterable[Tensor],
    *,
    stacked: bool = False,
) -> Shape:
    """Gather tensors into layers; with `stacked` all experts are there already."""
    times = 1 if stacked else config.num_experts
    params = Counter[tuple[bool, int, str]]()
    sizes: defaultdict[tuple[bool, int, str], float] = defaultdict(float)
    formats: defaultdict[tuple[bool, int, str], dict[str, float]] = defaultdict(dict)
    for tensor in tensors:
        key = (tensor.mtp, -1 if tensor.layer is None else tensor.layer, tensor.role)
        count = times if tensor.role in EXPERT_ROLES else 1
        params[key] += tensor.params * count
        sizes[key] += tensor.num_bytes * count
        found = formats[key]
        found[tensor.format] = found.get(tensor.format, 0.0) + tensor.num_bytes
    weights: defaultdict[tuple[bool, int], list[Weight]] = defaultdict(list)
    for key, size in sizes.items():
        fmt = max(formats[key], key=lambda name: formats[key][name])
        weights[key[:2]].append(Weight(key[2], params[key], size, fmt))
    backbone = tuple(
        make_layer(kind, config, weights[False, i]) for i, kind in enumerate(config.layers)
    )
    kinds = config.mtp_layers * config.num_mtp_layers
    extra = [w for i in range(len(kinds)) for w in weights[True, i] if w.role == "projection"]
    head = tuple(
        make_layer(kind, config, [w for w in weights[True, i] if w.role != "projection"])
        for i, kind in enumerate(kinds)
    )
    return Shape(
        name=base if precision == "bf16" else f"{base}-{precision}",
        base=base,
        precision=precision,
        layers=backbone,
        head_layers=head,
        head_extra=tuple(extra),
        ends=tuple(weights[False, -1]),
        hidden=config.hidden_size,
        vocab=config.vocab_size,
        experts=max(config.num_experts, 1),
        active=config.num_active_experts,
        expert_dim=config.expert_dim,
        expert_width=config.expert_intermediate_size,
        num_groups=config.num_groups,
        mamba_heads=config.mamba_num_heads,
        max_context=config.max_position_embeddings,
        kv_cache="bf16" if precision == "bf16" else "fp8",
    )


def make_layer(kind: str, config: ModelConfig, weights: list[Weight]) -> Layer:
    """Return a layer of the family."""
    own = tuple(weights)
    if kind == "mamba":
        inner, state = config.mamba_inner, config.ssm_state_size
        return Layer(
            kind=kind,
            weights=own,
            state_values=inner * state,
            conv_values=(config.conv_kernel - 1) * config.conv_dim,
            scan_ops=6.0 * inner * state,
            inner=config.in_proj_dim,
        )
    if kind == "attention":
        narrow = config.num_kv_heads * config.head_dim
        width = config.num_heads * config.head_dim
        return Layer(
            kind=kind,
            weights=own,
            kv_values=2 * narrow,
            kv_heads=config.num_kv_heads,
            query_width=width,
            inner=width + 2 * narrow,
        )
    widest = config.intermediate_size
    if kind == "moe":
        routed = config.num_active_experts * config.expert_intermediate_size
        widest = routed + config.shared_expert_intermediate_size
    return Layer(kind=kind, weights=own, inner=widest)


def target_shape(target: str, precision: str | None = None) -> Shape:
    """Return the shape that `target` names: a preset, a published file, a directory, a GGUF file.

    Also a hub id of the family and a competitor's name. Raises ConfigError naming what is known.
    """
    from aprium.plan.competitors import COMPETITORS, competitor_shape

    by_id = {name: key for key, name in HUB_IDS.items()}
    if target in by_id:
        base, stored = by_id[target]
        return family_shape(base, precision or stored)
    if target in QUANT_PRESETS:
        base, _, stored = target.rpartition("-")
        if precision is not None and precision != stored:
            return family_shape(base, precision)
        return family_shape(base, stored)
    if target in PRESETS:
        return family_shape(target, precision or "bf16")
    if target in COMPETITORS:
        return competitor_shape(target, precision)
    path = Path(target)
    if path.suffix == ".gguf" and path.is_file():
        from aprium.plan.gguf import file_shape

        return file_shape(path)
    if path.is_dir():
        if precision is not None:
            return family_shape(path.name, precision, ModelConfig.load(path))
        return directory_shape(path)
    known = ", ".join((*PRESETS, *QUANT_PRESETS, *COMPETITORS))
    raise ConfigError(
        f"{target!r} is neither a model known by name, nor a checkpoint directory, nor a GGUF "
        f"file: the names are {known}"
    )


def precisions_of(target: str) -> tuple[str, ...]:
    """Return the precisions to try for `target` where none was asked for; empty: as it is."""
    from aprium.plan.competitors import COMPETITORS

    if target in PRESETS:
        published = {"nano": PRECISIONS, "super": PRECISIONS, "ultra": ("bf16", "nvfp4")}
        return published.get(target, ("bf16", "nvfp4"))
    if target in COMPETITORS:
        return COMPETITORS[target]
    return ()
