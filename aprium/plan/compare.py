"""The family beside its competitors: tokens a second and device, and what moves their order.

The published comparison (8,192 tokens in, 65,536 out, GB200, NVFP4) is a model result here: every
model with attention-data and expert parallelism over the same number of devices, at its best batch.
How wide experts are spread, whether a sparse attention pays, in how many bits states are kept and
how many drafts are accepted change the ratios more than anything fitted: all are shown, none is
chosen.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

from aprium.base.errors import ConfigError
from aprium.plan.cost import CostModel, constants, serve
from aprium.plan.hardware import Device
from aprium.plan.memory import Deployment, check_parallelism, memory
from aprium.plan.plan import Load
from aprium.plan.shapes import Shape, target_shape

MODELS = ("qwen-3.5", "kimi-k2", "glm-5", "deepseek-v4")
WIDTHS = (4, 8, 16, 32)
REFERENCE = "glm-5"
# Published tokens a second and device over GLM-5.1's, without speculation; engines not stated.
PUBLISHED = {"ultra": 5.9, "qwen-3.5": 3.7, "kimi-k2": 1.2, "glm-5": 1.0}
_SHARE = 0.9  # of the memory


def variants(drafts: int) -> dict[str, dict[str, Any]]:
    """Return the assumptions to compare under, by name."""
    return {
        "16-bit states": {},
        "float32 states": {"state_dtype": "float32"},
        "dense attention": {"attention": "dense"},
        f"{drafts} drafts, 70 % accepted": {"drafts": drafts, "acceptance": 0.7},
        f"{drafts} drafts, 85 % accepted": {"drafts": drafts, "acceptance": 0.85},
        f"{drafts} drafts, 85 %, replayed": {
            "drafts": drafts,
            "acceptance": 0.85,
            "snapshots": False,
        },
    }


def compare(
    target: str,
    where: Device,
    load: Load,
    *,
    widths: Sequence[int] = WIDTHS,
    drafts: int = 3,
    overrides: dict[str, dict[str, Any]] | None = None,
) -> list[dict[str, Any]]:
    """Return one row for every model, width and assumption.

    `tokens_per_s_per_device` is None where the model does not fit; `ratio` is over GLM-5.1's.
    """
    shapes = {target: target_shape(target, "nvfp4")}
    shapes |= {name: target_shape(name, "nvfp4") for name in MODELS if name != target}
    rows = []
    for variant, settings in variants(drafts).items():
        for width in widths:
            found = {
                name: best_rate(shape, where, width, load, settings, overrides or {})
                for name, shape in shapes.items()
            }
            base = found[REFERENCE][0]
            for name, (rate, batch) in found.items():
                rows.append(
                    {
                        "model": name,
                        "devices": width,
                        "assumption": variant,
                        "tokens_per_s_per_device": rate,
                        "batch_per_device": batch,
                        "ratio": rate / base if rate and base else None,
                        "published_ratio": PUBLISHED.get(name),
                    }
                )
    return rows


def best_rate(
    shape: Shape,
    where: Device,
    width: int,
    load: Load,
    settings: dict[str, Any],
    overrides: dict[str, dict[str, Any]],
) -> tuple[float | None, float]:
    """Return the best tokens a second and device over `width` devices, and the batch a device.

    Attention is replicated on every device, experts are spread over all. None where it does not
    fit.
    """
    deployment = Deployment(
        tp=1, dp=width, ep=width > 1, kv_dtype="fp8", state_dtype="float16", utilization=_SHARE
    )
    deployment = dataclasses.replace(deployment, **settings)
    deployment = dataclasses.replace(deployment, with_mtp=bool(deployment.drafts))
    try:
        check_parallelism(shape, deployment)
    except ConfigError:
        return None, 0.0
    # Sequences are of all ages: on average half of the answer is there.
    most = memory(shape, where, deployment).max_concurrency(load.prompt + load.output // 2)
    if not most:
        return None, 0.0
    model = CostModel(shape, where, deployment, constants(overrides))
    best, batch, users = 0.0, 0.0, most
    while users >= width:
        rates = serve(model, concurrency=users, prompt=load.prompt, output=load.output)
        if rates.output_tokens_per_s > best:
            best, batch = rates.output_tokens_per_s, users / width
        users //= 2
    return best / width, batch


def as_text(rows: Sequence[dict[str, Any]]) -> str:
    """Return the comparison for people: one block an assumption, models by widths."""
    widths = sorted({row["devices"] for row in rows})
    models = list(dict.fromkeys(row["model"] for row in rows))
    lines = []
    for variant in dict.fromkeys(row["assumption"] for row in rows):
        head = "".join(f"{width:>17} GPUs" for width in widths)
        lines.append(f"{variant:<26}{head}{'published':>12}")
        for name in models:
            cells = []
            for width in widths:
                row = next(
                    r
                    for r in rows
                    if (r["model"], r["devices"], r["assumption"]) == (name, width, variant)
                )
                rate, ratio = row["tokens_per_s_per_device"], row["ratio"]
                text = "does not fit" if rate is None else f"{rate:,.0f}"
                cells.append(f"{text} ({ratio:.2f})" if ratio else text)
            published = PUBLISHED.get(name)
            shown = f"{published:.1f}" if published else "-"
            lines.append(f"  {name:<24}{''.join(f'{c:>22}' for c in cells)}{shown:>12}")
        lines.append("")
    lines.append(
        "tokens a second and GPU at the best batch (over GLM-5.1's). Published ratios are a\n"
        "vendor's for 8,192 tokens in and 65,536 out, without speculation, engines not stated."
    )
    return "\n".join(lines)
