"""How a run shows itself: a progress bar with the time left, and the loss curve as a picture."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


class TrainingProgress:
    """A progress bar; where standard error is no terminal, a line every few seconds instead."""

    def __init__(self, total: int, done: int) -> None:
        self._console = Console(stderr=True)
        self._bar = Progress(
            TextColumn("[bold]train"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self._bar.add_task("train", total=total, completed=done, figures="")
        self._total = total

    def __enter__(self) -> "TrainingProgress":
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.stop()

    def update(self, step: int, figures: Mapping[str, float], heldout: float | None) -> None:
        """Show the figures of a finished step."""
        text = f"loss {figures['loss']:.3f}"
        if heldout is not None:
            text += f"  held-out {heldout:.3f}"
        text += f"  {figures['tokens_per_s']:.0f} tok/s"
        self._bar.update(self._task, completed=step, figures=text)
        if not self._console.is_terminal and (step % 20 == 0 or step == self._total):
            self._console.print(f"step {step}/{self._total}  {text}", highlight=False)


def plot_losses(
    train: Sequence[Mapping[str, Any]], heldout: Sequence[Mapping[str, Any]], file: Path
) -> None:
    """Draw training and held-out loss, in all and by domain, over tokens; write a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 4.5))
    left.plot([f["step"] for f in train], [f["loss"] for f in train], alpha=0.5, label="train")
    left.plot([f["step"] for f in train], [f["mtp_loss"] for f in train], alpha=0.5, label="mtp")
    left.plot([f["step"] for f in heldout], [f["loss"] for f in heldout], label="held-out")
    names = sorted({name for f in heldout for name in f["domains"]})
    for name in names:
        points = [(f["step"], f["domains"][name]) for f in heldout if name in f["domains"]]
        right.plot(*zip(*points, strict=True), label=name)
    for axis, title in ((left, "loss per token (nats)"), (right, "held-out loss by domain")):
        axis.set_xlabel("step")
        axis.set_title(title)
        axis.set_yscale("log")
        axis.grid(alpha=0.3)
        if axis.has_data():
            axis.legend(fontsize=7)
    figure.tight_layout()
    partial = file.with_suffix(".partial.png")
    figure.savefig(partial, dpi=110)
    pyplot.close(figure)
    partial.replace(file)
