"""Pretraining from a recipe: a TOML file in, a checkpoint in the public layout out.

Under `output`: the resolved recipe, metrics, loss curve and resumable checkpoints while it runs,
then `model/`, which every other command opens. The same recipe and output continue a run that
was stopped, with any number of processes.
"""

import json
import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from aprium.base.config import from_dict, load_toml, to_dict
from aprium.base.errors import CheckpointError, ConfigError
from aprium.base.log import get_logger
from aprium.checkpoint.save import save_checkpoint
from aprium.data.loader import Loader
from aprium.data.sources import DataConfig, Text, heldout_samples
from aprium.envs import families
from aprium.model.config import ModelConfig
from aprium.model.model import HybridModel
from aprium.model.presets import preset
from aprium.parallel.collectives import barrier
from aprium.parallel.mesh import Mesh, ParallelConfig
from aprium.text.chat import ChatTemplate
from aprium.text.tokenizer import Tokenizer
from aprium.train import precision
from aprium.train.losses import LossConfig
from aprium.train.monitor import StabilityConfig
from aprium.train.optim import OptimConfig
from aprium.train.parallel import shard
from aprium.train.precision import PrecisionConfig
from aprium.train.shards import load
from aprium.train.trainer import Trainer, TrainerConfig, make_output

log = get_logger("train")
# What an export takes from the tokenizer's directory, which may be a whole checkpoint.
_TEXT_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "generation_config.json",
    "chat_template.jinja",
)


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """A recipe.

    `preset` names the shape and `model` replaces fields of it. `tokenizer` is a directory with
    the tokenizer and chat template; its files go into the exported checkpoint. Paths are relative
    to the working directory.
    """

    output: Path
    tokenizer: Path
    preset: str
    data: DataConfig
    trainer: TrainerConfig
    tokens_per_step: int = 4096
    model: dict[str, Any] = field(default_factory=dict)
    optim: OptimConfig = field(default_factory=OptimConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    stability: StabilityConfig = field(default_factory=StabilityConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)

    def __post_init__(self) -> None:
        """Check that a step can hold the longest sample."""
        if self.tokens_per_step < self.data.max_length:
            raise ConfigError(
                f"tokens_per_step is {self.tokens_per_step}: it must be at least "
                f"data.max_length, {self.data.max_length}"
            )


def run(recipe: str | Path, overrides: Mapping[str, Any] | None = None) -> Path | None:
    """Train by the TOML file `recipe`, continuing where an earlier run of it stopped.

    `overrides` maps dotted keys ("trainer.steps") to values. Returns the directory of the exported
    checkpoint, or None when asked to stop before the end. Raises ConfigError, DataError or
    CheckpointError.
    """
    config = load_toml(PretrainConfig, recipe, overrides)
    mesh = Mesh.from_environment(config.parallel)
    try:
        return _run(config, mesh)
    finally:
        mesh.close()


def _run(config: PretrainConfig, mesh: Mesh) -> Path | None:
    text = Text(Tokenizer.load(config.tokenizer), ChatTemplate.load(config.tokenizer), families)
    shape = _shape(config, text.tokenizer)
    model = HybridModel(shape, dtype=torch.float32, mesh=mesh)
    model.init_weights(torch.Generator().manual_seed(config.trainer.seed))
    whole = (model.plan.whole_shape(name, p.shape) for name, p in model.named_parameters())
    count = sum(math.prod(size) for size in whole)
    if mesh.leads:
        log.info("training %s parameters; everything is written to %s", f"{count:,}", config.output)
    rounding = precision.attach(model, config.precision)
    if rounding is not None and mesh.world.size > 1:
        raise ConfigError(
            f"[precision] emulates NVFP4 and this run has {mesh.world.size} processes: train with "
            "one, or leave the table out"
        )
    shard(model)
    if rounding is not None:
        log.info("%d matrices are trained in NVFP4, emulated", len(rounding.names))
    trainer = Trainer(
        model,
        Loader(config.data, text, tokens_per_batch=config.tokens_per_step),
        heldout_samples(config.data, text),
        output=config.output,
        optim=config.optim,
        loss=config.loss,
        config=config.trainer,
        stability=config.stability,
        recipe=recipe_text(config),
        before_step=rounding.begin if rounding is not None else None,
    )
    if not trainer.run():
        if mesh.leads:
            log.info("stopped at step %d: the same command continues", trainer.progress.step)
        return None
    last, directory = trainer.save(), config.output / "model"
    if mesh.leads:
        export(whole_model(model, last), config.tokenizer, directory)
    barrier(mesh.world)
    return directory


def whole_model(model: HybridModel, directory: Path) -> HybridModel:
    """Return `model` on one process, read back from its checkpoint where it is cut over many."""
    if model.mesh.world.size == 1:
        return model
    whole = HybridModel(model.config, dtype=torch.float32)
    load(directory, whole)
    return whole


def recipe_text(config: Any) -> str:
    """Return a resolved recipe as it is shown and written."""
    return json.dumps(to_dict(config), indent=2) + "\n"


def write_recipe(config: Any, output: Path) -> str:
    """Write the resolved recipe under `output`, and return its text; raises ConfigError."""
    text = recipe_text(config)
    make_output(output)
    try:
        (output / "recipe.json").write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"output {output} cannot be written: {error.strerror}") from error
    return text


def write_json(file: Path, data: Any) -> None:
    """Write what a run measured; raises CheckpointError."""
    try:
        file.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise CheckpointError(f"cannot write {file}: {error.strerror}") from error


def export(model: HybridModel, tokenizer: Path, directory: Path) -> Path:
    """Write `model` as BF16 in the public layout, with the files of directory `tokenizer`."""
    save_checkpoint(model, directory, dtype=torch.bfloat16)
    for name in _TEXT_FILES:
        if (tokenizer / name).exists():
            shutil.copyfile(tokenizer / name, directory / name)
    return directory


def _shape(config: PretrainConfig, tokenizer: Tokenizer) -> ModelConfig:
    shape = from_dict(ModelConfig, to_dict(preset(config.preset)) | config.model, where="model")
    if shape.vocab_size < tokenizer.vocab_size:
        raise ConfigError(
            f"model.vocab_size is {shape.vocab_size}: the tokenizer in {config.tokenizer} has "
            f"{tokenizer.vocab_size} tokens"
        )
    return shape
