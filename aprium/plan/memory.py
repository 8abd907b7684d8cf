"""What one device of a deployment holds: weights, caches, states, workspace; and whether it fits.

Counts the fullest device of the fullest pipeline stage. Keys and values are replicated where tensor
parallelism exceeds their heads; recurrent states are split by heads, their B and C channels
replicated beyond the number of groups; what an engine replicates (router, norms, latent
projections) counts whole. Speculation holds a state for every draft in engines that keep snapshots.
"""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from aprium.base.errors import ConfigError
from aprium.plan.hardware import Device
from aprium.plan.shapes import Layer, Shape, Weight

GIB = 1 << 30
DTYPE_BYTES = {"float32": 4.0, "bfloat16": 2.0, "float16": 2.0, "bf16": 2.0, "fp8": 1.0}
# Roles that each device holds whole whatever the parallelism.
_REPLICATED = ("router", "norms", "latent projections", "projection")
_CONTEXT_BYTES = 0.5e9  # driver and libraries of a process
_GRAPH_BYTES = 1.0e9  # captured graphs with the usual list of sizes
_LEAN_GRAPH_BYTES = 0.3e9  # of the sizes 1, 2 and 4 alone
_LEAN_TOKENS = 2048
_NCCL_MIB = {1: 0, 2: 342, 4: 392, 8: 392}  # AIC 0.12.0
_FRAGMENTED = 0.01  # of the memory, lost between blocks
_HOST_BYTES = 1.5e9  # of a CPU process beside weights and caches
FITS_SHARE = 0.80  # of the memory that weights may take where a deployment is called comfortable
TIGHT_SHARE = 0.98  # of the memory that may be used at the very most


