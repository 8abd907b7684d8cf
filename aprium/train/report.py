"""How a run shows itself: a progress bar and table, and a page and a picture of its curves."""

import html
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

Figures = Mapping[str, Any]
# Figures of the table, by what they are called there.
_ROWS = (
    ("loss", "loss"),
    ("policy loss", "rl_loss"),
    ("mtp loss", "mtp_loss"),
    ("gradient norm", "grad_norm"),
    ("MaxVio", "max_vio"),
    ("learning rate, of peak", "lr_factor"),
    ("tokens", "tokens"),
    ("tokens/s", "tokens_per_s"),
)


class TrainingProgress:
    """A progress bar over a table; where standard error is no terminal, lines now and then.

    Nothing is shown unless `shown`.
    """

    def __init__(self, total: int, done: int, shown: bool = True) -> None:
        self._console = Console(stderr=True)
        self._bar = Progress(
            TextColumn("[bold]train"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self._console,
        )
        self._task = self._bar.add_task("train", total=total, completed=done)
        self._live = Live(self._bar, console=self._console, refresh_per_second=4)
        self._shown = shown

    def __enter__(self) -> "TrainingProgress":
        if self._shown and self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._shown and self._console.is_terminal:
            self._live.stop()

    def update(self, step: int, total: int, figures: Figures, heldout: Figures | None) -> None:
        """Show the figures of a finished step of `total`, and the last evaluation."""
        if not self._shown:
            return
        self._bar.update(self._task, completed=step, total=total)
        if self._console.is_terminal:
            self._live.update(Group(self._bar, _table(figures, heldout)))
        elif step % 20 == 0 or step == total:
            loss = figures.get("rl_loss", figures["loss"])
            text = f"step {step}/{total}  loss {loss:.3f}"
            if heldout is not None:
                text += f"  held-out {heldout['loss']:.3f}"
            text += f"  {figures['tokens_per_s']:.0f} tok/s{self._left()}"
            self._console.print(text, highlight=False)

    def _left(self) -> str:
        seconds = self._bar.tasks[self._task].time_remaining
        return "" if seconds is None else f"  {seconds / 60:.1f} min left"


def _table(figures: Figures, heldout: Figures | None) -> Table:
    table = Table(box=None, show_header=False)
    for label, key in _ROWS:
        if key in figures:
            table.add_row(label, f"{figures[key]:,.4g}" if key != "tokens" else f"{figures[key]:,}")
    for label, key in (("gradients", "grad_norms"), ("residual stream", "residual")):
        found: Mapping[str, float] = figures.get(key, {})
        if found:
            name, value = max(found.items(), key=lambda item: item[1])
            table.add_row(f"{label}, largest", f"{value:.3g} ({name})")
    if heldout is not None:
        table.add_row("held-out loss", f"{heldout['loss']:.4f} at step {heldout['step']}")
        for name, value in heldout["domains"].items():
            table.add_row(f"  {name}", f"{value:.4f}")
    return table


def write_page(
    train: Sequence[Figures], heldout: Sequence[Figures], recipe: str, directory: Path
) -> None:
    """Write `report.html`, which needs no other file, and its first picture as `loss.png`."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    losses, monitors = _draw_losses(train, heldout), _draw_monitors(train)
    pictures = ""
    for figure in (losses, monitors):
        stream = io.StringIO()
        figure.savefig(stream, format="svg")
        pictures += stream.getvalue()[stream.getvalue().index("<svg") :]
    last = {k: v for k, v in (train[-1] if train else {}).items() if not isinstance(v, Mapping)}
    rows = "".join(f"<tr><td>{html.escape(k)}<td>{v:,.6g}" for k, v in last.items() if v != "")
    page = (
        "<!doctype html><html lang=en><meta charset=utf-8><title>training run</title>"
        "<style>body{font:14px sans-serif;max-width:80em;margin:2em auto;padding:0 1em}"
        "svg{width:100%;height:auto}td{padding:0 1em 0 0}</style>"
        f"<h1>Training run</h1>{pictures}<h2>Last step</h2><table>{rows}</table>"
        f"<h2>Recipe</h2><pre>{html.escape(recipe)}</pre></html>\n"
    )
    _replace(directory / "report.html", page.encode())
    picture = io.BytesIO()
    losses.savefig(picture, format="png", dpi=110)
    _replace(directory / "loss.png", picture.getvalue())
    pyplot.close("all")


def _replace(file: Path, content: bytes) -> None:
    partial = file.with_suffix(file.suffix + ".partial")
    partial.write_bytes(content)
    partial.replace(file)


def _draw_losses(train: Sequence[Figures], heldout: Sequence[Figures]) -> Any:
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 4.5))
    _line(left, train, "loss", "train")
    _line(left, train, "mtp_loss", "mtp")
    _line(left, heldout, "loss", "held-out")
    _lines(right, heldout, "domains")
    _finish(figure, ((left, "loss per token (nats)"), (right, "held-out loss by domain")))
    return figure


def _draw_monitors(train: Sequence[Figures]) -> Any:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 2, figsize=(12, 9))
    (gradients, residual), (balance, rate) = axes
    _lines(gradients, train, "grad_norms")
    _line(gradients, train, "grad_norm", "all, before clipping")
    _lines(residual, train, "residual")
    _lines(balance, train, "max_vios")
    _line(rate, train, "tokens_per_s", "tokens/s")
    titles = ("gradient norm by role", "residual stream after layer (rms)", "MaxVio by layer")
    _finish(figure, ((*zip((gradients, residual, balance), titles, strict=True), (rate, "speed"))))
    return figure


def _line(axis: Any, rows: Sequence[Figures], key: str, label: str) -> None:
    points = [(row["step"], row[key]) for row in rows if row.get(key)]
    if points:
        axis.plot(*zip(*points, strict=True), label=label, alpha=0.8)


def _lines(axis: Any, rows: Sequence[Figures], key: str) -> None:
    names = sorted({name for row in rows for name in row.get(key, {})})
    for name in names:
        points = [(row["step"], row[key][name]) for row in rows if name in row.get(key, {})]
        axis.plot(*zip(*points, strict=True), label=name, alpha=0.8)


def _finish(figure: Any, titled: Sequence[tuple[Any, str]]) -> None:
    for axis, title in titled:
        axis.set_xlabel("step")
        axis.set_title(title)
        axis.set_yscale("log")
        axis.grid(alpha=0.3)
        if axis.has_data():
            axis.legend(fontsize=7)
    figure.tight_layout()
