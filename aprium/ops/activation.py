"""Sigmoid, SiLU and softplus, the same bits for an element wherever it lies in its tensor.

PyTorch's fused versions use another implementation for the last few elements of a tensor than for
the rest, so a token's result would depend on the batch. Its exp, log1p and arithmetic do not
(tests/ops/test_row_invariance.py), and these are built from them.
"""

import torch
from torch import Tensor


def sigmoid(x: Tensor) -> Tensor:
    """Return 1 / (1 + exp(-x)), elementwise."""
    return 1.0 / (1.0 + torch.exp(-x))


def silu(x: Tensor) -> Tensor:
    """Return x * sigmoid(x), elementwise."""
    return x / (1.0 + torch.exp(-x))


def softplus(x: Tensor) -> Tensor:
    """Return log(1 + exp(x)), elementwise and without overflow."""
    return x.clamp(min=0) + torch.log1p(torch.exp(-x.abs()))
