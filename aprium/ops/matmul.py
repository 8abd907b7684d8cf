"""Matrix product of packed tokens with a weight, the same bits for a row whatever is beside it.

BLAS libraries choose another order of summation for a handful of rows than for many, so a token's
result would depend on what it was batched with. Rows are therefore padded to a multiple of
`ROW_TILE`, from where on the order is the same for every row (tests/ops/test_row_invariance.py).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

ROW_TILE = 8
_COLUMN_TILE = 16  # floats of a cache line
_WIDE = 256  # columns from where on their alignment pays


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return `x @ weight.T + bias`.

    `x` [T, in] decides the dtype of the result; `weight` [out, in] and `bias` [out] are converted
    to it. Returns [T, out].
    """
    num_rows = x.shape[0]
    weight = weight.to(x.dtype)
    pad = -num_rows % ROW_TILE
    if pad:
        x = F.pad(x, (0, 0, 0, pad))
    wide = x.dtype == torch.float32 and x.device.type == "cpu" and len(weight) >= _WIDE
    y = _Aligned.apply(x, weight) if wide and len(weight) % _COLUMN_TILE else F.linear(x, weight)
    if pad:
        y = y[:num_rows]
    return y if bias is None else y + bias.to(y.dtype)


class _Aligned(torch.autograd.Function):
    """`x @ weight.T` into rows that begin at cache lines, which are filled faster."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        columns = len(weight)
        room = x.new_empty(len(x), columns + -columns % _COLUMN_TILE)
        return torch.mm(x, weight.T, out=room[:, :columns])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        (grad,) = grads
        grad_x = grad @ weight if ctx.needs_input_grad[0] else None
        return grad_x, grad.T @ x if ctx.needs_input_grad[1] else None
