"""A plan as a fleet of simulated replicas, and the rate at which it can no longer keep up.

Each attention rank and each pipeline's share of a replica has a scheduler of its own, as engines do
it; the ranks of one replica are taken to be equally busy.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import Any

from aprium.base.errors import ConfigError
from aprium.plan.cost import CostModel, accepted_tokens, constants
from aprium.plan.memory import TIGHT_SHARE, memory
from aprium.plan.plan import Plan
from aprium.plan.simulate import Replica, ReplicaConfig, Simulation, Summary
from aprium.plan.traces import Trace, parse

PAGE_SIZE = 64  # tokens
_SNAPSHOTS = 64  # states that a rank keeps for prefix reuse, where the memory is there
_SATURATED = 0.97  # rate served over rate offered, below which a queue grows without end


def build(plan: Plan, overrides: dict[str, dict[str, Any]], *, prefixes: bool) -> list[Replica]:
    """Return the simulated replicas of `plan`; ConfigError where it does not hold a sequence."""
    if plan.verdict.verdict == "no":
        raise ConfigError(f"nothing to simulate: {plan.verdict.why}")
    deployment = plan.deployment
    lanes = deployment.dp * deployment.pp
    held = memory(plan.shape, plan.device, deployment)
    share = TIGHT_SHARE if plan.verdict.verdict == "tight" else deployment.utilization
    room = share * held.usable - held.fixed
    # A lane has its own sequences; lanes of one pipeline share the memory of their devices.
    room /= deployment.pp
    most = max(plan.max_concurrency // plan.replicas // lanes, 1)
    seqs = max(min(math.ceil(plan.load.concurrency / plan.replicas / lanes), most), 1)
    state = memory(
        plan.shape, plan.device, dataclasses.replace(deployment, drafts=0)
    ).state_per_sequence
    spare = room - seqs * (held.state_per_sequence + held.kv_fixed)
    kept = min(_SNAPSHOTS, int(spare / 2 // max(state, 1))) if prefixes else 0
    spare -= kept * state
    pages = int(spare // max(held.kv_per_token * PAGE_SIZE, 1))
    longest = -(-plan.load.length // PAGE_SIZE)
    if pages < longest:
        raise ConfigError(
            f"memory for {max(pages, 0)} pages of {PAGE_SIZE} tokens is left, {longest} are needed "
            f"for {plan.load.length:,}: lower --concurrency or --context"
        )
    pages = min(pages, 4 * seqs * longest)
    config = ReplicaConfig(
        num_pages=pages,
        page_size=PAGE_SIZE,
        max_num_seqs=seqs,
        max_num_batched_tokens=deployment.max_batched_tokens,
        num_snapshots=max(kept, 0),
        accepted=_chances(deployment.drafts, deployment.acceptance),
    )
    cost = CostModel(plan.shape, plan.device, deployment, constants(overrides))
    return [Replica(cost, config) for _ in range(plan.replicas * lanes)]


def _chances(drafts: int, acceptance: float | None) -> tuple[float, ...]:
    """Return the chance that at least 1, 2, ... of `drafts` are accepted."""
    means = [accepted_tokens(i, acceptance) for i in range(drafts + 1)]
    return tuple(after - before for before, after in itertools.pairwise(means))


def simulate_plan(plan: Plan, text: str, overrides: dict[str, dict[str, Any]]) -> Summary:
    """Serve the trace that `text` describes (see `traces.parse`) with the fleet of `plan`."""
    trace = _trace(plan, text)
    return Simulation(build(plan, overrides, prefixes=trace.shares_prefixes), trace).run()


def _trace(plan: Plan, text: str) -> Trace:
    load = plan.load
    return parse(text, prompt=load.prompt, output=load.output, most=load.length)


def saturation(
    make: Callable[[float], Simulation], *, first: float, limit_s: float = math.inf
) -> tuple[float, Summary]:
    """Return the highest rate of requests a second that is kept up with, within 3 %, and how.

    `make` gives a simulation of an open loop at a rate. Kept up with: the middle half of the
    requests takes as long to finish as to come, but for one answer's time, and nine of ten first
    tokens come within `limit_s`.
    """

    def serve(rate: float) -> tuple[float, float, Summary]:
        times: list[tuple[float, float]] = []
        found = make(rate).run(lambda r: times.append((r.job.arrival_s, r.finished_s)))
        # Neither filling nor draining counts.
        came, went = (_middle(sorted(column)) for column in zip(*times, strict=True))
        return came, went, found

    idle = serve(first / 8)[2].latency_s[1]

    def keeps_up(rate: float) -> tuple[bool, Summary]:
        came, went, found = serve(rate)
        return went <= came / _SATURATED + idle and found.ttft_s[1] <= limit_s, found

    low, high, best = 0.0, first, None
    while True:
        fine, found = keeps_up(high)
        if not fine:
            break
        low, best, high = high, found, 2 * high
        if low > 1e6 * first:
            raise ConfigError("no rate saturates it: give the trace more requests")
    while best is None or high / low > 1.03:
        middle = (low + high) / 2
        fine, found = keeps_up(middle)
        if fine:
            low, best = middle, found
        else:
            high = middle
        if high < first / 1024:
            raise ConfigError("no rate is kept up with: the limit is below an idle service's")
    return low, best


def _middle(times: list[float]) -> float:
    """Return how long the middle half of `times`, in order, takes."""
    return times[3 * len(times) // 4] - times[len(times) // 4]


def saturate_plan(
    plan: Plan, overrides: dict[str, dict[str, Any]], *, requests: int, limit_s: float
) -> tuple[float, Summary]:
    """Return the rate of requests a second at which the fleet of `plan` saturates."""
    load = plan.load

    def make(rate: float) -> Simulation:
        trace = parse(
            f"open:rate={rate!r},requests={requests},spread=0.3",
            prompt=load.prompt,
            output=load.output,
            most=load.length,
        )
        return Simulation(build(plan, overrides, prefixes=False), trace)

    assert plan.rates is not None
    return saturation(make, first=plan.rates.requests_per_s / 2, limit_s=limit_s)


def as_text(summary: Summary) -> str:
    """Return a summary for people."""

    def row(name: str, values: tuple[float, float, float], scale: float, unit: str) -> str:
        numbers = "".join(f"{scale * value:>12,.1f}" for value in values)
        return f"  {name:<16}{numbers}  {unit}"

    return "\n".join(
        [
            f"  {summary.requests:,} requests in {summary.duration_s:,.1f} s: "
            f"{summary.output_tokens_per_s:,.0f} tok/s out, "
            f"{summary.prompt_tokens_per_s:,.0f} tok/s in, {summary.requests_per_s:,.2f} a second",
            f"  {'':<16}{'50 %':>12}{'90 %':>12}{'99 %':>12}",
            row("first token", summary.ttft_s, 1e3, "ms"),
            row("between tokens", summary.tpot_s, 1e3, "ms"),
            row("in the queue", summary.queue_s, 1e3, "ms"),
            row("whole answer", summary.latency_s, 1.0, "s"),
            f"  busy {summary.busy:.0%}, {summary.reused_share:.0%} of prompts reused, "
            f"{summary.preemptions:,} preemptions, {summary.steps:,} engine steps",
        ]
    )
