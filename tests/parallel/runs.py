"""A few training steps on any mesh: what the processes of the tests do."""

import dataclasses
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from aprium.base.records import Sample
from aprium.model.config import ModelConfig
from aprium.model.model import Gate, HybridModel
from aprium.model.presets import PRESETS
from aprium.parallel.mesh import Mesh, ParallelConfig
from aprium.train.losses import LossConfig
from aprium.train.optim import OptimConfig
from aprium.train.parallel import shard
from aprium.train.trainer import Trainer, TrainerConfig

TOY = PRESETS["toy"]


class Documents:
    """Batches of random documents of many lengths, or of `episodes` to be learnt by credit."""

    def __init__(self, count: int = 7, episodes: bool = False) -> None:
        self.index, self.count, self.episodes = 0, count, episodes

    def next_batch(self) -> Sequence[Sample]:
        rng = random.Random(self.index)
        self.index += 1
        samples = []
        for i in range(self.count):
            tokens = [rng.randint(3, 200) for _ in range(rng.randint(3, 50))]
            weights = [0.0, *(rng.choice((0.0, 1.0, 1.0)) for _ in tokens[1:])]
            domain = ("even", "odd")[i % 2]
            sample = Sample(tokens=tuple(tokens), ce_weight=tuple(weights), domain=domain)
            samples.append(self._played(sample, rng) if self.episodes else sample)
        return samples

    def _played(self, sample: Sample, rng: random.Random) -> Sample:
        """Return `sample` with what is learnt as what was sampled, and none of it as text."""

        def drawn(middle: float, spread: float) -> tuple[float, ...]:
            return tuple(w and rng.uniform(middle - spread, middle + spread) for w in weights)

        weights = sample.ce_weight
        return dataclasses.replace(
            sample,
            ce_weight=(0.0,) * len(weights),
            rl_weight=weights,
            advantage=drawn(0.0, 2.0),
            behaviour_logprob=drawn(-5.6, 0.4),
            prox_logprob=drawn(-5.6, 0.4) if rng.random() < 0.5 else (),
            kl_weight=weights,
            teacher_logprob=drawn(-5.0, 1.0),
        )

    def state_dict(self) -> dict[str, Any]:
        return {"index": self.index}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.index = state["index"]


def make(
    output: Path,
    parallel: ParallelConfig,
    steps: int,
    shape: ModelConfig = TOY,
    source: Documents | None = None,
    optim: dict[str, Any] | None = None,
    loss: dict[str, Any] | None = None,
    trainer: dict[str, Any] | None = None,
) -> Trainer:
    model = HybridModel(shape, dtype=torch.float32, mesh=Mesh.from_environment(parallel))
    model.init_weights(torch.Generator().manual_seed(0))
    shard(model)
    held = Documents()
    held.index = 10_000
    return Trainer(
        model,
        source or Documents(),
        held.next_batch(),
        output=output,
        optim=OptimConfig(**{"lr": 1e-3, "muon_lr": 0.005, "warmup_steps": 2, **(optim or {})}),
        loss=LossConfig(**{"balance_weight": 1e-2, **(loss or {})}),
        config=TrainerConfig(steps=steps, eval_every=steps, log_every=1, **(trainer or {})),
    )


ADAMW = {"muon_lr": None, "lr": 1e-4}


def take_steps(trainer: Trainer, count: int) -> list[dict[str, float]]:
    """Resume, take `count` steps and write a checkpoint; return the figures."""
    trainer.resume()
    figures = [trainer.train_step(trainer.source.next_batch()) for _ in range(count)]
    trainer.save()
    return figures


def train(
    output: Path, parallel: dict[str, int], steps: int = 3, crowd: bool = False, **rest: Any
) -> dict[str, list[dict[str, Any]]]:
    """Take steps and evaluate; `crowd` sends all tokens to the first half of the experts."""
    trainer = make(output, ParallelConfig(**parallel), steps, **rest)
    if crowd:
        for module in trainer.model.modules():
            if isinstance(module, Gate):
                bias = module.e_score_correction_bias
                with torch.no_grad():
                    bias[: len(bias) // 2] += 100.0
    return {"train": take_steps(trainer, steps), "heldout": [trainer.evaluate()]}


def one_kv_head() -> ModelConfig:
    """Return a shape with a single KV head, which tp processes must share."""
    return dataclasses.replace(TOY, num_kv_heads=1)


def is_close(found: dict[str, Any], expected: dict[str, Any], rel: float = 1e-5) -> None:
    """Compare all figures of `train` but the time."""
    for kind in ("train", "heldout"):
        for one, other in zip(found[kind], expected[kind], strict=True):
            one, other = ({**figures, "tokens_per_s": 0} for figures in (one, other))
            one.pop("residual", None), other.pop("residual", None)  # of a process's own tokens
            for domain, values in one.pop("policy_domains", {}).items():
                assert values == pytest.approx(other["policy_domains"][domain], rel=rel)
            other.pop("policy_domains", None)
            for nested in ("domains", "max_vios", "grad_norms", "policy"):
                assert one.pop(nested, {}) == pytest.approx(other.pop(nested, {}), rel=rel)
            # The policy's loss is a sum of both signs, of which little may be left.
            assert one == pytest.approx(other, rel=rel, abs=1e-6)
