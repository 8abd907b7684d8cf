"""NVFP4 weights, decoded and encoded: 4-bit codes, a scale for every 16, one scale a matrix.

A value is `E2M1[code] * E4M3[scale of its block] * global scale`. Byte j of a row holds column 2j
in its low nibble and 2j + 1 in its high one; bit 3 of a code is the sign. The product of the two
scales is rounded to float32 before it meets the code, as ModelOpt does, so decoded values equal
ModelOpt's exactly (code 8 is -0 here and +0 there). Encoding gives ModelOpt's bytes, but for a
matrix of zeros, which is NaN there and zeros under scales of 1 here. Source: docs/numerics.md.
"""

import math
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from aprium.base.errors import QuantizeError
from aprium.ops import _native, fp8

BLOCK = 16
LARGEST = 448.0  # the largest block scale
FOUR_OVER_SIX = (
    256.0  # what stands for it in 4/6, so that a block at 4 has a scale up to 1.5 times it
)
Rule = Literal["max", "four_over_six", "sweep"]
RULES = get_args(Rule)
_SMALLEST = 2.0**-9
_TOP_CODE = 126
_SWEEP_ABOVE = 9  # codes above the first: twice its scale, and one
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


class Encoded(NamedTuple):
    """An encoded matrix or stack: what ModelOpt stores, and `dequantize` takes."""

    packed: Tensor  # uint8 [*lead, N, K/2]
    scale: Tensor  # float8_e4m3fn [*lead, N, K/16]
    scale_2: Tensor  # float32 [] or [*lead]


