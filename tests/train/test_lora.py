"""LoRA: exact beginnings, right gradients over every format, and files that PEFT shares."""

import json
import re
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from aprium.base.errors import CheckpointError, ConfigError
from aprium.base.records import Sample
from aprium.checkpoint.hub import PICO_DIR
from aprium.checkpoint.load import load_checkpoint
from aprium.checkpoint.names import matrices, matrix_role
from aprium.model import native
from aprium.model.layout import Layout
from aprium.model.linear import Matrix
from aprium.model.model import HybridModel
from aprium.model.presets import PRESETS
from aprium.quantize import pipeline, recipes
from aprium.text.tokenizer import Tokenizer
from aprium.train import lora, precision
from aprium.train.batch import collate
from aprium.train.lora import LoraConfig
from aprium.train.losses import LossConfig, compute_losses
from aprium.train.optim import OptimConfig
from aprium.train.trainer import Trainer, TrainerConfig
from tests.model.test_transformers import random_model, to_transformers
from tests.train.test_losses import documents
from tests.train.test_trainer import Copies

TOY = PRESETS["toy"]
EVERYTHING = LoraConfig(
    r=4,
    alpha=8.0,
    targets=(
        *("mamba_in", "mamba_out", "attention_qkv", "attention_out"),
        *("mlp", "shared_expert", "expert", "latent", "mtp"),
    ),
)
LOSS = LossConfig(bias_rate=0.0, balance_weight=0.0)


def toy() -> HybridModel:
    return random_model(TOY, 0)


