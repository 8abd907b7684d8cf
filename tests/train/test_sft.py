"""Fine-tuning from a checkpoint: recipe to opened result, two lengths in turns, refusals."""

import dataclasses
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from aprium.base.config import load_toml
from aprium.base.errors import CheckpointError, ConfigError
from aprium.base.records import Sample
from aprium.checkpoint.load import load_checkpoint
from aprium.checkpoint.save import save_checkpoint
from aprium.model.presets import PRESETS
from aprium.quantize import pipeline, recipes
from aprium.train import lora
from aprium.train.optim import schedule_factor
from aprium.train.sft import SftConfig, open_model, read_text, run
from aprium.train.trainer import Trainer
from tests.family import write_generation_config, write_tokenizer
from tests.model.test_transformers import random_model

RECIPES = Path(__file__).parents[2] / "recipes"
SHAPE = dataclasses.replace(PRESETS["toy"], vocab_size=512)
RECIPE = """
output = "{0}/out"
checkpoint = "{0}/start"
tokens_per_step = 256

[trainer]
steps = 6

[optim]
lr = 3e-3
warmup_steps = 0
schedule = "cosine"

[data]
max_length = 200
open_packs = 2
shuffled_packs = 1

[[data.sources]]
kind = "chat"
name = "chat"
path = "{0}/chat.jsonl"
heldout = "{0}/chat.jsonl"
"""
ALTERNATE = """
[alternate]
share = 0.25

[alternate.data]
max_length = 40

[[alternate.data.sources]]
kind = "text"
name = "short"
path = "{0}/chat.jsonl"
field = "note"
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    return write_recipe(tmp_path)


def write_recipe(tmp_path: Path) -> Path:
    write_tokenizer(tmp_path / "start")
    write_generation_config(tmp_path / "start")
    save_checkpoint(random_model(SHAPE, 0), tmp_path / "start", dtype=torch.bfloat16)
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"what is {i}?"},
                {"role": "assistant", "content": "the quick brown fox", "reasoning": "lazy dog"},
            ],
            "note": f"number {i} " * 9,
        }
        for i in range(12)
    ]
    (tmp_path / "chat.jsonl").write_text("\n".join(map(json.dumps, rows)))
    file = tmp_path / "recipe.toml"
    file.write_text(RECIPE.format(tmp_path))
    return file


def test_a_rate_that_nothing_uses_is_refused(recipe: Path) -> None:
    with pytest.raises(ConfigError, match="set optimizer to muon"):
        run(recipe, {"optimizer": "adamw", "optim.muon_lr": 0.01})


def test_heldout_loss_falls_and_the_result_opens(recipe: Path) -> None:
    directory = run(recipe)
    assert directory == recipe.parent / "out" / "model"
    losses = json.loads((recipe.parent / "out" / "heldout.json").read_text())
    assert losses["after"]["loss"] < losses["before"]["loss"] - 0.3
    assert losses["before"]["step"] == 0 and losses["after"]["step"] == 6
    assert load_checkpoint(directory).config == load_checkpoint(recipe.parent / "start").config
    assert (directory / "chat_template.jinja").exists()


def test_threads_are_set_before_anything_is_evaluated(
    recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    used, before = list[int](), torch.get_num_threads()
    evaluate = Trainer.evaluate

    def note(self: Trainer) -> dict[str, Any]:
        used.append(torch.get_num_threads())
        return evaluate(self)

    monkeypatch.setattr(Trainer, "evaluate", note)
    try:
        run(recipe, {"trainer.threads": before + 1, "trainer.steps": 1})
    finally:
        torch.set_num_threads(before)
    assert used and set(used) == {before + 1}


def test_two_lengths_never_meet_in_a_step(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with recipe.open("a") as file:
        file.write(ALTERNATE.format(recipe.parent))
    steps: list[set[str]] = []
    step = Trainer.train_step

    def note(self: Trainer, samples: list[Sample], **options: Any) -> dict[str, Any]:
        steps.append({sample.domain for sample in samples})
        longest = max(len(sample.tokens) for sample in samples)
        assert longest <= (40 if steps[-1] == {"short"} else 200)
        return step(self, samples, **options)

    monkeypatch.setattr(Trainer, "train_step", note)
    run(recipe, {"trainer.steps": 8})
    assert [i for i, domains in enumerate(steps) if domains == {"short"}] == [3, 7]
    assert all(len(domains) == 1 for domains in steps)


def test_context_grows_with_the_samples(recipe: Path) -> None:
    path = recipe.parent / "start"
    text = read_text(path)
    assert open_model(path, text).config.max_position_embeddings == 4096
    longer = open_model(path, text, context=10_000)
    assert longer.config.max_position_embeddings == 10_000


def test_adapters_are_trained_beside_frozen_weights_of_a_quantised_base(recipe: Path) -> None:
    base = recipe.parent / "nvfp4"
    pipeline.quantize(recipe.parent / "start", base, recipes.read("nvfp4-all"))
    settings = {"checkpoint": str(base), "lora.r": 4, "optim.lr": 0.01, "trainer.steps": 12}
    adapter = run(recipe, settings)
    assert adapter == recipe.parent / "out" / "adapter"
    figures = json.loads((recipe.parent / "out" / "heldout.json").read_text())
    assert figures["after"]["loss"] < figures["before"]["loss"] - 0.1
    model = open_model(base, read_text(base), frozen=True)
    before = {n: p.detach().float().clone() for n, p in model.named_parameters()}
    loaded = lora.load(model, adapter)
    assert loaded.names
    trained = set(loaded.parameters())
    for name, parameter in model.named_parameters():
        if name not in trained:
            assert torch.equal(parameter.detach().float(), before[name]), name


@pytest.mark.parametrize("fmt", ["nvfp4-all", "fp8"])
def test_adapters_with_dropout_over_a_quantised_base_resume(
    recipe: Path, fmt: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = recipe.parent / "base"
    calibration = [list(range(20, 60))]
    pipeline.quantize(recipe.parent / "start", base, recipes.read(fmt), calibration=calibration)
    settings = {
        "checkpoint": str(base),
        "lora.r": 4,
        "lora.dropout": 0.2,
        "trainer.recompute": True,
    }
    step = Trainer.train_step

    def stop_after_second(self: Trainer, samples: list[Sample], **options: Any) -> dict[str, Any]:
        figures = step(self, samples, **options)
        self._stop = figures["step"] == 2
        return figures

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", stop_after_second)
        assert run(recipe, settings) is None
    resumed = run(recipe, settings)
    straight = run(recipe, settings | {"output": str(recipe.parent / "straight")})
    assert resumed is not None and straight is not None
    found, wanted = (load_file(d / "adapter_model.safetensors") for d in (resumed, straight))
    assert wanted and found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert torch.equal(found[name], value), name


def test_a_run_goes_on_with_its_own_adapter_and_base_alone(recipe: Path) -> None:
    settings = {"lora.r": 4, "lora.targets": ["attention_qkv", "mlp"], "trainer.steps": 1}
    run(recipe, settings)
    other = recipe.parent / "other"
    write_tokenizer(other)
    write_generation_config(other)
    save_checkpoint(random_model(SHAPE, 1), other, dtype=torch.bfloat16)
    more = settings | {"trainer.steps": 2}
    for changed, message in (
        (more | {"lora.targets": ["mlp"]}, r"lora\.targets: \['attention_qkv', 'mlp'\] then"),
        (more | {"lora.alpha": 99.0}, r"lora\.alpha: 32\.0 then, 99\.0 now"),
        ({"trainer.steps": 2}, r"lora: \{'r': 4, .* then, None now"),
        (more | {"checkpoint": str(other)}, "digest of checkpoint: .* begin in another output"),
    ):
        with pytest.raises(CheckpointError, match=message):
            run(recipe, changed)
    shutil.copytree(recipe.parent / "start", recipe.parent / "moved")
    assert run(recipe, more | {"checkpoint": str(recipe.parent / "moved")}) is not None


def test_a_tokenizer_of_another_model_is_refused(recipe: Path) -> None:
    write_tokenizer(recipe.parent / "start", vocab_size=600)
    save_checkpoint(random_model(PRESETS["toy"], 0), recipe.parent / "start")
    with pytest.raises(CheckpointError, match="give it the tokenizer it was trained with"):
        run(recipe)


@pytest.mark.parametrize(
    ("overrides", "error", "message"),
    [
        ({"lora.r": 8, "optimizer": "muon"}, ConfigError, "with adamw"),
        ({"lora.r": 8, "precision.recipe": "nvfp4"}, ConfigError, "leave one out"),
        ({"trainer.threads": 100_000}, ConfigError, "at most 1024"),
        ({"optim.lr": math.inf}, ConfigError, r"optim\.lr is inf: it must be a finite number"),
        ({"loss.mtp_weight": math.nan}, ConfigError, r"loss\.mtp_weight is nan"),
        ({"loss.policy.eps_high": math.nan}, ConfigError, r"loss\.policy\.eps_high is nan"),
        ({"stability.spike_ratio": math.inf}, ConfigError, r"stability\.spike_ratio is inf"),
        ({"lora.alpha": math.inf}, ConfigError, r"lora\.alpha is inf"),
        ({"trainer.seed": 2**70}, ConfigError, r"trainer\.seed is 1180591620717411303424"),
        ({"lora.seed": 2**64}, ConfigError, r"lora\.seed is 18446744073709551616"),
        ({"tokens_per_step": 100}, ConfigError, "at least data.max_length, 200"),
        ({"alternate.share": 1.0}, ConfigError, "must lie between 0 and 1"),
        ({"alternate.data.max_length": 999}, ConfigError, "at least alternate.data.max_length"),
        ({"checkpoint": "nowhere"}, CheckpointError, "no checkpoint 'nowhere'"),
    ],
)
def test_bad_recipes_are_refused(
    recipe: Path, overrides: dict[str, Any], error: type[Exception], message: str
) -> None:
    if any(key.startswith("alternate") for key in overrides):
        with recipe.open("a") as file:
            file.write(ALTERNATE.format(recipe.parent))
    with pytest.raises(error, match=message):
        run(recipe, overrides)


@pytest.mark.parametrize(
    "name", ["sft-pico", "pico-finish", "long-context-pico", "lora-pico-nvfp4"]
)
def test_shipped_recipes_can_be_read(name: str) -> None:
    config = load_toml(SftConfig, RECIPES / f"{name}.toml")
    factors = [schedule_factor(s, config.trainer.steps, config.optim) for s in range(50, 100)]
    assert (len(set(factors)) == 1) == (name == "long-context-pico")
