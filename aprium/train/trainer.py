"""The training loop over packed samples: steps, evaluation, checkpoints, resuming, rolling back.

It does not know which stage it serves: it takes batches of `Sample`s and a model, which may be cut
over processes: then all run the same loop, and the first writes and shows. Under `output`
come checkpoints (see `train/checkpoint.py`), the figures of steps and evaluations as JSON lines in
`metrics.jsonl`, and a page of their curves. Resuming continues bit for bit on the same machine.
"""

import math
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Literal, Protocol

import torch

from aprium.base.config import require_seed
from aprium.base.errors import CheckpointError, ConfigError
from aprium.base.log import get_logger
from aprium.base.records import Sample
from aprium.model.model import HybridModel
from aprium.parallel.collectives import any_true, barrier, total
from aprium.train import checkpoint, shards
from aprium.train.batch import Batch, collate, share_samples
from aprium.train.losses import LossConfig, Losses, Teacher, Whole, compute_losses
from aprium.train.metrics import MetricsFile
from aprium.train.monitor import (
    DivergenceError,
    Spikes,
    StabilityConfig,
    balance_experts,
    expert_loads,
    first_not_finite,
    freeze_routers,
    gradient_norms,
    max_violations,
    policy_figures,
    residual_norms,
)
from aprium.train.optim import (
    OptimConfig,
    build_optimisers,
    last_step,
    schedule_factor,
    set_learning_rates,
)
from aprium.train.parallel import clip_gradients, reshard
from aprium.train.report import TrainingProgress, write_page
from aprium.train.sinks import Sink, flatten, open_sinks

log = get_logger("train")
_MOST_THREADS = 1024
_EVALUATED_TOKENS = 1 << 14  # at a time, unless trainer.micro_tokens says how many


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


class Objective(Protocol):
    """What a step minimises; `compute_losses` is one."""

    def __call__(
        self,
        model: HybridModel,
        batch: Batch,
        config: LossConfig,
        teacher: Teacher | None = None,
        *,
        whole: Whole | None = None,
        recompute: bool = False,
    ) -> Losses:
        """Return the losses of a part of a step (see `compute_losses`)."""
        ...


