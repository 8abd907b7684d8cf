"""Train a tiny hybrid to copy, with the project's own trainer, and watch the loss fall.

python examples/train.py [OUTPUT]
"""

import random
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from aprium.base.records import Sample
from aprium.model.model import HybridModel
from aprium.model.presets import PRESETS
from aprium.train.losses import LossConfig
from aprium.train.optim import OptimConfig
from aprium.train.trainer import Trainer, TrainerConfig


class Copies:
    """An endless stream of documents whose second half repeats the first."""

    def __init__(self, position: int = 0) -> None:
        self.position = position

    def next_batch(self) -> Sequence[Sample]:
        """Return 24 documents."""
        rng = random.Random(self.position)
        self.position += 1
        samples = []
        for _ in range(24):
            half = tuple(rng.randint(20, 30) for _ in range(rng.randint(2, 6)))
            weights = (0.0,) * (len(half) + 1) + (1.0,) * len(half)
            samples.append(Sample(tokens=(*half, 1, *half), ce_weight=weights, domain="copy"))
        return samples

    def state_dict(self) -> dict[str, Any]:
        """Return the position."""
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a position."""
        self.position = state["position"]


def main(output: Path) -> None:
    """Train the toy shape for 100 steps; run it again with the same output to go on."""
    model = HybridModel(PRESETS["toy"], dtype=torch.float32)
    model.init_weights(torch.Generator().manual_seed(0))
    trainer = Trainer(
        model,
        Copies(),
        Copies(position=1_000_000).next_batch(),
        output=output,
        optim=OptimConfig(lr=3e-3, muon_lr=0.01, warmup_steps=5),
        loss=LossConfig(bias_rate=0.01),
        config=TrainerConfig(steps=100, eval_every=25, checkpoint_every=50),
    )
    trainer.run()
    losses = [round(figures["loss"], 3) for figures in trainer.metrics.read("heldout")]
    print(f"held-out loss {losses}; curve in {output / 'loss.png'}")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(tempfile.mkdtemp()))
