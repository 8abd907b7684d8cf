"""Stochastic rounding to narrow floating-point types: to either neighbour, right on average."""

import torch
from torch import Tensor

# dtype -> bits of the fraction, exponent of the smallest normal number, largest value.
_FORMATS = {torch.float16: (10, -14, 65504.0), torch.float8_e4m3fn: (3, -6, 448.0)}


def round_stochastic(x: Tensor, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Round float32 `x` to float16 or float8_e4m3fn, up with the probability of its remainder.

    Saturates at the largest finite value; numbers that `dtype` has stay as they are.
    """
    fraction, smallest, largest = _FORMATS[dtype]
    _, exponent = torch.frexp(x)
    step = torch.ldexp(torch.ones_like(x), (exponent - 1).clamp(min=smallest) - fraction)
    scaled = x / step
    lower = scaled.floor()
    drawn = torch.rand(x.shape, generator=generator).to(x.device)
    return ((lower + (drawn < scaled - lower)) * step).clamp(-largest, largest).to(dtype)
