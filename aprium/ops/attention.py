"""Causal grouped-query attention without positions (NoPE), packed and over paged keys and values.

`paged` is what generation uses. It takes keys in blocks on a fixed grid of the sequence's own
positions and merges them in order with the online softmax, so a query's result does not depend on
how its prompt was chunked or batched: a block that lies wholly after a query changes nothing, bit
for bit. `packed` serves training, equal up to rounding: native kernels, else PyTorch's fused one.
Source: arXiv 2205.14135 for the online softmax; docs/architecture.md for the absence of positions.
Letters: T packed tokens, H query heads, K KV heads, P head dim, Q page size.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from aprium.ops import _native, fp8
from aprium.ops.matmul import ROW_TILE

KEY_BLOCK = 256
# Query tokens worked on together; bounds the memory of scores.
_QUERY_TILE = 256
_COLUMN_TILE = 16


def packed(q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int]) -> Tensor:
    """Attend within each segment; `q` [T, H, P], `k`, `v` [T, K, P]. Returns [T, H, P]."""
    if q.dtype == k.dtype == v.dtype and _native.runs_on(q, k, v, dtypes=_native.FLOATS):
        return _Packed.apply(q, k, v, lengths)
    outputs = []
    # split, not slices: its backward pass joins the parts once instead of padding each to T.
    segments = zip(*(t.split(list(lengths)) for t in (q, k, v)), strict=True)
    for segment in segments:
        one = (t.transpose(0, 1).unsqueeze(0) for t in segment)
        out = F.scaled_dot_product_attention(*one, is_causal=True, enable_gqa=True)
        outputs.append(out[0].transpose(0, 1))
    return torch.cat(outputs)


class _Packed(torch.autograd.Function):
    """`packed` by native kernels, which keep a logarithm a row and make the weights again."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int]) -> Tensor:
        q, k, v = (t.contiguous() for t in (q, k, v))
        out, log_mass = torch.empty_like(q), q.new_empty(q.shape[:2], dtype=torch.float32)
        ctx.machine = _native.shared()
        ctx.sizes = (q.shape[1], *k.shape[1:])
        ctx.lengths, half = list(lengths), q.dtype == torch.bfloat16
        addresses = (q.data_ptr(), k.data_ptr(), v.data_ptr())
        call = (ctx.lengths, addresses, half, ctx.sizes, out.data_ptr(), log_mass.data_ptr())
        ctx.machine.flash_forward(*call)
        ctx.save_for_backward(q, k, v, out, log_mass)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, log_mass = ctx.saved_tensors
        grad, found = grads[0].contiguous(), tuple(torch.empty_like(t) for t in (q, k, v))
        addresses, to = (tuple(t.data_ptr() for t in each) for each in ((q, k, v), found))
        half = q.dtype == torch.bfloat16
        call = (ctx.lengths, addresses, half, ctx.sizes, out.data_ptr(), log_mass.data_ptr())
        ctx.machine.flash_backward(*call, grad.data_ptr(), to)
        return *found, None


def packed_part(q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], first: int) -> Tensor:
    """Attend as `packed` for some of the queries: `q` [R, H, P] are those of tokens from `first`.

    `k`, `v` [T, K, P] are those of all segments. Returns [R, H, P].
    """
    outputs, start, last = [], 0, first + q.shape[0]
    for length in lengths:
        begin, end = max(start, first), min(start + length, last)
        if begin < end:
            queries = torch.arange(begin, end, device=q.device).unsqueeze(1)
            mask = queries >= torch.arange(start, end, device=q.device)
            parts = (q[begin - first : end - first], k[start:end], v[start:end])
            one = (t.transpose(0, 1).unsqueeze(0) for t in parts)
            out = F.scaled_dot_product_attention(*one, attn_mask=mask, enable_gqa=True)
            outputs.append(out[0].transpose(0, 1))
        start += length
    return torch.cat(outputs)


