"""The loop: it learns, it resumes bit for bit after a kill, it refuses damaged checkpoints."""

import json
import multiprocessing
import os
import random
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from aprium.base.errors import CheckpointError
from aprium.base.records import Sample
from aprium.model.model import HybridModel
from aprium.model.presets import PRESETS
from aprium.train.losses import LossConfig
from aprium.train.optim import OptimConfig
from aprium.train.trainer import Trainer, TrainerConfig

TOY = PRESETS["toy"]


class Copies:
    """Batches of documents whose second half repeats the first."""

    def __init__(self, interrupt_at: int | None = None, number: int = signal.SIGTERM) -> None:
        self.index, self.interrupt_at, self.number = 0, interrupt_at, number

    def next_batch(self) -> Sequence[Sample]:
        if self.index == self.interrupt_at:
            os.kill(os.getpid(), self.number)
        rng = random.Random(self.index)
        self.index += 1
        samples = []
        for _ in range(12):
            half = [rng.randint(20, 30) for _ in range(rng.randint(2, 5))]
            weights = [0.0] * (len(half) + 1) + [1.0] * len(half)
            samples.append(
                Sample(tokens=(*half, 1, *half), ce_weight=tuple(weights), domain="copy")
            )
        return samples

    def state_dict(self) -> dict[str, Any]:
        return {"index": self.index}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.index = state["index"]


def make(output: Path, steps: int, source: Copies | None = None, every: int = 4) -> Trainer:
    model = HybridModel(TOY, dtype=torch.float32)
    model.init_weights(torch.Generator().manual_seed(0))
    held = Copies()
    held.index = 10_000
    config = TrainerConfig(steps=steps, eval_every=5, checkpoint_every=every, log_every=1)
    return Trainer(
        model,
        source or Copies(),
        held.next_batch(),
        output=output,
        optim=OptimConfig(lr=3e-3, muon_lr=0.01, warmup_steps=3),
        loss=LossConfig(),
        config=config,
    )


def figures(trainer: Trainer) -> list[dict[str, float]]:
    return [{k: v for k, v in f.items() if k != "tokens_per_s"} for f in trainer.progress.train]


def test_loss_falls_and_outputs_are_written(tmp_path: Path) -> None:
    trainer = make(tmp_path, 40)
    assert trainer.run()
    heldout = [f["loss"] for f in trainer.progress.heldout]
    assert heldout[-1] < heldout[0] - 0.5
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    kinds = [json.loads(line)["kind"] for line in lines]
    assert kinds.count("train") == 40 and kinds.count("heldout") == 8
    assert [p.name for p in trainer.checkpoints()] == ["step-000036", "step-000040"]


def test_resumed_run_equals_uninterrupted_run(tmp_path: Path) -> None:
    straight = make(tmp_path / "a", 10)
    straight.run()
    assert make(tmp_path / "b", 10, Copies(interrupt_at=6)).run() is False
    # A crash after the checkpoint at step 4 leaves a partial directory behind.
    (tmp_path / "b" / "step-000009.partial").mkdir()
    resumed = make(tmp_path / "b", 10)
    assert resumed.run()
    assert figures(resumed) == figures(straight)
    for (name, one), (_, other) in zip(
        straight.model.named_parameters(), resumed.model.named_parameters(), strict=True
    ):
        assert torch.equal(one, other), name


def test_run_killed_between_checkpoints_continues_the_same_curve(tmp_path: Path) -> None:
    straight = make(tmp_path / "a", 10)
    straight.run()
    process = multiprocessing.get_context("spawn").Process(target=_killed, args=(tmp_path / "b",))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    resumed = make(tmp_path / "b", 10)
    assert resumed.run()
    assert figures(resumed) == figures(straight)
    assert _metrics(tmp_path / "b") == _metrics(tmp_path / "a")


def _killed(output: Path) -> None:
    torch.set_num_threads(1)
    make(output, 10, Copies(interrupt_at=6, number=signal.SIGKILL)).run()


def _metrics(output: Path) -> list[dict[str, Any]]:
    lines = (output / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(x).items() if k != "tokens_per_s"} for x in lines]


def test_damaged_checkpoint_is_named(tmp_path: Path) -> None:
    trainer = make(tmp_path, 4)
    trainer.run()
    file = tmp_path / "step-000004" / "optimiser.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(CheckpointError, match="step-000004"):
        make(tmp_path, 8).run()


def test_infinite_loss_stops_the_run(tmp_path: Path) -> None:
    trainer = make(tmp_path, 4)
    with torch.no_grad():
        trainer.model.lm_head.weight.fill_(float("nan"))
    with pytest.raises(CheckpointError, match="loss at step 0"):
        trainer.run()
