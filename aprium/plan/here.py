"""Measure this machine, or its GPU, and predict how a checkpoint runs on it.

The only file of the planner that loads torch. Bandwidth is read over memory larger than caches,
peaks are those of the kernels' own dot products (without kernels, of a matrix product); a GPU's are
of a copy and of a product. `aprium bench` puts the prediction beside what it measured.
"""

import dataclasses
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch

from aprium.base.memory import available_bytes
from aprium.checkpoint.hub import resolve
from aprium.model.presets import PRESETS
from aprium.model.quant_presets import QUANT_PRESETS
from aprium.ops import _native
from aprium.plan.cost import Constants, CostModel, constants
from aprium.plan.hardware import Device
from aprium.plan.memory import Deployment
from aprium.plan.shapes import Shape, directory_shape, target_shape

_PROBE_BYTES = 1 << 29  # beyond any cache
_REPEATS = 4
_SIDE = 4096  # of the matrices of a GPU's product


class Prediction(NamedTuple):
    """Tokens a second over all sequences of a batch: reading prompts, and generating."""

    batch: int
    prefill_tokens_per_s: float
    decode_tokens_per_s: float


def measure() -> Device:
    """Measure the GPU where there is one, else this machine; takes about a second."""
    return _measure_gpu() if torch.cuda.is_available() else _measure_cpu()


def _measure_cpu() -> Device:
    machine = _native.machine()
    probe = torch.ones(_PROBE_BYTES, dtype=torch.uint8)
    if machine is not None:
        bandwidth = machine.bandwidth(probe.data_ptr(), probe.numel(), _REPEATS)
        peaks = {name: machine.peak(name) for name in ("int8", "bfloat16", "float32")}
    else:
        bandwidth = _best(lambda: probe.view(torch.int64).sum(), _PROBE_BYTES)
        side = 1024
        left = torch.ones(side, side)
        float32 = _best(lambda: left @ left, 2 * side**3)
        peaks = {"int8": float32, "bfloat16": float32, "float32": float32}
    return Device(
        key="here",
        name=f"this machine, {torch.get_num_threads()} threads, {_native.isa()}",
        kind="cpu",
        memory_gb=available_bytes() / 1e9,
        bandwidth_tb_s=bandwidth / 1e12,
        bf16_tflops=peaks["bfloat16"] / 1e12,
        f32_tflops=peaks["float32"] / 1e12,
        int8_tops=peaks["int8"] / 1e12,
        source="measured now",
    )


def _measure_gpu() -> Device:
    device = torch.device("cuda", 0)
    free, _ = torch.cuda.mem_get_info(device)
    size = min(_PROBE_BYTES, free // 8)
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    left = torch.ones(_SIDE, _SIDE, dtype=torch.bfloat16, device=device)
    # A copy reads and writes.
    bandwidth = _best(lambda: target.copy_(source), 2 * size)
    bf16 = _best(lambda: left @ left, 2 * _SIDE**3)
    return Device(
        key="here",
        name=torch.cuda.get_device_name(device),
        memory_gb=free / 1e9,
        bandwidth_tb_s=bandwidth / 1e12,
        bf16_tflops=bf16 / 1e12,
        source="measured now; products in 8 and 4 bits taken at the 16-bit rate",
    )


def _best(run: Any, work: float) -> float:
    """Return the highest rate of `work` a second over several runs."""
    seconds = []
    for _ in range(_REPEATS):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        begun = time.perf_counter()
        run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begun)
    return work / min(seconds)


def shape_of(model: str) -> Shape:
    """Return the shape of what the engine would load as `model`: a directory, a hub id, a name."""
    if model != "pico" and (model in PRESETS or model in QUANT_PRESETS):
        return target_shape(model)
    return directory_shape(Path(resolve(model)))


def _constants(device: Device) -> Constants:
    """Return the constants for a measured device: its bandwidth is already what can be had.

    A GPU's measured peak is a product's own, so only the rest of a step is lost.
    """
    values = constants()
    if device.kind == "cpu":
        return values
    return dataclasses.replace(values, bandwidth=min(values.bandwidth / 0.9, 0.95), compute=0.6)


def predict(
    shape: Shape, device: Device, *, prompt: int, generate: int, batches: list[int]
) -> list[Prediction]:
    """Predict the engine's rates here: float32 keys, values and states on a CPU, short steps."""
    cpu = device.kind == "cpu"
    deployment = Deployment(
        kv_dtype="float32" if cpu else "auto",
        max_batched_tokens=512 if cpu else 8192,
        utilization=1.0,
    )
    model = CostModel(shape, device, deployment, _constants(device))
    found = []
    for batch in batches:
        seconds = model.prefill(batch * prompt) if prompt * batch <= 512 else None
        if seconds is None:
            seconds = batch * model.prefill(prompt)
        step = model.decode(batch, prompt + generate / 2)
        found.append(Prediction(batch, batch * prompt / seconds, batch / step))
    return found


def comparison(
    device: Device, predicted: list[Prediction], measured: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """Return prediction beside measurement, one row a batch size and rate, with the error."""
    rows = []
    for guess, result in zip(predicted, measured, strict=True):
        for name in ("prefill_tokens_per_s", "decode_tokens_per_s"):
            value, real = getattr(guess, name), result[name]
            rows.append(
                {
                    "batch": guess.batch,
                    "rate": name,
                    "predicted": value,
                    "measured": real,
                    "error": value / real - 1,
                    "bandwidth_bytes_per_s": device.bandwidth,
                }
            )
    return rows


def comparison_text(rows: list[dict[str, Any]]) -> str:
    """Return the comparison for people."""
    lines = ["", f"{'batch':>5} {'':<8}{'predicted':>12}{'measured':>12}{'error':>8}"]
    for row in rows:
        name = row["rate"].partition("_")[0]
        lines.append(
            f"{row['batch']:>5} {name:<8}{row['predicted']:>12.1f}{row['measured']:>12.1f}"
            f"{row['error']:>+8.0%}"
        )
    return "\n".join(lines)


def as_text(shape: Shape, device: Device, predicted: list[Prediction]) -> str:
    """Return what was measured and what is predicted, for people."""
    peaks = [("BF16", device.bf16_tflops), ("int8", device.int8_tops)]
    peaks.append(("float32", device.f32_tflops))
    shown = ", ".join(f"{name} {1e3 * value:,.0f} Gop/s" for name, value in peaks if value)
    size, room = shape.num_bytes() / 1e9, device.memory_gb
    lines = [
        f"{device.name}: {room:.1f} GB free, {1e3 * device.bandwidth_tb_s:.1f} GB/s, {shown}",
        f"{shape.name}: {size:.2f} GB of weights, "
        + ("which fit" if size + 1.5 < room else "which do not fit in memory"),
        "",
        f"{'batch':>5}{'prefill tok/s':>15}{'decode tok/s':>15}  predicted",
    ]
    lines += [
        f"{p.batch:>5}{p.prefill_tokens_per_s:>15,.1f}{p.decode_tokens_per_s:>15,.1f}"
        for p in predicted
    ]
    return "\n".join(lines)
