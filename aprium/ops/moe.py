"""Mixture of experts: sigmoid router with a selection bias, and experts grouped by token.

Source: docs/architecture.md; DeepSeek-V3 (arXiv 2412.19437) for the bias that only selects.
Letters: T packed tokens, E experts, A active experts, D width that experts act on.
"""

from collections.abc import Callable

import torch
from torch import Tensor


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


def grouped_experts(
    x: Tensor, weights: Tensor, experts: Tensor, run: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """Return the weighted sum of each token's experts.

    `x` [T, D]; `weights` [T, A]; `experts` int64 [T, A]; `run(rows, sorted)` runs row r of
    [R, D] through expert `sorted[r]`. Tokens are sorted by expert once; sums run over A in order,
    in float32. Returns [T, D] in the dtype of `x`.
    """
    num_tokens, num_active = experts.shape
    order = experts.flatten().argsort(stable=True)
    done = run(x[order // num_active], experts.flatten()[order])
    # Back to token order: row (t, a) of the result lies at the place where `order` put it.
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(order.shape[0], device=order.device)
    results = done[inverse].unflatten(0, (num_tokens, num_active)).float()
    total = results[:, 0] * weights[:, :1]
    for slot in range(1, num_active):
        total = total + results[:, slot] * weights[:, slot : slot + 1]
    return total.to(x.dtype)
