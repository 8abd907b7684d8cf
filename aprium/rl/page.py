"""A run of rounds as one page that needs no other file: the graph, figures by domain, curves.

The graph is drawn as it is in the recipe, from left to right; a click on a node leads to what it
was given and what became of it.
"""

import html
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from aprium.rl.lineage import NodeState, RoundsConfig, read_state
from aprium.train.metrics import MetricsFile

_COLOURS = {
    "sft": "#8ab4e8",
    "warmup": "#f2c572",
    "rl": "#9bd0a0",
    "mopd": "#e59a9a",
    "merge": "#c5b3e6",
}
_WIDTH, _HEIGHT, _ACROSS, _DOWN = 150, 46, 215, 70  # of a node, and between two
_STYLE = """
body{font:14px/1.45 system-ui,sans-serif;max-width:80em;margin:2em auto;padding:0 1em;color:#222}
svg{max-width:100%;height:auto} table{border-collapse:collapse;margin:1em 0}
td,th{padding:.25em .8em;text-align:right;border-bottom:1px solid #ddd}
td:first-child,th:first-child{text-align:left} .best{font-weight:600} small{color:#777}
pre{background:#f6f6f6;padding:1em;overflow:auto} .scroll{overflow-x:auto}
"""


def write(recipe: RoundsConfig, table: Mapping[str, Any], file: Path) -> None:
    """Write the page of what there is so far; `table` is that of `rl/recovery`."""
    states = {
        (name, seed): read_state(recipe.place(name, seed))
        for name in recipe.nodes
        for seed in recipe.seeds
    }
    parts = [
        f"<h1>Rounds: {html.escape(recipe.output.name)}</h1>",
        "<h2>Graph</h2>",
        f"<div class=scroll>{_graph(recipe, states)}</div>",
        "<h2>Held-out accuracy</h2>",
        _scores(recipe, table),
        "<h2>Recovery of the teachers' lead</h2>",
        _recovery(table),
        "<h2>Support</h2>",
        _support(recipe),
        "<h2>Curves</h2>",
        _curves(recipe),
        "<h2>Nodes</h2>",
        *(_node(recipe, name, states) for name in recipe.order()),
    ]
    page = (
        "<!doctype html><html lang=en><meta charset=utf-8>"
        "<meta name=viewport content='width=device-width'>"
        f"<title>rounds</title><style>{_STYLE}</style>{''.join(parts)}</html>\n"
    )
    partial = file.with_suffix(".partial")
    partial.write_text(page, encoding="utf-8")
    partial.replace(file)


States = Mapping[tuple[str, int], NodeState | None]


def _graph(recipe: RoundsConfig, states: States) -> str:
    """Draw nodes in columns by how many lie before them, and lines from parents and teachers."""
    columns: dict[str, int] = {}
    for name in recipe.order():
        columns[name] = max((columns[p] + 1 for p in recipe.parents(name)), default=0)
    rows: dict[str, int] = {}
    taken: dict[int, int] = {}
    for name in recipe.order():
        rows[name] = taken.get(columns[name], 0)
        taken[columns[name]] = rows[name] + 1
    at = {n: (20 + columns[n] * _ACROSS, 20 + rows[n] * _DOWN) for n in columns}
    lines = []
    for name, node in recipe.nodes.items():
        for parent in recipe.parents(name):
            begins = parent == node.parent or parent in node.members
            lines.append(_line(at[parent], at[name], dashed=not begins))
    boxes = [_box(recipe, name, at[name], states) for name in recipe.order()]
    width = 40 + max(columns.values()) * _ACROSS + _WIDTH
    height = 40 + (max(taken.values()) - 1) * _DOWN + _HEIGHT
    return (
        f"<svg viewBox='0 0 {width} {height}' width='{width}' font-size='12'>"
        f"{''.join(lines)}{''.join(boxes)}</svg>"
        "<p><small>A full line: its weights; a dashed one: it teaches. "
        + " ".join(
            f"<span style='background:{colour};padding:0 .5em'>{kind}</span>"
            for kind, colour in _COLOURS.items()
        )
        + "</small></p>"
    )


def _line(start: tuple[int, int], end: tuple[int, int], *, dashed: bool) -> str:
    x, y = start[0] + _WIDTH, start[1] + _HEIGHT // 2
    to_x, to_y = end[0], end[1] + _HEIGHT // 2
    bend = (x + to_x) // 2
    style = "stroke-dasharray='5 4' stroke='#999'" if dashed else "stroke='#444'"
    return (
        f"<path d='M{x} {y} C{bend} {y} {bend} {to_y} {to_x} {to_y}' fill='none' {style} "
        "stroke-width='1.4'/>"
    )


def _box(recipe: RoundsConfig, name: str, at: tuple[int, int], states: States) -> str:
    node, (x, y) = recipe.nodes[name], at
    found = [states[name, seed] for seed in recipe.seeds]
    done = sum(state is not None and state.status == "done" for state in found)
    failed = any(state is not None and state.status == "failed" for state in found)
    said = "failed" if failed else "done" if done == len(found) else f"{done} of {len(found)} done"
    opacity = 1 if done == len(found) else 0.45
    return (
        f"<a href='#{name}'><rect x='{x}' y='{y}' width='{_WIDTH}' height='{_HEIGHT}' rx='7' "
        f"fill='{_COLOURS[node.kind]}' fill-opacity='{opacity}' stroke='#555'/>"
        f"<text x='{x + _WIDTH / 2}' y='{y + 20}' text-anchor='middle'>{html.escape(name)}</text>"
        f"<text x='{x + _WIDTH / 2}' y='{y + 36}' text-anchor='middle' fill='#555' font-size='10'>"
        f"{node.kind}, {said}</text></a>"
    )


