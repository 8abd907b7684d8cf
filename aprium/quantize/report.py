"""What quantising cost, as files beside the checkpoint: `report.json` and `report.html`."""

import html
import io
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from aprium.quantize.encode import MatrixReport
from aprium.quantize.pipeline import Result

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 64rem; padding: 0 1rem }
table { border-collapse: collapse; margin: 1rem 0 }
td, th { padding: .2rem .8rem; text-align: right; border-bottom: 1px solid #8884 }
td:first-child, th:first-child { text-align: left }
@media (prefers-color-scheme: dark) {
  body { background: #181818; color: #ddd }
  svg { background: #fff }
}
"""


def write_report(directory: Path, result: Result, **more: Any) -> None:
    """Write `result` and what else is to be kept (`more`, plain values) into `directory`."""
    facts = asdict(result) | more
    (directory / "report.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    (directory / "report.html").write_text(_page(result, more), encoding="utf-8")


def summary(result: Result) -> dict[str, str]:
    """Return the figures of the whole, as texts by what they are."""
    found = {
        "bits a weight": f"{result.bits:.2f}",
        "size": f"{result.bytes_before / 1e6:,.1f} MB to {result.bytes_after / 1e6:,.1f} MB",
        "time": f"{result.seconds:.1f} s",
    }
    quality = result.quality
    if quality is not None:
        before, after = quality["perplexity_before"], quality["perplexity_after"]
        found["perplexity"] = f"{before:.4f} to {after:.4f} ({after / before - 1:+.2%})"
        found["KL at the logits"] = f"{quality['logit_kl']:.5f} nats a token"
        found["same first choice"] = f"{quality['same_first_choice']:.2%}"
    few = sum(matrix.fell_back for matrix in result.matrices)
    if few:
        found["experts rounded to nearest, too few tokens"] = str(few)
    return found


def _page(result: Result, more: dict[str, Any]) -> str:
    lines = [f"<tr><td>{k}</td><td>{html.escape(v)}</td></tr>" for k, v in summary(result).items()]
    when = ", before distillation" if "distillation" in more else ""
    settings = html.escape(json.dumps(result.recipe | more, indent=2))
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>Quantisation report</title>"
        f"<style>{_STYLE}</style><h1>Quantisation report</h1>"
        f"<p>{html.escape(result.source)}</p><table>{''.join(lines)}</table>"
        f"{_plot(result.matrices)}"
        f"<h2>By matrix{when}</h2><table><tr><th>matrix<th>role<th>format<th>bits<th>weight error"
        f"<th>output error</tr>{''.join(_row(m) for m in result.matrices)}</table>"
        f"<h2>Settings</h2><pre>{settings}</pre></html>"
    )


def _row(matrix: MatrixReport) -> str:
    output = "" if matrix.output_error is None else f"{matrix.output_error:.2%}"
    name = html.escape(matrix.module.removeprefix("backbone.layers."))
    return (
        f"<tr><td>{name}<td>{matrix.role}<td>{matrix.format or 'unquantised'}<td>{matrix.bits:g}"
        f"<td>{matrix.weight_error:.2%}<td>{output}</tr>"
    )


def _plot(matrices: Sequence[MatrixReport]) -> str:
    """Return an SVG: the output error of every quantised matrix over the layers, by role."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    axis = figure.subplots()
    measured = [m for m in matrices if m.format and m.layer is not None]
    values = [m.weight_error if m.output_error is None else m.output_error for m in measured]
    for role in sorted({m.role for m in measured}):
        points = [(m.layer, v) for m, v in zip(measured, values, strict=True) if m.role == role]
        axis.plot(*zip(*points, strict=True), "o", label=role.replace("_", " "))
    axis.set_xlabel("layer")
    axis.set_ylabel("relative error")
    axis.set_title("Error of each quantised matrix's outputs on held-out samples")
    axis.grid(alpha=0.3)
    if measured:
        axis.legend(fontsize=8)
    text = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "report", "svg.fonttype": "none"}):
        figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()[text.getvalue().index("<svg") :]
