"""Mixture of experts: sigmoid router with a selection bias, and experts grouped by token.

Gradients of gathering, of weighted sums and of stacked experts are written out: each is one pass,
and a stack's gradient is filled in place, where PyTorch would add or join parts.
Source: docs/architecture.md; DeepSeek-V3 (arXiv 2412.19437) for the bias that only selects.
Letters: T packed tokens, E experts, A active experts, D width that experts act on.
"""

from collections.abc import Callable
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from aprium.ops.matmul import ROW_TILE

_ROWS = 64  # of an expert in bfloat16: a multiple


def choose(
    scores: Tensor,
    bias: Tensor,
    *,
    num_active: int,
    num_groups: int = 1,
    num_active_groups: int = 1,
) -> Tensor:
    """Choose experts by biased score, in float32.

    `scores` [T, E] are sigmoids, `bias` [E]. With groups, the `num_active_groups` groups with the
    largest sum of their two best keys stay eligible. Returns int64 [T, A], ordered by expert
    number so that sums over A have one order.
    """
    keys = (scores + bias.float()).detach()
    if num_groups > 1:
        grouped = keys.unflatten(1, (num_groups, -1))
        best = grouped.topk(min(2, grouped.shape[-1]), -1).values.sum(-1)
        kept = best.topk(num_active_groups, -1).indices
        mask = torch.ones_like(best, dtype=torch.bool).scatter_(1, kept, False)
        keys = grouped.masked_fill(mask.unsqueeze(-1), -torch.inf).flatten(1)
    return keys.topk(num_active, -1).indices.sort(-1).values


def weigh(scores: Tensor, experts: Tensor, *, normalise: bool = True, scale: float = 1.0) -> Tensor:
    """Weigh the chosen `experts` int64 [T, A] by their unbiased `scores` [T, E]: [T, A]."""
    weights = scores.gather(1, experts)
    if normalise:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return weights * scale


def run_sorted(rows: Tensor, experts: Tensor, apply: Callable[[int, Tensor], Tensor]) -> Tensor:
    """Run each of `rows` [R, D] through its expert; `experts` int64 [R] is sorted.

    `apply(e, rows)` runs expert e. Without rows it runs expert 0 on none, for the result's width
    and so that gradients, of zero, reach the parameters here as they do elsewhere.
    """
    if not len(rows):
        return apply(0, rows)
    used, counts = torch.unique_consecutive(experts, return_counts=True)
    parts = rows.split(counts.tolist())
    return torch.cat([apply(e, part) for e, part in zip(used.tolist(), parts, strict=True)])


