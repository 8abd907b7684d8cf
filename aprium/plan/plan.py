"""One plan: a model on given devices, its verdict, memory, rates with ranges, cost and commands.

What is not asked for is chosen and said: precision (the widest that fits) and parallelism (the one
that serves the asked load fastest): `aprium plan ultra --gpu h100-sxm --num 8` is a question.
"""

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aprium.base.errors import ConfigError
from aprium.plan.cost import CostModel, Rates, constants, range_factor, serve
from aprium.plan.data import load_data, load_overrides
from aprium.plan.hardware import Device, device
from aprium.plan.launch import commands
from aprium.plan.memory import (
    DTYPE_BYTES,
    TIGHT_SHARE,
    Deployment,
    Memory,
    Verdict,
    judge,
    kv_bytes,
    remedies,
)
from aprium.plan.prices import Cost, cost
from aprium.plan.shapes import Shape, precisions_of, target_shape

_ORDER = ("no", "tight", "fits")
Overrides = dict[str, dict[str, Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What is asked of a deployment: users at once, tokens of a prompt and of an answer.

    `context` is the longest sequence to hold, by default prompt and answer; `reuse` of each prompt
    is known from earlier requests.
    """

    concurrency: int = 16
    prompt: int = 8192
    output: int = 1024
    context: int | None = None
    reuse: float = 0.0

    def __post_init__(self) -> None:
        """Check ranges; raise ConfigError naming the field."""
        for name in ("concurrency", "prompt", "output"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}: it must be at least 1")
        if not 0 <= self.reuse < 1:
            raise ConfigError(f"reuse is {self.reuse}: it must be at least 0 and under 1")
        if self.context is not None and self.context < self.prompt + self.output:
            raise ConfigError(
                f"context is {self.context}: it must hold a prompt of {self.prompt} and an answer "
                f"of {self.output} tokens; lower --input or --output, or raise it"
            )

    @property
    def length(self) -> int:
        """Tokens that every sequence must have room for."""
        return self.context or self.prompt + self.output


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A deployment of `num` devices in `replicas`, judged and timed under `load`."""

    shape: Shape
    device: Device
    num: int
    replicas: int
    deployment: Deployment
    load: Load
    verdict: Verdict
    memory: Memory
    rates: Rates | None
    prefill_tokens_per_s: float
    cost: Cost | None
    factor: float

    @property
    def max_concurrency(self) -> int:
        """Sequences of the asked length that all replicas hold."""
        share = TIGHT_SHARE if self.verdict.verdict == "tight" else None
        return self.memory.max_concurrency(self.load.length, share) * self.replicas

    @property
    def max_context(self) -> int:
        """Longest sequences at the asked concurrency."""
        share = TIGHT_SHARE if self.verdict.verdict == "tight" else None
        each = math.ceil(self.load.concurrency / self.replicas)
        return self.memory.max_context(each, share)


def splits(num: int, shape: Shape, where: Device) -> Iterator[tuple[Deployment, int]]:
    """Yield parallelism of `num` devices worth considering, and the replicas it makes."""
    most_tp = min(num, where.domain if where.domain > 1 else num, 16)
    for tp in (2**i for i in range(5) if 2**i <= most_tp):
        for pp in (1, 2, 4):
            if num % (tp * pp):
                continue
            for dp in {1, num // (tp * pp)}:
                if num % (tp * pp * dp) or (dp > 1 and (pp > 1 or num > where.domain)):
                    continue
                for ep in (False, True) if tp * dp > 1 and shape.experts > 1 else (False,):
                    if dp > 1 and not ep:
                        continue
                    yield Deployment(tp=tp, pp=pp, dp=dp, ep=ep), num // (tp * pp * dp)


def evaluate(
    shape: Shape,
    where: Device,
    deployment: Deployment,
    replicas: int,
    load: Load,
    overrides: Overrides,
    *,
    price: float | None = None,
    licence: bool = False,
) -> Plan:
    """Judge and time one deployment; ConfigError where the model cannot be cut so."""
    each = math.ceil(load.concurrency / replicas)
    verdict, held, used = judge(shape, where, deployment, load.length, each)
    rates, prefill, money = None, 0.0, None
    if verdict.verdict != "no":
        model = CostModel(shape, where, used, constants(overrides))
        share = TIGHT_SHARE if verdict.verdict == "tight" else None
        rates = serve(
            model,
            concurrency=load.concurrency / replicas,
            prompt=load.prompt,
            output=load.output,
            reuse=load.reuse,
            most_running=held.max_concurrency(load.length, share),
        )
        if load.concurrency < replicas:  # so many replicas have nothing to do
            busy = serve(model, concurrency=1, prompt=load.prompt, output=load.output)
            rates = _scaled(busy, load.concurrency)
        else:
            rates = _scaled(rates, replicas)
        lanes = used.dp * used.pp * replicas
        prefill = load.prompt / model.prefill(load.prompt) * lanes
        money = cost(
            where,
            used.devices * replicas,
            shape.base,
            output_tokens_per_s=rates.output_tokens_per_s,
            prompt_per_output=load.prompt / load.output,
            reuse=load.reuse,
            overrides=overrides,
            price=price,
            licence=licence,
        )
    return Plan(
        shape=shape,
        device=where,
        num=used.devices * replicas,
        replicas=replicas,
        deployment=used,
        load=load,
        verdict=verdict,
        memory=held,
        rates=rates,
        prefill_tokens_per_s=prefill,
        cost=money,
        factor=range_factor(overrides),
    )


def _scaled(rates: Rates, replicas: int) -> Rates:
    names = ("output_tokens_per_s", "decode_tokens_per_s", "requests_per_s", "running")
    return dataclasses.replace(rates, **{n: getattr(rates, n) * replicas for n in names})


def make_plan(
    target: str,
    *,
    gpu: str,
    num: int = 1,
    precision: str | None = None,
    load: Load,
    settings: dict[str, Any] | None = None,
    data: Path | None = None,
    price: float | None = None,
    licence: bool = False,
) -> Plan:
    """Plan `target` on `num` devices `gpu`; what `settings` (fields of Deployment) leave is chosen.

    Raises ConfigError where a name is unknown or nothing asked for can be cut so.
    """
    if num < 1:
        raise ConfigError(f"num is {num}: it must be at least 1")
    overrides = load_overrides(data)
    where, settings = device(gpu, overrides), dict(settings or {})
    tried = [precision] if precision else list(precisions_of(target)) or [None]
    best: Plan | None = None
    for stored in tried:
        shape = target_shape(target, stored)
        found = _best(shape, where, num, load, settings, overrides, price, licence)
        if best is None or _rank(found) > _rank(best) or _saves(found, best):
            best = found
        if best.verdict.verdict == "fits":
            break
    assert best is not None
    if best.verdict.verdict != "fits":
        each = math.ceil(load.concurrency / best.replicas)
        changes = _narrower(best, where, num, load, settings, overrides)
        changes += remedies(best.shape, where, best.deployment, load.length, each)
        changed = dataclasses.replace(best.verdict, remedies=changes)
        best = dataclasses.replace(best, verdict=changed)
    return best


def _narrower(
    plan: Plan,
    where: Device,
    num: int,
    load: Load,
    settings: dict[str, Any],
    overrides: Overrides,
) -> tuple[str, ...]:
    """Return the published precisions below that of `plan` that lead to a better verdict."""
    base = plan.shape.base
    known = precisions_of(base)
    if plan.shape.precision not in known:
        return ()
    found = []
    for stored in known[known.index(plan.shape.precision) + 1 :]:
        try:
            other = _best(
                target_shape(base, stored), where, num, load, settings, overrides, None, False
            )
        except ConfigError:
            continue
        if _rank(other) > _rank(plan):
            found.append(f"{stored}: {other.verdict.verdict}")
    return tuple(found)


def _rank(plan: Plan) -> int:
    return _ORDER.index(plan.verdict.verdict)


def _saves(new: Plan, old: Plan) -> bool:
    """Of two that do not fit, the smaller comes nearer."""
    return _rank(new) == _rank(old) == 0 and new.memory.weight_bytes < old.memory.weight_bytes


def _best(
    shape: Shape,
    where: Device,
    num: int,
    load: Load,
    settings: dict[str, Any],
    overrides: Overrides,
    price: float | None,
    licence: bool,
) -> Plan:
    cut = {k: settings[k] for k in ("tp", "pp", "dp", "ep") if settings.get(k) is not None}
    rest = {k: v for k, v in settings.items() if k not in ("tp", "pp", "dp", "ep")}
    if cut.keys() & {"tp", "pp", "dp"}:
        given = Deployment(**cut)
        if num % given.devices:
            raise ConfigError(
                f"{given.describe()} takes {given.devices} devices, which do not divide --num {num}"
            )
        choices = [(given, num // given.devices)]
    else:
        choices = [
            (option, replicas)
            for option, replicas in splits(num, shape, where)
            if "ep" not in cut or option.ep == cut["ep"] or option.tp * option.dp == 1
        ]
    found: Plan | None = None
    refused: ConfigError | None = None
    for option, replicas in choices:
        deployment = dataclasses.replace(option, **rest)
        try:
            plan = evaluate(
                shape, where, deployment, replicas, load, overrides, price=price, licence=licence
            )
        except ConfigError as error:
            refused = error
            continue
        if found is None or _key(plan) > _key(found):
            found = plan
    if found is None:
        assert refused is not None
        raise refused
    return found


def _key(plan: Plan) -> tuple[float, ...]:
    """Order plans: verdict, then rate; where none fits, the one that lacks least."""
    if plan.rates is None:
        return (0.0, -plan.memory.fixed)
    return (float(_rank(plan)), plan.rates.output_tokens_per_s)


def as_json(plan: Plan) -> dict[str, Any]:
    """Return a plan as plain values; bytes, seconds, dollars, tokens."""
    rates, memory, low_high = plan.rates, plan.memory, {}
    values: dict[str, float | None] = {
        "decode_tokens_per_s": rates.decode_tokens_per_s if rates else None,
        "output_tokens_per_s": rates.output_tokens_per_s if rates else None,
        "prefill_tokens_per_s": plan.prefill_tokens_per_s if rates else None,
        "ttft_s": rates.ttft_s if rates else None,
        "tpot_s": rates.tpot_s if rates else None,
    }
    for name, value in values.items():
        if value is not None:
            low_high[name] = [value / plan.factor, value * plan.factor]
    money = plan.cost
    if money is not None:
        low_high["cost_per_million_output_tokens"] = [
            money.per_million_output.low / plan.factor,
            money.per_million_output.high * plan.factor,
        ]
    by_kind = dict(memory.weights)
    each = math.ceil(plan.load.concurrency / plan.replicas / memory.ranks)
    held = {
        "keys and values": each * (memory.kv_fixed + memory.kv_per_token * plan.load.length),
        "recurrent state": each * memory.state_per_sequence,
        "state checkpoints": memory.checkpoints,
    }
    return {
        "model": plan.shape.name,
        "precision": plan.shape.precision,
        "weights_bytes": plan.shape.num_bytes(),
        "weights_exact": plan.shape.exact,
        "device": plan.device.key,
        "num": plan.num,
        "parallelism": plan.deployment.describe(),
        "replicas": plan.replicas,
        "verdict": plan.verdict.verdict,
        "why": plan.verdict.why,
        "remedies": list(plan.verdict.remedies),
        "weights_share": plan.verdict.share,
        "per_gpu_bytes": {f"weights: {k}": v for k, v in by_kind.items()} | held | memory.other,
        "usable_bytes_per_gpu": memory.usable,
        "offloaded_bytes_per_gpu": memory.offloaded,
        "kv_bytes_per_token_per_gpu": memory.kv_per_token,
        "state_bytes_per_sequence_per_gpu": memory.state_per_sequence,
        "max_concurrency": plan.max_concurrency,
        "max_context": plan.max_context,
        "load": dataclasses.asdict(plan.load),
        **values,
        "tokens_per_s_per_user": 1 / rates.tpot_s if rates else None,
        "running": rates.running if rates else None,
        "cost_per_million_output_tokens": money.per_million_output.typical if money else None,
        "cost": dataclasses.asdict(money) if money else None,
        "ranges": low_high,
        "commands": _commands(plan),
        "assumptions": assumptions(plan),
    }


def _commands(plan: Plan) -> dict[str, str]:
    """Return the commands of a plan; none for one that does not fit."""
    if plan.rates is None:
        return {}
    users = math.ceil(plan.load.concurrency / plan.replicas)
    return commands(plan.shape, plan.device, plan.deployment, plan.load.length, users)


def assumptions(plan: Plan) -> list[str]:
    """Say what the plan takes for granted."""
    shape, deployment, load = plan.shape, plan.deployment, plan.load
    found = [
        f"{load.concurrency} users at once, prompts of {load.prompt:,} tokens"
        + (f" of which {load.reuse:.0%} are known" if load.reuse else "")
        + f", answers of {load.output:,}",
        "weights: "
        + ("read from the file's headers" if shape.exact else "counted from the configuration"),
        f"keys and values at {kv_bytes(shape, deployment):.0f} byte(s) a value, recurrent states "
        f"at {DTYPE_BYTES[deployment.state_dtype]:.0f}",
        f"an engine may take {deployment.utilization:.0%} of the memory",
        "experts are chosen evenly; one set of constants for all engines, fitted to published "
        "figures (docs/planning.md)",
        f"times and rates within a factor of {plan.factor:.2f} in nine of ten published figures",
    ]
    if not deployment.with_mtp and shape.head_layers:
        found.append("the prediction head is left out")
    if deployment.lean:
        found.append("steps of at most 2,048 tokens, few captured graphs")
    if deployment.drafts:
        found.append(
            f"{deployment.drafts} drafts a step of which {accepted(deployment):.2f} tokens come"
            + ("" if deployment.acceptance else ", as Lightning's prediction head gives")
        )
    if plan.memory.offloaded:
        found.append(f"{plan.memory.offloaded / 1e9:.0f} GB of experts a device in host memory")
    if plan.device.unverified:
        found.append(f"no source for the device's {', '.join(plan.device.unverified)}")
    if plan.device.unified:
        found.append("memory is shared with the operating system")
    if plan.cost is not None:
        found.append(f"price: {plan.cost.source}")
        found.append("cost at full load all the time")
    dates = {name: load_data(name)["date"].isoformat() for name in ("hardware", "prices")}
    found.append(f"devices as of {dates['hardware']}, prices as of {dates['prices']}")
    return [*found, *shape.notes]


def accepted(deployment: Deployment) -> float:
    """Return the tokens that a verification step gives."""
    from aprium.plan.cost import accepted_tokens

    return accepted_tokens(deployment.drafts, deployment.acceptance)