@dataclass(frozen=True, slots=True, kw_only=True)
class Deployment:
    """How a model is spread and run.

    `tp` tensor, `pp` pipeline, `dp` attention-data parallel ranks, which share the experts: one
    replica takes tp x pp x dp devices. `ep` places whole experts on ranks instead of slices.
    `utilization` is the share of memory an engine may take. `drafts` tokens are drafted a step;
    `snapshots` engines keep a state for each. `offload_gb` of routed experts a device stay in host
    memory. `state_checkpoints` states are kept for prefix reuse. `attention` "dense" reads the
    whole cache where a model would select from it.
    """

    tp: int = 1
    pp: int = 1
    dp: int = 1
    ep: bool = False
    kv_dtype: str = "auto"
    state_dtype: str = "float32"
    utilization: float = 0.92
    max_batched_tokens: int = 8192
    drafts: int = 0
    acceptance: float | None = None
    snapshots: bool | None = None  # None: on GPUs, whose engines do
    with_mtp: bool = True
    offload_gb: float = 0.0
    state_checkpoints: int = 0
    attention: str = "auto"
    lean: bool = False  # few captured graphs and short steps: what a full device still runs with
    reserve_gb: float | None = None

    def __post_init__(self) -> None:
        """Check ranges; raise ConfigError naming the field."""
        for name in ("tp", "pp", "dp", "max_batched_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}: it must be at least 1")
        for name in ("drafts", "offload_gb", "state_checkpoints", "reserve_gb"):
            if (getattr(self, name) or 0) < 0:
                raise ConfigError(f"{name} is {getattr(self, name)}: it must be at least 0")
        if self.acceptance is not None and not 0 <= self.acceptance <= 1:
            raise ConfigError(f"acceptance is {self.acceptance}: it must be between 0 and 1")
        if self.attention not in ("auto", "dense"):
            raise ConfigError(f"attention is {self.attention!r}: use auto or dense")
        if not 0 < self.utilization <= 1:
            raise ConfigError(f"utilization is {self.utilization}: it must be over 0 and at most 1")
        if self.kv_dtype != "auto" and self.kv_dtype not in DTYPE_BYTES:
            raise ConfigError(f"kv_dtype is {self.kv_dtype!r}: use auto, fp8, bfloat16 or float32")
        if self.state_dtype not in DTYPE_BYTES:
            raise ConfigError(f"state_dtype is {self.state_dtype!r}: use float32, float16 or fp8")

    @property
    def devices(self) -> int:
        """Devices of one replica."""
        return self.tp * self.pp * self.dp

    def describe(self) -> str:
        """Return the parallelism in the usual letters, as in TP8 PP2 EP."""
        parts = [f"TP{self.tp}"]
        parts += [f"PP{self.pp}"] if self.pp > 1 else []
        parts += [f"DP{self.dp}"] if self.dp > 1 else []
        parts += ["EP"] if self.ep else []
        return " ".join(parts)


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Bytes on the fullest device. `kv_per_token` and `state_per_sequence` are a sequence's.

    `budget` is what an engine may take, `usable` all the device has. `sequences_per_device` is
    dp: so many sequences are parted over the attention ranks.
    """

    weights: dict[str, float]
    kv_per_token: float
    kv_fixed: float
    state_per_sequence: float
    other: dict[str, float]
    usable: float
    budget: float
    offloaded: float
    ranks: int
    checkpoints: float

    @property
    def weight_bytes(self) -> float:
        """Bytes of weights on the device."""
        return sum(self.weights.values())

    @property
    def fixed(self) -> float:
        """Bytes taken before the first sequence."""
        return self.weight_bytes + sum(self.other.values()) + self.checkpoints

    def sequence(self, context: int) -> float:
        """Bytes of one sequence of `context` tokens on the device that has it."""
        return self.state_per_sequence + self.kv_fixed + self.kv_per_token * context

    def max_concurrency(self, context: int, share: float | None = None) -> int:
        """Most sequences of `context` tokens at once, over all attention ranks."""
        budget = self.budget if share is None else share * self.usable
        return max(int((budget - self.fixed) // self.sequence(context)), 0) * self.ranks

    def max_context(self, concurrency: int, share: float | None = None) -> int:
        """Longest context that `concurrency` sequences may have at once; 0 where none."""
        budget = self.budget if share is None else share * self.usable
        each = (budget - self.fixed) / math.ceil(concurrency / self.ranks)
        room = each - self.state_per_sequence - self.kv_fixed
        if room <= 0:
            return 0
        return int(room // self.kv_per_token) if self.kv_per_token else 1 << 40


def memory(shape: Shape, device: Device, deployment: Deployment) -> Memory:
    """Count the bytes of the fullest device of `deployment`."""
    check_parallelism(shape, deployment)
    found = [
        _stage(shape, device, deployment, stage, index)
        for index, stage in enumerate(stages(shape, deployment.pp))
    ]
    return max(found, key=lambda m: m.fixed + m.sequence(shape.max_context))


def check_parallelism(shape: Shape, deployment: Deployment) -> None:
    """Raise ConfigError where the model cannot be cut so, with a cut that works."""
    tp, ranks = deployment.tp, deployment.tp * deployment.dp
    if shape.mamba_heads and shape.mamba_heads % tp:
        raise ConfigError(
            f"tp {tp} does not divide the {shape.mamba_heads} recurrent heads of {shape.name}: use "
            "a power of two, or more of dp or pp"
        )
    if deployment.pp > len(shape.layers):
        raise ConfigError(f"pp {deployment.pp} is more than {len(shape.layers)} layers")
    if deployment.ep and shape.experts % ranks:
        raise ConfigError(
            f"expert parallelism over {ranks} ranks does not divide {shape.experts} experts"
        )
    width = shape.expert_width
    if not deployment.ep and shape.precision == "nvfp4" and (width % ranks or width // ranks % 16):
        raise ConfigError(
            f"experts of width {width} in NVFP4 cannot be sliced over {ranks} ranks in whole "
            "blocks of 16: use expert parallelism (--ep)"
        )


def stages(shape: Shape, count: int) -> list[tuple[Layer, ...]]:
    """Cut the layers into `count` runs of about equal bytes, in order."""
    total = sum(layer.num_bytes for layer in shape.layers)
    found: list[list[Layer]] = [[] for _ in range(count)]
    done, index = 0.0, 0
    for position, layer in enumerate(shape.layers):
        left = len(shape.layers) - position
        if found[index] and index < count - 1:
            full = done + layer.num_bytes / 2 > total * (index + 1) / count
            index += full or left <= count - 1 - index
        found[index].append(layer)
        done += layer.num_bytes
    return [tuple(stage) for stage in found]


def shard(weight: Weight, layer: Layer | None, shape: Shape, deployment: Deployment) -> float:
    """Return the share of a weight that one device holds."""
    tp = deployment.tp
    if weight.role == "routed experts":
        return 1 / (tp * deployment.dp)
    if weight.role in _REPLICATED:
        return 1.0
    if weight.role == "attention kv":
        heads = layer.kv_heads if layer else 1
        return max(1.0, tp / heads) / tp
    if weight.role == "mamba" and tp > shape.num_groups:
        # B and C of each group are on several ranks: a small part of the input projection.
        extra = 2 * shape.num_groups * (tp / shape.num_groups - 1)
        return (1 + extra * 128 / max(layer.inner if layer else 1, 1)) / tp
    return 1 / tp


def _stage(
    shape: Shape, device: Device, deployment: Deployment, layers: Sequence[Layer], index: int
) -> Memory:
    weights: dict[str, float] = {}

    def add(role: str, num_bytes: float) -> None:
        weights[role] = weights.get(role, 0.0) + num_bytes

    for layer in layers:
        for weight in layer.weights:
            add(weight.role, weight.num_bytes * shard(weight, layer, shape, deployment))
    last = index == deployment.pp - 1
    for weight in shape.ends:
        if (weight.role == "embedding" and index == 0) or (weight.role != "embedding" and last):
            add(weight.role, weight.num_bytes * shard(weight, None, shape, deployment))
    cached = list(layers)
    if last and deployment.with_mtp:
        for layer in shape.head_layers:
            for weight in layer.weights:
                add("mtp", weight.num_bytes * shard(weight, layer, shape, deployment))
        for weight in shape.head_extra:
            add("mtp", weight.num_bytes)
        if deployment.drafts:
            cached += shape.head_layers
    offloaded = min(deployment.offload_gb * 1e9, weights.get("routed experts", 0.0))
    if offloaded:
        weights["routed experts"] -= offloaded
    kv, fixed, state = caches(cached, shape, deployment)
    return Memory(
        weights=weights,
        kv_per_token=kv,
        kv_fixed=fixed,
        state_per_sequence=state * (1 + deployment.drafts * keeps_snapshots(device, deployment)),
        other=_other(shape, device, deployment, layers, last),
        usable=device.memory_bytes,
        budget=deployment.utilization * device.memory_bytes,
        offloaded=offloaded,
        ranks=deployment.dp,
        checkpoints=deployment.state_checkpoints * state,
    )


def keeps_snapshots(device: Device, deployment: Deployment) -> bool:
    """Return whether a state is kept for each draft, rather than the inputs to replay."""
    if deployment.snapshots is None:
        return device.kind != "cpu"
    return deployment.snapshots


def kv_bytes(shape: Shape, deployment: Deployment) -> float:
    """Return the bytes of one cached value."""
    return DTYPE_BYTES[shape.kv_cache if deployment.kv_dtype == "auto" else deployment.kv_dtype]


def caches(
    layers: Sequence[Layer], shape: Shape, deployment: Deployment
) -> tuple[float, float, float]:
    """Return the bytes on one device: a token of KV, a sequence's window, a sequence's states."""
    tp, each = deployment.tp, kv_bytes(shape, deployment)
    kv = fixed = state = 0.0
    for layer in layers:
        share = max(1.0, tp / layer.kv_heads) / tp
        kv += layer.kv_values * share * each + layer.index_bytes
        fixed += layer.kv_fixed * share * each
        state += layer.state_values / tp * DTYPE_BYTES[deployment.state_dtype]
        state += layer.conv_values / tp * 2
    return kv, fixed, state


def _other(
    shape: Shape, device: Device, deployment: Deployment, layers: Sequence[Layer], last: bool
) -> dict[str, float]:
    """Return workspace and what framework and libraries take."""
    widest = max(layer.inner for layer in layers)
    tokens = deployment.max_batched_tokens
    tokens = min(tokens, _LEAN_TOKENS) if deployment.lean else tokens
    work = tokens * (widest / deployment.tp * 2 * 2 + shape.hidden * 2 * 4)
    rows = 16 if deployment.lean else 256
    logits = rows * shape.vocab / deployment.tp * 4 if last else 0.0
    found = {"activations": work, "logits": logits}
    if deployment.reserve_gb is not None:
        return found | {"framework": deployment.reserve_gb * 1e9}
    if device.kind == "cpu":
        return found | {"framework": _HOST_BYTES}
    ranks = deployment.tp * deployment.dp
    nccl = _NCCL_MIB.get(ranks, 392) * 2**20
    framework = _CONTEXT_BYTES + nccl
    if deployment.lean:
        return found | {"graphs": _LEAN_GRAPH_BYTES, "framework": framework}
    return found | {
        "graphs": _GRAPH_BYTES,
        "framework": framework + _FRAGMENTED * device.memory_bytes,
    }


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """Whether a deployment holds what was asked: "fits", "tight" or "no".

    `why` is the binding constraint; `remedies` are changes that were tried and what they lead to.
    """

    verdict: str
    why: str
    share: float  # of the memory that weights take
    remedies: tuple[str, ...] = ()


def judge(
    shape: Shape, device: Device, deployment: Deployment, context: int, concurrency: int
) -> tuple[Verdict, Memory, Deployment]:
    """Class a deployment; a prediction head that does not fit is left out, which makes it tight.

    "fits": weights take at most 80 % of the memory and the budget holds `concurrency` sequences of
    `context` tokens. "tight": it runs, with less room than that, filling memory to at most 98 %.
    Returns the verdict, the bytes, and the deployment that they are of.
    """
    found = memory(shape, device, deployment)
    share = found.weight_bytes / found.usable
    if found.max_concurrency(context) >= concurrency and share <= FITS_SHARE:
        why = _binding(found, context)
        return Verdict(verdict="fits", why=why, share=share), found, deployment
    lean = dataclasses.replace(deployment, lean=True)
    tight = memory(shape, device, lean)
    if tight.max_concurrency(context, TIGHT_SHARE) >= concurrency:
        full = found.max_concurrency(context) < concurrency
        why = f"weights take {share:.0%} of the memory"
        if full:
            what = why if share > FITS_SHARE else f"{concurrency} sequences of {context:,} tokens"
            why = f"{what}: needs over {deployment.utilization} of the memory and short steps"
        verdict = Verdict(verdict="tight", why=why, share=share)
        return (verdict, tight, lean) if full else (verdict, found, deployment)
    if deployment.with_mtp and shape.head_layers and not deployment.drafts:
        bare = dataclasses.replace(deployment, with_mtp=False)
        verdict, less, used = judge(shape, device, bare, context, concurrency)
        if verdict.verdict != "no":
            why = f"{verdict.why}; only without the prediction head"
            return dataclasses.replace(verdict, verdict="tight", why=why), less, used
    why = _missing(tight, context, concurrency)
    return Verdict(verdict="no", why=why, share=share), found, deployment


def _binding(found: Memory, context: int) -> str:
    state, kv = found.state_per_sequence, found.kv_per_token * context
    if state > kv:
        return f"concurrency is bound by recurrent state, {state / 1e6:,.0f} MB a sequence"
    return f"concurrency is bound by keys and values, {kv / 1e6:,.0f} MB a sequence"


def _missing(found: Memory, context: int, concurrency: int) -> str:
    usable = TIGHT_SHARE * found.usable
    if found.weight_bytes > usable:
        return (
            f"weights take {found.weight_bytes / 1e9:,.1f} GB a device, which has "
            f"{found.usable / 1e9:,.1f} GB"
        )
    if found.fixed > usable:
        return (
            f"weights and workspace take {found.fixed / 1e9:,.1f} GB a device, which has "
            f"{found.usable / 1e9:,.1f} GB"
        )
    most = found.max_concurrency(context, TIGHT_SHARE)
    longest = found.max_context(concurrency, TIGHT_SHARE)
    each = math.ceil(concurrency / found.ranks)
    needed = found.fixed + found.sequence(context) * each
    return (
        f"{concurrency} sequences of {context:,} tokens need {needed / 1e9:,.1f} GB a device of"
        f" {found.usable / 1e9:,.1f} GB: {most} fit at that length, or "
        f"{longest:,} tokens at that concurrency"
    )


def remedies(
    shape: Shape, device: Device, deployment: Deployment, context: int, concurrency: int
) -> tuple[str, ...]:
    """Try changes one at a time and return those that lead to a better verdict, in words."""
    order = ("no", "tight", "fits")
    now = judge(shape, device, deployment, context, concurrency)[0].verdict
    tries: list[tuple[str, dict[str, Any], int, int]] = []
    for factor in (2, 4):
        tp = deployment.tp * factor
        tries.append((f"{deployment.devices * factor} devices (TP{tp})", {"tp": tp}, context, concurrency))  # fmt: skip  # noqa: E501
    if deployment.state_dtype == "float32" and any(layer.state_values for layer in shape.layers):
        tries.append(("float16 states", {"state_dtype": "float16"}, context, concurrency))
    if kv_bytes(shape, deployment) > 1:
        tries.append(("FP8 keys and values", {"kv_dtype": "fp8"}, context, concurrency))
    if deployment.drafts:
        tries.append(("no speculation", {"drafts": 0}, context, concurrency))
    if concurrency > 1:
        tries.append((f"{concurrency // 2} sequences at once", {}, context, concurrency // 2))
    if context > 8192:
        tries.append((f"a context of {context // 2:,} tokens", {}, context // 2, concurrency))
    if device.host_gb and not deployment.offload_gb:
        most = min(device.host_gb * 0.8, shape.num_bytes() / 1e9 / deployment.devices)
        tries.append(("experts in host memory", {"offload_gb": most}, context, concurrency))
    found = []
    for name, change, length, count in tries:
        try:
            changed = dataclasses.replace(deployment, **change)
            verdict = judge(shape, device, changed, length, count)[0].verdict
        except ConfigError:
            continue
        if order.index(verdict) > order.index(now):
            found.append(f"{name}: {verdict}")
    return tuple(found)
