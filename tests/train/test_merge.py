"""Averaging emulates a decay of the rate, in the layout of an exported checkpoint."""

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from aprium.base.errors import CheckpointError, ConfigError
from aprium.checkpoint.load import load_checkpoint
from aprium.checkpoint.save import save_checkpoint
from aprium.model.model import HybridModel
from aprium.model.presets import PRESETS
from aprium.train.merge import Decay, decay_weights, merge
from tests.model.test_transformers import random_model

TOY = PRESETS["toy"]


@given(
    st.lists(st.floats(-2, 2), min_size=1, max_size=12), st.sampled_from(["minus-sqrt", "uniform"])
)
def test_weights_emulate_the_decay(updates: list[float], decay: Decay) -> None:
    """The average is where the run would be had each update been scaled by the decay there."""
    places = [1.0]
    for update in updates:
        places.append(places[-1] + update)
    count = len(places)
    scaled = 1.0
    for j, update in enumerate(updates, 1):
        p = j / count
        scaled += update * ((1 - p**0.5) if decay == "minus-sqrt" else 1 - p)
    weights = decay_weights(count, decay)
    assert sum(weights) == pytest.approx(1) and min(weights) > 0
    merged = sum(w * place for w, place in zip(weights, places, strict=True))
    assert merged == pytest.approx(scaled, abs=1e-9)


def test_uniform_is_the_mean() -> None:
    assert decay_weights(4, "uniform") == pytest.approx([0.25] * 4)


def models(count: int) -> list[HybridModel]:
    return [random_model(TOY, seed) for seed in range(count)]


def mean(found: list[HybridModel], name: str, decay: Decay) -> torch.Tensor:
    weights = decay_weights(len(found), decay)
    pairs = zip(weights, found, strict=True)
    return sum((w * m.get_parameter(name).double() for w, m in pairs), torch.zeros(()).double())


@pytest.mark.parametrize("decay", ["minus-sqrt", "uniform"])
def test_exported_checkpoints(tmp_path: Path, decay: Decay) -> None:
    found = models(3)
    paths = [tmp_path / str(i) for i in range(3)]
    for model, path in zip(found, paths, strict=True):
        save_checkpoint(model, path)
    weights = merge(paths, tmp_path / "out", decay=decay)
    assert [path for path, _ in weights] == paths
    merged = load_checkpoint(tmp_path / "out").model
    for name, value in merged.named_parameters():
        assert torch.allclose(value.double(), mean(found, name, decay), atol=1e-6), name
    newest = merge(paths, tmp_path / "two", window=2, decay=decay)
    assert [path for path, _ in newest] == paths[1:]


def test_weights_may_be_given(tmp_path: Path) -> None:
    found = models(3)
    paths = [tmp_path / str(i) for i in range(3)]
    for model, path in zip(found, paths, strict=True):
        save_checkpoint(model, path)
    shares = [weight for _, weight in merge(paths, tmp_path / "all", weights=[3, 1, 0])]
    assert shares == [0.75, 0.25, 0.0]
    name = "backbone.layers.0.norm.weight"
    values = [m.get_parameter(name).double() for m in found]
    merged = load_checkpoint(tmp_path / "all").model.get_parameter(name).double()
    torch.testing.assert_close(merged, 0.75 * values[0] + 0.25 * values[1], atol=1e-6, rtol=1e-6)
    for weights in ([1, 2], [1, -1, 0]):
        with pytest.raises(ConfigError, match="give one each, not all"):
            merge(paths, tmp_path / "more", weights=weights)


def test_a_run_and_its_layout(tmp_path: Path) -> None:
    found, run = models(3), tmp_path / "run"
    for step, model in zip((2, 10, 9), found, strict=True):
        folder = run / f"step-{step:06d}"
        folder.mkdir(parents=True)
        save_file(
            {n: p.detach() for n, p in model.named_parameters()}, folder / "model.safetensors"
        )
        save_file({"x": torch.zeros(1)}, folder / "optimiser.safetensors")
    with pytest.raises(CheckpointError, match="--like"):
        merge([run], tmp_path / "out")
    save_checkpoint(found[0], tmp_path / "like", dtype=torch.bfloat16)
    averaged = merge([run], tmp_path / "out", like=tmp_path / "like", decay="uniform")
    assert [path.name for path, _ in averaged] == ["step-000002", "step-000009", "step-000010"]
    merged = load_checkpoint(tmp_path / "out").model
    for name, value in merged.named_parameters():
        assert torch.equal(value, mean(found, name, "uniform").to(value.dtype)), name


def test_checkpoints_of_many_processes_are_refused(tmp_path: Path) -> None:
    save_checkpoint(models(1)[0], tmp_path / "like")
    for step in (1, 2):
        (tmp_path / "run" / f"step-{step:06d}" / "shards").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="step-000001 was written by many processes"):
        merge([tmp_path / "run"], tmp_path / "out", like=tmp_path / "like")


def test_what_cannot_be_averaged_is_named(tmp_path: Path) -> None:
    (one,) = models(1)
    save_checkpoint(one, tmp_path / "a")
    with pytest.raises(CheckpointError, match="give two or more"):
        merge([tmp_path / "a"], tmp_path / "out")
    with pytest.raises(CheckpointError, match="the window is 3 and there are 2"):
        merge([tmp_path / "a"] * 2, tmp_path / "out", window=3)
    with pytest.raises(CheckpointError, match="neither a checkpoint nor a run"):
        merge([tmp_path], tmp_path / "out")
    (tmp_path / "step-000001").mkdir()
    weights = load_file(tmp_path / "a" / "model.safetensors")
    save_file(
        {"lm_head.weight": weights["lm_head.weight"]},
        tmp_path / "step-000001" / "model.safetensors",
    )
    with pytest.raises(CheckpointError, match="they are not of one model"):
        merge([tmp_path / "a", tmp_path / "step-000001"], tmp_path / "out")
    assert not (tmp_path / "out").exists()