def run_stacked(rows: Tensor, experts: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """Return down(relu(up(row))^2) of each row's expert, for training.

    `rows` [R, D]; `experts` int64 [R] is sorted; `up` [E, I, D], `down` [E, D, I]. Returns [R, D]
    in the dtype of `rows`, in which products are computed.
    """
    counts = experts.bincount(minlength=up.shape[0])
    # Rows of zeros fill up: `ROW_TILE` gives a row the same bits in any company, and a product in
    # bfloat16 is compiled for each number of rows, so there are to be few.
    tile = _ROWS if rows.dtype == torch.bfloat16 else ROW_TILE
    filled = (counts + tile - 1) // tile * tile
    shift = (filled - counts).cumsum(0) - (filled - counts)
    place = torch.arange(len(rows), device=rows.device) + shift[experts]
    wide = _Place.apply(rows, place, int(filled.sum()))
    return _Fetch.apply(_Stacked.apply(wide, up, down, filled.tolist()), place)


class _Place(torch.autograd.Function):
    """Rows put at the places `place`, which are distinct, of `size` rows of zeros."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, place: Tensor, size: int) -> Tensor:
        ctx.save_for_backward(place)
        return rows.new_zeros(size, rows.shape[1]).index_copy_(0, place, rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (place,) = ctx.saved_tensors
        return grads[0][place], None, None


class _Fetch(torch.autograd.Function):
    """Undo `_Place`."""

    @staticmethod
    def forward(ctx: Any, wide: Tensor, place: Tensor) -> Tensor:
        ctx.save_for_backward(place)
        ctx.size = len(wide)
        return wide[place]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (place,) = ctx.saved_tensors
        (grad,) = grads
        return grad.new_zeros(ctx.size, grad.shape[1]).index_copy_(0, place, grad), None


class _Stacked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, up: Tensor, down: Tensor, counts: list[int]) -> Tensor:
        inner = rows.new_empty(rows.shape[0], up.shape[1])
        out = torch.empty_like(rows)
        wide, narrow = up.to(rows.dtype), down.to(rows.dtype)
        for e, part in _parts(counts):
            torch.mm(rows[part], wide[e].T, out=inner[part])
        inner.clamp_(min=0)
        squared = inner.square()
        for e, part in _parts(counts):
            torch.mm(squared[part], narrow[e].T, out=out[part])
        ctx.save_for_backward(rows, inner, up, down)
        ctx.counts = counts
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        rows, inner, up, down = ctx.saved_tensors
        counts, grad = ctx.counts, grads[0].contiguous()
        wide, narrow = up.to(rows.dtype), down.to(rows.dtype)
        grad_up, grad_down = torch.empty_like(wide), torch.empty_like(narrow)
        grad_inner, grad_rows, squared = (
            torch.empty_like(inner),
            torch.empty_like(rows),
            inner.square(),
        )
        for e, part in _parts(counts):
            torch.mm(grad[part].T, squared[part], out=grad_down[e])
            torch.mm(grad[part], narrow[e], out=grad_inner[part])
        grad_inner.mul_(inner).mul_(2)  # d relu(v)^2 = 2 relu(v) dv
        for e, part in _parts(counts):
            torch.mm(grad_inner[part].T, rows[part], out=grad_up[e])
            torch.mm(grad_inner[part], wide[e], out=grad_rows[part])
        for e, count in enumerate(counts):
            if not count:
                grad_up[e] = grad_down[e] = 0
        return grad_rows, grad_up.to(up.dtype), grad_down.to(down.dtype), None


def _parts(counts: list[int]) -> list[tuple[int, slice]]:
    """Return the experts that have rows, and which rows."""
    ends = list(accumulate(counts))
    both = zip(counts, ends, strict=True)
    return [(e, slice(end - n, end)) for e, (n, end) in enumerate(both) if n]


def grouped_experts(
    x: Tensor, weights: Tensor, experts: Tensor, run: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """Return the weighted sum of each token's experts.

    `x` [T, D]; `weights` [T, A]; `experts` int64 [T, A]; `run(rows, sorted)` runs row r of
    [R, D] through expert `sorted[r]`. Tokens are sorted by expert once; sums run over A in order,
    in float32. Returns [T, D] in the dtype of `x`.
    """
    num_active = experts.shape[1]
    order = experts.flatten().argsort(stable=True)
    # Row (t, a) of the result lies at the place where `order` put it.
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(order.shape[0], device=order.device)
    rows = _Take.apply(x, order // num_active, inverse, num_active)
    done = run(rows, experts.flatten()[order])
    results = _Take.apply(done, inverse, order, 1).unflatten(0, experts.shape)
    return _WeightedSum.apply(results, weights).to(x.dtype)


class _Take(torch.autograd.Function):
    """Rows `index` of a tensor [N, D], each of which is taken `copies` times.

    Row i of the tensor goes to the rows `back[copies * i :][:copies]`.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, back: Tensor, copies: int) -> Tensor:
        ctx.save_for_backward(back)
        ctx.copies = copies
        return x[index]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (back,) = ctx.saved_tensors
        grad = grads[0][back]
        if ctx.copies > 1:
            grad = grad.unflatten(0, (-1, ctx.copies)).sum(1)
        return grad, None, None, None


class _WeightedSum(torch.autograd.Function):
    """Sum over A, in order, of `results` [T, A, D] times `weights` [T, A], in float32."""

    @staticmethod
    def forward(ctx: Any, results: Tensor, weights: Tensor) -> Tensor:
        ctx.save_for_backward(results, weights)
        total = results[:, 0].float() * weights[:, :1]
        for slot in range(1, results.shape[1]):
            total = total + results[:, slot].float() * weights[:, slot : slot + 1]
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        results, weights = ctx.saved_tensors
        grad = grads[0].unsqueeze(1)
        grad_weights = (results * grad).sum(-1)
        return (grad * weights.unsqueeze(-1)).to(results.dtype), grad_weights.to(weights.dtype)
