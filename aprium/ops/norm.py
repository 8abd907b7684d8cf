"""Root-mean-square normalisation, plain and gated by groups, with statistics in float32.

Source: docs/architecture.md; Mamba-2 (arXiv 2405.21060) for the gated form, gate before norm.
"""

import torch
from torch import Tensor

from aprium.ops.activation import silu


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return `x / rms(x) * weight`, computed in float32 and cast back.

    `x` [..., D], `weight` [D]; returns [..., D] in the dtype of `x`.
    """
    wide = x.float()
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * scale * weight.float()).to(x.dtype)


def gated_group_norm(
    y: Tensor, gate: Tensor, weight: Tensor, num_groups: int, eps: float
) -> Tensor:
    """Return the group-wise RMS norm of `y * silu(gate)`.

    `y`, `gate` [T, I], `weight` [I]; each of `num_groups` contiguous groups of I / num_groups
    values has its own statistics. Returns [T, I] in the dtype of `gate`.
    """
    wide = (y.float() * silu(gate.float())).unflatten(-1, (num_groups, -1))
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return ((wide * scale).flatten(-2) * weight.float()).to(gate.dtype)
