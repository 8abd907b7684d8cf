"""Root-mean-square normalisation, plain and gated by groups, with statistics in float32.

Gradients are written out: they keep the inputs alone and make the rest again. On the CPU both run
in native kernels where there are any; a row has the same bits whatever is beside it.
Source: docs/architecture.md; Mamba-2 (arXiv 2405.21060) for the gated form, gate before norm.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from aprium.ops import _native
from aprium.ops.activation import sigmoid, silu


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return `x / rms(x) * weight`, computed in float32 and cast back.

    `x` [..., D], `weight` [D]; returns [..., D] in the dtype of `x`.
    """
    if _native.runs_on(x, dtypes=_native.FLOATS):
        return _NativeNorm.apply(x, None, weight, 1, eps)
    return _RmsNorm.apply(x, weight, eps)


def gated_group_norm(
    y: Tensor, gate: Tensor, weight: Tensor, num_groups: int, eps: float
) -> Tensor:
    """Return the group-wise RMS norm of `y * silu(gate)`.

    `y`, `gate` [T, I], `weight` [I]; each of `num_groups` contiguous groups of I / num_groups
    values has its own statistics. Returns [T, I] in the dtype of `gate`.
    """
    if _native.runs_on(y, gate, dtypes=_native.FLOATS):
        return _NativeNorm.apply(y, gate, weight, num_groups, eps)
    return _GatedNorm.apply(y, gate, weight, num_groups, eps)


def _inverse_rms(wide: Tensor, eps: float) -> Tensor:
    return torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)


def _backward(unit: Tensor, scale: Tensor, grad: Tensor) -> Tensor:
    """Return the gradient of `x` where `unit` = x * `scale` and `grad` is that of `unit`."""
    return scale * (grad - unit * (grad * unit).mean(-1, keepdim=True))


class _NativeNorm(torch.autograd.Function):
    """Both norms by native kernels; plain without a gate."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, gate: Tensor | None, weight: Tensor, num_groups: int, eps: float
    ) -> Tensor:
        x = x.contiguous()
        gate = gate if gate is None or gate.stride(-1) == 1 else gate.contiguous()
        out = torch.empty_like(x if gate is None else gate, memory_format=torch.contiguous_format)
        scales = x.new_empty((*x.shape[:-1], num_groups), dtype=torch.float32)
        ctx.machine, ctx.call = _native.shared(), (num_groups, eps)
        ctx.save_for_backward(x, gate, weight, scales)
        wide = weight.float().contiguous()
        inputs = _inputs(x, gate, wide, num_groups, eps, scales)
        ctx.machine.norm_forward(*inputs, out.data_ptr())
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, gate, weight, scales = ctx.saved_tensors
        grad, wide = grads[0].contiguous(), weight.float().contiguous()
        grad_x, grad_weight = torch.empty_like(x), torch.empty_like(wide)
        grad_gate = None if gate is None else gate.new_empty(gate.shape)
        to = (grad_x.data_ptr(), _address(grad_gate), grad_weight.data_ptr())
        num_groups, eps = ctx.call
        inputs = _inputs(x, gate, wide, num_groups, eps, scales)
        ctx.machine.norm_backward(*inputs, grad.data_ptr(), to)
        return grad_x, grad_gate, grad_weight.to(weight.dtype), None, None


def _inputs(
    x: Tensor, gate: Tensor | None, weight: Tensor, num_groups: int, eps: float, scales: Tensor
) -> tuple:
    """Return what the kernels take; the tensors must outlive the call."""
    like = x if gate is None else gate
    halves = (x.dtype == torch.bfloat16, like.dtype == torch.bfloat16)
    sizes = (x.shape[:-1].numel(), x.shape[-1], num_groups, 0 if gate is None else gate.stride(0))
    where = (x.data_ptr(), _address(gate))
    return *where, halves, sizes, weight.data_ptr(), eps, scales.data_ptr()


def _address(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


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
