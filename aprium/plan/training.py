"""What training takes: weights, gradients, optimiser and activations a device; rollouts, teachers.

Parameters are sharded over all ranks, experts over expert-parallel groups inside them (so that
ep x expert shards = ranks); the largest block is gathered twice, the next one prefetched.
Activations are those a layer saves for its gradient. Reinforcement learning and distillation add a
pool that generates and frozen teachers that score. Source: torchtitan's mesh, NeMo's recipes
(docs/planning.md).
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from aprium.base.errors import ConfigError
from aprium.plan.cost import CostModel, constants
from aprium.plan.hardware import Device
from aprium.plan.memory import FITS_SHARE, TIGHT_SHARE
from aprium.plan.plan import Load, make_plan
from aprium.plan.shapes import Layer, Shape, target_shape

# Bytes of gradient, master weight and moments of one weight beside its two of BF16.
OPTIMIZERS = {
    "adamw": (2.0, 4.0, 8.0),
    "adamw-fp32-gradients": (4.0, 4.0, 8.0),
    "adamw-bf16": (2.0, 4.0, 4.0),
    "adamw-8bit": (2.0, 0.0, 4.0),
    "muon": (2.0, 4.0, 4.0),
}
RECOMPUTE = ("none", "selective", "full")
METHODS = ("pretrain", "sft", "lora", "rl", "mopd")
_RESERVE = 4e9  # context, collectives' buffers, workspace
_CHUNK = 128  # tokens between saved states of the recurrence
_LOGIT_BYTES = 6  # of one logit: BF16 and float32
_LOGIT_CHUNK = 2048  # tokens whose logits are there at once


@dataclass(frozen=True, slots=True, kw_only=True)
class Training:
    """How a model is trained.

    `tokens` is the length of a packed sequence, `micro_batch` sequences of a device at once;
    `cp` devices share one sequence. `rank` is LoRA's. `prompts`, `samples` and `answer` describe a
    step of reinforcement learning or distillation, `teachers` the frozen models that score.
    """

    method: str = "sft"
    optimizer: str = "adamw"
    recompute: str = "selective"
    tokens: int = 8192
    micro_batch: int = 1
    cp: int = 1
    ep: int = 1
    rank: int = 16
    prompts: int = 512
    samples: int = 16
    answer: int = 8192
    teachers: int = 0
    chunked_loss: bool = True

    def __post_init__(self) -> None:
        """Check names and ranges; raise ConfigError naming the field."""
        for name, known in (
            ("method", METHODS),
            ("optimizer", OPTIMIZERS),
            ("recompute", RECOMPUTE),
        ):
            if getattr(self, name) not in known:
                raise ConfigError(
                    f"{name} is {getattr(self, name)!r}: it must be one of {', '.join(known)}"
                )
        for name in ("tokens", "micro_batch", "cp", "ep", "rank", "prompts", "samples", "answer"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}: it must be at least 1")


def training_plan(
    target: str, *, where: Device, num: int, training: Training, load: Load
) -> dict[str, Any]:
    """Return the memory, verdict and speed of training `target` on `num` devices, as plain values.

    Raises ConfigError where the groups do not divide the devices.
    """
    if target.endswith(("-fp8", "-nvfp4")) and training.method != "lora":
        target = target.rpartition("-")[0]
    shape = target_shape(target)
    for name in ("cp", "ep"):
        if num % getattr(training, name):
            raise ConfigError(f"{name} {getattr(training, name)} does not divide {num} devices")
    if shape.experts % training.ep:
        raise ConfigError(f"ep {training.ep} does not divide {shape.experts} experts")
    held = device_bytes(shape, num, training)
    total = sum(held.values())
    share = total / where.memory_bytes
    verdict = "fits" if share <= FITS_SHARE else "tight" if share <= TIGHT_SHARE else "no"
    need = _least(shape, where, training)
    found: dict[str, Any] = {
        "model": shape.name,
        "method": training.method,
        "device": where.key,
        "num": num,
        "verdict": verdict,
        "per_gpu_bytes": held,
        "usable_bytes_per_gpu": where.memory_bytes,
        "share": share,
        "least_devices": need,
        "tokens_per_s": _speed(shape, where, num, training),
        "training": dataclasses.asdict(training),
    }
    if training.method in ("rl", "mopd"):
        found["pools"] = _pools(target, where, num, training, load, found["tokens_per_s"])
    return found


def device_bytes(shape: Shape, num: int, training: Training) -> dict[str, float]:
    """Return what one of `num` devices holds, by kind."""
    experts = sum(w.params for w in shape.weights() if w.role == "routed experts")
    dense = shape.params() - experts
    if training.method == "lora":
        added = _lora_params(shape, training.rank)
        frozen = shape.num_bytes() / num
        gradient, master, moments = OPTIMIZERS[training.optimizer]
        held = {"weights": frozen + 2 * added / num}
        trained = added / num
    else:
        gradient, master, moments = OPTIMIZERS[training.optimizer]
        trained = (experts + dense) / num
        held = {"weights": 2 * trained}
    held |= {
        "gradients": gradient * trained,
        "master weights": master * trained,
        "optimizer": moments * trained,
        "gathered blocks": 2 * _largest_block(shape, training.ep),
        "activations": activations(shape, training),
        "logits": _logits(shape, training),
        "reserve": _RESERVE,
    }
    return held


def _lora_params(shape: Shape, rank: int) -> int:
    """Return the weights of adapters of `rank` at mixers and attention: r (in + out) a matrix."""
    total = 0
    for layer in shape.layers:
        matrices = {"mamba": 2, "attention": 4, "pair": 4}.get(layer.kind, 0)
        total += matrices * rank * (shape.hidden + layer.inner // max(matrices, 1))
    return total


def _largest_block(shape: Shape, ep: int) -> float:
    """Return the BF16 bytes of the largest layer as a device gathers it."""

    def gathered(layer: Layer) -> float:
        return sum(
            2.0 * w.params / (ep if w.role == "routed experts" else 1) for w in layer.weights
        )

    return max(gathered(layer) for layer in shape.layers)


def activations(shape: Shape, training: Training) -> float:
    """Return the bytes of activations that a device saves for the gradient, BF16."""
    tokens = training.tokens * training.micro_batch / training.cp
    total = 0.0
    for layer in (*shape.layers, *shape.head_layers):
        if training.recompute == "full":
            total += 2 * shape.hidden * tokens
            continue
        if layer.kind == "mamba":
            states = layer.state_values * 4 / _CHUNK
            each = 2 * (2 * shape.hidden + 2 * layer.inner) + states
            if training.recompute == "selective":
                each = 2 * (shape.hidden + layer.inner)
        elif layer.kind == "attention":
            each = 2 * (2 * shape.hidden + 2 * layer.inner) + 4
        else:
            routed = shape.active * (shape.expert_dim + 2 * shape.expert_width)
            shared = max(layer.inner - shape.active * shape.expert_width, 0)
            each = 2 * (2 * shape.hidden + routed + 2 * shared)
            if training.recompute == "selective":
                each = 2 * 2 * shape.hidden
        total += each * tokens
    return total


def _logits(shape: Shape, training: Training) -> float:
    tokens = training.tokens * training.micro_batch / training.cp
    if training.chunked_loss:
        tokens = min(tokens, _LOGIT_CHUNK)
    return tokens * shape.vocab * _LOGIT_BYTES


def _least(shape: Shape, where: Device, training: Training) -> int | None:
    """Return the smallest power of two of devices on which training fits, tightly at worst."""
    for power in range(14):
        num = 2**power
        if num % training.cp or num % training.ep:
            continue
        if sum(device_bytes(shape, num, training).values()) <= TIGHT_SHARE * where.memory_bytes:
            return num
    return None


def _speed(shape: Shape, where: Device, num: int, training: Training) -> float:
    """Return trained tokens a second: three or four forward passes' operations at the fitted share.

    A forward pass, twice that backward, and the part that is computed again.
    """
    again = {"none": 0.0, "selective": 0.5, "full": 1.0}[training.recompute]
    passes = 3.0 + again - (1.0 if training.method == "lora" else 0.0)
    pairs = training.tokens / 2
    ops = 2.0 * shape.active_params(input_embedding=False)
    ops += sum(4 * layer.query_width * pairs + layer.scan_ops for layer in shape.layers)
    rate = constants().compute * where.peak("bf16")
    return num * rate / (ops * passes)


def _pools(
    target: str, where: Device, num: int, training: Training, load: Load, trained_per_s: float
) -> dict[str, Any]:
    """Size generation so that it keeps pace with training, and the teachers' devices."""
    generated = training.prompts * training.samples * training.answer
    read = training.prompts * training.samples * (load.prompt + training.answer)
    train_s = read / trained_per_s
    unit = 1
    plan = None
    while unit <= 64:
        plan = make_plan(
            target,
            gpu=where.key,
            num=unit,
            precision="bf16",
            load=dataclasses.replace(
                load, output=training.answer, concurrency=64 * unit, context=None
            ),
        )
        if plan.rates is not None:
            break
        unit *= 2
    if plan is None or plan.rates is None:
        raise ConfigError(f"no group of up to 64 {where.key} generates with {target} in BF16")
    rate = plan.rates.output_tokens_per_s
    groups = max(math.ceil(generated / train_s / rate), 1)
    teachers = training.teachers or (1 if training.method == "mopd" else 0)
    scoring = CostModel(plan.shape, where, plan.deployment, constants())
    prefill = load.prompt + training.answer
    score_s = scoring.prefill(prefill) / max(plan.deployment.dp * plan.deployment.pp, 1)
    each = max(math.ceil(training.prompts * training.samples * score_s / train_s), 1)
    return {
        "step_s": train_s,
        "generated_tokens": generated,
        "rollout_devices": groups * unit,
        "rollout_parallelism": plan.deployment.describe(),
        "rollout_tokens_per_s": groups * rate,
        "teacher_devices": teachers * each * unit,
        "teachers": teachers,
        "trainer_devices": num,
        "total_devices": num + groups * unit + teachers * each * unit,
    }
