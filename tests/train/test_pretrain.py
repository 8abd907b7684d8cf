"""A recipe from file to exported checkpoint, stopped and continued on the way."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from aprium.base.errors import CheckpointError, ConfigError, DataError
from aprium.checkpoint.load import load_checkpoint
from aprium.model.model import HybridModel
from aprium.train.pretrain import run
from aprium.train.trainer import Trainer
from tests.family import write_tokenizer

RECIPE = """
output = "{0}/out"
tokenizer = "{0}/tokenizer"
preset = "toy"
tokens_per_step = 256

[model]
vocab_size = {1}

[trainer]
steps = 2

[data]
max_length = 64
heldout_samples = 3

[[data.sources]]
kind = "text"
name = "text"
path = "{0}/text.jsonl"
heldout = "{0}/text.jsonl"
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    return write_recipe(tmp_path)


def write_recipe(tmp_path: Path) -> Path:
    """Write a recipe of two steps, its text and its tokenizer; returns the recipe's file."""
    (tmp_path / "tokenizer").mkdir()
    write_tokenizer(tmp_path / "tokenizer")
    rows = [json.dumps({"text": f"line {i} of a small text " * 4}) for i in range(9)]
    (tmp_path / "text.jsonl").write_text("\n".join(rows))
    file = tmp_path / "recipe.toml"
    file.write_text(RECIPE.format(tmp_path, 512))
    return file


def test_recipe_becomes_a_checkpoint_that_opens(recipe: Path) -> None:
    directory = run(recipe)
    assert directory == recipe.parent / "out" / "model"
    loaded = load_checkpoint(directory)
    assert isinstance(loaded.model, HybridModel)
    trained = _weights(recipe, "step-000002")
    name = "backbone.layers.0.mixer.in_proj.weight"
    assert torch.equal(loaded.model.get_parameter(name), trained[name].bfloat16())
    bias = "backbone.layers.2.mixer.gate.e_score_correction_bias"
    assert torch.equal(loaded.model.get_parameter(bias), trained[bias])
    for file in (recipe.parent / "tokenizer").glob("*.json"):
        assert (directory / file.name).read_bytes() == file.read_bytes()
    resolved = json.loads((recipe.parent / "out" / "recipe.json").read_text())
    assert resolved["trainer"]["steps"] == 2 and resolved["optim"]["schedule"] == "wsd"


def test_stopped_run_exports_nothing_and_continues(
    recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Trainer.train_step

    def stop_after_first(self: Trainer, samples: Any, **options: Any) -> dict[str, Any]:
        figures = step(self, samples, **options)
        self._request_stop(15, None)
        return figures

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", stop_after_first)
        assert run(recipe) is None
    assert not (recipe.parent / "out" / "model").exists()
    assert run(recipe, {"trainer.steps": 3}) is not None
    straight = recipe.parent / "straight"
    run(recipe, {"trainer.steps": 3, "output": str(straight)})
    for name, tensor in _weights(recipe, "step-000003").items():
        assert torch.equal(tensor, _load(straight / "step-000003")[name]), name


def test_precision_is_a_table_of_the_recipe_and_may_change_in_the_middle(recipe: Path) -> None:
    run(recipe, {"precision.recipe": "nvfp4"})
    plain = recipe.parent / "plain"
    run(recipe, {"output": str(plain)})
    name = "backbone.layers.0.mixer.in_proj.weight"
    rounded = _weights(recipe, "step-000002")[name]
    assert not torch.equal(rounded, _load(plain / "step-000002")[name])
    run(recipe, {"trainer.steps": 3, "precision.recipe": "bf16"})
    resolved = json.loads((recipe.parent / "out" / "recipe.json").read_text())
    assert resolved["precision"]["recipe"] == "bf16"
    assert not torch.equal(_weights(recipe, "step-000003")[name], rounded)


def test_a_run_goes_on_with_its_own_model_alone(recipe: Path) -> None:
    run(recipe)
    for key, message in (
        ("num_active_experts", "3 then, 2 now"),
        ("norm_eps", r"1e-05 then, 2\.0 now"),
    ):
        with pytest.raises(CheckpointError, match=rf"model\.{key}: {message}"):
            run(recipe, {f"model.{key}": 2, "trainer.steps": 3})
    file = recipe.parent / "out" / "step-000002" / "state.json"
    _forget_identity(file)  # as checkpoints of earlier versions
    with pytest.raises(CheckpointError, match="which this model does not have"):
        run(recipe, {"model.num_mtp_layers": 0, "trainer.steps": 3})
    assert run(recipe, {"trainer.steps": 3}) is not None


def test_a_run_that_trained_nothing_keeps_its_record(
    recipe: Path, caplog: pytest.LogCaptureFixture
) -> None:
    logging.getLogger("aprium").propagate = True
    run(recipe)
    file = recipe.parent / "out" / "recipe.json"
    written = file.read_text()
    for changed in ({"data.seed": 5}, {"model.norm_eps": 2, "trainer.steps": 3}):
        with pytest.raises((CheckpointError, DataError)):
            run(recipe, changed)
        assert file.read_text() == written
    run(recipe, {"optim.lr": 0.5, "optim.muon_lr": 0.5})
    assert file.read_text() == written
    assert "already at step 2 of 2: nothing to train" in caplog.text
    assert "recipe.json: optim.lr, optim.muon_lr" in caplog.text
    run(recipe, {"optim.lr": 0.5, "trainer.steps": 3})
    assert json.loads(file.read_text())["optim"]["lr"] == 0.5
    assert "continued; other than in" in caplog.text


def _forget_identity(file: Path) -> None:
    state = json.loads(file.read_text())
    del state["identity"], state["digest"]
    file.write_text(json.dumps(state))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"trainer.step": 1}, "unknown key trainer.step"),
        ({"model.hidden": 1}, "unknown key model.hidden"),
        ({"preset": "huge"}, "unknown preset 'huge'"),
        ({"model.vocab_size": 20}, "model.vocab_size is 20"),
        ({"tokens_per_step": 63}, "tokens_per_step is 63"),
        ({"precision.recipe": "fp4"}, "precision.recipe is 'fp4'"),
        ({"precision.kernels": "transformer_engine"}, "use 'emulated'"),
    ],
)
def test_bad_recipes_name_the_value(recipe: Path, overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        run(recipe, overrides)


def _weights(recipe: Path, name: str) -> dict[str, torch.Tensor]:
    return _load(recipe.parent / "out" / name)


def _load(directory: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(directory / "model.safetensors")
