"""The training loop over packed samples: steps, evaluation, checkpoints, resuming.

It does not know which stage it serves: it takes batches of `Sample`s and a model. A checkpoint is
a directory `step-N` with the weights, the optimisers' tensors, the source's position and the
figures so far; it is written beside its name and renamed into place, so that a fault at any moment
leaves the previous one whole. Resuming continues bit for bit on the same machine.
"""

import json
import shutil
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from aprium.base.errors import CheckpointError, ConfigError
from aprium.base.log import get_logger
from aprium.base.records import Sample
from aprium.model.model import HybridModel
from aprium.train.batch import collate
from aprium.train.losses import LossConfig, balance_experts, compute_losses
from aprium.train.optim import OptimConfig, build_optimisers, set_learning_rates
from aprium.train.report import TrainingProgress, plot_losses

log = get_logger("train")


class BatchSource(Protocol):
    """Where batches come from: an endless, deterministic, resumable stream."""

    def next_batch(self) -> Sequence[Sample]:
        """Return the samples of the next step."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Return the position, as plain values, before the batch to come."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a position that `state_dict` returned."""
        ...


@dataclass(frozen=True, kw_only=True)
class TrainerConfig:
    """How long to train and how often to look.

    `steps` may be changed when resuming: with the "wsd" schedule that moves the decay. `threads`
    None leaves PyTorch's own choice.
    """

    steps: int
    eval_every: int = 100
    checkpoint_every: int = 200
    log_every: int = 10
    keep_checkpoints: int = 2
    seed: int = 0
    threads: int | None = None

    def __post_init__(self) -> None:
        """Check ranges."""
        for name in ("steps", "eval_every", "checkpoint_every", "log_every", "keep_checkpoints"):
            if getattr(self, name) < 1:
                raise ConfigError(f"trainer.{name} is {getattr(self, name)}: it must be positive")


@dataclass
class _Progress:
    """What a run has done so far; written into every checkpoint."""

    step: int = 0
    tokens: int = 0
    train: list[dict[str, float]] = field(default_factory=list)
    heldout: list[dict[str, Any]] = field(default_factory=list)


