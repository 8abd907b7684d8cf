"""NVFP4: 4-bit codes with an E4M3 scale for each 16 and one global scale: decode.

Storage: byte j of a row holds the code of column 2j in its low nibble and of 2j + 1 in its high
one; bit 3 is the sign, the rest counts 0, .5, 1, 1.5, 2, 3, 4, 6. Block scales are E4M3, row-major.
ModelOpt stores a global scale that multiplies, compressed-tensors one that divides. The order of
operations below is each library's own, so decoded values agree with theirs bit for bit.
Source: docs/numerics.md; arXiv 2509.25149.
"""

import torch
from torch import Tensor

BLOCK = 16
_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_VALUES = _MAGNITUDES + tuple(-m for m in _MAGNITUDES)
# Both values of every possible byte: [256, 2], low nibble first.
_PAIRS = torch.tensor([[_VALUES[byte & 15], _VALUES[byte >> 4]] for byte in range(256)])


def dequantize(packed: Tensor, scale: Tensor, scale_2: Tensor) -> Tensor:
    """Return code * (scale * scale_2) in float32, ModelOpt's order.

    `packed` uint8 [*lead, N, K/2]; `scale` float8_e4m3fn [*lead, N, K/16]; `scale_2` float32
    [*lead] or [*lead, 1]. Returns [*lead, N, K].
    """
    return _apply(packed, scale.float() * _align(scale_2, scale))


def dequantize_divided(packed: Tensor, scale: Tensor, global_scale: Tensor) -> Tensor:
    """Return code * (scale / global_scale) in float32, compressed-tensors' order.

    Shapes as in `dequantize`.
    """
    return _apply(packed, scale.float() / _align(global_scale, scale))


def _align(scalar: Tensor, scale: Tensor) -> Tensor:
    """Shape a scalar per matrix so that it broadcasts over [*lead, N, K/16]."""
    lead = scale.shape[:-2]
    return scalar.float().reshape(*lead, 1, 1)


def _apply(packed: Tensor, scale: Tensor) -> Tensor:
    values = _PAIRS.to(packed.device)[packed.int()].flatten(-2)
    return (values.unflatten(-1, (-1, BLOCK)) * scale.unsqueeze(-1)).flatten(-2)
