"""How plans are shown: a table for a terminal, JSON, and one self-contained page with charts."""

import base64
import html
import io
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from aprium.plan.plan import Plan, as_json, evaluate
from aprium.plan.search import dollars, pareto

_COLUMNS = ("model", "devices", "parallelism", "users", "verdict")
_NUMBERS = ("$/M output", "tok/s a user", "tok/s a device", "tok/s", "TTFT s")
_SWEEP = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


def plan_json(plan: Plan) -> str:
    """Return the JSON of a plan."""
    return json.dumps(as_json(plan), indent=2)


def plan_text(plan: Plan) -> str:
    """Return a plan for people."""
    facts = as_json(plan)
    factor = plan.factor
    lines = [
        f"{facts['model']} on {plan.num} x {plan.device.name}: {facts['parallelism']}"
        + (f", {plan.replicas} replicas" if plan.replicas > 1 else ""),
        f"  {facts['verdict'].upper()}: {facts['why']}",
        *(f"    with {remedy}" for remedy in facts["remedies"]),
        "",
        f"  {'a device holds':<34}{'GB':>9}",
    ]
    kinds = sorted(facts["per_gpu_bytes"].items(), key=lambda item: -item[1])
    lines += [f"    {name:<32}{size / 1e9:>9.2f}" for name, size in kinds if size >= 5e6]
    total = sum(facts["per_gpu_bytes"].values())
    lines.append(f"    {'of ' + format(plan.memory.usable / 1e9, '.1f'):<32}{total / 1e9:>9.2f}")
    lines += [
        "",
        f"  at most       {facts['max_concurrency']:,} sequences of {plan.load.length:,} tokens, "
        f"or {facts['max_context']:,} tokens for {plan.load.concurrency}",
    ]
    if plan.rates is not None:
        lines += _rates_text(plan, factor)
    lines.append("")
    for engine, command in facts["commands"].items():
        lines.append(f"  {engine:<14}{command}")
    if facts["commands"]:
        lines.append("")
    lines += [f"  - {text}" for text in facts["assumptions"]]
    return "\n".join(lines)


def _rates_text(plan: Plan, factor: float) -> list[str]:
    rates = plan.rates
    assert rates is not None

    def ranged(value: float, digits: int = 0) -> str:
        low, high = value / factor, value * factor
        return f"{value:,.{digits}f} ({low:,.{digits}f} to {high:,.{digits}f})"

    lines = [
        f"  output        {ranged(rates.output_tokens_per_s)} tok/s in all, "
        f"{ranged(1 / rates.tpot_s, 1)} a user",
        f"  decode        {ranged(rates.decode_tokens_per_s)} tok/s while no prompt is read",
        f"  prefill       {ranged(plan.prefill_tokens_per_s)} tok/s",
        f"  first token   {ranged(rates.ttft_s, 2)} s, without network and server",
    ]
    money = plan.cost
    if money is None:
        lines.append("  cost          no price known: give --price, dollars a device and hour")
        return lines
    each = money.per_million_output
    lines.append(
        f"  cost          ${each.typical:,.2f} a million output tokens "
        f"(${each.low:,.2f} to ${each.high:,.2f} by price), ${money.per_hour.typical:,.2f} an hour"
    )
    if money.api_per_million_output is not None and money.break_even is not None:
        lines.append(
            f"  API           ${money.api_per_million_output:,.2f} for the same tokens: break-even "
            f"at {money.break_even:.0%} utilisation" + (" (never)" if money.break_even > 1 else "")
        )
    return lines


