"""Sigmoid, SiLU, softplus and squared ReLU, the same bits wherever an element lies in its tensor.

PyTorch's fused versions use another implementation for the last few elements of a tensor than for
the rest, so a token's result would depend on the batch. Its exp, log1p and arithmetic do not
(tests/ops/test_row_invariance.py), and these are built from them. Gradients need no such care and
come from PyTorch's fused forms, which keep the input alone.
"""

from typing import Any

import torch
from torch import Tensor


def sigmoid(x: Tensor) -> Tensor:
    """Return 1 / (1 + exp(-x)), elementwise."""
    return 1.0 / (1.0 + torch.exp(-x))


def silu(x: Tensor) -> Tensor:
    """Return x * sigmoid(x), elementwise."""
    return _Silu.apply(x) if x.requires_grad else _silu(x)


def _silu(x: Tensor) -> Tensor:
    return x / torch.exp(-x).add_(1.0)


class _Silu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return _silu(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return torch.ops.aten.silu_backward(grads[0].contiguous(), x)


def softplus(x: Tensor) -> Tensor:
    """Return log(1 + exp(x)), elementwise and without overflow."""
    return x.clamp(min=0) + torch.log1p(torch.exp(-x.abs()))


def relu_squared(x: Tensor) -> Tensor:
    """Return max(x, 0)^2, elementwise."""
    return _ReluSquared.apply(x)


class _ReluSquared(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        positive = x.relu()
        ctx.save_for_backward(positive)
        return positive.square()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (positive,) = ctx.saved_tensors
        return (grads[0] * positive).mul_(2)
