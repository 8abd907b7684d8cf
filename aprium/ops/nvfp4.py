"""NVFP4 weights, decoded to float32: 4-bit codes, a scale for every 16, one scale a matrix.

A value is `E2M1[code] * E4M3[scale of its block] * global scale`. Byte j of a row holds column 2j
in its low nibble and 2j + 1 in its high one; bit 3 of a code is the sign. The product of the two
scales is rounded to float32 before it meets the code, as ModelOpt does, so decoded values equal
ModelOpt's exactly (code 8 is -0 here and +0 there). Encoding is the quantiser's business.
Source: docs/numerics.md.
"""

import torch
from torch import Tensor

from aprium.ops import fp8

BLOCK = 16
_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def _byte_table() -> Tensor:
    """Return int64 [256]: the bits of the two float32 values that each byte holds."""
    values = torch.tensor(_MAGNITUDES, device="cpu")
    values = torch.cat((values, -values))
    byte = torch.arange(256, device="cpu")
    pairs = torch.stack((values[byte & 15], values[byte >> 4]), -1)
    return pairs.view(torch.int64).flatten()


# Gathering pairs as one 8-byte word halves the work and keeps the gather one-dimensional.
_PAIRS = _byte_table()


def dequantize(packed: Tensor, scale: Tensor, scale_2: Tensor) -> Tensor:
    """Decode ModelOpt's layout: code * (scale * scale_2), float32 [*lead, N, K].

    `packed` uint8 [*lead, N, K/2]; `scale` float8_e4m3fn [*lead, N, K/16]; `scale_2` float32, one
    value for all, or [*lead] or [*lead, 1].
    """
    factor = fp8.to_float(scale).mul_(fp8.align_scale(scale_2, packed.shape[:-2]))
    return _decode(packed, factor)


def dequantize_divided(packed: Tensor, scale: Tensor, global_scale: Tensor) -> Tensor:
    """Decode compressed-tensors' layout: code * (scale / global_scale), float32 [*lead, N, K].

    Shapes and dtypes as in `dequantize`.
    """
    factor = fp8.to_float(scale).div_(fp8.align_scale(global_scale, packed.shape[:-2]))
    return _decode(packed, factor)


def transpose(packed: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Lay a matrix out by columns, so that columns with an input of zero need not be read.

    `packed` uint8 [N, K/2], `scale` float8_e4m3fn [N, K/16], N a multiple of 128. Returns codes
    uint8 [K, N/2] and scales [K/16, N]. In each 64 bytes of a column, byte 16 l + 4 m + i holds row
    16 m + 4 l + i in its low nibble and the row 64 further in its high one, which is the order in
    which native/ unpacks four columns side by side.
    """
    codes = torch.stack((packed & 15, packed >> 4), -1).flatten(-2).T  # [K, N]
    low, high = (
        codes.unflatten(1, (-1, 2, 4, 4, 4)).transpose(3, 4).unbind(2)
    )  # [K, N/128, 4, 4, 4]
    return (low | high << 4).flatten(1).contiguous(), scale.view(torch.uint8).T.contiguous().view(
        scale.dtype
    )


def untranspose(codes: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """Undo `transpose`."""
    bytes_ = codes.unflatten(1, (-1, 4, 4, 4)).transpose(2, 3)
    rows = torch.stack((bytes_ & 15, bytes_ >> 4), 2).flatten(1).T  # [N, K]
    packed = rows[:, ::2] | rows[:, 1::2] << 4
    return packed.contiguous(), scales.view(torch.uint8).T.contiguous().view(scales.dtype)


def _decode(packed: Tensor, factor: Tensor) -> Tensor:
    """Multiply the values of `packed` by the factor of their block."""
    index = packed.flatten().int()
    words = _PAIRS.to(packed.device).index_select(0, index)
    values = words.view(torch.float32).view(*factor.shape, BLOCK)  # [*lead, N, K/16, 16]
    return values.mul_(factor.unsqueeze(-1)).flatten(-2)
