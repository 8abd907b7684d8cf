"""FP8 E4M3 with one scale a matrix: decode. Source: docs/numerics.md."""

import torch
from torch import Tensor


def dequantize(weight: Tensor, scale: Tensor) -> Tensor:
    """Return `weight * scale` in float32.

    `weight` float8_e4m3fn [*lead, N, K]; `scale` float32 [*lead].
    """
    return weight.float() * scale.float()[(...,) + (None,) * 2]


def is_valid_scale(scale: Tensor) -> bool:
    """Tell whether every scale is finite and not negative."""
    wide = scale.float()
    return bool((torch.isfinite(wide) & (wide >= 0)).all())