@dataclass(frozen=True, kw_only=True)
class TrainerConfig:
    """How long to train, how, and how often to look.

    `steps` may be changed when resuming: with the "wsd" schedule that moves the decay. `threads`
    None leaves PyTorch's own choice. `dtype` is that of activations; weights, optimiser and
    gradient sums are float32. A step is run in parts of at most `micro_tokens` tokens, whose
    gradients add up (of all processes together), and so is what is held out; with `recompute` the
    layers' activations are made again for the gradient. With `freeze_router` neither routers nor
    their selection biases change, whatever `loss.bias_rate` says. `sinks` may name "tensorboard"
    and "wandb".
    """

    steps: int
    eval_every: int = 100
    checkpoint_every: int = 200
    log_every: int = 10
    keep_checkpoints: int = 2
    seed: int = 0
    threads: int | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"
    micro_tokens: int | None = None
    recompute: bool = False
    freeze_router: bool = False
    sinks: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Check ranges."""
        for name in ("steps", "eval_every", "checkpoint_every", "log_every", "keep_checkpoints"):
            if getattr(self, name) < 1:
                raise ConfigError(f"trainer.{name} is {getattr(self, name)}: it must be positive")
        require_seed(self.seed, "trainer.seed")
        for name in ("micro_tokens", "threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"trainer.{name} is {value}: it must be positive")
        if self.threads is not None and self.threads > _MOST_THREADS:
            raise ConfigError(
                f"trainer.threads is {self.threads}: it must be at most {_MOST_THREADS}; leave it "
                "out for PyTorch's own choice"
            )

    def use_threads(self) -> None:
        """Let PyTorch and the native kernels compute with `threads`; before either has begun to."""
        if self.threads is not None:
            torch.set_num_threads(self.threads)


@dataclass
class _Progress:
    """What a run has done so far; written into every checkpoint."""

    step: int = 0
    tokens: int = 0
    rollbacks: int = 0
    decay_from: int | None = None  # where a rollback began the decay


class Trainer:
    """Train `model` on batches from `source`, with everything written under `output`.

    `teacher`, one or by domain, is what the model is held to where `loss.policy.distillation` is
    "full"; it is never changed.
    `recipe`, as JSON, is shown on the page and written to `recipe.json` unless it is refused or
    there is nothing left to train. `identity` is what a run cannot change when it is continued, as
    plain values by key; the model's shape always belongs to it.
    `before_step` is told the number of each step before it is computed.
    `objective` stands in the place of the usual loss. `more_figures` adds to those of a step that
    is written down.
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
        teacher: Teacher | None = None,
        stability: StabilityConfig | None = None,
        recipe: str = "",
        identity: Mapping[str, Any] | None = None,
        before_step: Callable[[int], None] | None = None,
        objective: Objective = compute_losses,
        more_figures: Callable[[], Mapping[str, Any]] | None = None,
    ) -> None:
        if (loss.policy.distillation == "full") != (teacher is not None):
            raise ConfigError(
                f"loss.policy.distillation is {loss.policy.distillation!r} and there is "
                f"{'no' if teacher is None else 'a'} teacher in this process: 'full' needs one, "
                "and the other forms take what teachers said from the samples"
            )
        if (stability or StabilityConfig()).action == "anneal" and (
            optim.schedule != "wsd" or not optim.decay_fraction
        ):
            raise ConfigError(
                "stability.action is 'anneal', which begins the decay of the learning rate early: "
                "set optim.schedule to 'wsd' and optim.decay_fraction above 0, or use 'rollback'"
            )
        self.teacher, self.objective = teacher, objective
        self.before_step, self.more_figures = before_step, more_figures
        self.model, self.source, self.heldout = model, source, list(heldout)
        self.mesh = model.mesh
        self.output, self.optim, self.loss, self.config = output, optim, loss, config
        if config.freeze_router:
            freeze_routers(model)
        self.optimisers = build_optimisers(model, optim)
        self.progress = _Progress()
        self.metrics = MetricsFile(output)
        self.stability = stability or StabilityConfig()
        self.spikes = Spikes(self.stability)
        self.recipe = recipe
        self.identity = {"model": asdict(model.config), **(identity or {})}
        self._stop = self._stopped = False
        self._returned_to: int | None = None  # the step of the last rollback's checkpoint
        self._heldout: dict[str, Any] | None = None  # the last evaluation
        self._sinks: list[Sink] = []
        model.compute_dtype = getattr(torch, config.dtype)
        config.use_threads()
        make_output(output)

    @property
    def last_step(self) -> int:
        """At how many steps the run ends."""
        return last_step(self.config.steps, self.optim, self.progress.decay_from)

    def run(self) -> bool:
        """Train to the configured number of steps; return False when asked to stop early.

        SIGINT and SIGTERM finish the step under way, write a checkpoint and return; none is written
        while a loss is too high, since that may be the beginning of a divergence. Raises
        CheckpointError where `output` cannot be written, or for a divergence that is not rolled
        back.
        """
        try:
            return self._run()
        except DivergenceError as error:
            raise CheckpointError(
                f"step {self.progress.step}: {error}: nothing is written of it; resume from the "
                "last checkpoint with a lower learning rate"
            ) from error
        except OSError as error:
            raise CheckpointError(
                f"{self.output} cannot be written or read ({error}): checkpoints are whole; make "
                "room and give the same command again"
            ) from error

    def _run(self) -> bool:
        self.resume()
        if self.mesh.leads:
            self._write_recipe()
            self._check_warmup()
        self._open_sinks()
        if self.stability.action != "stop" and not checkpoint.complete(self.output):
            self.save()  # there must be something to go back to
        handlers = {s: signal.signal(s, self._request_stop) for s in _stop_signals()}
        try:
            with TrainingProgress(self.config.steps, self.progress.step, self.mesh.leads) as bar:
                while self.progress.step < self.last_step and not self._agree_to_stop():
                    self._advance(bar)
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        if self.progress.step >= self.last_step or not self.spikes.num_above:
            self.save()
        return not self._stopped

    def _write_recipe(self) -> None:
        """Write the recipe, unless it has nothing left to train; say what is other than it was."""
        file, step, last = self.output / "recipe.json", self.progress.step, self.last_step
        keys = checkpoint.changed_keys(file, self.recipe) if step and self.recipe else []
        others = f"; other than in {file}: {', '.join(keys)}" if keys else ""
        if step and step >= last:
            log.warning("already at step %d of %d: nothing to train%s", step, last, others)
        elif others:
            log.warning("continued%s", others)
        if self.recipe and (step < last or not file.exists()):
            file.write_text(self.recipe, encoding="utf-8")

    def _check_warmup(self) -> None:
        """Say when the learning rates never reach their peaks."""
        steps, warmup = self.config.steps, self.optim.warmup_steps
        if warmup > steps:
            log.warning(
                "optim.warmup_steps is %d and trainer.steps %d: the learning rates end at %.0f %% "
                "of their peaks; set optim.warmup_steps lower for all of them",
                *(warmup, steps, 100 * steps / warmup),
            )

    def _open_sinks(self) -> None:
        if self.mesh.leads:
            recipe = {"recipe": self.recipe}
            names, step = self.config.sinks, self.progress.step
            self._sinks = open_sinks(names, self.output, recipe, step)

    def _agree_to_stop(self) -> bool:
        """Tell whether any process was asked to stop; all get the same answer."""
        self._stopped = any_true(self._stop, self.mesh.world)
        return self._stopped

    def _request_stop(self, number: int, frame: FrameType | None) -> None:
        self._stop = True

    def _advance(self, bar: TrainingProgress) -> None:
        progress, config = self.progress, self.config
        due = (progress.step + 1) % config.log_every == 0 or progress.step + 1 == self.last_step
        try:
            figures = self.train_step(self.source.next_batch(), monitor=due)
            if figures["loss"]:  # the policy's loss is about 0, and says nothing of this
                self.spikes.see(figures["loss"])
            last = progress.step == self.last_step
            if last or progress.step % config.checkpoint_every == 0:
                self._require_finite()
        except DivergenceError as cause:
            self._recover(cause)
            return
        if due:
            figures |= self.more_figures() if self.more_figures is not None else {}
            self._write_metrics("train", figures)
        if progress.step % config.eval_every == 0 or progress.step == self.last_step:
            if self.heldout:
                self._heldout = self.evaluate()
                self._write_metrics("heldout", self._heldout)
            if self.mesh.leads:
                self.write_page()
        # What may be the beginning of a divergence is nothing to go back to.
        whole = not self.spikes.num_above and progress.step < self.last_step
        if progress.step % config.checkpoint_every == 0 and whole:
            self.save()
        bar.update(progress.step, self.last_step, figures, self._heldout)

    def write_page(self) -> None:
        """Write the page of the run, as far as it is."""
        kinds = ("train", "heldout", "accuracy")
        train, heldout, accuracy = (self.metrics.read(kind) for kind in kinds)
        write_page(train, heldout, self.recipe, self.output, accuracy)

    def _recover(self, cause: DivergenceError) -> None:
        """Go back to a checkpoint, and on with the data after those that diverged."""
        stability, begun = self.stability, self.progress.step
        if stability.action == "stop":
            raise CheckpointError(
                f"step {begun}: {cause}; resume from the last checkpoint with a lower learning "
                "rate, or set stability.action to rollback or anneal"
            )
        if self.progress.rollbacks >= stability.max_rollbacks:
            raise CheckpointError(
                f"step {begun}: {cause}, after {self.progress.rollbacks} rollbacks: lower the "
                "learning rate"
            )
        position = self.source.state_dict()
        rollbacks = self.progress.rollbacks + 1
        self._drop_bad(begun)
        self.resume()
        self._returned_to = self.progress.step
        self.source.load_state_dict(position)
        self.progress.rollbacks = rollbacks
        if stability.action == "anneal" and self.progress.decay_from is None:
            self.progress.decay_from = self.progress.step
        self.spikes = Spikes(stability)
        if self.mesh.leads:
            checkpoint.replace_state(checkpoint.complete(self.output)[-1], self._state())
        self._open_sinks()
        barrier(self.mesh.world)
        event = {"step": self.progress.step, "from_step": begun, "cause": str(cause)}
        self._write_metrics("rollback", event)
        log.warning("step %d: %s; back to step %d", begun, cause, self.progress.step)

    def _drop_bad(self, step: int) -> None:
        """Remove the last checkpoint if the run came back to it, and at `step` diverges again."""
        kept, back = checkpoint.complete(self.output), self._returned_to
        if back is None or len(kept) < 2 or kept[-1].name != f"step-{back:06d}":
            return
        if step - back <= self.stability.patience:
            barrier(self.mesh.world)  # until all have looked
            if self.mesh.leads:
                shutil.rmtree(kept[-1])
                log.warning("%s diverges again at once, and is removed", kept[-1])
            barrier(self.mesh.world)

    def _require_finite(self) -> None:
        """Raise DivergenceError where the last update left a weight that is not finite."""
        where = first_not_finite(self.model)
        if any_true(bool(where), self.mesh.world):
            raise DivergenceError(f"{where or 'a weight of another process'} is not finite")

    def train_step(self, samples: Sequence[Sample], *, monitor: bool = True) -> dict[str, Any]:
        """Take one optimisation step; return its figures, with `monitor` those by layer and role.

        Raises DivergenceError, before anything is changed, where loss or gradient is not finite.
        """
        begin = time.perf_counter()
        progress, config = self.progress, self.config
        if self.before_step is not None:
            self.before_step(progress.step)
        factor = schedule_factor(progress.step, config.steps, self.optim, progress.decay_from)
        set_learning_rates(self.optimisers, factor)
        parts = [self._collate(part) for part in _parts(samples, config.micro_tokens)]
        whole, found = Whole.of(parts, self.loss, self.mesh), list[Losses]()
        with residual_norms(self.model, monitor) as residual:
            for part in parts:
                losses = self.objective(
                    self.model,
                    part,
                    self.loss,
                    self.teacher,
                    whole=whole,
                    recompute=config.recompute,
                )
                losses.total.backward()
                found.append(losses)
        norms = gradient_norms(self.model) if monitor else {}
        grad_norm = clip_gradients(self.model, self.optim.max_grad_norm)
        losses = [f.ce + f.kl + f.mtp + f.balance + f.rl + f.z for f in found]
        if not all(map(math.isfinite, (float(grad_norm), *losses))):
            where = first_not_finite(self.model) or "the loss"
            self._forget_gradients()
            raise DivergenceError(f"{where} is not finite")
        for optimiser in self.optimisers:
            optimiser.step()
        self._forget_gradients()
        loads = expert_loads([r for f in found for r in f.routing], self.mesh.data)
        # It falls with the learning rates, so that the last choices are not moved to and fro; while
        # those are only rising the router has to be held already.
        held = 1.0 if progress.step < self.optim.warmup_steps else factor
        rate = 0.0 if config.freeze_router else self.loss.bias_rate
        balance_experts(self.model, loads, rate * held)
        vios = max_violations(loads)
        tokens = sum(len(sample.tokens) for sample in samples)
        progress.step += 1
        progress.tokens += tokens
        figures: dict[str, Any] = {
            "step": progress.step,
            "tokens": progress.tokens,
            "loss": sum(f.ce for f in found),
            "kl": sum(f.kl for f in found),
            "mtp_loss": sum(f.mtp for f in found),
            "balance": sum(f.balance for f in found),
            "max_vio": max(vios.values(), default=0.0),
            "grad_norm": float(grad_norm),
            "lr_factor": factor,
            "tokens_per_s": tokens / (time.perf_counter() - begin),
        }
        figures |= self._more_figures(samples, found, whole)
        if monitor:
            figures |= {"max_vios": vios, "grad_norms": norms, "residual": residual}
        return figures

    def _more_figures(
        self, samples: Sequence[Sample], found: Sequence[Losses], whole: Whole
    ) -> dict[str, Any]:
        """Return the figures of terms that this step's loss has, and most have not."""
        figures: dict[str, Any] = {}
        if whole.rl:
            names = sorted({sample.domain for sample in samples})
            figures |= policy_figures([f.policy for f in found], names, self.mesh.data)
            figures["rl_loss"] = sum(f.rl for f in found)
        if self.loss.z_weight:
            figures["z_loss"] = sum(f.z for f in found)
        return figures

    def _forget_gradients(self) -> None:
        for optimiser in self.optimisers:
            optimiser.zero_grad(set_to_none=True)

    @torch.no_grad()
    def evaluate(self) -> dict[str, Any]:
        """Return mean held-out cross-entropy per weighted token: in all, and by domain."""
        sums: dict[str, float] = {}
        counts: dict[str, float] = {}
        for part in _parts(self.heldout, self.config.micro_tokens or _EVALUATED_TOKENS):
            batch = self._collate(part)
            losses = compute_losses(self.model, batch, LossConfig(mtp_weight=0.0))
            weights = batch.ce_weight[losses.predicted]
            domains = batch.domains[losses.predicted]
            for i, name in enumerate(batch.domain_names):
                mask = domains == i
                nll = -(losses.logprobs * weights)[mask].sum()
                sums[name] = sums.get(name, 0.0) + float(nll)
                counts[name] = counts.get(name, 0.0) + float(weights[mask].sum())
        reshard(self.model)
        if self.mesh.data.size > 1:
            names = sorted({sample.domain for sample in self.heldout})
            pairs = [[sums.get(name, 0.0), counts.get(name, 0.0)] for name in names]
            pairs = total(torch.tensor(pairs, dtype=torch.float64), self.mesh.data).tolist()
            sums = {name: nll for name, (nll, _) in zip(names, pairs, strict=True)}
            counts = {name: count for name, (_, count) in zip(names, pairs, strict=True)}
        domains_loss = {name: sums[name] / counts[name] for name in sorted(sums) if counts[name]}
        loss = sum(sums.values()) / (sum(counts.values()) or 1.0)
        return {"step": self.progress.step, "loss": loss, "domains": domains_loss}

    def _collate(self, samples: Sequence[Sample]) -> Batch:
        """Pack this process's share of `samples`; every cp process gets at least one token."""
        least = self.mesh.cp.size if self.mesh.world.size > 1 else 0
        return collate(share_samples(samples, self.mesh.dp), least)

    def save(self) -> Path:
        """Write checkpoint `step-N` and drop the oldest beyond those kept.

        Raises DivergenceError where a weight is not finite.
        """
        self._require_finite()
        if self.mesh.leads:
            self.metrics.flush()
        if self.mesh.world.size > 1:
            final = shards.write(
                self.output, self.progress.step, self.model, self.optimisers, self._state()
            )
        else:
            weights = {name: p.detach() for name, p in self.model.named_parameters()}
            tensors = shards.optimiser_tensors(self.model, self.optimisers)
            step = self.progress.step
            final = checkpoint.write(self.output, step, weights, tensors, self._state())
        if self.mesh.leads:
            for old in checkpoint.complete(self.output)[: -self.config.keep_checkpoints]:
                shutil.rmtree(old)
        barrier(self.mesh.world)
        return final

    def _state(self) -> dict[str, Any]:
        spikes = {"recent": self.spikes.recent, "num_above": self.spikes.num_above}
        return {
            "source": self.source.state_dict(),
            "progress": vars(self.progress),
            "spikes": spikes,
            "identity": self.identity,
        }

    def resume(self) -> None:
        """Continue from the newest checkpoint under `output`, if there is one.

        Raises CheckpointError for a damaged one, or one of another model, optimiser or data.
        """
        found = checkpoint.complete(self.output)
        if found:
            state = shards.read(found[-1], self.model, self.optimisers, self.identity)
            try:
                self.source.load_state_dict(state["source"])
                self.progress = _Progress(**state["progress"])
                self.spikes = Spikes(self.stability, **state["spikes"])
            except (KeyError, TypeError, IndexError) as error:
                raise CheckpointError(
                    f"checkpoint {found[-1]} does not fit this run ({error!r}): it was made from "
                    "other data or by another version; use another output"
                ) from error
        if self.mesh.leads:
            self.metrics.cut(self.progress.step)
            self._heldout = (self.metrics.read("heldout") or [None])[-1]
        if found and self.mesh.leads:
            log.info("resumed from %s", found[-1])

    def _write_metrics(self, kind: str, figures: dict[str, Any]) -> None:
        if not self.mesh.leads:
            return
        if kind != "rollback":
            flat = flatten({k: v for k, v in figures.items() if k != "step"}, kind)
            for sink in self._sinks:
                sink(figures["step"], flat)
        self.metrics.append(kind, figures)


def make_output(output: Path) -> None:
    """Make the directory that a run writes to; raises ConfigError."""
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"output {output} cannot be made: {error.strerror}") from error


def _parts(samples: Sequence[Sample], budget: int | None) -> Iterator[list[Sample]]:
    """Cut samples into parts of at most `budget` tokens, or of one sample, in order."""
    part: list[Sample] = []
    size = 0
    for sample in samples:
        size += len(sample.tokens)
        if part and budget is not None and size > budget:
            yield part
            part, size = [], len(sample.tokens)
        part.append(sample)
    if part:
        yield part


def _stop_signals() -> tuple[signal.Signals, ...]:
    """Signals can only be caught in a process's main thread."""
    import threading

    main = threading.current_thread() is threading.main_thread()
    return (signal.SIGINT, signal.SIGTERM) if main else ()