def _scores(recipe: RoundsConfig, table: Mapping[str, Any]) -> str:
    names, domains = list(table["scores"]), recipe.domain_names()
    if not names:
        return "<p>Nothing is evaluated yet.</p>"
    rows = []
    for name in names:
        found = table["scores"][name]
        cells = [_number(found[domain]) if domain in found else "" for domain in domains]
        means = [found[domain]["mean"] for domain in domains if domain in found]
        mean = f"{100 * sum(means) / len(means):.1f}" if len(means) == len(domains) else ""
        rows.append([html.escape(name), *cells, mean])
    return _table(["", *domains, "mean"], rows) + (
        "<p><small>Percent; the error is over seeds where there are several, else over tasks."
        "</small></p>"
    )


def _number(cell: Mapping[str, Any], key: str = "mean") -> str:
    error = cell["seed_error"] if cell["seed_error"] is not None else cell["item_error"]
    return f"{100 * cell[key]:.1f} <small>&plusmn; {100 * error:.1f}</small>"


def _recovery(table: Mapping[str, Any]) -> str:
    names = [name for name, row in table["recovery"].items() if any(row.values())]
    if not names:
        return "<p>No learner, baseline and teacher that is ahead of it are evaluated yet.</p>"
    rows = []
    for domain in (*table["teachers"], "all"):
        cells = [table["recovery"][name].get(domain) for name in names]
        shown = ["&ndash;" if cell is None else _number(cell, "value") for cell in cells]
        rows.append([html.escape(domain), html.escape(table["teachers"].get(domain, "")), *shown])
    return _table(["domain", "teacher", *names], rows) + (
        f"<p><small>Percent of the way from {html.escape(table['baseline'])} to the teacher; "
        "&ndash; where its lead is within two standard errors.</small></p>"
    )


def _support(recipe: RoundsConfig) -> str:
    rows = []
    for name in recipe.nodes:
        for seed in recipe.seeds:
            file = recipe.place(name, seed) / "support.json"
            if not file.exists():
                continue
            for domain, one in json.loads(file.read_text(encoding="utf-8")).items():
                shares = [one[k] for k in ("inside", "own_inside", "prefix", "own_prefix", "mass")]
                cells = [f"{100 * share:.1f}" for share in shares]
                where = f"{name} <small>seed {seed}</small>"
                teacher, gap = html.escape(one["teacher"]), f"{one['gap']:.3f}"
                rows.append([where, html.escape(domain), teacher, *cells, gap])
    if not rows:
        return "<p>None was measured.</p>"
    head = ["node", "domain", "teacher", "inside", "of itself", "prefix", "of itself", "mass"]
    return _table([*head, "gap"], rows) + (
        "<p><small>Percent of sampled tokens among the teacher's top ones, of an answer before its "
        "first one outside, and of the teacher's probability on the student's top tokens; gap in "
        "nats a token.</small></p>"
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    first = "".join(f"<th>{cell}" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{cell}" for cell in row) for row in rows)
    return f"<div class=scroll><table><tr>{first}{body}</table></div>"


def _curves(recipe: RoundsConfig) -> str:
    """Draw the reward of each domain while nodes train, those after each other end to end."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    series: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for name in recipe.order():
        output = recipe.place(name, recipe.seeds[0])
        if not (output / "metrics.jsonl").exists():
            continue
        for row in MetricsFile(output).read("train"):
            for domain, value in row.get("rewards", {}).items():
                series.setdefault(domain, {}).setdefault(name, []).append((row["step"], value))
    if not series:
        return "<p>Nothing was played yet.</p>"
    columns = min(3, len(series))
    lines = -(-len(series) // columns)
    figure, axes = pyplot.subplots(
        lines, columns, figsize=(4.3 * columns, 3.1 * lines), squeeze=False
    )
    for axis in axes.flat[len(series) :]:
        axis.remove()
    for axis, (domain, nodes) in zip(axes.flat, sorted(series.items()), strict=False):
        for name, points in nodes.items():
            axis.plot(*zip(*points, strict=True), label=name, alpha=0.8, marker=".")
        axis.set_title(domain)
        axis.set_xlabel("step of the node")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    figure.tight_layout()
    stream = io.StringIO()
    figure.savefig(stream, format="svg")
    pyplot.close(figure)
    text = stream.getvalue()
    seed = f" of seed {recipe.seeds[0]}" if len(recipe.seeds) > 1 else ""
    return f"{text[text.index('<svg') :]}<p><small>Mean reward of rollouts{seed}.</small></p>"


def _node(recipe: RoundsConfig, name: str, states: States) -> str:
    node = recipe.nodes[name]
    rows = []
    for seed in recipe.seeds:
        state = states[name, seed]
        if state is None:
            rows.append([str(seed), "not begun", "", ""])
            continue
        note = state.error or state.note or ""
        where = html.escape(state.checkpoint or "")
        rows.append(
            [str(seed), state.status, f"{state.seconds:.0f} s", f"{where} {html.escape(note)}"]
        )
    known = next((s for s in (states[name, seed] for seed in recipe.seeds) if s is not None), None)
    settings = json.dumps(known.config, indent=2) if known is not None else ""
    parents = ", ".join(recipe.parents(name)) or recipe.checkpoint
    return (
        f"<h3 id='{name}'>{html.escape(name)} <small>{node.kind}, from {html.escape(parents)}"
        f"</small></h3>{_table(['seed', 'status', 'took', ''], rows)}"
        f"<details><summary>settings</summary><pre>{html.escape(settings)}</pre></details>"
    )
