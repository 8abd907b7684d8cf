"""Root-mean-square normalisation, plain and gated by groups, with statistics in float32.

Gradients are written out: they keep the inputs alone and make the rest again.
Source: docs/architecture.md; Mamba-2 (arXiv 2405.21060) for the gated form, gate before norm.
"""

from typing import Any

import torch
from torch import Tensor

from aprium.ops.activation import sigmoid, silu


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return `x / rms(x) * weight`, computed in float32 and cast back.

    `x` [..., D], `weight` [D]; returns [..., D] in the dtype of `x`.
    """
    return _RmsNorm.apply(x, weight, eps)


def gated_group_norm(
    y: Tensor, gate: Tensor, weight: Tensor, num_groups: int, eps: float
) -> Tensor:
    """Return the group-wise RMS norm of `y * silu(gate)`.

    `y`, `gate` [T, I], `weight` [I]; each of `num_groups` contiguous groups of I / num_groups
    values has its own statistics. Returns [T, I] in the dtype of `gate`.
    """
    return _GatedNorm.apply(y, gate, weight, num_groups, eps)


def _inverse_rms(wide: Tensor, eps: float) -> Tensor:
    return torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)


def _backward(unit: Tensor, scale: Tensor, grad: Tensor) -> Tensor:
    """Return the gradient of `x` where `unit` = x * `scale` and `grad` is that of `unit`."""
    return scale * (grad - unit * (grad * unit).mean(-1, keepdim=True))


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = _wide(x)
        scale = _inverse_rms(wide, eps)
        ctx.save_for_backward(x, weight, scale)
        return (wide * scale * _wide(weight)).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, scale = ctx.saved_tensors
        grad, unit = _wide(grads[0]), _wide(x) * scale
        grad_weight = (grad * unit).flatten(0, -2).sum(0)
        grad_x = _backward(unit, scale, grad * _wide(weight))
        return grad_x.to(x.dtype), grad_weight.to(weight.dtype), None


class _GatedNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, y: Tensor, gate: Tensor, weight: Tensor, num_groups: int, eps: float
    ) -> Tensor:
        wide = (_wide(y) * silu(_wide(gate))).unflatten(-1, (num_groups, -1))
        scale = _inverse_rms(wide, eps)
        ctx.save_for_backward(y, gate, weight, scale)
        return ((wide * scale).flatten(-2) * _wide(weight)).to(gate.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        y, gate, weight, scale = ctx.saved_tensors
        groups = (scale.shape[-2], -1)
        grad, open_ = _wide(grads[0]), sigmoid(_wide(gate))
        gated = _wide(gate) * open_
        unit = (_wide(y) * gated).unflatten(-1, groups).mul_(scale)
        grad_weight = (grad * unit.flatten(-2)).flatten(0, -2).sum(0)
        inner = (grad * _wide(weight)).unflatten(-1, groups)
        inner = _backward(unit, scale, inner).flatten(-2)
        # d silu(g) / dg = s + g s (1 - s), with s the sigmoid.
        grad_gate = inner * _wide(y) * (open_ + gated * (1.0 - open_))
        grad_y = inner.mul_(gated)
        return (
            grad_y.to(y.dtype),
            grad_gate.to(gate.dtype),
            grad_weight.to(weight.dtype),
            None,
            None,
        )


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