def search_rows(plans: Sequence[Plan]) -> list[dict[str, Any]]:
    """Return plain values of plans, one row each."""
    rows = []
    for plan in plans:
        assert plan.rates is not None
        rows.append(
            {
                "model": plan.shape.name,
                "device": plan.device.key,
                "num": plan.num,
                "parallelism": plan.deployment.describe(),
                "replicas": plan.replicas,
                "concurrency": plan.load.concurrency,
                "verdict": plan.verdict.verdict,
                "cost_per_million_output_tokens": dollars(plan) if plan.cost else None,
                "tokens_per_s_per_user": 1 / plan.rates.tpot_s,
                "tokens_per_s_per_device": plan.rates.output_tokens_per_s / plan.num,
                "output_tokens_per_s": plan.rates.output_tokens_per_s,
                "ttft_s": plan.rates.ttft_s,
                "range_factor": plan.factor,
            }
        )
    return rows


def search_text(plans: Sequence[Plan], rows: int = 40) -> str:
    """Return the best deployments for people, cheapest first."""
    from rich.console import Console
    from rich.table import Table

    best = pareto(plans)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in _COLUMNS:
        table.add_column(name, no_wrap=True)
    for name in _NUMBERS:
        table.add_column(name, justify="right", no_wrap=True)
    for row in search_rows(best[:rows]):
        price = row["cost_per_million_output_tokens"]
        table.add_row(
            row["model"],
            f"{row['num']} x {row['device']}",
            row["parallelism"] + (f" x {row['replicas']}" if row["replicas"] > 1 else ""),
            str(row["concurrency"]),
            row["verdict"],
            "-" if price is None else f"{price:.2f}",
            f"{row['tokens_per_s_per_user']:.1f}",
            f"{row['tokens_per_s_per_device']:,.0f}",
            f"{row['output_tokens_per_s']:,.0f}",
            f"{row['ttft_s']:.2f}",
        )
    out = io.StringIO()
    Console(file=out, width=120).print(table)
    more = f"{len(best) - rows} more\n" if len(best) > rows else ""
    factor = best[0].factor
    return (
        f"{out.getvalue()}{more}{len(plans):,} deployments hold it; none beats these {len(best)} "
        f"in cost, user speed and rate a device at once. Rates within a factor of {factor:.2f}."
    )


def training_text(facts: dict[str, Any]) -> str:
    """Return a training plan for people."""
    lines = [
        f"{facts['method']} of {facts['model']} on {facts['num']} x {facts['device']}: "
        f"{facts['verdict'].upper()}, {facts['share']:.0%} of the memory",
    ]
    lines += [
        f"    {name:<32}{size / 1e9:>9.2f} GB" for name, size in facts["per_gpu_bytes"].items()
    ]
    least = facts["least_devices"]
    lines.append(
        "  no number of devices up to 8,192 holds it"
        if least is None
        else f"  smallest power of two that holds it: {least} devices"
    )
    lines.append(
        f"  about {facts['tokens_per_s']:,.0f} trained tokens a second at the fitted share"
    )
    pools = facts.get("pools")
    if pools:
        lines += [
            f"  a step reads and trains for {pools['step_s']:,.0f} s and needs "
            f"{pools['generated_tokens']:,} generated tokens",
            f"  rollouts      {pools['rollout_devices']} devices "
            f"({pools['rollout_parallelism']} each), {pools['rollout_tokens_per_s']:,.0f} tok/s",
            f"  teachers      {pools['teacher_devices']} devices for {pools['teachers']}",
            f"  trainer       {pools['trainer_devices']} devices",
            f"  in all        {pools['total_devices']} devices",
        ]
    return "\n".join(lines)


def write_plan_page(plan: Plan, path: Path) -> None:
    """Write one page: the plan as text, what a device holds, and rates over users, as charts."""
    charts = [_memory_chart(plan)]
    if plan.rates is not None:
        charts.append(_load_chart(plan))
    title = f"{plan.shape.name} on {plan.num} x {plan.device.name}"
    _write(path, title, plan_text(plan), charts)


def write_search_page(target: str, plans: Sequence[Plan], path: Path) -> None:
    """Write one page: the best deployments and where they lie among all."""
    _write(path, f"Deployments of {target}", search_text(plans, 200), [_search_chart(plans)])


