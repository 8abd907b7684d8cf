"""Mixture of experts: sigmoid router with a selection bias, and experts grouped by token.

Source: docs/architecture.md; DeepSeek-V3 (arXiv 2412.19437) for the bias that only selects.
Letters: T packed tokens, E experts, A active experts, D width that experts act on.
"""

from collections.abc import Callable

import torch
from torch import Tensor


def route(
    scores: Tensor,
    bias: Tensor,
    *,
    num_active: int,
    num_groups: int = 1,
    num_active_groups: int = 1,
    normalise: bool = True,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Choose experts by biased score and weigh them by unbiased score, in float32.

    `scores` [T, E] are sigmoids, `bias` [E]. With groups, the `num_active_groups` groups with the
    largest sum of their two best keys stay eligible. Returns weights [T, A] and experts
    int64 [T, A], ordered by expert number so that sums over A have one order.
    """
    keys = (scores + bias.float()).detach()
    if num_groups > 1:
        grouped = keys.unflatten(1, (num_groups, -1))
        best = grouped.topk(min(2, grouped.shape[-1]), -1).values.sum(-1)
        kept = best.topk(num_active_groups, -1).indices
        mask = torch.ones_like(best, dtype=torch.bool).scatter_(1, kept, False)
        keys = grouped.masked_fill(mask.unsqueeze(-1), -torch.inf).flatten(1)
    experts = keys.topk(num_active, -1).indices.sort(-1).values
    weights = scores.gather(1, experts)
    if normalise:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return weights * scale, experts


def grouped_experts(
    x: Tensor, weights: Tensor, experts: Tensor, apply: Callable[[int, Tensor], Tensor]
) -> Tensor:
    """Return the weighted sum of each token's experts.

    `x` [T, D]; `weights` [T, A]; `experts` int64 [T, A]; `apply(e, rows)` runs expert e on
    [R, D]. Tokens are sorted by expert once; sums run over A in order, in float32. Returns [T, D]
    in the dtype of `x`.
    """
    num_tokens, num_active = experts.shape
    order = experts.flatten().argsort(stable=True)
    rows = x[order // num_active]
    used, counts = torch.unique_consecutive(experts.flatten()[order], return_counts=True)
    parts = rows.split(counts.tolist())
    done = torch.cat([apply(e, part) for e, part in zip(used.tolist(), parts, strict=True)])
    # Back to token order: row (t, a) of the result lies at the place where `order` put it.
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(order.shape[0], device=order.device)
    results = done[inverse].unflatten(0, (num_tokens, num_active)).float()
    total = results[:, 0] * weights[:, :1]
    for slot in range(1, num_active):
        total = total + results[:, slot] * weights[:, slot : slot + 1]
    return total.to(x.dtype)