class Trainer:
    """Train `model` on batches from `source`, with everything written under `output`.

    `teacher` is what the model is held to where `loss.kl_weight` is not 0; it is never changed.
    """

    def __init__(
        self,
        model: HybridModel,
        source: BatchSource,
        heldout: Sequence[Sample],
        *,
        output: Path,
        optim: OptimConfig,
        loss: LossConfig,
        config: TrainerConfig,
        teacher: HybridModel | None = None,
    ) -> None:
        if loss.kl_weight and teacher is None:
            raise ConfigError("loss.kl_weight asks for a teacher and there is none: set it to 0")
        self.teacher = teacher
        self.model, self.source, self.heldout = model, source, list(heldout)
        self.output, self.optim, self.loss, self.config = output, optim, loss, config
        self.optimisers = build_optimisers(model, optim)
        self.progress = _Progress()
        self._stop = False
        output.mkdir(parents=True, exist_ok=True)

    def run(self) -> bool:
        """Train to the configured number of steps; return False when asked to stop early.

        SIGINT and SIGTERM finish the step under way, write a checkpoint and return.
        """
        if self.config.threads is not None:
            torch.set_num_threads(self.config.threads)
        self.resume()
        handlers = {s: signal.signal(s, self._request_stop) for s in _stop_signals()}
        try:
            with TrainingProgress(self.config.steps, self.progress.step) as bar:
                while self.progress.step < self.config.steps and not self._stop:
                    self._advance(bar)
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        self.save()
        return not self._stop

    def _request_stop(self, number: int, frame: FrameType | None) -> None:
        self._stop = True

    def _advance(self, bar: TrainingProgress) -> None:
        progress, config = self.progress, self.config
        figures = self.train_step(self.source.next_batch())
        if progress.step % config.log_every == 0 or progress.step == config.steps:
            progress.train.append(figures)
            self._write_metrics("train", figures)
        if progress.step % config.eval_every == 0 or progress.step == config.steps:
            result = self.evaluate()
            progress.heldout.append(result)
            self._write_metrics("heldout", result)
            plot_losses(progress.train, progress.heldout, self.output / "loss.png")
        if progress.step % config.checkpoint_every == 0 and progress.step < config.steps:
            self.save()
        heldout = progress.heldout[-1]["loss"] if progress.heldout else None
        bar.update(progress.step, figures, heldout)

    def train_step(self, samples: Sequence[Sample]) -> dict[str, float]:
        """Take one optimisation step; return its figures. Raises on a loss that is not finite."""
        begin = time.perf_counter()
        progress = self.progress
        batch = collate(samples)
        factor = set_learning_rates(self.optimisers, progress.step, self.config.steps, self.optim)
        losses = compute_losses(self.model, batch, self.loss, self.teacher)
        if not torch.isfinite(losses.total):
            raise CheckpointError(
                f"the loss at step {progress.step} is {losses.total.item()}: resume from the last "
                "checkpoint with a lower learning rate"
            )
        losses.total.backward()
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        grad_norm = torch.nn.utils.clip_grad_norm_(parameters, self.optim.max_grad_norm)
        if not torch.isfinite(grad_norm):
            raise CheckpointError(
                f"the gradient at step {progress.step} is not finite: resume from the last "
                "checkpoint with a lower learning rate"
            )
        for optimiser in self.optimisers:
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        max_vio = balance_experts(self.model, losses.routing, self.loss.bias_rate)
        progress.step += 1
        progress.tokens += batch.layout.num_tokens
        return {
            "step": progress.step,
            "tokens": progress.tokens,
            "loss": losses.ce,
            "kl": losses.kl,
            "mtp_loss": losses.mtp,
            "balance": losses.balance,
            "max_vio": max_vio,
            "grad_norm": float(grad_norm),
            "lr_factor": factor,
            "tokens_per_s": batch.layout.num_tokens / (time.perf_counter() - begin),
        }

    @torch.no_grad()
    def evaluate(self) -> dict[str, Any]:
        """Return mean held-out cross-entropy per weighted token: in all, and by domain."""
        sums: dict[str, float] = {}
        counts: dict[str, float] = {}
        for begin in range(0, len(self.heldout), 32):
            batch = collate(self.heldout[begin : begin + 32])
            losses = compute_losses(self.model, batch, LossConfig(mtp_weight=0.0))
            weights = batch.ce_weight[losses.predicted]
            domains = batch.domains[losses.predicted]
            for i, name in enumerate(batch.domain_names):
                mask = domains == i
                nll = -(losses.logprobs * weights)[mask].sum()
                sums[name] = sums.get(name, 0.0) + float(nll)
                counts[name] = counts.get(name, 0.0) + float(weights[mask].sum())
        domains_loss = {name: sums[name] / max(counts[name], 1.0) for name in sorted(sums)}
        total = sum(sums.values()) / max(sum(counts.values()), 1.0)
        return {"step": self.progress.step, "loss": total, "domains": domains_loss}

    def save(self) -> Path:
        """Write checkpoint `step-N` atomically and drop the oldest beyond those kept."""
        final = self.output / f"step-{self.progress.step:06d}"
        if final.exists():
            return final
        partial = self.output / f"{final.name}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        weights = {name: p.detach() for name, p in self.model.named_parameters()}
        save_file(weights, partial / "model.safetensors")
        save_file(self._optimiser_tensors(), partial / "optimiser.safetensors")
        state = {"source": self.source.state_dict(), "progress": vars(self.progress)}
        (partial / "state.json").write_text(json.dumps(state))
        partial.rename(final)
        for old in self.checkpoints()[: -self.config.keep_checkpoints]:
            shutil.rmtree(old)
        return final

    def checkpoints(self) -> list[Path]:
        """Return the complete checkpoints under `output`, oldest first."""
        return sorted(p for p in self.output.glob("step-*") if not p.name.endswith(".partial"))

    def resume(self) -> None:
        """Continue from the newest checkpoint under `output`, if there is one."""
        found = self.checkpoints()
        if not found:
            return
        try:
            weights = load_file(found[-1] / "model.safetensors")
            tensors = load_file(found[-1] / "optimiser.safetensors")
            state = json.loads((found[-1] / "state.json").read_text())
        except (OSError, ValueError, SafetensorError) as error:
            raise CheckpointError(
                f"checkpoint {found[-1]} cannot be read ({error}): delete it to resume from the "
                "one before"
            ) from error
        self.model.load_state_dict(weights)
        self._restore_optimisers(tensors)
        self.source.load_state_dict(state["source"])
        self.progress = _Progress(**state["progress"])
        self._forget_metrics_after(self.progress.step)
        log.info("resumed from %s", found[-1])

    def _slots(self) -> list[tuple[str, torch.optim.Optimizer, torch.nn.Parameter]]:
        names = {id(p): name for name, p in self.model.named_parameters()}
        return [
            (names[id(p)], optimiser, p)
            for optimiser in self.optimisers
            for group in optimiser.param_groups
            for p in group["params"]
        ]

    def _optimiser_tensors(self) -> dict[str, Tensor]:
        return {
            f"{name}/{key}": value.contiguous()
            for name, optimiser, p in self._slots()
            for key, value in optimiser.state[p].items()
        }

    def _restore_optimisers(self, tensors: dict[str, Tensor]) -> None:
        by_name: dict[str, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            name, _, leaf = key.rpartition("/")
            by_name.setdefault(name, {})[leaf] = value
        for name, optimiser, p in self._slots():
            optimiser.state[p] = by_name.get(name, {})

    def _forget_metrics_after(self, step: int) -> None:
        """Drop the lines of steps that a killed run took after its last checkpoint."""
        file = self.output / "metrics.jsonl"
        lines = file.read_text().splitlines(keepends=True) if file.exists() else []
        kept = [line for line in lines if line.endswith("}\n") and json.loads(line)["step"] <= step]
        partial = file.with_suffix(".partial")
        partial.write_text("".join(kept))
        partial.replace(file)

    def _write_metrics(self, kind: str, figures: dict[str, Any]) -> None:
        with (self.output / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"kind": kind, **figures}) + "\n")


def _stop_signals() -> tuple[signal.Signals, ...]:
    """Signals can only be caught in a process's main thread."""
    import threading

    main = threading.current_thread() is threading.main_thread()
    return (signal.SIGINT, signal.SIGTERM) if main else ()
