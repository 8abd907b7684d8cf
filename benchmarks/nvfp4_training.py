"""What training pico in NVFP4 costs: loss curves from one start on the same batches, and time.

OMP_NUM_THREADS=1 python benchmarks/nvfp4_training.py [--steps 300] [--tokens 2048] [--picture FILE]

The runs take turns step by step: float32, the recipe, the recipe without its Hadamard matrix,
without stochastic rounding, with everything in the last blocks rounded too, and with a forward pass
that is no longer rounded after four fifths of the steps; and float32 again from weights moved by a
millionth, which shows how far runs drift apart by themselves. Data are generated tasks in pico's
tokens, so nothing is downloaded. Prints a JSON line for each tenth of the steps and a summary for
each run. Step times are ratios of neighbours.
"""

import argparse
import json
import platform
import pydoc_data.topics
import re
import statistics
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from aprium.base.config import load_toml
from aprium.checkpoint.hub import PICO_DIR
from aprium.data.loader import Loader
from aprium.data.sources import DataConfig, SourceConfig, Text, heldout_samples
from aprium.envs import families
from aprium.model.model import HybridModel
from aprium.model.presets import preset
from aprium.text.chat import ChatTemplate
from aprium.text.tokenizer import Tokenizer
from aprium.train import precision
from aprium.train.precision import PrecisionConfig
from aprium.train.pretrain import PretrainConfig
from aprium.train.trainer import Trainer, TrainerConfig

RECIPE = Path(__file__).resolve().parents[1] / "recipes" / "pico.toml"
BASE, MOVED, SWITCHED = "float32", "float32, moved start", "nvfp4, switched"
RUNS: dict[str, dict[str, Any]] = {
    BASE: {},
    MOVED: {},
    "nvfp4": {"recipe": "nvfp4"},
    "nvfp4, no hadamard": {"recipe": "nvfp4", "hadamard": False},
    "nvfp4, no stochastic rounding": {"recipe": "nvfp4", "stochastic_rounding": False},
    "nvfp4, all blocks": {"recipe": "nvfp4", "keep_last_fraction": 0.0},
    SWITCHED: {"recipe": "nvfp4"},
}
SMOOTH = 20  # steps that a point of the picture is the mean of


def data(place: Path) -> tuple[DataConfig, Text]:
    """Return generated tasks of the families that pico learns, and what renders them."""
    recipe = load_toml(PretrainConfig, RECIPE)
    known = tuple(dict.fromkeys(name for s in recipe.data.sources for name in s.families))
    topics = " ".join(pydoc_data.topics.topics.values())
    words = place / "words.txt"
    words.write_text("\n".join(sorted(set(re.findall(r"\b[a-z]{3,8}\b", topics)))))
    source = SourceConfig(kind="tasks", name="tasks", words=words, families=known)
    config = DataConfig(sources=(source,), max_length=256, heldout_samples=300)
    return config, Text(Tokenizer.load(PICO_DIR), ChatTemplate.load(PICO_DIR), families)