def encode(
    x: Tensor,
    rule: Rule = "max",
    *,
    amax: Tensor | None = None,
    importance: Tensor | None = None,
    name: str = "tensor",
) -> Encoded:
    """Encode `x` [*lead, N, K], its block scales chosen by `rule`.

    "max": the largest magnitude of a block becomes 6 (ModelOpt's dynamic order). "four_over_six":
    6 or 4, whichever has the smaller squared error. "sweep": the E4M3 scale with the smallest
    squared error. `amax` float32 [] or [*lead] sets the global scales, by default from each
    matrix; matrices that a server fuses share one. `importance` float32 [*lead, K] weighs squared
    errors by column. Bits do not depend on the kernels at hand. Raises QuantizeError naming `name`
    for values that are not finite and for K not a multiple of 16.
    Source: docs/numerics.md; 4/6 arXiv 2512.02010, sweep arXiv 2606.07618.
    """
    if rule not in RULES:
        raise QuantizeError(f"unknown scale rule {rule!r}: use one of {', '.join(RULES)}")
    lead, columns = x.shape[:-2], x.shape[-1]
    found = check(x, name)
    amax = (found if amax is None else amax.float()).expand(lead)
    scale_2 = global_scale(amax, FOUR_OVER_SIX if rule == "four_over_six" else LARGEST)
    if importance is not None:
        importance = importance.float().expand(*lead, columns).contiguous()
    machine = _native.shared()
    if machine is None or x.device.type != "cpu":
        scale = _choose_scales(_blocks(x), rule, scale_2, amax, importance)
        return Encoded(encode_with(x, scale, scale_2), scale, scale_2)
    x = (x if x.dtype in (torch.float32, torch.bfloat16) else x.float()).contiguous()
    packed = torch.empty((*x.shape[:-1], columns // 2), dtype=torch.uint8)
    scale = torch.empty((*x.shape[:-1], columns // BLOCK), dtype=torch.uint8)
    matrices = math.prod(lead)
    scale_2, amax = scale_2.contiguous(), amax.contiguous()
    machine.encode_nvfp4(
        RULES.index(rule),
        x.dtype == torch.bfloat16,
        x.data_ptr(),
        importance.data_ptr() if importance is not None else 0,
        (matrices, x.shape[-2], columns),
        scale_2.data_ptr(),
        amax.data_ptr(),
        packed.data_ptr(),
        scale.data_ptr(),
    )
    return Encoded(packed, scale.view(torch.float8_e4m3fn), scale_2)


def check(x: Tensor, name: str) -> Tensor:
    """Return the largest magnitude of each matrix of `x`, float32 [*lead].

    Raises QuantizeError naming `name` for what cannot be encoded.
    """
    if x.shape[-1] % BLOCK:
        raise QuantizeError(
            f"{name}: its {x.shape[-1]} columns are not a multiple of {BLOCK}, the block of NVFP4: "
            "leave it unquantised or in FP8"
        )
    return fp8.largest_magnitude(x, name)


def global_scale(amax: Tensor, largest: float = LARGEST) -> Tensor:
    """Return scale_2, float32: that with which `amax` has the block scale `largest`.

    1 where all is zero, or so small that the scale would be.
    """
    scale_2 = amax.float() / torch.tensor(6.0 * largest)
    return torch.where(scale_2 > 0, scale_2, 1.0)


def static_scales(block_amax: Tensor, amax: Tensor, largest: float = LARGEST) -> Tensor:
    """Return block scales for magnitudes `block_amax` [*lead, N, K/16] in ModelOpt's static order.

    `amax` float32 [] or [*lead] of the matrix becomes the scale `largest`; a matrix of zeros gets
    scales of 1. Returns float8_e4m3fn.
    """
    sixth = block_amax.float() / 6.0
    sixth = torch.where(sixth == 0, 1.0, sixth)
    whole = _align(amax.float() / 6.0, sixth)
    return _to_scale(torch.where(whole > 0, (sixth * largest) / whole, 1.0))


def encode_with(x: Tensor, scale: Tensor, scale_2: Tensor) -> Tensor:
    """Return the codes uint8 [*lead, N, K/2] of `x` under given scales, to nearest, ties to even.

    `scale` and `scale_2` as in `dequantize`. The quotient by the product of the two decides, as in
    ModelOpt.
    """
    factor = fp8.to_float(scale) * _align(scale_2, scale)
    return _pack(_round(_blocks(x) / factor.unsqueeze(-1)).flatten(-2), x)


def round_to(x: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
    """Round `x` to E2M1 multiples of `factor`: codes uint8 and values float32, shaped as `x`."""
    codes = _round(x / factor)
    values = torch.tensor(_MAGNITUDES, device=x.device)[codes.int()] * factor
    return codes | (x < 0).to(torch.uint8) << 3, torch.where(x < 0, -values, values)


class Rounded(NamedTuple):
    """A matrix or stack rounded for training, not yet packed."""

    values: Tensor  # float32 [*lead, N, K/16, 16]: E2M1 numbers, to be multiplied by the scales
    scale: Tensor  # float8_e4m3fn [*lead, N, K/16]
    scale_2: Tensor  # float32 [*lead]

    def dequantize(self) -> Tensor:
        """Return the values, float32 [*lead, N, K], the same as from the packed codes."""
        factor = fp8.to_float(self.scale).mul_(_align(self.scale_2, self.scale))
        return (self.values * factor.unsqueeze(-1)).flatten(-2)


def round_training(
    x: Tensor,
    *,
    tile: int = 1,
    amax: Tensor | None = None,
    generator: torch.Generator | None = None,
    headroom: float = 1.0,
) -> Rounded:
    """Round `x` [*lead, N, K] as Transformer Engine's training recipe does, by reciprocals.

    A block scale covers `tile` rows, a divisor of N, of 16 columns: with 16 the transpose has the
    same scales. `amax` float32 [] or [*lead] sets the global scales, by default from each matrix.
    With a `generator` values are rounded stochastically with 16 random bits, to either neighbour,
    on average to themselves, but for what the scale of a block clips: `headroom` 17/16 makes the
    scales so much larger that nothing is. Values that are not finite give NaN.
    Source: arXiv 2509.25149; docs/numerics.md.
    """
    blocks = _blocks(x)
    largest = blocks.abs().amax(-1)
    if tile > 1:
        largest = largest.unflatten(-2, (-1, tile)).amax(-2)
    amax = (largest.flatten(-2).amax(-1) if amax is None else amax.float()) * headroom
    encode_scale = torch.where(amax > 0, torch.tensor(2688.0) / amax, 1.0)
    encode_scale = encode_scale.clamp(max=torch.finfo(torch.float32).max)
    sixth = torch.tensor(1.0) / 6.0
    scale = (largest * headroom) * _align(encode_scale * sixth, largest)
    scale = scale.clamp(max=LARGEST).to(torch.float8_e4m3fn)
    inverse = 1.0 / (fp8.to_float(scale) * (1.0 / _align(encode_scale, largest)))
    inverse = inverse.clamp(max=torch.finfo(torch.float32).max)
    if tile > 1:
        inverse = inverse.repeat_interleave(tile, -2)
        scale = scale.view(torch.uint8).repeat_interleave(tile, -2).view(torch.float8_e4m3fn)
    scaled = (blocks * inverse.unsqueeze(-1)).clamp_(-6.0, 6.0)
    return Rounded(_to_e2m1(scaled, generator), scale, global_scale(amax))


def encode_training(
    x: Tensor,
    *,
    tile: int = 1,
    amax: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Encoded:
    """Encode `x` [N, K] as `round_training` rounds it. Raises QuantizeError."""
    check(x, "tensor")
    if x.dim() != 2 or x.shape[0] % tile:
        raise QuantizeError(f"tensor: {list(x.shape)} does not divide into tiles of {tile} rows")
    rounded = round_training(x, tile=tile, amax=amax, generator=generator)
    table = torch.tensor(_MAGNITUDES, device=x.device)
    codes = torch.bucketize(rounded.values.abs(), table).to(torch.uint8)
    return Encoded(_pack(codes.flatten(-2), x), rounded.scale, rounded.scale_2)


def _to_e2m1(scaled: Tensor, generator: torch.Generator | None) -> Tensor:
    """Round float32 values within 6 to E2M1 numbers: to nearest even, or stochastically."""
    # Steps are half the power of two below, and a half below 1: those of a float32 number whose
    # last bit they are, so adding and taking away such a number rounds.
    power = (scaled.abs().clamp_(min=1.0).view(torch.int32) & 0x7F800000).view(torch.float32)
    if generator is not None:
        # Offsets lie within half a step, never at it, so that E2M1 numbers stay as they are.
        offset = _random_int16(scaled, generator).float().add_(0.5).mul_(2.0**-17)
        scaled = scaled.addcmul(offset, power)
    anchor = power.mul_(1.5 * 2.0**22)
    return (scaled + anchor).sub_(anchor)


def _random_int16(like: Tensor, generator: torch.Generator) -> Tensor:
    """Return int16 numbers of the shape of `like`, each of all 65,536 as likely."""
    count = like.numel()
    words = torch.empty(-(-count // 4), dtype=torch.int64, device=generator.device)
    words.random_(-(2**63), None, generator=generator)
    return words.view(torch.int16)[:count].view(like.shape).to(like.device)


def _round(scaled: Tensor) -> Tensor:
    """Return the code without sign of each value, uint8: nearest, ties to even, saturating."""
    magnitude = scaled.abs()
    codes = torch.zeros_like(scaled, dtype=torch.uint8)
    for i in range(7):
        middle = (_MAGNITUDES[i] + _MAGNITUDES[i + 1]) / 2
        codes += magnitude >= middle if i % 2 else magnitude > middle
    return codes


def _pack(codes: Tensor, x: Tensor) -> Tensor:
    """Add the signs of `x` [..., K] to `codes`, and put two in a byte."""
    codes = codes | (x < 0).to(torch.uint8) << 3
    return codes[..., ::2] | codes[..., 1::2] << 4


def _blocks(x: Tensor) -> Tensor:
    return x.float().unflatten(-1, (-1, BLOCK))


def _align(per_matrix: Tensor, scale: Tensor) -> Tensor:
    return fp8.align_scale(per_matrix, scale.shape[:-2])


def _to_scale(value: Tensor) -> Tensor:
    return value.clamp(_SMALLEST, LARGEST).to(torch.float8_e4m3fn)


def _choose_scales(
    blocks: Tensor, rule: Rule, scale_2: Tensor, amax: Tensor, importance: Tensor | None
) -> Tensor:
    """Return the scale of each block [*lead, N, K/16, 16]; the kernels do the same bit for bit."""
    largest = blocks.abs().amax(-1)
    if rule == "max":
        ratio = largest / (6.0 * _align(scale_2, largest))
        return _to_scale(torch.where(ratio == 0, 1.0, ratio))
    limit = FOUR_OVER_SIX if rule == "four_over_six" else LARGEST
    weights = torch.ones(()) if importance is None else _blocks(importance).unsqueeze(-3)
    factor_2 = _align(scale_2, largest)
    best = static_scales(largest, amax, limit)
    if rule == "four_over_six":
        other = static_scales(largest * 1.5, amax, limit)
        better = _error(blocks, other, factor_2, weights) < _error(blocks, best, factor_2, weights)
        return _pick(better, other, best)
    return _sweep(blocks, best, factor_2, weights)


def _sweep(blocks: Tensor, first: Tensor, factor_2: Tensor, weights: Tensor) -> Tensor:
    """Return the scale of least error: `first` is tried first, then the larger, then the smaller.

    From twice a scale that clips nothing on, values are a subset of those before. Downwards, a
    block is done when what it clips alone costs more than its best.
    """
    start = first.view(torch.uint8).int()
    best, least = first, _error(blocks, first, factor_2, weights)
    for step in range(1, _SWEEP_ABOVE + 1):
        scale = (start + step).clamp(max=_TOP_CODE).to(torch.uint8).view(torch.float8_e4m3fn)
        error = _error(blocks, scale, factor_2, weights)
        best, least = _pick(error < least, scale, best), torch.minimum(error, least)
    for step in range(1, _TOP_CODE):
        code = start - step
        scale = code.clamp(min=1).to(torch.uint8).view(torch.float8_e4m3fn)
        beyond = (blocks.abs() - 6.0 * (fp8.to_float(scale) * factor_2).unsqueeze(-1)).clamp(min=0)
        live = (code >= 1) & (_fold(beyond.square() * weights) <= least)
        if not bool(live.any()):
            break
        error = _error(blocks, scale, factor_2, weights)
        better = live & (error < least)
        best, least = _pick(better, scale, best), torch.where(better, error, least)
    return best


def _pick(mask: Tensor, yes: Tensor, no: Tensor) -> Tensor:
    """`torch.where` of scales."""
    return torch.where(mask, yes.view(torch.uint8), no.view(torch.uint8)).view(torch.float8_e4m3fn)


def _error(blocks: Tensor, scale: Tensor, factor_2: Tensor, weights: Tensor) -> Tensor:
    """Return the weighted squared error of each block under `scale`."""
    factor = (fp8.to_float(scale) * factor_2).unsqueeze(-1)
    magnitude = blocks.abs()
    table = torch.tensor(_MAGNITUDES, device=blocks.device)
    values = table[_round(magnitude / factor).int()]
    return _fold((values * factor - magnitude).square() * weights)


def _fold(terms: Tensor) -> Tensor:
    """Sum 16 terms in halves, the order of the kernels."""
    for half in (8, 4, 2, 1):
        terms = terms[..., :half] + terms[..., half:]
    return terms.squeeze(-1)


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