def _write(path: Path, title: str, text: str, charts: Sequence[str]) -> None:
    pictures = "\n".join(
        f'<img alt="chart" src="data:image/png;base64,{chart}">' for chart in charts
    )
    path.write_text(
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{html.escape(title)}</title>"
        "<style>body{font:15px/1.5 system-ui;max-width:70rem;margin:2rem auto;padding:0 1rem}"
        "pre{overflow-x:auto;font-size:13px}img{max-width:100%}</style>"
        f"<h1>{html.escape(title)}</h1>{pictures}<pre>{html.escape(text)}</pre></html>\n",
        encoding="utf-8",
    )


def _figure(height: float = 3.6) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, height), layout="constrained")
    return figure, figure.add_subplot()


def _colours() -> Sequence[Any]:
    import matplotlib

    return matplotlib.colormaps["tab20"].colors  # type: ignore[attr-defined]


def _png(figure: Any) -> str:
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=120)
    return base64.b64encode(data.getvalue()).decode("ascii")


def _memory_chart(plan: Plan) -> str:
    figure, axes = _figure(2.8)
    kinds = sorted(as_json(plan)["per_gpu_bytes"].items(), key=lambda item: -item[1])
    shown = [(name, size) for name, size in kinds if size > 0.003 * plan.memory.usable]
    shown.append(("rest", sum(size for _, size in kinds) - sum(size for _, size in shown)))
    left, colours = 0.0, _colours()
    for (name, size), colour in zip(shown, itertools.cycle(colours), strict=False):
        axes.barh([0], [size / 1e9], left=left, label=name, color=colour)
        left += size / 1e9
    axes.axvline(plan.memory.usable / 1e9, color="black")
    axes.axvline(plan.memory.budget / 1e9, color="black", linestyle=":")
    axes.set(
        yticks=[], xlabel="GB on the fullest device; lines: what it has, what an engine may take"
    )
    figure.legend(fontsize=7, ncols=5, loc="outside lower center")
    return _png(figure)


def _load_chart(plan: Plan) -> str:
    """Draw rates over users, up to what fits."""
    import dataclasses

    figure, axes = _figure()
    users, total, each = [], [], []
    for count in _SWEEP:
        if count > max(plan.max_concurrency, 1):
            break
        load = dataclasses.replace(plan.load, concurrency=count)
        found = evaluate(plan.shape, plan.device, plan.deployment, plan.replicas, load, {})
        if found.rates is not None:
            users.append(count)
            total.append(found.rates.output_tokens_per_s)
            each.append(1 / found.rates.tpot_s)
    axes.plot(users, total, marker="o", label="in all")
    low, high = ([v / plan.factor for v in total], [v * plan.factor for v in total])
    axes.fill_between(users, low, high, alpha=0.2)
    axes.set(xscale="log", yscale="log", xlabel="users at once", ylabel="output tok/s")
    axes.plot(users, each, marker="s", label="a user")
    axes.legend()
    return _png(figure)


def _search_chart(plans: Sequence[Plan]) -> str:
    figure, axes = _figure(4.6)
    devices = sorted({plan.device.key for plan in plans})
    for device, colour in zip(devices, itertools.cycle(_colours()), strict=False):
        own = [plan for plan in plans if plan.device.key == device and plan.cost]
        speed = [1 / plan.rates.tpot_s for plan in own if plan.rates]
        axes.scatter(
            speed, [dollars(plan) for plan in own], s=6, alpha=0.5, color=colour, label=device
        )
    # From the quickest on, each that is cheaper than all quicker ones.
    line: list[tuple[float, float]] = []
    for plan in sorted(plans, key=lambda p: p.rates.tpot_s if p.rates else 0.0):
        if plan.rates and plan.cost and (not line or dollars(plan) < line[-1][1]):
            line.append((1 / plan.rates.tpot_s, dollars(plan)))
    axes.plot([x for x, _ in line], [y for _, y in line], color="black", linewidth=1)
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="tokens a second of a user",
        ylabel="dollars a million output tokens",
    )
    axes.legend(fontsize=7, markerscale=2)
    return _png(figure)