def make(name: str, steps: int, place: Path, heldout: list[Any]) -> Trainer:
    """Make the trainer of one run; all have the same weights at first."""
    recipe = load_toml(PretrainConfig, RECIPE)
    model = HybridModel(preset("pico").without_mtp(), dtype=torch.float32)
    model.init_weights(torch.Generator().manual_seed(0))
    if name == MOVED:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1 + 1e-6)
    switch = {"switch_at_step": steps * 4 // 5} if name == SWITCHED else {}
    rounding = precision.attach(model, PrecisionConfig(**RUNS[name], **switch))
    return Trainer(
        model,
        Loader(*data(place), tokens_per_batch=1 << 30),  # batches come from outside
        heldout,
        output=place / "runs" / re.sub(r"\W+", "-", name),
        optim=recipe.optim,
        loss=recipe.loss,
        config=TrainerConfig(steps=steps),
        before_step=rounding.begin if rounding is not None else None,
    )


def train(names: list[str], steps: int, tokens: int, place: Path) -> dict[str, list[Any]]:
    """Take every step in all runs, one after another; return the figures of each."""
    config, text = data(place)
    heldout = heldout_samples(config, text)
    trainers = {name: make(name, steps, place, heldout) for name in names}
    loader = Loader(config, text, tokens_per_batch=tokens)
    curves: dict[str, list[Any]] = {name: [] for name in names}
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for step in range(1, steps + 1):
        batch = loader.next_batch()
        count = sum(len(sample.tokens) for sample in batch)
        for name, trainer in trainers.items():
            figures = trainer.train_step(batch)
            curves[name].append(figures["loss"])
            seconds[name].append(count / figures["tokens_per_s"])
        if step % max(1, steps // 10) == 0:
            report({"case": "loss", "step": step} | {n: last(c) for n, c in curves.items()})
    base = trainers[BASE].evaluate()["loss"]
    for name, trainer in trainers.items():
        found = trainer.evaluate()["loss"]
        ratios = [a / b for a, b in zip(seconds[name], seconds[BASE], strict=True)]
        report(
            {
                "case": name,
                "steps": steps,
                "tokens_per_step": tokens,
                "train_loss": last(curves[name]),
                "train_gap_percent": round(gap(curves[name], curves[BASE]), 2),
                "heldout_loss": round(found, 4),
                "heldout_gap_percent": round(100 * (found / base - 1), 2),
                "step_time_ratio": round(statistics.median(ratios), 2),
            }
        )
    return curves


def last(curve: list[float]) -> float:
    """Return the mean of the last points."""
    return round(statistics.mean(curve[-SMOOTH:]), 4)


def gap(curve: list[float], base: list[float]) -> float:
    """Return by how many percent the last tenth of `curve` lies above that of `base`."""
    count = max(1, len(curve) // 10)
    return 100 * (sum(curve[-count:]) / sum(base[-count:]) - 1)


def draw(curves: Mapping[str, list[float]], file: Path) -> None:
    """Draw the curves, and how far each lies above float32."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 4.5))
    smooth = {name: smoothed(curve) for name, curve in curves.items()}
    for name, curve in smooth.items():
        steps = range(SMOOTH, SMOOTH + len(curve))
        left.plot(steps, curve, label=name, linewidth=1)
        if name != BASE:
            above = [100 * (a / b - 1) for a, b in zip(curve, smooth[BASE], strict=True)]
            right.plot(steps, above, label=name, linewidth=1)
    left.set_yscale("log")
    left.set_title(f"loss per token (nats), mean of {SMOOTH} steps")
    right.axhline(0, color="black", linewidth=0.5)
    right.set_title("loss above float32 (%)")
    for axis in (left, right):
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(file, dpi=110)
    pyplot.close(figure)


def smoothed(curve: list[float]) -> list[float]:
    """Return the means of `SMOOTH` neighbours."""
    return [statistics.mean(curve[i : i + SMOOTH]) for i in range(len(curve) - SMOOTH + 1)]


def report(line: dict[str, Any]) -> None:
    """Print one line."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    facts = {
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "commit": commit,
    }
    print(json.dumps(line | facts), flush=True)


def main() -> None:
    """Run the comparison that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--only", action="append", help="a run beside float32; may be repeated")
    parser.add_argument("--picture", type=Path)
    options = parser.parse_args()
    if options.steps < SMOOTH or not set(options.only or ()) <= RUNS.keys():
        parser.error(f"--steps is at least {SMOOTH}; the runs are {', '.join(RUNS)}")
    names = [name for name in RUNS if options.only is None or name in (BASE, *options.only)]
    with tempfile.TemporaryDirectory() as place:
        curves = train(names, options.steps, options.tokens, Path(place))
    if options.picture is not None:
        draw(curves, options.picture)


if __name__ == "__main__":
    main()