def shake(adapter: lora.Adapter, seed: int = 0, size: float = 0.1) -> None:
    """Give every factor values, so that nothing is hidden by a zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in adapter.parameters().values():
            value.copy_(torch.randn(value.shape, generator=generator) * size)


def loss_of(model: HybridModel) -> Tensor:
    return compute_losses(model, collate(documents([33, 20, 7])), LOSS).total


@pytest.fixture(scope="module", params=["bf16", "fp8", "nvfp4"])
def base(request, tmp_path_factory) -> Path:
    """Pico in one of the stored formats."""
    if request.param == "bf16":
        return PICO_DIR
    path = tmp_path_factory.mktemp("base") / request.param
    tokenizer = Tokenizer.load(PICO_DIR)
    sample = [tokenizer.encode("The quick brown fox jumps over the lazy dog.")]
    recipe = recipes.read("fp8" if request.param == "fp8" else "nvfp4-all")
    pipeline.quantize(PICO_DIR, path, recipe, calibration=sample)
    return path


def test_untrained_factors_change_nothing() -> None:
    model = toy()
    batch = collate(documents([33, 20]))
    before = model(batch.tokens, batch.layout)
    adapter = lora.attach(model, EVERYTHING)
    assert torch.equal(model(batch.tokens, batch.layout), before)
    shake(adapter)
    assert not torch.allclose(model(batch.tokens, batch.layout), before, atol=1e-3)
    adapter.detach()
    assert torch.equal(model(batch.tokens, batch.layout), before)
    assert not [n for n, _ in model.named_parameters() if "lora" in n]


def test_output_is_that_of_the_merged_weights_and_gradients_are_those_of_its_parts() -> None:
    model = toy().double()
    model.compute_dtype = torch.float64
    adapter = lora.attach(model, EVERYTHING)
    shake(adapter)
    plain = HybridModel(TOY, dtype=torch.float64, compute_dtype=torch.float64)
    state = {n: v for n, v in model.state_dict().items() if "lora" not in n}
    plain.load_state_dict(state)
    with torch.no_grad():
        for name in adapter.names:
            a, b = (
                adapter.parameters()[f"{name}.{side}"].double() for side in ("lora_A", "lora_B")
            )
            plain.get_submodule(name).weight += adapter.scale * (b @ a)  # type: ignore[operator]
    mine, merged = loss_of(model), loss_of(plain)
    torch.testing.assert_close(mine.detach(), merged.detach(), rtol=1e-6, atol=0)
    mine.backward()
    merged.backward()
    for name in adapter.names:
        a, b = (adapter.parameters()[f"{name}.{side}"] for side in ("lora_A", "lora_B"))
        whole = plain.get_parameter(f"{name}.weight").grad
        assert whole is not None and a.grad is not None and b.grad is not None
        wanted_a = adapter.scale * (b.detach().double().mT @ whole)
        wanted_b = adapter.scale * (whole @ a.detach().double().mT)
        for found, wanted in ((a.grad, wanted_a), (b.grad, wanted_b)):
            off = (found.double() - wanted).norm() / wanted.norm()
            assert float(off) < 1e-4, name
    trained = {n for n, p in model.named_parameters() if p.grad is not None}
    assert trained == set(adapter.parameters())


def test_trains_over_any_format_and_keeps_no_dense_copy(base: Path) -> None:
    model = load_checkpoint(base, load="memory").model
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    adapter = lora.attach(
        model, LoraConfig(r=4, alpha=8.0, targets=("q_proj", "expert", "in_proj"))
    )
    dense = {tuple(m.shape[-2:]) for m in model.modules() if isinstance(m, Matrix)}
    dense -= {tuple(model.lm_head.shape)}
    assert min(rows for rows, _ in dense) > 56  # so that no activation is taken for a weight
    kept = []

    def note(value: Tensor) -> Tensor:
        kept.append((tuple(value.shape), value.dtype))
        return value

    tokens = Tokenizer.load(PICO_DIR).encode("A snake sees the stone near the river. " * 5)[:56]
    weights = (0.0,) + (1.0,) * (len(tokens) - 1)
    batch = collate([Sample(tokens=tuple(tokens), ce_weight=weights, domain="text")])
    with torch.autograd.graph.saved_tensors_hooks(note, lambda value: value):
        compute_losses(model, batch, LOSS).total.backward()
    floats = (torch.float32, torch.float64)
    assert kept and not {shape for shape, dtype in kept if dtype in floats} & dense
    optimiser = torch.optim.AdamW(adapter.parameters().values(), lr=1e-2)
    losses = []
    for _ in range(12):
        optimiser.zero_grad()
        loss = compute_losses(model, batch, LOSS).total
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.3
    for name, value in before.items():
        stored = model.get_parameter(name)
        assert stored.grad is None
        raw = [t.detach().reshape(-1).view(torch.uint8) for t in (stored, value)]
        assert torch.equal(*raw), name


def test_trainer_learns_saves_and_resumes(tmp_path: Path) -> None:
    def run(output: Path, steps: int, source: Copies) -> Trainer:
        model = toy()
        config = LoraConfig(r=4, alpha=8.0, dropout=0.1, targets=("attention_qkv", "mamba_in"))
        adapter = lora.attach(model, config)
        trainer = Trainer(
            model,
            source,
            [],
            output=output,
            optim=OptimConfig(lr=1e-2, muon_lr=None, warmup_steps=2, weight_decay=0.0),
            loss=LOSS,
            config=TrainerConfig(steps=steps, eval_every=50, checkpoint_every=4, log_every=1),
            before_step=adapter.begin,
        )
        trainer.run()
        return trainer

    straight = run(tmp_path / "a", 10, Copies())
    held = collate(Copies(index=10_000).next_batch())
    with torch.no_grad():
        before = compute_losses(toy(), held, LOSS).ce
        after = compute_losses(straight.model, held, LOSS).ce
    assert after < before - 0.1
    run(tmp_path / "b", 10, Copies(interrupt_at=5))
    resumed = run(tmp_path / "b", 10, Copies())
    for (name, one), (_, two) in zip(
        straight.model.named_parameters(), resumed.model.named_parameters(), strict=True
    ):
        assert torch.equal(one, two), name


def test_dropout_only_touches_passes_with_gradients() -> None:
    model = toy()
    adapter = lora.attach(model, LoraConfig(r=4, dropout=0.5, targets=("in_proj",)))
    shake(adapter)
    batch = collate(documents([33]))
    found = []
    for step in (0, 0, 1):
        adapter.begin(step)
        found.append(model(batch.tokens, batch.layout).detach())
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])
    with torch.no_grad():
        quiet = model(batch.tokens, batch.layout)
        adapter.config = LoraConfig(r=4, targets=("in_proj",))
        assert torch.equal(quiet, model(batch.tokens, batch.layout))


def test_layers_that_run_again_leave_out_the_same() -> None:
    """Also where one matrix is passed several times in a step, as those of the head are."""
    model = toy()
    adapter = lora.attach(model, LoraConfig(r=4, dropout=0.5, targets=("in_proj", "mtp")))
    shake(adapter)
    batch = collate(documents([33, 12]))
    found = []
    for recompute in (False, True):
        adapter.begin(3)
        losses = compute_losses(model, batch, LossConfig(mtp_depths=2), recompute=recompute)
        losses.total.backward()
        found.append({name: p.grad for name, p in adapter.parameters().items()})
        model.zero_grad(set_to_none=True)
    assert any(name.startswith("mtp.") for name in found[0])
    for name, gradient in found[0].items():
        torch.testing.assert_close(gradient, found[1][name], msg=name)


# ---- targets ----


def test_targets_are_roles_ends_of_names_and_patterns() -> None:
    with torch.device("meta"):
        model = HybridModel(PRESETS["pico"])
    names = [n for n, m in model.named_modules() if isinstance(m, Matrix)]
    assert {n.rsplit(".", 1)[1] for n in lora.select(names, ["attention_qkv"])} == {
        "q_proj",
        "k_proj",
        "v_proj",
    }
    ends = lora.select(names, ["q_proj"])
    assert ends and all(n.endswith("q_proj") and n.startswith("backbone") for n in ends)
    assert lora.select(names, ["mtp"]) == tuple(n for n in names if n.startswith("mtp."))
    assert all(".experts." in n for n in lora.select(names, ["experts.up_proj"]))
    first = lora.select(names, ["backbone.layers.[01].*"])
    assert {n.split(".")[2] for n in first} == {"0", "1"}
    default = lora.select(names, LoraConfig().targets)
    assert default and not {matrix_role(n) for n in default} & {"mtp", "expert", "latent", "head"}
    for target in ("lm_head", "head", "q_prj", "gate"):
        with pytest.raises(ConfigError, match=f"names '{target}': no matrix"):
            lora.select(names, [target])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"r": 0}, "lora.r is 0"),
        ({"alpha": 0.0}, "lora.alpha is 0"),
        ({"dropout": 1.0}, "lora.dropout is 1"),
        ({"targets": ()}, "lora.targets is empty"),
    ],
)
def test_mistakes_are_named(values: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        LoraConfig(**values)


def test_only_one_thing_stands_in_the_place_of_a_product() -> None:
    model = toy()
    rounding = precision.Precision(model, precision.PrecisionConfig(recipe="nvfp4"))
    with pytest.raises(ConfigError, match="replaced already"):
        lora.attach(model, EVERYTHING)
    rounding.detach()
    lora.attach(model, EVERYTHING)
    with pytest.raises(ConfigError, match="another product"):
        precision.Precision(model, precision.PrecisionConfig(recipe="nvfp4"))
    assert not native.bindable(model)


# ---- files ----


def test_written_and_read_again(tmp_path: Path) -> None:
    model = toy()
    adapter = lora.attach(model, EVERYTHING)
    shake(adapter)
    lora.save(adapter, tmp_path / "adapter", base="toy")
    batch = collate(documents([33, 20]))
    wanted = model(batch.tokens, batch.layout)
    other = toy()
    again = lora.load(other, tmp_path / "adapter")
    assert torch.equal(other(batch.tokens, batch.layout), wanted)
    assert again.names == adapter.names and again.scale == adapter.scale
    assert all(p.requires_grad for p in again.parameters().values())
    tensors = load_file(tmp_path / "adapter" / lora.WEIGHTS_NAME)
    modules = {n for n in matrices(TOY) if matrix_role(n) != "head"}
    assert {n.removeprefix("base_model.model.").rsplit(".", 2)[0] for n in tensors} == modules
    described = json.loads((tmp_path / "adapter" / lora.CONFIG_NAME).read_text())
    assert described["target_modules"] == sorted({n.rsplit(".", 1)[1] for n in modules})
    # Some experts alone get the others' share of zero.
    kept = {n: t for n, t in tensors.items() if ".experts.0." not in n}
    save_file(kept, tmp_path / "adapter" / lora.WEIGHTS_NAME)
    part = lora.load(toy(), tmp_path / "adapter")
    up = part.parameters()["backbone.layers.2.mixer.experts.up_proj.lora_B"]
    assert not up[0].any() and up[1].any()


def test_peft_reads_what_is_written(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = random_model(TOY.without_mtp(), 0)
    targets = (*LoraConfig().targets, "latent")
    adapter = lora.attach(model, LoraConfig(r=4, alpha=6.0, targets=targets))
    reference = to_transformers(strip(model))
    shake(adapter)
    lora.save(adapter, tmp_path / "adapter")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = peft.PeftModel.from_pretrained(
            reference, str(tmp_path / "adapter"), key_mapping={r"^backbone": "model"}
        )
    tokens = torch.randint(1, TOY.vocab_size, (29,), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = adapted(tokens[None]).logits[0]
        plain = model.logits(model(tokens, Layout.packed([29])))
    assert (plain - wanted).abs().max() < 1e-4 * wanted.abs().max()


def strip(model: HybridModel) -> HybridModel:
    """Return the model's base as a model of its own."""
    plain = HybridModel(model.config, dtype=torch.float32)
    plain.load_state_dict({n: v for n, v in model.state_dict().items() if "lora" not in n})
    return plain.eval()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"r": 5}, "has shape"),
        ({"r": 0}, "r is 0"),
        ({"peft_type": "IA3"}, "does not describe a LoRA adapter"),
        ({"use_dora": True}, "use_dora is True"),
        ({"rank_pattern": {"q_proj": 3}}, "rank_pattern is"),
    ],
)
def test_adapters_that_do_not_fit_are_refused(tmp_path: Path, change: dict, message: str) -> None:
    lora.save(lora.attach(toy(), LoraConfig(r=4, targets=("q_proj",))), tmp_path)
    file = tmp_path / lora.CONFIG_NAME
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(CheckpointError, match=message):
        lora.load(toy(), tmp_path)


def test_tensors_of_another_model_are_refused(tmp_path: Path) -> None:
    lora.save(lora.attach(toy(), LoraConfig(r=4, targets=("q_proj",))), tmp_path)
    file = tmp_path / lora.WEIGHTS_NAME
    tensors = load_file(file)
    for rename, message in (
        (("q_proj", "r_proj"), "has no matrix"),
        (("lora_B.weight", "lora_C.weight"), "is not a factor"),
    ):
        save_file({n.replace(*rename): t for n, t in tensors.items()}, file)
        with pytest.raises(CheckpointError, match=message):
            lora.load(toy(), tmp_path)
    save_file({n: t for n, t in tensors.items() if "lora_A" in n}, file)
    with pytest.raises(CheckpointError, match="has no lora_B"):
        lora.load(toy(), tmp_path)
    with pytest.raises(CheckpointError, match="name the directory of an adapter"):
        lora.load(toy(), tmp_path / "nowhere")
