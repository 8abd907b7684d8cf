"""NVFP4 training: its products against their definitions, Transformer Engine's bytes, and runs."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from aprium.base.errors import ConfigError
from aprium.model.linear import Matrix
from aprium.model.model import HybridModel
from aprium.model.presets import PRESETS
from aprium.ops import fp8, nvfp4
from aprium.train import precision
from aprium.train.batch import collate
from aprium.train.losses import LossConfig, compute_losses
from aprium.train.optim import OptimConfig
from aprium.train.precision import PrecisionConfig, Rules, fake, product, rotate
from aprium.train.trainer import Trainer, TrainerConfig
from tests.train.test_losses import documents
from tests.train.test_trainer import Copies, figures

# Made with Transformer Engine's reference quantiser (generated data only).
VECTORS = dict(np.load(Path(__file__).parents[1] / "vectors" / "nvfp4_vectors.npz"))
TOY = PRESETS["toy"]
OFF = Rules(forward=False, input_gradient=False, weight_gradient=False)
NEAREST = Rules(stochastic=False)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def gradients(x: Tensor, weight: Tensor, dy: Tensor, rules: Rules, seed: str = "") -> list[Tensor]:
    """Return the output and the gradients of `x` and `weight`."""
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    y = product(weight, rules, seed)(x, None)
    return [y.detach(), *torch.autograd.grad(y, (x, weight), dy)]


# ---- one product ----


@pytest.mark.parametrize("rows", [8, 40, 48])
def test_without_rounding_it_is_the_plain_product_bit_for_bit(rows):
    x, weight, dy = normal(rows, 64), normal(36, 64, seed=1), normal(rows, 36, seed=2)
    plain_x, plain_w = x.clone().requires_grad_(), weight.clone().requires_grad_()
    y = F.linear(plain_x, plain_w)
    wanted = [y.detach(), *torch.autograd.grad(y, (plain_x, plain_w), dy)]
    for found, one in zip(gradients(x, weight, dy, OFF), wanted, strict=True):
        assert torch.equal(found, one)


def test_the_three_products_have_the_operands_of_the_recipe():
    x, weight, dy = normal(32, 48), normal(32, 48, seed=1), normal(32, 32, seed=2)
    q_w = nvfp4.dequantize(*nvfp4.encode_training(weight, tile=16))
    y, dx, dw = gradients(x, weight, dy, NEAREST)
    torch.testing.assert_close(y, nvfp4.dequantize(*nvfp4.encode_training(x)) @ q_w.T)
    torch.testing.assert_close(dx, nvfp4.dequantize(*nvfp4.encode_training(dy)) @ q_w)
    matrix = torch.from_numpy(VECTORS["train/rht_matrix_unscaled"]) / 4
    turned = [
        nvfp4.dequantize(
            *nvfp4.encode_training((t.T.reshape(-1, 2, 16) @ matrix).reshape(t.shape[1], 32))
        )
        for t in (dy, x)
    ]
    torch.testing.assert_close(dw, turned[0] @ turned[1].T)


def test_weights_in_one_dimension_are_rounded_along_each_contraction():
    x, weight, dy = normal(16, 48), normal(32, 48, seed=1), normal(16, 32, seed=2)
    y, dx, _ = gradients(x, weight, dy, NEAREST._replace(weights_2d=False))
    torch.testing.assert_close(y, fake(x) @ fake(weight).T)
    torch.testing.assert_close(dx, fake(dy) @ fake(weight.T).T)
    assert not torch.equal(fake(weight), fake(weight.T).T)
    assert torch.equal(fake(weight, tile=16), fake(weight.T, tile=16).T)


def test_a_forward_pass_that_is_not_rounded_keeps_the_rounded_gradients():
    x, weight, dy = normal(32, 48), normal(32, 48, seed=1), normal(32, 32, seed=2)
    rounded = gradients(x, weight, dy, NEAREST)
    switched = gradients(x, weight, dy, NEAREST._replace(forward=False))
    assert torch.equal(switched[0], F.linear(x, weight))
    assert torch.equal(switched[1], rounded[1]) and torch.equal(switched[2], rounded[2])


def test_gradients_are_right_on_average():
    x, weight, dy = normal(48, 32), normal(48, 32, seed=1), normal(48, 48, seed=2)
    rules = Rules(headroom=17 / 16)
    draws = [gradients(x, weight, dy, rules, seed=str(i))[1:] for i in range(400)]
    matrix = precision.hadamard(torch.device("cpu"))
    rounded_x = (fake(rotate(x.T)).unflatten(-1, (-1, 16)) @ matrix.T).flatten(-2).T
    wanted = (dy @ fake(weight, tile=16), dy.T @ rounded_x)
    for which, exact in enumerate(wanted):
        stack = torch.stack([draw[which] for draw in draws])
        error = stack.std(0) / len(draws) ** 0.5
        z = (stack.mean(0) - exact) / error
        assert float(z.abs().max()) < 5.5
        assert abs(float(z.mean())) < 0.15 and 0.9 < float(z.std()) < 1.1
    other = dy.T @ x  # the rounding of x does not average out
    z = (torch.stack([d[1] for d in draws]).mean(0) - other) / error
    assert float(z.std()) > 1.5


@settings(max_examples=30)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 40), st.integers(0, 999))
def test_any_size_is_padded_with_zeros(rows, outputs, inputs, seed):
    x, weight = normal(rows, inputs, seed=seed), normal(outputs, inputs, seed=seed + 1)
    dy = normal(rows, outputs, seed=seed + 2)
    alone = gradients(x, weight, dy, NEAREST)
    pad = [-n % 16 for n in (rows, outputs, inputs)]
    padded = gradients(
        F.pad(x, (0, pad[2], 0, pad[0])),
        F.pad(weight, (0, pad[2], 0, pad[1])),
        F.pad(dy, (0, pad[1], 0, pad[0])),
        NEAREST,
    )
    for found, whole in zip(alone, padded, strict=True):
        inside = whole[: found.shape[0], : found.shape[1]]
        torch.testing.assert_close(found, inside, rtol=1e-5, atol=1e-5)


def test_experts_are_rounded_one_by_one():
    stack = (normal(3, 20, 32) * torch.tensor([1.0, 30.0, 0.1])[:, None, None]).requires_grad_()
    multiply = product(stack, NEAREST, "s")
    total = torch.zeros(())
    for expert in (0, 2):
        rows = normal(5 + expert, 32, seed=expert)
        dy = normal(5 + expert, 20, seed=9)
        y, _, dw = gradients(rows, stack[expert].detach(), dy, NEAREST)
        mine = multiply(rows, expert)
        assert torch.equal(mine, y)
        total = total + (mine * dy).sum()
        (alone,) = torch.autograd.grad((mine * dy).sum(), stack, retain_graph=True)
        assert torch.equal(alone[expert], dw)
    (both,) = torch.autograd.grad(total, stack)
    assert not both[1].any() and both[0].any() and both[2].any()


# ---- rounding and rotation ----


@settings(max_examples=40)
@given(st.integers(0, 9999), st.floats(1e-20, 1e20))
def test_stochastic_rounding_takes_neighbours_and_leaves_exact_values(seed, size):
    x = normal(8, 48, seed=seed) * size
    draw = nvfp4.round_training(x, generator=torch.Generator().manual_seed(seed))
    nearest = nvfp4.round_training(x)
    assert torch.equal(draw.scale.float(), nearest.scale.float())
    table = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6.0])
    places = [torch.bucketize(r.values.abs(), table) for r in (draw, nearest)]
    assert torch.equal(table[places[0]], draw.values.abs())
    assert int((places[0] - places[1]).abs().max()) <= 1


@settings(max_examples=30)
@given(st.integers(0, 9999))
def test_numbers_that_nvfp4_has_never_move(seed):
    generator = torch.Generator().manual_seed(seed)
    table = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6.0])
    values = table[torch.randint(8, (8, 3, 16), generator=generator)]
    values[..., 0] = 6  # so that the block keeps its scale
    scale = 2.0 ** torch.randint(-6, 8, (8, 3, 1), generator=generator)
    scale[0, 0] = 448
    x = (values * scale * torch.randn(8, 3, 16, generator=generator).sign()).flatten(-2)
    assert torch.equal(fake(x, generator=generator), x)


def test_stochastic_rounding_goes_up_with_the_share_of_the_step():
    values = torch.tensor([0.1, 0.7, 1.3, 2.3, 2.9, 3.5, 4.4, 5.9])
    row = torch.cat((values, -values[:7], torch.tensor([6.0])))  # scales of exactly 1
    x = torch.cat((row, torch.full((16,), 448 * 6.0))).expand(4096, 32)
    draws = fake(x, generator=torch.Generator().manual_seed(0))[:, :15]
    table = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6.0])
    low = torch.bucketize(row[:15].abs(), table, right=True) - 1
    share = (row[:15].abs() - table[low]) / (table[low + 1] - table[low])
    up = (draws.abs() == table[low + 1]).float().mean(0)
    assert bool(((draws.abs() == table[low]) | (draws.abs() == table[low + 1])).all())
    sigma = (share * (1 - share) / 4096).sqrt()
    assert float(((up - share) / sigma).abs().max()) < 4.5
    same = fake(x, generator=torch.Generator().manual_seed(0))[:, :15]
    assert torch.equal(draws, same)


def test_headroom_alone_frees_the_largest_of_a_block_from_bias():
    x = normal(64, 64, seed=3)
    generator = torch.Generator().manual_seed(1)
    largest = x.unflatten(-1, (-1, 16)).abs()
    largest = (largest == largest.amax(-1, keepdim=True)).flatten(-2)
    bias = {}
    for headroom in (1.0, 17 / 16):
        draws = [fake(x, generator=generator, headroom=headroom) for _ in range(400)]
        relative = (torch.stack(draws).mean(0) - x) / x.abs() * x.sign()
        bias[headroom] = float(relative[largest].mean()), float(relative[~largest].median())
    assert bias[1.0][0] == pytest.approx(-0.011, abs=0.004)
    assert abs(bias[17 / 16][0]) < 0.002 and abs(bias[1.0][1]) < 0.002


def test_rotation_is_transformer_engines_and_orthogonal():
    matrix = precision.hadamard(torch.device("cpu"))
    assert torch.equal(matrix @ matrix.T, torch.eye(16))
    assert torch.equal(matrix * 4, torch.from_numpy(VECTORS["train/rht_matrix_unscaled"]))
    a, b = normal(24, 64), normal(40, 64, seed=1)
    torch.testing.assert_close(rotate(a) @ rotate(b).T, a @ b.T, rtol=0, atol=2e-5)


def test_rotated_values_round_to_transformer_engines_bytes():
    x = torch.from_numpy(VECTORS["train/x"]).view(torch.bfloat16)
    turned = rotate(x.T.contiguous())
    assert turned.dtype == torch.bfloat16
    found = nvfp4.encode_training(turned)
    assert np.array_equal(found.packed.numpy(), VECTORS["train/te_rht/packed_t"])
    assert np.array_equal(fp8_bytes(found.scale), VECTORS["train/te_rht/scale_t"])
    assert np.array_equal(nvfp4.round_training(turned).dequantize().numpy(), decoded(found))
    for case, tile in (("te2d", 16), ("te1d_col", 1)):
        wanted = torch.from_numpy(VECTORS[f"train/{case}/deq"])
        torch.testing.assert_close(fake(x.float(), tile=tile), wanted, rtol=3e-7, atol=0)


def fp8_bytes(scale: Tensor) -> np.ndarray:
    return scale.view(torch.uint8).numpy()


def decoded(encoded: nvfp4.Encoded) -> np.ndarray:
    factor = fp8.to_float(encoded.scale) * encoded.scale_2
    assert factor.isfinite().all()
    return nvfp4.dequantize(*encoded).numpy()


# ---- a model ----


def toy() -> HybridModel:
    model = HybridModel(TOY, dtype=torch.float32)
    model.init_weights(torch.Generator().manual_seed(0))
    return model


def backward(model: HybridModel) -> dict[str, Tensor]:
    model.zero_grad()
    compute_losses(model, collate(documents([33, 20, 7])), LossConfig()).total.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", ["pico", "nano", "ultra"])
def test_what_the_published_runs_kept_is_kept(name):
    with torch.device("meta"):
        model = HybridModel(PRESETS[name])
    found = precision.rounded_matrices(model, 0.15)
    layers = model.config.layers
    last = {"pico": 8, "nano": 44, "ultra": 92}[name]
    assert max(int(n.split(".")[2]) for n in found) < last
    leaves = {(layers[int(n.split(".")[2])], n.split(".", 4)[4]) for n in found}
    wanted = {
        ("mamba", "in_proj"),
        *(("moe", f"{p}.{m}_proj") for p in ("experts", "shared_experts") for m in ("up", "down")),
    }
    wanted |= {("mlp", "up_proj"), ("mlp", "down_proj")} if "mlp" in layers else set()
    assert leaves == wanted
    count = sum(kind in ("mamba", "moe", "mlp") for kind in layers[:last])
    assert len({n.split(".")[2] for n in found}) == count


def test_attached_and_detached_model():
    model = toy()
    plain = backward(model)
    attached = precision.attach(model, PrecisionConfig(recipe="nvfp4"))
    assert attached is not None and len(attached.names) == 8
    one = backward(model)
    attached.begin(0)
    again = backward(model)
    other_step = (attached.begin(1), backward(model))[1]
    rounded = attached.names[0] + ".weight"
    attached.begin(0)
    assert torch.equal(backward(model)[rounded], again[rounded])
    assert not torch.equal(again[rounded], other_step[rounded])
    assert torch.equal(one[rounded], again[rounded])
    assert not torch.equal(one[rounded], plain[rounded])
    with torch.no_grad():
        batch = collate(documents([33]))
        quiet = model(batch.tokens, batch.layout)
    assert torch.equal(quiet, model(batch.tokens, batch.layout))
    attached.detach()
    for name, gradient in backward(model).items():
        assert torch.equal(gradient, plain[name]), name
    assert precision.attach(model, PrecisionConfig()) is None


def test_threads_do_not_change_the_numbers():
    found = []
    for threads in (1, 2):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            x = normal(256, 192)
            found.append(fake(x, generator=precision.keyed_generator("k", x.device)))
        finally:
            torch.set_num_threads(before)
    assert torch.equal(*found)


def run(output: Path, steps: int, config: PrecisionConfig, source: Copies | None = None) -> Trainer:
    model = toy()
    rounding = precision.attach(model, config)
    trainer = Trainer(
        model,
        source or Copies(),
        [],
        output=output,
        optim=OptimConfig(lr=3e-3, muon_lr=0.01, warmup_steps=3),
        loss=LossConfig(),
        config=TrainerConfig(steps=steps, eval_every=50, checkpoint_every=4, log_every=1),
        before_step=rounding.begin if rounding else None,
    )
    trainer.run()
    return trainer


def test_resumed_run_equals_uninterrupted_run(tmp_path):
    config = PrecisionConfig(recipe="nvfp4")
    straight = run(tmp_path / "a", 8, config)
    run(tmp_path / "b", 8, config, Copies(interrupt_at=5))
    resumed = run(tmp_path / "b", 8, config)
    assert figures(resumed) == figures(straight)
    for (name, one), (_, two) in zip(
        straight.model.named_parameters(), resumed.model.named_parameters(), strict=True
    ):
        assert torch.equal(one, two), name


def test_it_learns_and_switches_in_the_middle(tmp_path):
    whole = run(tmp_path / "a", 30, PrecisionConfig(recipe="nvfp4"))
    losses = [f["loss"] for f in whole.metrics.read("train")]
    assert losses[-1] < losses[0] - 0.4
    switched = run(tmp_path / "b", 30, PrecisionConfig(recipe="nvfp4", switch_at_step=20))
    mine = [f["loss"] for f in switched.metrics.read("train")]
    assert mine[:20] == losses[:20] and mine[20] != losses[20]


def test_nothing_is_rounded_before_it_begins(tmp_path):
    plain = run(tmp_path / "a", 6, PrecisionConfig())
    later = run(tmp_path / "b", 9, PrecisionConfig(recipe="nvfp4", begin_at_step=6))
    rounded = run(tmp_path / "c", 6, PrecisionConfig(recipe="nvfp4"))
    losses = [[f["loss"] for f in t.metrics.read("train")] for t in (plain, later, rounded)]
    assert losses[1][:6] == losses[0] != losses[2]
    plainly_on = run(tmp_path / "d", 9, PrecisionConfig())
    assert later.metrics.read("train")[6]["loss"] != plainly_on.metrics.read("train")[6]["loss"]


# ---- what is refused ----


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"keep_last_fraction": 1.5}, r"keep_last_fraction is 1\.5"),
        ({"begin_at_step": -1}, "begin_at_step is -1"),
        ({"switch_at_step": -1}, "switch_at_step is -1"),
        ({"begin_at_step": 9, "switch_at_step": 8}, "before begin_at_step, 9"),
        ({"kernels": "transformer_engine"}, "use 'emulated'"),
    ],
)
def test_mistakes_are_named(values: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        PrecisionConfig(recipe="nvfp4", **values)


def test_models_that_cannot_be_trained_so_are_refused():
    with pytest.raises(ConfigError, match="no matrix is left"):
        precision.attach(toy(), PrecisionConfig(recipe="nvfp4", keep_last_fraction=1.0))
    model = toy()
    matrix = model.get_submodule("backbone.layers.0.mixer.in_proj")
    assert isinstance(matrix, Matrix)
    matrix.format = "fp8"
    with pytest.raises(ConfigError, match=r"layers\.0\.mixer\.in_proj is stored as fp8"):
        precision.attach(model, PrecisionConfig(recipe="nvfp4"))
