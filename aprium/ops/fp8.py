"""FP8 E4M3 weights with one float32 scale a matrix, decoded and encoded.

The reference that every faster path is tested against. Source: OFP8 specification (E4M3: no
infinities, NaN is 0x7F and 0xFF, largest value 448).
"""

import torch
from torch import Tensor

from aprium.base.errors import QuantizeError

LARGEST = 448.0

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


def encode(x: Tensor, *, amax: Tensor | None = None, name: str = "tensor") -> tuple[Tensor, Tensor]:
    """Encode `x` [*lead, N, K] under the scales that make each matrix's largest magnitude 448.

    `amax` float32 [] or [*lead] stands for that magnitude where matrices share a scale. Returns
    float8_e4m3fn codes and float32 [*lead] scales, 1 where all is zero. The quotient is
    rounded to the dtype of `x` first, as ModelOpt does. Raises QuantizeError naming `name` for
    values that are not finite.
    """
    found = largest_magnitude(x, name)
    amax = (found if amax is None else amax.float()).expand(found.shape)
    scale = torch.where(amax > 0, amax / LARGEST, 1.0)
    quotient = (x.float() / align_scale(scale, x.shape[:-2])).to(x.dtype)
    return to_fp8(quotient), scale


def to_fp8(x: Tensor) -> Tensor:
    """Round to float8_e4m3fn, to nearest even, saturating at 448 whatever torch's own cast does."""
    return x.clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)


def largest_magnitude(x: Tensor, name: str) -> Tensor:
    """Return the largest magnitude of each matrix of `x` [*lead, N, K], float32 [*lead].

    Raises QuantizeError naming `name` for values that are not finite.
    """
    amax = x.abs().flatten(-2).amax(-1).float() if x.numel() else x.new_zeros(x.shape[:-2]).float()
    if not bool(torch.isfinite(amax).all()):
        raise QuantizeError(f"{name} holds NaN or infinity: the checkpoint is damaged")
    return amax


def align_scale(scale: Tensor, lead: torch.Size) -> Tensor:
    """Return per-matrix `scale` ([], [1], [*lead] or [*lead, 1]) as a factor of [*lead, N, K]."""
    if scale.numel() == 1:
        return scale.reshape(())
    return scale.reshape(*lead, 1, 1)
