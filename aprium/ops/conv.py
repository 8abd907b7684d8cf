"""Causal depthwise convolution over packed segments, with a carried tail per sequence.

Source: Mamba-2 (arXiv 2405.21060). Tap K-1 multiplies the current token; what lies left of a
sequence is zeros. Products are summed oldest tap first, each rounded on its own, so a token's
result is the same in every batch and chunking.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from aprium.ops import _native
from aprium.ops.activation import silu

_MOST_TAPS = 8  # of the native kernels


def silu_conv(x: Tensor, weight: Tensor, bias: Tensor | None, positions: Tensor) -> Tensor:
    """Return `silu(causal_conv(...))` in float32 (float64 for float64), with gradients."""
    if weight.shape[1] <= _MOST_TAPS and _native.runs_on(x, dtypes=_native.FLOATS):
        return _NativeConv.apply(x, weight, bias, positions)
    y = silu(causal_conv(x, weight, bias, positions))
    return y if y.dtype == torch.float64 else y.float()


class _NativeConv(torch.autograd.Function):
    """`silu_conv` by native kernels, which keep the input alone."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, positions: Tensor
    ) -> Tensor:
        x = x if x.stride(1) == 1 else x.contiguous()
        positions = positions.contiguous()
        ctx.save_for_backward(x, weight, bias, positions)
        ctx.machine = _native.shared()
        out = x.new_empty(x.shape, dtype=torch.float32)
        taps, shift = _taps(weight, bias)
        ctx.machine.conv_forward(*_conv_inputs(x, taps, shift, positions), out.data_ptr())
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor | None, None]:
        x, weight, bias, positions = ctx.saved_tensors
        taps, shift = _taps(weight, bias)
        grad, grad_x = grads[0].contiguous(), x.new_empty(x.shape)
        grad_taps, grad_shift = torch.empty_like(taps), taps.new_empty(taps.shape[1])
        to = (grad_x.data_ptr(), grad_taps.data_ptr(), grad_shift.data_ptr())
        inputs = _conv_inputs(x, taps, shift, positions)
        ctx.machine.conv_backward(*inputs, grad.data_ptr(), to)
        grad_bias = None if bias is None else grad_shift.to(bias.dtype)
        return grad_x, grad_taps.T.to(weight.dtype), grad_bias, None


def _taps(weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Return the weight as [K, C] and the bias, in float32."""
    return weight.T.float().contiguous(), None if bias is None else bias.float().contiguous()


def _conv_inputs(x: Tensor, taps: Tensor, shift: Tensor | None, positions: Tensor) -> tuple:
    """Return what the kernels take; the tensors must outlive the call."""
    sizes = (*x.shape, taps.shape[0], x.stride(0))
    bias = 0 if shift is None else shift.data_ptr()
    half = x.dtype == torch.bfloat16
    return x.data_ptr(), half, sizes, taps.data_ptr(), bias, positions.data_ptr()


def causal_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, positions: Tensor, history: Tensor | None = None
) -> Tensor:
    """Convolve each segment of packed `x` along its tokens.

    `x` [T, C]; `weight` [C, K]; `bias` [C]; `positions` int64 [T], index of a token in its
    segment. `history` [T, K-1, C] holds, for tokens whose position is below K-1, the inputs that
    precede the segment, oldest first (other rows are not read); without it they are zeros.
    Returns [T, C] in the dtype of `x`. Without `history` there are gradients.
    """
    if history is None:
        return _CausalConv.apply(x, weight, bias, positions)
    return _convolve(x, weight, bias, positions, history)


class _CausalConv(torch.autograd.Function):
    """The convolution from zeros, which keeps its input alone for the gradient."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, positions: Tensor
    ) -> Tensor:
        ctx.save_for_backward(x, weight, positions)
        ctx.bias_dtype = None if bias is None else bias.dtype
        return _convolve(x, weight, bias, positions, None)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor | None, None]:
        x, weight, positions = ctx.saved_tensors
        grad, kernel = grads[0].contiguous(), weight.shape[1]
        taps = weight.to(x.dtype).unbind(1)
        grad_x = grad * taps[-1]
        by_tap = [(grad * x).sum(0)]
        for back in range(1, kernel):
            # Token t + back reads token t, if it is that far into its sequence.
            count = max(x.shape[0] - back, 0)
            later = grad[back:] * (positions[back:] >= back).unsqueeze(1)
            grad_x[:count].addcmul_(later, taps[kernel - 1 - back])
            by_tap.append((later * x[:count]).sum(0))
        grad_weight = torch.stack(by_tap[::-1], 1).to(weight.dtype)
        grad_bias = None if ctx.bias_dtype is None else grad.sum(0).to(ctx.bias_dtype)
        return grad_x, grad_weight, grad_bias, None


def _convolve(
    x: Tensor, weight: Tensor, bias: Tensor | None, positions: Tensor, history: Tensor | None
) -> Tensor:
    kernel = weight.shape[1]
    taps = weight.to(x.dtype).unbind(1)
    total = None
    for back in range(kernel - 1, -1, -1):
        term = _shifted(x, back, positions, history, kernel) * taps[kernel - 1 - back]
        total = term if total is None else total + term
    assert total is not None
    return total if bias is None else total + bias.to(x.dtype)


def _shifted(
    x: Tensor, back: int, positions: Tensor, history: Tensor | None, kernel: int
) -> Tensor:
    """Return for every token the input `back` tokens before it in its sequence: [T, C]."""
    if back == 0:
        return x
    inside = (positions >= back).unsqueeze(1)
    shifted = torch.cat((x.new_zeros(min(back, x.shape[0]), x.shape[1]), x[:-back]))
    if history is None:
        return torch.where(inside, shifted, 0.0)
    # Entry K-1-back+position of the history is `back` tokens before the one at `position`.
    index = (kernel - 1 - back + positions).clamp(max=kernel - 2)
    before = history[torch.arange(x.shape[0], device=x.device), index]
    return torch.where(inside, shifted, before)


def conv_tail(x: Tensor, starts: Tensor, lengths: Tensor, tail: Tensor) -> Tensor:
    """Return the last K-1 inputs of each sequence after a step.

    `x` [T, C] are the step's inputs, `starts` and `lengths` int64 [S] its segments, `tail`
    [S, K-1, C] the inputs before them, oldest first. Returns [S, K-1, C].
    """
    width = tail.shape[1]
    # Source of entry j, counted from the segment's first token; negative reaches into the tail.
    source = lengths.unsqueeze(1) - width + torch.arange(width, device=x.device)
    fresh = x[(starts.unsqueeze(1) + source).clamp(0, x.shape[0] - 1)]
    kept = torch.gather(
        tail, 1, (source + width).clamp(0, width - 1).unsqueeze(2).expand(-1, -1, tail.shape[2])
    )
    return torch.where((source >= 0).unsqueeze(2), fresh.to(tail.dtype), kept)
