"""Quantising whole checkpoints: what is written loads, does what was measured, and resumes."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from aprium.base.errors import CheckpointError, QuantizeError
from aprium.checkpoint.hub import PICO_DIR
from aprium.checkpoint.load import load_checkpoint, read_plan
from aprium.model.layout import Layout
from aprium.model.linear import Matrix
from aprium.ops import fp8, nvfp4
from aprium.quantize import pipeline, recipes
from aprium.quantize.qad import evaluate
from tests import modelopt_layout


@pytest.mark.parametrize("name", recipes.names())
def test_every_recipe_writes_a_checkpoint_that_loads(name, tmp_path, samples):
    recipe = recipes.read(name)
    result = pipeline.quantize(
        PICO_DIR, tmp_path / "out", recipe, calibration=samples, heldout=samples[:4]
    )
    loaded = load_checkpoint(tmp_path / "out")
    assert loaded.quant.formats == recipes.formats_of(recipe, loaded.config)
    assert (loaded.quant.kv_cache, loaded.quant.kv_scales) == (recipe.kv_cache, recipe.kv_scales)
    stored = (tmp_path / "out" / "model.safetensors").stat().st_size
    assert 0 < stored - result.bytes_after < 200_000  # the header
    assert result.bits < 16 and result.bytes_after < result.bytes_before
    # What was measured on the way is what the written checkpoint does.
    again = evaluate(load_checkpoint(PICO_DIR).model, loaded.model, samples[:4])
    assert result.quality is not None
    for key, value in again.items():
        assert result.quality[key] == pytest.approx(value, rel=1e-4, abs=1e-6)


def test_weights_hold_the_bytes_of_the_format_description(tmp_path, samples):
    recipe = recipes.read("nano-nvfp4")
    pipeline.quantize(PICO_DIR, tmp_path / "out", recipe, calibration=samples)
    before, after = load_checkpoint(PICO_DIR).model, load_checkpoint(tmp_path / "out").model
    checked = 0
    for name, matrix in after.named_modules():
        if not isinstance(matrix, Matrix) or matrix.format is None:
            continue
        source = before.get_submodule(name).weight
        for expert in range(source.shape[0]) if source.dim() == 3 else (None,):
            one = source if expert is None else source[expert]
            wanted = modelopt_layout.encode_nvfp4(one.detach())
            found = (matrix.pick(n, expert) for n in ("weight", "weight_scale", "weight_scale_2"))
            for mine, theirs in zip(found, wanted, strict=True):
                assert torch.equal(mine.float(), theirs.float())
            checked += 1
    assert checked > 90


@pytest.mark.parametrize(("fmt", "leaf"), [("nvfp4", "weight_scale_2"), ("fp8", "weight_scale")])
def test_fused_matrices_share_their_global_scale(fmt, leaf, tmp_path, samples):
    recipe = recipes.read("nvfp4-all", {"formats.attention_qkv": fmt})
    pipeline.quantize(PICO_DIR, tmp_path / "out", recipe, calibration=samples)
    model = load_checkpoint(tmp_path / "out").model
    for block in model.backbone.layers:
        if block.kind == "attention":
            parts = [getattr(block.mixer, n) for n in ("q_proj", "k_proj", "v_proj")]
            assert len({float(getattr(p, leaf)) for p in parts}) == 1
            assert len({float(p.input_scale) for p in parts}) == 1


def test_input_scales_are_the_largest_inputs(tmp_path, samples):
    pipeline.quantize(PICO_DIR, tmp_path / "out", recipes.read("fp8"), calibration=samples)
    first = load_checkpoint(tmp_path / "out").model.backbone.layers[0].mixer.in_proj
    model = load_checkpoint(PICO_DIR).model
    tokens = torch.tensor([t for sample in samples for t in sample])
    block = model.backbone.layers[0]
    with torch.no_grad():
        x = block.norm(model.backbone.embeddings.weight[tokens].float())
    assert float(first.input_scale) == pytest.approx(float(x.abs().max()) / 448)


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_compensation_and_weighting_lower_the_divergence(method, tmp_path, samples):
    plain = recipes.read("nvfp4-all", {"rule": "max"})
    better = dataclasses.replace(plain, method=method, rule="sweep", weighted=True)
    divergence = [
        pipeline.quantize(
            PICO_DIR, tmp_path / "out", recipe, calibration=samples, heldout=samples
        ).quality["logit_kl"]
        for recipe in (plain, better)
    ]
    assert divergence[1] < 0.8 * divergence[0]


def test_experts_with_few_tokens_are_counted(tmp_path, samples):
    recipe = recipes.read("nvfp4-all", {"method": "gptq"})
    result = pipeline.quantize(PICO_DIR, tmp_path / "out", recipe, calibration=samples[:2])
    by_name = {matrix.module: matrix for matrix in result.matrices}
    experts = [m for name, m in by_name.items() if ".experts." in name]
    assert experts and all(0 < m.fell_back <= 16 for m in experts)


@pytest.mark.parametrize("stop_after", [1, 5, 9])
def test_goes_on_where_it_was_stopped(stop_after, tmp_path, samples, monkeypatch):
    recipe = recipes.read("nvfp4-all", {"method": "gptq"})
    options = {"calibration": samples, "heldout": samples[:4]}
    whole = pipeline.quantize(PICO_DIR, tmp_path / "whole", recipe, **options)
    done: list[int] = []
    original = pipeline._Work._layer

    def layer(self, index, state):
        if len(done) == stop_after and index == stop_after:
            raise KeyboardInterrupt
        done.append(index)
        original(self, index, state)

    monkeypatch.setattr(pipeline._Work, "_layer", layer)
    with pytest.raises(KeyboardInterrupt):
        pipeline.quantize(PICO_DIR, tmp_path / "out", recipe, **options)
    assert not (tmp_path / "out").exists()
    done.append(-1)
    resumed = pipeline.quantize(PICO_DIR, tmp_path / "out", recipe, **options)
    assert done == [*range(stop_after), -1, *range(stop_after, 10)]
    files = [tmp_path / name / "model.safetensors" for name in ("whole", "out")]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert resumed.quality == whole.quality and resumed.matrices == whole.matrices
    assert not list(tmp_path.glob(".*.parts"))


def test_another_command_does_not_go_on_with_what_is_there(tmp_path, samples):
    parts = tmp_path / ".out.parts"
    parts.mkdir()
    stale = {"key": "another", "done": 3, "seconds": 0, "state": "none", "reports": []}
    (parts / "progress.json").write_text(json.dumps(stale))
    recipe = recipes.read("nvfp4-all")
    pipeline.quantize(PICO_DIR, tmp_path / "out", recipe, calibration=samples)
    assert load_checkpoint(tmp_path / "out").quant.formats


@pytest.mark.parametrize("stacked", [False, True])
def test_reads_every_spelling_of_names(stacked, toy, tmp_path, numbers):
    """A file as transformers keeps it in memory gives the bytes of the published one."""
    from safetensors.torch import load_file, save_file

    source = tmp_path / "source"
    source.mkdir()
    tensors = load_file(toy / "model.safetensors")
    renamed: dict[str, torch.Tensor] = {}
    experts: dict[str, dict[int, torch.Tensor]] = {}
    for name, value in tensors.items():
        head, found, rest = name.partition(".experts.")
        if found and stacked:
            number, leaf, _ = rest.split(".")
            experts.setdefault(f"{head}.experts.{leaf}", {})[int(number)] = value
        else:
            renamed[name] = value
    for name, parts in experts.items():
        renamed[name] = torch.stack([parts[i] for i in range(len(parts))])
    renamed = {n.replace("backbone.", "model.", 1): v for n, v in renamed.items()}
    save_file(renamed, source / "model.safetensors")
    (source / "config.json").write_text((toy / "config.json").read_text())
    recipe = recipes.read("nvfp4-all")
    for name, path in (("one", toy), ("two", source)):
        pipeline.quantize(path, tmp_path / name, recipe, calibration=numbers)
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name].float(), two[name].float()) for name in one)


def test_generation_runs_on_the_result(tmp_path, samples):
    pipeline.quantize(PICO_DIR, tmp_path / "out", recipes.read("nvfp4"), calibration=samples)
    from aprium import LLM, SamplingParams

    with LLM(str(tmp_path / "out"), activation_dtype="float32") as llm:
        (completion,) = llm.generate([samples[0]], SamplingParams(temperature=0, max_tokens=8))
    model = load_checkpoint(tmp_path / "out").model
    tokens = torch.tensor([*samples[0], *completion.tokens])
    with torch.no_grad():
        said = model.logits(model(tokens, Layout.packed([len(tokens)]))).argmax(-1)
    assert said[len(samples[0]) - 1 : -1].tolist() == list(completion.tokens)


def test_formats_of_a_search_get_what_they_need(tmp_path, samples):
    recipe = recipes.read("nvfp4-all")  # which needs no inputs
    formats = {"backbone.layers.0.mixer.in_proj": "fp8"}
    with pytest.raises(QuantizeError, match="needs calibration samples"):
        pipeline.quantize(PICO_DIR, tmp_path / "out", recipe, formats=formats)
    pipeline.quantize(PICO_DIR, tmp_path / "out", recipe, calibration=samples, formats=formats)
    assert load_checkpoint(tmp_path / "out").quant.formats == formats


def test_what_cannot_be_done_is_refused(toy, tmp_path, samples, numbers):
    with pytest.raises(QuantizeError, match="needs calibration samples"):
        pipeline.quantize(toy, tmp_path / "out", recipes.read("fp8"))
    pipeline.quantize(toy, tmp_path / "out", recipes.read("fp8"), calibration=numbers)
    with pytest.raises(QuantizeError, match="quantised already"):
        pipeline.quantize(
            tmp_path / "out", tmp_path / "again", recipes.read("fp8"), calibration=numbers
        )


def test_nothing_to_quantise_and_writing_over_the_source_are_refused(toy, tmp_path):
    recipe = recipes.read("nvfp4-all")
    with pytest.raises(QuantizeError, match="no matrix of this model gets a format"):
        pipeline.quantize(toy, tmp_path / "out", recipe, formats={})
    with pytest.raises(QuantizeError, match="is the source itself"):
        pipeline.quantize(toy, toy / ".." / toy.name, recipe)
    assert not load_checkpoint(toy).quant.formats


def test_a_place_that_cannot_be_written_is_named(toy, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot write"):
        pipeline.quantize(toy, tmp_path / "file" / "out", recipes.read("nvfp4-all"))


def test_a_damaged_source_is_named(toy, tmp_path, numbers):
    from safetensors.torch import load_file, save_file

    source = tmp_path / "source"
    source.mkdir()
    tensors = load_file(toy / "model.safetensors")
    name = next(name for name in tensors if name.endswith("in_proj.weight"))
    tensors[name][0, 0] = float("nan")
    save_file(tensors, source / "model.safetensors")
    (source / "config.json").write_text((toy / "config.json").read_text())
    module = name.removesuffix(".weight")
    with pytest.raises(QuantizeError, match=f"{module} holds NaN"):
        pipeline.quantize(source, tmp_path / "out", recipes.read("nvfp4-all"))


def test_memory_holds_one_layer(toy, tmp_path, monkeypatch):
    """While a layer is at work no other has its weights."""
    seen = []
    original = pipeline._Work._layer

    def layer(self, index, state):
        original(self, index, state)
        held = [name for name, p in self.model.named_parameters() if p.device.type != "meta"]
        seen.append(held)

    monkeypatch.setattr(pipeline._Work, "_layer", layer)
    pipeline.quantize(toy, tmp_path / "out", recipes.read("nvfp4-all"))
    assert len(seen) == len(read_plan(toy).config.layers)
    assert not any(seen)


def test_errors_reported_are_those_of_the_weights(tmp_path, samples):
    recipe = recipes.read("ultra-nvfp4")
    result = pipeline.quantize(PICO_DIR, tmp_path / "out", recipe, calibration=samples)
    model = load_checkpoint(PICO_DIR).model
    for matrix in result.matrices:
        if matrix.format is None:
            assert matrix.weight_error == 0
            continue
        weight = model.get_submodule(matrix.module).weight.detach()
        if matrix.format == "fp8":
            decoded = fp8.dequantize(*fp8.encode(weight))
        else:
            decoded = nvfp4.dequantize(*nvfp4.encode(weight, recipe.rule))
        error = float((decoded - weight.float()).norm() / weight.float().norm())
        assert matrix.weight_error == pytest.approx(error, rel=1e-3)


def test_paths_may_be_relative(toy, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pipeline.quantize(toy, Path("out"), recipes.read("nvfp4-all"))
    assert load_checkpoint("out").quant.formats
