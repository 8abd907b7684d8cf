"""The boosted head's loss against its definition; only the head moves, and drafts get better."""

import dataclasses
import json
import logging
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from aprium.base.config import load_toml
from aprium.base.errors import ConfigError
from aprium.base.records import Sample
from aprium.checkpoint.save import save_checkpoint
from aprium.model.layout import Layout
from aprium.model.presets import PRESETS
from aprium.train.batch import collate
from aprium.train.boost import BoostConfig, Objective, run
from aprium.train.losses import LossConfig
from tests.family import write_generation_config, write_tokenizer
from tests.model.test_transformers import random_model

TOY = PRESETS["toy"]


def test_first_two_steps_equal_their_definition() -> None:
    """With two steps nothing is left to chance: the second always reads what the first made."""
    model = random_model(TOY, 0)
    generator = torch.Generator().manual_seed(0)
    samples = []
    for length in (7, 2, 12):
        tokens = torch.randint(0, TOY.vocab_size, (length,), generator=generator).tolist()
        weights = (0.0, 1.0, *(float(i % 3) for i in range(length - 2)))
        samples.append(Sample(tokens=tuple(tokens), ce_weight=weights[:length], domain="d"))
    temperature = 2.0
    with torch.no_grad():
        found, routing = Objective(2, temperature, 0).by_step(model, collate(samples))
        sums, norm = [0.0, 0.0], 0.0
        for sample in samples:
            tokens = torch.tensor(sample.tokens)
            layout = Layout.packed([len(tokens)])
            real = model(tokens, layout)
            wanted = (model.logits(real) / temperature).log_softmax(-1)
            hidden = real
            for step in range(2):
                ahead = model.predict(hidden, tokens.roll(-1), layout)
                guess = (model.logits(ahead) / temperature).log_softmax(-1)
                for t in range(len(tokens) - 2):
                    weight = sample.ce_weight[t + 2]
                    kl = (wanted[t + 1].exp() * (wanted[t + 1] - guess[t])).sum()
                    sums[step] += weight * float(kl) * temperature**2
                    norm += weight if step == 0 else 0.0
                hidden = torch.cat((real[:1], ahead[:-1]))
    assert [float(x) for x in found] == pytest.approx([s / norm for s in sums], rel=1e-4)
    assert routing and all(record.name.startswith("mtp.") for record in routing)


def test_draws_repeat_and_gradients_reach_only_the_head() -> None:
    model = random_model(TOY, 0)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("mtp.") and parameter.requires_grad)
    batch = collate([Sample(tokens=tuple(range(20, 40)), ce_weight=(0.0,) + (1.0,) * 19)])
    losses = [Objective(5, 2.0, 1)(model, batch, LossConfig()) for _ in range(2)]
    assert losses[0].kl == losses[1].kl
    assert Objective(5, 2.0, 2)(model, batch, LossConfig()).kl != losses[0].kl
    losses[0].total.backward()
    moved = {name for name, p in model.named_parameters() if p.grad is not None}
    assert moved and all(name.startswith("mtp.") for name in moved)


SHAPE = dataclasses.replace(PRESETS["toy"], vocab_size=512)
RECIPE = """
output = "{0}/out"
checkpoint = "{0}/start"
tokens_per_step = 256
steps = 3
rollouts = 12
max_tokens = 24
probes = 6

[trainer]
steps = 40

[optim]
lr = 5e-3
warmup_steps = 0

[data]
max_length = 100

[[data.sources]]
kind = "text"
name = "text"
path = "{0}/text.jsonl"
heldout = "{0}/text.jsonl"
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    write_tokenizer(tmp_path / "start")
    write_generation_config(tmp_path / "start", eos_token_id=[11])
    save_checkpoint(random_model(SHAPE, 0), tmp_path / "start", dtype=torch.bfloat16)
    rows = [{"text": f"fox {i}"} for i in range(12)]
    (tmp_path / "text.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "recipe.toml").write_text(RECIPE.format(tmp_path))
    return tmp_path / "recipe.toml"


def test_only_the_head_changes_and_its_loss_falls(recipe: Path) -> None:
    directory = run(recipe)
    assert directory is not None
    before = load_file(recipe.parent / "start" / "model.safetensors")
    after = load_file(directory / "model.safetensors")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all(name.startswith("mtp.") for name in changed)
    assert all(after[name].dtype == before[name].dtype for name in before)
    lines = (recipe.parent / "out" / "metrics.jsonl").read_text().splitlines()
    losses = [json.loads(x)["kl"] for x in lines if json.loads(x)["kind"] == "train"]
    assert losses[-1] < 0.8 * losses[0]
    measured = json.loads((recipe.parent / "out" / "acceptance.json").read_text())
    assert len(measured["after"]["by_position"]) == 3
    # A second run of the same recipe finds what was written.
    file = recipe.parent / "out" / "rollouts.jsonl"
    written = file.stat().st_mtime_ns
    run(recipe)
    assert file.stat().st_mtime_ns == written


def test_without_anything_held_out_acceptance_is_not_measured(
    recipe: Path, caplog: pytest.LogCaptureFixture
) -> None:
    logging.getLogger("aprium").propagate = True
    recipe.write_text(re.sub("heldout = .*", "", recipe.read_text()))
    assert run(recipe, {"trainer.steps": 1, "rollouts": 0}) is not None
    assert not (recipe.parent / "out" / "acceptance.json").exists()
    assert "probes is 6 and no source of data holds anything out" in caplog.text


def test_bad_values_are_named(recipe: Path) -> None:
    for overrides, message in (
        ({"steps": 0}, r"steps is 0: it must be in 1\.\.16"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"rollouts": -1}, "rollouts is -1: it must be at least 0"),
        ({"optim.muon_lr": 0.5}, r"optim\.muon_lr is 0\.5"),
        ({"tokens_per_step": 110}, "at least 124"),
    ):
        with pytest.raises(ConfigError, match=message):
            run(recipe, overrides)
    shipped = Path(__file__).parents[2] / "recipes" / "boost-mtp-pico.toml"
    assert load_toml(BoostConfig, shipped).steps == 7
