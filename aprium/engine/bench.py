"""How fast a model generates here: prefill and decode rates, bytes moved, and shares of the limits.

Drives the engine itself with random tokens. A decode step's bytes are the weights that its products
read, plus recurrent state (read and written) and keys and values; the limits are read bandwidth and
peak of the machine, measured between the runs. Rates are of this machine at this moment: neighbours
and clocks move them, so compare in one run.
"""

import random
import statistics
import time
from dataclasses import asdict, dataclass
from typing import Any

from aprium.base.errors import ConfigError
from aprium.base.records import Request, SamplingParams
from aprium.engine.engine import Engine

_LEAST_BANDWIDTH_BYTES = 1 << 28  # smaller weights would be read from a cache


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchResult:
    """One batch size. Rates in tokens a second over all sequences, `step_ms` the median step.

    `bytes_per_step` is what a decode step moves; `bandwidth_share` of the read bandwidth measured
    beside it, `overhead_share` the part of decoding outside kernels, `skipped_share` the part of
    down projections' columns left out because their inputs are zero; all 0 to 1. None where there
    are no kernels to measure with, weights fit a cache, or none lie by columns.
    """

    batch: int
    prompt: int
    generated: int
    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    step_ms: float
    bytes_per_step: int | None
    bandwidth_bytes_per_s: float | None
    bandwidth_share: float | None
    prefill_peak_share: float | None
    overhead_share: float | None
    skipped_share: float | None


def bench(engine: Engine, *, prompt: int, generate: int, batch: int) -> BenchResult:
    """Run `batch` sequences of `prompt` random tokens and `generate` greedy ones.

    Raises ConfigError for a count below what can be timed.
    """
    for name, value, least in (
        ("prompt", prompt, 1),
        ("generate", generate, 2),
        ("batch", batch, 1),
    ):
        if value < least:
            raise ConfigError(f"{name} is {value}: it must be at least {least}")
    numbers = random.Random(0)
    params = SamplingParams(temperature=0, max_tokens=generate, ignore_eos=True)
    for i in range(batch):
        tokens = tuple(numbers.randrange(engine.vocab_size) for _ in range(prompt))
        engine.add(Request(id=f"bench-{batch}-{i}", tokens=tokens, params=params))
    native = engine.runner.model.native
    begun = time.perf_counter()
    started: set[str] = set()
    while len(started) < batch:
        started |= {delta.id for delta in engine.step()}
    prefill_s = time.perf_counter() - begun
    bandwidth = _bandwidth(engine)
    if native:
        native.machine.take_counters()
    steps: list[float] = []
    tokens_made = 0
    while engine.has_work:
        begun = time.perf_counter()
        tokens_made += sum(len(delta.tokens) for delta in engine.step())
        steps.append(time.perf_counter() - begun)
    counters = native.machine.take_counters() if native else (0.0, 0, 0, 0)
    kernel_s, weight_bytes, columns, skipped = counters
    decode_s, step_s = sum(steps), statistics.median(steps)
    moved = None
    if native:
        cached = (prompt + generate / 2) * engine.plan.page_bytes / engine.plan.page_size
        moved = int(weight_bytes / len(steps) + batch * (2 * engine.plan.slot_bytes + cached))
    prefill = batch * prompt / prefill_s
    return BenchResult(
        batch=batch,
        prompt=prompt,
        generated=generate,
        prefill_tokens_per_s=prefill,
        decode_tokens_per_s=tokens_made / decode_s,
        step_ms=1e3 * step_s,
        bytes_per_step=moved,
        bandwidth_bytes_per_s=bandwidth,
        bandwidth_share=moved / step_s / bandwidth if moved and bandwidth else None,
        prefill_peak_share=_peak_share(engine, prefill),
        overhead_share=1 - kernel_s / decode_s if native else None,
        skipped_share=skipped / columns if columns else None,
    )


def _bandwidth(engine: Engine) -> float | None:
    """Read the largest weight, several times; None where it fits a cache."""
    model = engine.runner.model
    largest = max(model.parameters(), key=lambda p: p.numel() * p.element_size())
    size = largest.numel() * largest.element_size()
    if model.native is None or size < _LEAST_BANDWIDTH_BYTES:
        return None
    return model.native.machine.bandwidth(largest.data_ptr(), min(size, 1 << 30), 3)


def _peak_share(engine: Engine, tokens_per_s: float) -> float | None:
    """Return the operations of prefill, head left out, over the peak of their dtype."""
    native = engine.runner.model.native
    if native is None:
        return None
    peak = native.machine.peak(native.activation_dtype)
    return tokens_per_s * 2 * engine.runner.model.config.active_matrix_params / peak


def render(results: list[BenchResult]) -> str:
    """Return a table for people."""

    def share(value: float | None) -> str:
        return "-" if value is None else f"{100 * value:.1f} %"

    lines = [
        f"{'batch':>5}{'prefill tok/s':>15}{'decode tok/s':>14}{'step ms':>10}{'GB/step':>9}"
        f"{'bandwidth':>11}{'peak':>8}{'overhead':>10}{'skipped':>9}"
    ]
    for r in results:
        moved = "-" if r.bytes_per_step is None else f"{r.bytes_per_step / 1e9:.3f}"
        lines.append(
            f"{r.batch:>5}{r.prefill_tokens_per_s:>15.1f}{r.decode_tokens_per_s:>14.2f}"
            f"{r.step_ms:>10.2f}{moved:>9}{share(r.bandwidth_share):>11}"
            f"{share(r.prefill_peak_share):>8}{share(r.overhead_share):>10}"
            f"{share(r.skipped_share):>9}"
        )
    return "\n".join(lines)


def as_json(results: list[BenchResult]) -> list[dict[str, Any]]:
    """Return plain values."""
    return [asdict(result) for result in results]