def write_pages(
    pages: Tensor, new: Tensor, page_ids: Tensor, first: int, scale: float = 1.0
) -> None:
    """Store `new` [L, K, P] at positions first, first + 1, ... of one sequence.

    `pages` [num_pages, Q, K, P] is mutated; `page_ids` int64 are the sequence's pages in order.
    Pages of float8_e4m3fn hold values divided by `scale`, saturated.
    """
    if pages.dtype == torch.float8_e4m3fn:  # torch cannot index these: as bytes
        new = fp8.to_fp8(new.float() / scale).view(torch.uint8)
        pages = pages.view(torch.uint8)
    page_size = pages.shape[1]
    position = torch.arange(first, first + new.shape[0], device=new.device)
    pages[page_ids[position // page_size], position % page_size] = new.to(pages.dtype)


def paged(
    q: Tensor,
    key_pages: Tensor,
    value_pages: Tensor,
    starts: Sequence[int],
    lengths: Sequence[int],
    context: Sequence[int],
    page_ids: Sequence[Tensor],
    scales: tuple[float, float] = (1.0, 1.0),
) -> Tensor:
    """Attend each segment's queries to its sequence's paged keys and values, its own included.

    `q` [T, H, P]; `key_pages`, `value_pages` [num_pages, Q, K, P] already hold the step's tokens;
    sequence i has `context[i]` tokens before its `lengths[i]` new ones. `scales` of keys and values
    multiply those of float8_e4m3fn pages. Returns [T, H, P].
    """
    out = torch.empty_like(q)
    for start, length, done, ids in zip(starts, lengths, context, page_ids, strict=True):
        end = done + length
        used = ids[: -(-end // key_pages.shape[1])]
        keys, values = (
            _gather(pages, used, end, q.dtype, scale)
            for pages, scale in zip((key_pages, value_pages), scales, strict=True)
        )
        for begin in range(0, length, _QUERY_TILE):
            rows = slice(start + begin, start + min(begin + _QUERY_TILE, length))
            out[rows] = _attend(q[rows], keys, values, done + begin)
    return out


def _gather(pages: Tensor, ids: Tensor, end: int, dtype: torch.dtype, scale: float) -> Tensor:
    """Return the first `end` positions as [blocks, K, KEY_BLOCK, P'], zeros after them.

    P' is P filled up with zeros to a multiple of 16: matrix products with fewer columns at their
    edge may sum in another order for other numbers of rows.
    """
    if pages.dtype == torch.float8_e4m3fn:
        codes = pages.view(torch.uint8)[ids].flatten(0, 1)[:end].view(pages.dtype)
        flat = fp8.to_float(codes).mul_(scale).to(dtype)
    else:
        flat = pages[ids].flatten(0, 1)[:end].to(dtype)
    flat = F.pad(flat, (0, -flat.shape[2] % _COLUMN_TILE, 0, 0, 0, -end % KEY_BLOCK))
    return flat.unflatten(0, (-1, KEY_BLOCK)).transpose(1, 2).contiguous()


def _attend(q: Tensor, keys: Tensor, values: Tensor, first: int) -> Tensor:
    """Attend queries [L, H, P] at positions first, ... to blocked keys; returns [L, H, P]."""
    length, num_heads, head_dim = q.shape
    num_kv = keys.shape[1]
    rows = q.unflatten(1, (num_kv, -1)).permute(1, 0, 2, 3).flatten(1, 2) * head_dim**-0.5
    position = torch.arange(first, first + length, device=q.device)
    position = position.repeat_interleave(num_heads // num_kv)
    pad = -rows.shape[1] % ROW_TILE
    # [K, L * H/K + pad, P']
    rows = F.pad(rows, (0, keys.shape[3] - head_dim, 0, pad))
    position = F.pad(position, (0, pad)).unsqueeze(1)
    peak = rows.new_full((*rows.shape[:2], 1), -torch.inf)
    mass = torch.zeros_like(peak)
    total = torch.zeros_like(rows)
    for block in range((first + length - 1) // KEY_BLOCK + 1):
        scores = torch.bmm(rows, keys[block].transpose(1, 2))  # [K, rows, KEY_BLOCK]
        begin = block * KEY_BLOCK
        if begin + KEY_BLOCK > first + 1:
            columns = torch.arange(begin, begin + KEY_BLOCK, device=q.device)
            scores = scores.masked_fill(columns > position, -torch.inf)
        # A query always sees position 0, so the peak is finite from the first block on.
        new_peak = torch.maximum(peak, scores.amax(-1, keepdim=True))
        weights = torch.exp(scores - new_peak)
        shrink = torch.exp(peak - new_peak)
        mass = mass * shrink + weights.sum(-1, keepdim=True)
        total = total * shrink + torch.bmm(weights, values[block])
        peak = new_peak
    out = (total / mass)[:, : length * num_heads // num_kv, :head_dim]
    return out.unflatten(1, (length, -1)).permute(1, 0, 2, 3).flatten(1, 2)
