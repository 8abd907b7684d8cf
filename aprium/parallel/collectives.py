"""What processes of one axis tell each other, with gradients where training goes through them.

Every function returns its input on an axis of size 1. Each process computes a loss of its own
share, and the gradient of a parameter is the sum over processes; the backward passes here keep to
that. `copy_to` and `reduce_from` are the pair around a region where processes hold different heads
or columns (arXiv 1909.08053): what goes in is the same on all, what comes out is a sum over all.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from aprium.parallel.mesh import Axis


def total(x: Tensor, axis: Axis) -> Tensor:
    """Return the sum of `x` over the processes of `axis`, without gradients."""
    if axis.size == 1:
        return x
    x = x.detach().clone(memory_format=torch.contiguous_format)
    dist.all_reduce(x, group=axis.group)
    return x


def broadcast(x: Tensor, axis: Axis) -> Tensor:
    """Return the first process's `x`, without gradients."""
    if axis.size == 1:
        return x
    x = x.detach().clone(memory_format=torch.contiguous_format)
    dist.broadcast(x, group=axis.group, group_src=0)
    return x


def all_gather(x: Tensor, axis: Axis) -> list[Tensor]:
    """Return every process's `x`, all of one shape, in order of index, without gradients."""
    if axis.size == 1:
        return [x]
    parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(axis.size)]
    dist.all_gather(parts, x.detach().contiguous(), group=axis.group)
    return parts


def gather_objects(value: Any, axis: Axis) -> list[Any]:
    """Return every process's `value`, a plain one, in order of index."""
    if axis.size == 1:
        return [value]
    found: list[Any] = [None] * axis.size
    dist.all_gather_object(found, value, group=axis.group)
    return found


def barrier(axis: Axis) -> None:
    """Wait until every process of `axis` is here."""
    if axis.size > 1:
        dist.barrier(group=axis.group)


def any_true(flag: bool, axis: Axis) -> bool:
    """Tell whether `flag` is set on any process of `axis`."""
    return flag if axis.size == 1 else bool(total(torch.tensor(int(flag)), axis))


def copy_to(x: Tensor, axis: Axis) -> Tensor:
    """Take `x`, the same on all, into a region of different shares: its gradients are summed."""
    return x if axis.size == 1 else _CopyTo.apply(x, axis)


def reduce_from(x: Tensor, axis: Axis) -> Tensor:
    """Sum the processes' shares `x` on the way out of the region that `copy_to` leads into."""
    return x if axis.size == 1 else _ReduceFrom.apply(x, axis)


def exchange(x: Tensor, send: Sequence[int], receive: Sequence[int], axis: Axis) -> Tensor:
    """Send `send[i]` rows of `x` [R, ...] to process i, in order; return the rows received.

    `receive[i]` is how many come from process i.
    """
    return x if axis.size == 1 else _Exchange.apply(x, tuple(send), tuple(receive), axis)


def all_to_all_counts(counts: Tensor, axis: Axis) -> Tensor:
    """Send row i of `counts` int64 [processes, ...] to process i; return the rows received."""
    return counts if axis.size == 1 else _all_to_all(counts, None, None, axis)


def gather_rows(x: Tensor, counts: Sequence[int], axis: Axis) -> Tensor:
    """Return the rows of all processes end to end; process i has `counts[i]` in its `x`."""
    if axis.size == 1:
        return x
    return exchange(torch.cat([x] * axis.size), [x.shape[0]] * axis.size, counts, axis)


class _CopyTo(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return total(grads[0], ctx.axis), None


class _ReduceFrom(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        return total(x, axis)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, send: tuple[int, ...], receive: tuple[int, ...], axis: Axis
    ) -> Tensor:
        ctx.sizes, ctx.axis = (send, receive), axis
        return _all_to_all(x, send, receive, axis)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        send, receive = ctx.sizes
        return _all_to_all(grads[0], receive, send, ctx.axis), None, None, None


def _all_to_all(
    x: Tensor, send: Sequence[int] | None, receive: Sequence[int] | None, axis: Axis
) -> Tensor:
    out = x.new_empty((len(x) if receive is None else sum(receive), *x.shape[1:]))
    splits = [None if sizes is None else list(sizes) for sizes in (receive, send)]
    dist.all_to_all_single(out, x.contiguous(), *splits, group=axis.group)
    return out
