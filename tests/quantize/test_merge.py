"""Merged adapters: what is touched changes as it should, what is not stays byte for byte."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from aprium import LLM
from aprium.base.errors import CheckpointError, QuantizeError
from aprium.base.records import Sample, SamplingParams
from aprium.checkpoint.hub import PICO_DIR
from aprium.checkpoint.load import load_checkpoint
from aprium.checkpoint.names import parameter_of
from aprium.checkpoint.save import copy_texts
from aprium.cli import main
from aprium.model.layout import Layout
from aprium.model.linear import Matrix
from aprium.model.model import HybridModel
from aprium.quantize import pipeline, recipes
from aprium.quantize.convert import convert
from aprium.quantize.merge import merge
from aprium.text.tokenizer import Tokenizer
from aprium.train import lora
from aprium.train.batch import collate
from aprium.train.lora import LoraConfig
from aprium.train.losses import LossConfig, compute_losses

TARGETS = ("attention_qkv", "mamba_in", "expert", "shared_expert")
LOSS = LossConfig(bias_rate=0.0, balance_weight=0.0)


def values(model: HybridModel, module: str) -> Tensor:
    """Return the matrix that a published module name means, float32."""
    parameter, expert = parameter_of(f"{module}.weight")
    matrix = model.get_submodule(parameter.removesuffix(".weight"))
    assert isinstance(matrix, Matrix)
    return matrix.dense(torch.float32, expert).detach()


def adapted(base: Path, directory: Path, targets: tuple[str, ...], size: float) -> lora.Adapter:
    """Write an adapter with random factors for `base`; return it, attached."""
    adapter = lora.attach(
        load_checkpoint(base, load="memory").model, LoraConfig(r=4, alpha=8.0, targets=targets)
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for value in adapter.parameters().values():
            value.copy_(torch.randn(value.shape, generator=generator) * size)
    lora.save(adapter, directory, base=base)
    return adapter


def tensors(path: Path) -> dict[str, Tensor]:
    return load_file(path / "model.safetensors")


def differing(one: Path, two: Path) -> set[str]:
    """Return the names of tensors that are not the same bytes."""
    first, second = tensors(one), tensors(two)
    assert first.keys() == second.keys()
    return {
        name
        for name, value in first.items()
        if value.dtype != second[name].dtype
        or value.shape != second[name].shape
        or value.reshape(-1).view(torch.uint8).ne(second[name].reshape(-1).view(torch.uint8)).any()
    }


@pytest.fixture(scope="module", params=["nvfp4-all", "nano-nvfp4", "fp8", "compressed-tensors"])
def quantised(request, tmp_path_factory, samples) -> Path:
    path = tmp_path_factory.mktemp("base") / "quantised"
    recipe = "nvfp4-all" if request.param == "compressed-tensors" else request.param
    pipeline.quantize(PICO_DIR, path, recipes.read(recipe), calibration=samples)
    if request.param == "compressed-tensors":
        convert(path, path.parent / "ct", "compressed-tensors")
        return path.parent / "ct"
    return path


def test_plain_base_gets_the_sum_and_keeps_the_rest(tmp_path):
    adapter = adapted(PICO_DIR, tmp_path / "adapter", TARGETS, 0.05)
    merge(PICO_DIR, tmp_path / "adapter", tmp_path / "out")
    factors = adapter.factors()
    assert differing(PICO_DIR, tmp_path / "out") == {f"{module}.weight" for module in factors}
    before, after = tensors(PICO_DIR), tensors(tmp_path / "out")
    for module, one in factors.items():
        wanted = (before[f"{module}.weight"].float() + one.delta()).bfloat16()
        assert torch.equal(after[f"{module}.weight"], wanted)
    assert (tmp_path / "out" / "config.json").read_bytes() == (
        PICO_DIR / "config.json"
    ).read_bytes()


@pytest.mark.parametrize("rule", ["max", "sweep"])
def test_requantised_base_keeps_its_formats_and_what_is_not_touched(quantised, tmp_path, rule):
    adapter = adapted(quantised, tmp_path / "adapter", TARGETS, 0.05)
    merge(quantised, tmp_path / "adapter", tmp_path / "out", requantize=True, rule=rule)
    factors = adapter.factors()
    changed = {name.rpartition(".")[0] for name in differing(quantised, tmp_path / "out")}
    formats = load_checkpoint(quantised).quant.formats
    assert changed <= factors.keys() and changed >= factors.keys() - formats.keys()
    assert len(changed & formats.keys()) > 0.9 * len(factors.keys() & formats.keys())
    base, merged = (load_checkpoint(p) for p in (quantised, tmp_path / "out"))
    assert merged.quant == base.quant
    for module, one in factors.items():
        wanted = values(base.model, module) + one.delta()
        error = (values(merged.model, module) - wanted).norm() / wanted.norm()
        bound = {None: 0.003, "fp8": 0.03}.get(formats.get(module), 0.11)
        assert float(error) < bound, module
    for name in tensors(quantised):
        if name.endswith(("input_scale", "input_global_scale")):
            assert name not in differing(quantised, tmp_path / "out")
            break


def test_quantised_base_becomes_bf16(quantised, tmp_path):
    adapter = adapted(quantised, tmp_path / "adapter", TARGETS, 0.05)
    merge(quantised, tmp_path / "adapter", tmp_path / "out")
    base, merged = (load_checkpoint(p) for p in (quantised, tmp_path / "out"))
    assert not merged.quant.formats
    factors = adapter.factors()
    for module in base.quant.formats:
        wanted = values(base.model, module)
        if module in factors:
            wanted = wanted + factors[module].delta()
        assert torch.equal(values(merged.model, module), wanted.bfloat16().float())


def test_fused_matrices_go_on_sharing_their_scale(quantised, tmp_path):
    formats = load_checkpoint(quantised).quant.formats
    queries = [n for n in formats if n.endswith("q_proj")]
    if not queries:  # this recipe leaves attention as it is
        adapted(quantised, tmp_path / "adapter", ("q_proj",), 1.0)
        with pytest.raises(QuantizeError, match="leave out --requantize"):
            merge(quantised, tmp_path / "adapter", tmp_path / "out", requantize=True)
        return
    for size, alone in ((1e-3, True), (1.0, False)):
        adapted(quantised, tmp_path / "adapter", ("q_proj",), size)
        merge(quantised, tmp_path / "adapter", tmp_path / "out", requantize=True)
        changed = {n.rpartition(".")[0] for n in differing(quantised, tmp_path / "out")}
        touched = {n.rpartition(".")[2] for n in changed}
        assert touched == ({"q_proj"} if alone else {"q_proj", "k_proj", "v_proj"})
        stored = tensors(tmp_path / "out")
        for query in queries:
            fused = [query[: -len("q_proj")] + leaf for leaf in ("q_proj", "k_proj", "v_proj")]
            leaves = ("weight_scale_2", "weight_global_scale")
            leaf = next((n for n in leaves if f"{query}.{n}" in stored), "weight_scale")
            assert len({float(stored[f"{module}.{leaf}"]) for module in fused}) == 1


def test_stacked_experts_of_a_base(tmp_path):
    stored = tensors(PICO_DIR)
    experts: dict[str, dict[int, Tensor]] = {}
    written = {}
    for name, value in stored.items():
        parameter, expert = parameter_of(name)
        disk = parameter.replace("backbone.", "model.", 1)
        if expert is None:
            written[disk] = value
        else:
            experts.setdefault(disk.removesuffix(".weight"), {})[expert] = value
    for name, parts in experts.items():
        written[name] = torch.stack([parts[e] for e in sorted(parts)])
    base = tmp_path / "base"
    base.mkdir()
    copy_texts(PICO_DIR, base)
    save_file(written, base / "model.safetensors")
    adapted(base, tmp_path / "adapter", TARGETS, 0.05)
    merge(base, tmp_path / "adapter", tmp_path / "out")
    merge(PICO_DIR, tmp_path / "adapter", tmp_path / "plain")
    assert tensors(tmp_path / "out").keys() == written.keys()
    one, two = (load_checkpoint(tmp_path / n).model for n in ("out", "plain"))
    for (name, a), (_, b) in zip(one.named_parameters(), two.named_parameters(), strict=True):
        assert torch.equal(a, b), name


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[Path, lora.Adapter]:
    """An adapter that has taught pico one sentence."""
    path = tmp_path_factory.mktemp("trained")
    adapter = lora.attach(
        load_checkpoint(PICO_DIR, load="memory").model,
        LoraConfig(r=8, alpha=16.0, targets=TARGETS),
    )
    tokens = tuple(
        Tokenizer.load(PICO_DIR).encode("A snake sees the stone near the river, at noon.")
    )
    batch = collate(
        [Sample(tokens=tokens, ce_weight=(0.0,) + (1.0,) * (len(tokens) - 1), domain="text")]
    )
    optimiser = torch.optim.AdamW(adapter.parameters().values(), lr=5e-3)
    for _ in range(40):
        optimiser.zero_grad()
        compute_losses(adapter.model, batch, LOSS).total.backward()
        optimiser.step()
    lora.save(adapter, path / "adapter")
    return path / "adapter", adapter


@torch.no_grad()
def greedy(model: HybridModel, prompt: list[int], count: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        hidden = model(torch.tensor(tokens), Layout.packed([len(tokens)]))
        tokens.append(int(model.logits(hidden[-1:]).argmax()))
    return tokens[len(prompt) :]


def test_engine_continues_as_the_adapted_model_does(trained, tmp_path):
    directory, adapter = trained
    merge(PICO_DIR, directory, tmp_path / "out")
    prompt = "A snake sees"
    ids = Tokenizer.load(PICO_DIR).encode(prompt)
    wanted = greedy(adapter.model, ids, 16)
    params = SamplingParams(max_tokens=16, temperature=0.0, ignore_eos=True)
    found = {}
    for name in (str(tmp_path / "out"), "pico"):
        with LLM(name) as llm:
            (completion,) = llm.generate([ids], params)
        found[name] = list(completion.tokens)
    assert found[str(tmp_path / "out")] == wanted
    assert found["pico"] != wanted


def test_command_writes_what_the_engine_opens(trained, tmp_path, samples, capsys):
    base = tmp_path / "base"
    pipeline.quantize(PICO_DIR, base, recipes.read("nvfp4"), calibration=samples)
    arguments = ["lora-merge", str(base), str(trained[0]), str(tmp_path / "out"), "--requantize"]
    assert main(arguments) == 0
    assert "MB" in capsys.readouterr().out
    assert load_checkpoint(tmp_path / "out").quant == load_checkpoint(base).quant
    with LLM(str(tmp_path / "out")) as llm:
        params = SamplingParams(max_tokens=12, temperature=0.0)
        (completion,) = llm.generate(["A snake sees"], params)
    assert "stone" in completion.text


def test_mistakes_are_named(trained, tmp_path):
    directory = trained[0]
    with pytest.raises(QuantizeError, match="is one of the sources"):
        merge(PICO_DIR, directory, PICO_DIR)
    with pytest.raises(QuantizeError, match="leave out --requantize"):
        merge(PICO_DIR, directory, tmp_path / "out", requantize=True)
    with pytest.raises(QuantizeError, match="unknown scale rule 'best'"):
        merge(PICO_DIR, directory, tmp_path / "out", rule="best")  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match="name the directory of an adapter"):
        merge(PICO_DIR, tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()
