"""Search deployments of a model: every device, count, parallelism and precision that holds it.

Keeps those that no other beats in all of cost a token, speed a user and rate a device. Where no
concurrency is asked for, each deployment is tried at several.
"""

import dataclasses
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from aprium.base.errors import ConfigError
from aprium.plan.data import load_overrides
from aprium.plan.hardware import Device, devices
from aprium.plan.memory import check_parallelism, memory
from aprium.plan.plan import Load, Plan, evaluate, splits
from aprium.plan.shapes import Shape, precisions_of, target_shape

COUNTS = (1, 2, 4, 8, 16)
CONCURRENCY = (1, 8, 32, 128, 512)


def search(
    target: str,
    *,
    load: Load,
    gpus: Sequence[str] = (),
    counts: Sequence[int] = COUNTS,
    precision: str | None = None,
    concurrency: Sequence[int] | None = None,
    settings: dict[str, Any] | None = None,
    max_tpot_s: float | None = None,
    max_ttft_s: float | None = None,
    data: Path | None = None,
) -> list[Plan]:
    """Return every feasible deployment of `target` under `load` that meets the limits.

    `concurrency` replaces the load's by several. Devices without a known price are left out
    where `gpus` names none. Raises ConfigError where nothing is feasible.
    """
    overrides = load_overrides(data)
    known = devices(overrides)
    chosen = [known[name] for name in gpus] if gpus else _priced(known.values(), overrides)
    tried = [precision] if precision else list(precisions_of(target)) or [None]
    found: list[Plan] = []
    for stored in tried:
        shape = target_shape(target, stored)
        for where in chosen:
            for num in counts:
                found += _deployments(shape, where, num, load, concurrency, settings, overrides)
    kept = [plan for plan in found if _meets(plan, max_tpot_s, max_ttft_s)]
    if not kept:
        limits = " within the limits" if found else ""
        raise ConfigError(
            f"no deployment of up to {max(counts)} devices holds {target} at "
            f"{load.length:,} tokens{limits}: allow more devices (--max-num), a lower --precision, "
            "fewer users or looser limits"
        )
    return kept


def _priced(known: Iterable[Device], overrides: dict[str, dict[str, Any]]) -> list[Device]:
    from aprium.plan.prices import hourly

    return [where for where in known if where.kind == "gpu" and hourly(where, overrides)]


def _meets(plan: Plan, max_tpot_s: float | None, max_ttft_s: float | None) -> bool:
    rates = plan.rates
    if rates is None:
        return False
    slow = max_tpot_s is not None and rates.tpot_s > max_tpot_s
    late = max_ttft_s is not None and rates.ttft_s > max_ttft_s
    return not slow and not late


def _deployments(
    shape: Shape,
    where: Device,
    num: int,
    load: Load,
    concurrency: Sequence[int] | None,
    settings: dict[str, Any] | None,
    overrides: dict[str, dict[str, Any]],
) -> list[Plan]:
    """Evaluate every cut of `num` devices.

    Where users are tried in several numbers, copies of fewer devices only scale and are left out.
    """
    if shape.num_bytes(mtp=False) > num * where.memory_bytes:
        return []
    found = []
    for option, replicas in splits(num, shape, where):
        if replicas > 1 and concurrency is not None:
            continue
        deployment = dataclasses.replace(option, **(settings or {}))
        try:
            check_parallelism(shape, deployment)
        except ConfigError:
            continue
        room = memory(shape, where, deployment)
        if room.fixed > where.memory_bytes:
            continue
        most = max(room.max_concurrency(load.length), 1) * replicas
        for users in concurrency or (load.concurrency,):
            if concurrency is not None and users > most:
                continue
            asked = dataclasses.replace(load, concurrency=users)
            plan = evaluate(shape, where, deployment, replicas, asked, overrides)
            if plan.rates is not None:
                found.append(plan)
    return found


def dollars(plan: Plan) -> float:
    """Return typical dollars a million output tokens; infinite where no price is known."""
    return plan.cost.per_million_output.typical if plan.cost else math.inf


def pareto(plans: Sequence[Plan]) -> list[Plan]:
    """Return the plans that no other equals or beats in cost, user speed and rate a device.

    Cheapest first.
    """
    scored = [(_score(plan), plan) for plan in plans]
    scored.sort(key=lambda item: item[0])
    kept: list[tuple[tuple[float, ...], Plan]] = []
    for score, plan in scored:
        if not any(all(a <= b for a, b in zip(other, score, strict=True)) for other, _ in kept):
            kept.append((score, plan))
    return [plan for _, plan in kept]


def _score(plan: Plan) -> tuple[float, ...]:
    """Return what is to be small."""
    assert plan.rates is not None
    rate = plan.rates.output_tokens_per_s / plan.num
    return dollars(plan), plan.rates.tpot_s, -rate
