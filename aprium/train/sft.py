"""Fine-tuning from a checkpoint by a recipe: conversations, more text, or longer documents.

All weights are trained, in float32, and written as BF16 in the public layout. Supervised
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

from aprium.base.config import load_toml, to_dict
from aprium.base.errors import CheckpointError, ConfigError, UnsupportedError
from aprium.base.log import get_logger
from aprium.base.records import Sample
from aprium.checkpoint.hub import resolve
from aprium.checkpoint.load import load_checkpoint
from aprium.data.loader import Alternation, Loader
from aprium.data.sources import DataConfig, Text, heldout_samples
from aprium.envs import families
from aprium.model.model import HybridModel
from aprium.text.chat import ChatTemplate
from aprium.text.tokenizer import Tokenizer
from aprium.train.losses import LossConfig
from aprium.train.optim import OptimConfig
from aprium.train.pretrain import export
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
    `lora` trains adapters in place of the weights. A longer `max_length` than the checkpoint's
    context makes that longer. Paths are relative to the working directory.
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
    lora: dict[str, Any] | None = None

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
        if self.lora is not None:
            raise UnsupportedError(
                "[lora] asks for adapters, which cannot be trained yet: leave the table out to "
                "train all weights"
            )

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
    config = load_toml(SftConfig, recipe, overrides)
    path = resolve(config.checkpoint)
    text = read_text(path)
    longest = max(data.max_length for data in config.mixtures().values())
    model = open_model(path, text, context=longest)
    loaders = [
        Loader(data, text, tokens_per_batch=config.tokens_per_step)
        for data in config.mixtures().values()
    ]
    source: BatchSource = loaders[0]
    if config.alternate:
        source = Alternation(loaders[0], loaders[1], config.alternate.share)
    heldout = [s for data in config.mixtures().values() for s in heldout_samples(data, text)]
    optim = config.optim
    if config.optimizer == "adamw":
        optim = dataclasses.replace(optim, muon_lr=None)
    write_recipe(config, config.output)
    trainer = Trainer(
        model,
        source,
        heldout,
        output=config.output,
        optim=optim,
        loss=config.loss,
        config=config.trainer,
    )
    before = _measure_before(trainer, heldout)
    if not trainer.run():
        log.info("stopped at step %d: the same command continues", trainer.progress.step)
        return None
    if heldout:
        after = trainer.evaluate()
        _write_json(config.output / "heldout.json", {"before": before, "after": after})
        log.info("held-out loss: %.4f before, %.4f after", before["loss"], after["loss"])
    return export(model, path, config.output / "model")


def open_model(path: Path, text: Text, *, context: int = 0) -> HybridModel:
    """Load checkpoint `path` in float32 to be trained, with room for `context` tokens.

    Raises CheckpointError for a quantised one, or one with fewer tokens than `text` has.
    """
    checkpoint = load_checkpoint(path, load="memory")
    if checkpoint.quant.formats:
        raise CheckpointError(
            f"{path} is quantised: fine-tune the BF16 checkpoint it was made of, or decode it with "
            "aprium convert --to bf16"
        )
    if checkpoint.config.vocab_size < text.tokenizer.vocab_size:
        raise CheckpointError(
            f"{path}: the model has {checkpoint.config.vocab_size} tokens and its tokenizer "
            f"{text.tokenizer.vocab_size}: give it the tokenizer it was trained with"
        )
    longest = max(context, checkpoint.config.max_position_embeddings)
    shape = dataclasses.replace(checkpoint.config, max_position_embeddings=longest)
    model = HybridModel(shape, dtype=torch.float32)
    model.load_state_dict(checkpoint.model.state_dict())
    return model


def read_text(path: Path) -> Text:
    """Return what samples are made with, from the files of checkpoint `path`."""
    return Text(Tokenizer.load(path), ChatTemplate.load(path), families)


def write_recipe(config: Any, output: Path) -> None:
    """Write the resolved recipe under `output`."""
    output.mkdir(parents=True, exist_ok=True)
    _write_json(output / "recipe.json", to_dict(config))


def _measure_before(trainer: Trainer, heldout: Sequence[Sample]) -> dict[str, Any]:
    """Return the held-out loss of the checkpoint; a run that is continued remembers it."""
    file = trainer.output / "before.json"
    if not heldout:
        return {}
    if not (file.exists() and trainer.checkpoints()):
        _write_json(file, trainer.evaluate())
    return json.loads(file.read_text(encoding="utf-8"))


def _write_json(file: Path, data: Any) -> None:
    file.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
