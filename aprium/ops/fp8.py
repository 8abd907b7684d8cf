"""FP8 E4M3 weights with one float32 scale a matrix, decoded to float32.

The reference that every faster path is tested against. Encoding is the quantiser's business.
Source: OFP8 specification (E4M3: no infinities, NaN is 0x7F and 0xFF, largest value 448).
"""

import torch
from torch import Tensor

# Bit pattern -> value. A gather is several times faster on a CPU than torch's own conversion.
_VALUES = torch.arange(256, dtype=torch.uint8, device="cpu").view(torch.float8_e4m3fn).float()


def to_float(codes: Tensor) -> Tensor:
    """Return the float32 values of float8_e4m3fn `codes`, exactly; same shape."""
    index = codes.contiguous().view(torch.uint8).flatten().int()
    return _VALUES.to(codes.device).index_select(0, index).view(codes.shape)


def dequantize(weight: Tensor, weight_scale: Tensor) -> Tensor:
    """Return `weight * weight_scale` in float32, [*lead, N, K].

    `weight` float8_e4m3fn [*lead, N, K]; `weight_scale` float32, one value for all, or [*lead] or
    [*lead, 1].
    """
    return to_float(weight).mul_(align_scale(weight_scale, weight.shape[:-2]))


def align_scale(scale: Tensor, lead: torch.Size) -> Tensor:
    """Return per-matrix `scale` ([], [1], [*lead] or [*lead, 1]) as a factor of [*lead, N, K]."""
    if scale.numel() == 1:
        return scale.reshape(())
    return scale.reshape(*lead, 1, 1)
