"""Principle: a token's result has the same bits whatever lies beside it in the tensor."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from aprium.ops.activation import sigmoid, silu, softplus
from aprium.ops.matmul import linear
from aprium.ops.norm import gated_group_norm, rms_norm

WIDTHS = (1, 15, 16, 17, 37, 48, 100, 192, 384)

OPS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "sigmoid": lambda x, w: sigmoid(x),
    "silu": lambda x, w: silu(x),
    "softplus": lambda x, w: softplus(x),
    "exp": lambda x, w: torch.exp(x),
    "rms_norm": lambda x, w: rms_norm(x, w[0], 1e-5),
    "gated_group_norm": lambda x, w: gated_group_norm(x, x.flip(1), w[0], 1, 1e-5),
    "linear": lambda x, w: linear(x, w),
    "linear bf16 weight": lambda x, w: linear(x, w.bfloat16(), w[:, 0]),
}


@pytest.mark.parametrize("name", OPS)
@settings(max_examples=15)
@given(st.sampled_from(WIDTHS), st.lists(st.integers(1, 40), min_size=1, max_size=8))
def test_rows_do_not_depend_on_partition(name: str, width: int, sizes: list[int]) -> None:
    generator = torch.Generator().manual_seed(width)
    x = torch.randn(sum(sizes), width, generator=generator)
    weight = torch.randn(29, width, generator=generator)
    whole = OPS[name](x, weight)
    parts = torch.cat([OPS[name](part, weight) for part in x.split(sizes)])
    assert torch.equal(whole, parts)


def test_activations_equal_torch() -> None:
    x = torch.cat((torch.randn(1000) * 5, torch.tensor([-200.0, 200.0, 0.0])))
    pairs = (
        (sigmoid, torch.sigmoid),
        (silu, torch.nn.functional.silu),
        (softplus, torch.nn.functional.softplus),
    )
    for ours, theirs in pairs:
        torch.testing.assert_close(ours(x), theirs(x), rtol=2e-6, atol=1e-7)
    wide = x.double().requires_grad_()
    for ours, _ in pairs:
        (gradient,) = torch.autograd.grad(ours(wide).sum(), wide)
        assert torch.isfinite(gradient).all()


def test_norms_equal_their_formulas() -> None:
    x, gate = torch.randn(7, 24, dtype=torch.float64), torch.randn(7, 24, dtype=torch.float64)
    weight = torch.randn(24, dtype=torch.float64)
    expected = torch.nn.functional.rms_norm(x, (24,), weight, 1e-5)
    torch.testing.assert_close(rms_norm(x, weight, 1e-5), expected, rtol=1e-5, atol=1e-6)
    mixed = (x * torch.nn.functional.silu(gate)).unflatten(1, (3, 8))
    expected = torch.nn.functional.rms_norm(mixed, (8,), None, 1e-5).flatten(1) * weight
    found = gated_group_norm(x, gate, weight, 3, 1e-5)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
