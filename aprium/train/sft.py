"""Fine-tuning from a checkpoint by a recipe: conversations, more text, or longer documents.

All weights are trained, in float32, and written as BF16 in the public layout; or, with `[lora]`,
adapters beside frozen weights in any format, written as PEFT's files. Supervised
fine-tuning and long-context extension are the same stage with other data: with `[alternate]` a
share of the steps draws from a second mixture, so that two lengths never meet in a step. Held-out
loss is measured before and after. The same recipe and output continue a run that was stopped.
Source: docs/training.md.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from aprium.base.config import load_toml
from aprium.base.errors import CheckpointError, ConfigError
from aprium.base.log import get_logger
from aprium.base.records import Sample
from aprium.checkpoint.hub import resolve
from aprium.checkpoint.load import load_checkpoint
from aprium.data.loader import Alternation, Loader
from aprium.data.sources import DataConfig, Text, heldout_samples
from aprium.envs import families
from aprium.model.model import HybridModel
from aprium.parallel.collectives import barrier
from aprium.parallel.mesh import Mesh, ParallelConfig
from aprium.text.chat import ChatTemplate
from aprium.text.tokenizer import Tokenizer
from aprium.train import checkpoint, lora, precision
from aprium.train.lora import LoraConfig
from aprium.train.losses import LossConfig
from aprium.train.monitor import StabilityConfig
from aprium.train.optim import OptimConfig
from aprium.train.parallel import shard
from aprium.train.precision import PrecisionConfig
from aprium.train.pretrain import export, recipe_text, whole_model, write_json
from aprium.train.shards import fill
from aprium.train.trainer import BatchSource, Trainer, TrainerConfig

log = get_logger("train")


@dataclass(frozen=True, kw_only=True)
class AlternateConfig:
    """A second mixture, of which `share` of the steps are made."""

    share: float
    data: DataConfig


@dataclass(frozen=True, kw_only=True)
class SftConfig:
    """A recipe.

    `checkpoint` is a directory, a hub id or pico; its tokenizer and chat template are used.
    `optimizer` "adamw" trains everything with `optim.lr`, "muon" matrices with `optim.muon_lr`.
    `lora` trains adapters beside the weights, which may then be quantised. Without it, a longer
    `max_length` than the checkpoint's context makes that longer. Paths are relative to the working
    directory.
    """

    output: Path
    data: DataConfig
    trainer: TrainerConfig
    checkpoint: str = "pico"
    tokens_per_step: int = 4096
    optimizer: Literal["adamw", "muon"] = "adamw"
    alternate: AlternateConfig | None = None
    optim: OptimConfig = field(
        default_factory=lambda: OptimConfig(lr=1e-4, schedule="cosine", final_fraction=0.1)
    )
    loss: LossConfig = field(default_factory=LossConfig)
    stability: StabilityConfig = field(default_factory=StabilityConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    lora: LoraConfig | None = None
    parallel: ParallelConfig = field(default_factory=ParallelConfig)

    def __post_init__(self) -> None:
        """Check that a step can hold the longest sample, and that nothing is asked in vain."""
        for name, data in self.mixtures().items():
            if self.tokens_per_step < data.max_length:
                raise ConfigError(
                    f"tokens_per_step is {self.tokens_per_step}: it must be at least "
                    f"{name}.max_length, {data.max_length}"
                )
        if self.alternate and not 0 < self.alternate.share < 1:
            raise ConfigError(
                f"alternate.share is {self.alternate.share}: it must lie between 0 and 1; leave "
                "the table out for one mixture"
            )
        if self.lora is not None and self.optimizer == "muon":
            raise ConfigError(
                "optimizer is muon, which is for whole matrices: train the adapters of [lora] with "
                "adamw"
            )
        default = OptimConfig.muon_lr
        if self.optimizer == "adamw" and self.optim.muon_lr not in (None, default):
            raise ConfigError(
                f"optim.muon_lr is {self.optim.muon_lr} and optimizer is adamw, which has no use "
                "for it: set optimizer to muon, or leave it out"
            )
        if self.lora is not None and self.precision.recipe != "bf16":
            raise ConfigError("[lora] and [precision] cannot both be asked for: leave one out")

    def mixtures(self) -> dict[str, DataConfig]:
        """Return the mixtures by their dotted keys."""
        found = {"data": self.data}
        return found | ({"alternate.data": self.alternate.data} if self.alternate else {})


def run(recipe: str | Path, overrides: Mapping[str, Any] | None = None) -> Path | None:
    """Fine-tune by the TOML file `recipe`, continuing where an earlier run of it stopped.

    `overrides` maps dotted keys ("trainer.steps") to values. Returns the directory of the exported
    checkpoint, or None when asked to stop before the end. Raises ConfigError, DataError or
    CheckpointError.
    """
    return run_config(load_toml(SftConfig, recipe, overrides))


def run_config(config: SftConfig) -> Path | None:
    """Fine-tune as `config` says; see `run`."""
    mesh = Mesh.from_environment(config.parallel)
    try:
        return _run(config, mesh)
    finally:
        mesh.close()


def _run(config: SftConfig, mesh: Mesh) -> Path | None:
    if mesh.world.size > 1 and (config.lora is not None or config.precision.recipe != "bf16"):
        raise ConfigError(
            f"[lora] and [precision] take one process and this run has {mesh.world.size}: start "
            "it alone, or leave the table out"
        )
    path = resolve(config.checkpoint)
    text = read_text(path)
    longest = max(data.max_length for data in config.mixtures().values())
    model = open_model(path, text, context=longest, frozen=config.lora is not None, mesh=mesh)
    adapter = lora.attach(model, config.lora) if config.lora is not None else None
    rounding = precision.attach(model, config.precision)
    shard(model)
    loaders = [
        Loader(data, text, tokens_per_batch=config.tokens_per_step)
        for data in config.mixtures().values()
    ]
    source: BatchSource = loaders[0]
    if config.alternate:
        source = Alternation(loaders[0], loaders[1], config.alternate.share)
    heldout = [s for data in config.mixtures().values() for s in heldout_samples(data, text)]
    changed = adapter or rounding
    trainer = Trainer(
        model,
        source,
        heldout,
        output=config.output,
        optim=_optim(config),
        loss=config.loss if adapter is None else dataclasses.replace(config.loss, bias_rate=0.0),
        config=config.trainer,
        stability=config.stability,
        recipe=recipe_text(config),
        identity=identity(path, config.lora, mesh),
        before_step=changed.begin if changed is not None else None,
    )
    before = _measure_before(trainer, heldout)
    if not trainer.run():
        if mesh.leads:
            log.info("stopped at step %d: the same command continues", trainer.progress.step)
        return None
    after = trainer.evaluate() if heldout else {}
    if heldout and mesh.leads:
        write_json(config.output / "heldout.json", {"before": before, "after": after})
        log.info("held-out loss: %.4f before, %.4f after", before["loss"], after["loss"])
    if adapter is not None:
        lora.save(adapter, config.output / "adapter", base=config.checkpoint)
        return config.output / "adapter"
    last, directory = trainer.save(), config.output / "model"
    if mesh.leads:
        export(whole_model(model, last), path, directory)
    barrier(mesh.world)
    return directory


def _optim(config: SftConfig) -> OptimConfig:
    if config.optimizer == "adamw":
        return dataclasses.replace(config.optim, muon_lr=None)
    return config.optim


def open_model(
    path: Path,
    text: Text,
    *,
    context: int = 0,
    frozen: bool = False,
    mesh: Mesh | None = None,
) -> HybridModel:
    """Load checkpoint `path` in float32 to be trained, with room for `context` tokens.

    A `frozen` one, which is only to bear adapters, stays in the formats of its file. On a `mesh`
    each process keeps its part; until then it has the whole in the file's own formats. Raises
    CheckpointError for one that is quantised otherwise, or has fewer tokens than `text`.
    """
    found = load_checkpoint(path, load="memory")
    if found.quant.formats and not frozen:
        raise CheckpointError(
            f"{path} is quantised: fine-tune the BF16 checkpoint it was made of, decode it with "
            "aprium convert --to bf16, or train adapters beside it with a [lora] table"
        )
    if found.config.vocab_size < text.tokenizer.vocab_size:
        raise CheckpointError(
            f"{path}: the model has {found.config.vocab_size} tokens and its tokenizer "
            f"{text.tokenizer.vocab_size}: give it the tokenizer it was trained with"
        )
    if frozen:
        return found.model
    longest = max(context, found.config.max_position_embeddings)
    shape = dataclasses.replace(found.config, max_position_embeddings=longest)
    model = HybridModel(shape, dtype=torch.float32, mesh=mesh)
    fill(model, dict(found.model.named_parameters()))
    return model


def identity(path: Path, adapter: LoraConfig | None, mesh: Mesh) -> dict[str, Any]:
    """Return what a run that starts from checkpoint `path` cannot change when it is continued."""
    table = dataclasses.asdict(adapter) if adapter is not None else None
    return {"lora": table, "digest of checkpoint": checkpoint.digest_weights(path, mesh.world)}


def read_text(path: Path) -> Text:
    """Return what samples are made with, from the files of checkpoint `path`."""
    return Text(Tokenizer.load(path), ChatTemplate.load(path), families)


def _measure_before(trainer: Trainer, heldout: Sequence[Sample]) -> dict[str, Any]:
    """Return the held-out loss of the checkpoint; a run that is continued remembers it."""
    file = trainer.output / "before.json"
    if not heldout:
        return {}
    if not (file.exists() and checkpoint.complete(trainer.output)):
        figures = trainer.evaluate()
        if trainer.mesh.leads:
            write_json(file, figures)
        barrier(trainer.mesh.world)
    return json.loads(file.read_text(encoding="utf-8"))
