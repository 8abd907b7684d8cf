"""State-space duality: the Mamba-2 recurrence, token by token and in chunks.

    S_t = exp(dt_t a) S_{t-1} + dt_t x_t (x) B_t        y_t = S_t C_t + D x_t

`scan` walks the tokens in order. It is the specification, and it is what generation uses: every
product and sum is rounded on its own and in a fixed order, so a sequence gives the same bits in
one step or in many, alone or in a batch. `chunked` is the matrix form for training, equal up to
rounding, with gradients; native/ssd.inl is the same where there are kernels. All reset at segment
boundaries. Everything is float32.
Source: Mamba-2 (arXiv 2405.21060), listing 1 and section 6.
Letters: T packed tokens, S sequences, H heads, P head dim, G groups, N state, C chunk.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from aprium.ops import _native
from aprium.ops.activation import softplus

# Bytes of per-token states that `scan` materialises at a time.
_BLOCK_BYTES = 8 << 20


def step_size(dt: Tensor, bias: Tensor, limit: tuple[float, float]) -> Tensor:
    """Return softplus(dt + bias) clamped to `limit`, in float32; `dt` [T, H], `bias` [H]."""
    value = softplus(dt.float() + bias.float())
    return value if limit == (0.0, float("inf")) else value.clamp(*limit)


def scan(
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor,
    starts: Sequence[int],
    lengths: Sequence[int],
    state: Tensor,
) -> tuple[Tensor, Tensor]:
    """Run the recurrence over packed segments from given states.

    `x` [T, H, P], `dt` [T, H] after softplus, `a` [H] negative, `b`, `c` [T, G, N], `d` [H];
    `state` [S, H, P, N] before each segment. Returns y [T, H, P] and the states after
    [S, H, P, N]. Head i reads group i // (H / G).
    """
    groups = b.shape[1]
    decay = torch.exp(dt * a)
    xd = (x * dt.unsqueeze(-1)).unflatten(1, (groups, -1))  # [T, G, H/G, P]
    y = torch.empty_like(xd)
    after = state.unflatten(1, (groups, -1)).clone()  # [S, G, H/G, P, N]
    decay = decay.unflatten(1, (groups, -1))[..., None, None]  # [T, G, H/G, 1, 1]
    single = [i for i, n in enumerate(lengths) if n == 1]
    if single:
        rows = torch.tensor([starts[i] for i in single], device=x.device)
        which = torch.tensor(single, device=x.device)
        new = after[which] * decay[rows]
        new += xd[rows].unsqueeze(-1) * b[rows][:, :, None, None, :]
        y[rows] = _read_out(new, c[rows])
        after[which] = new
    for i, length in enumerate(lengths):
        if length > 1:
            rows = slice(starts[i], starts[i] + length)
            after[i] = _scan_one(xd[rows], decay[rows], b[rows], c[rows], after[i], y[rows])
    return y.flatten(1, 2) + x * d[:, None], after.flatten(1, 2)


def _scan_one(xd: Tensor, decay: Tensor, b: Tensor, c: Tensor, state: Tensor, y: Tensor) -> Tensor:
    """Walk one segment, write its outputs into `y` [L, G, H/G, P], return its last state."""
    block = max(1, _BLOCK_BYTES // (state.numel() * 4))
    carried = torch.empty_like(state)
    for begin in range(0, xd.shape[0], block):
        rows = slice(begin, begin + block)
        states = xd[rows].unsqueeze(-1) * b[rows][:, :, None, None, :]
        for t, alpha in zip(states.unbind(0), decay[rows].unbind(0), strict=True):
            torch.mul(state, alpha, out=carried)
            state = t.add_(carried)
        y[rows] = _read_out(states, c[rows])
    return state


def _read_out(states: Tensor, c: Tensor) -> Tensor:
    """Contract states [T, G, H/G, P, N] with `c` [T, G, N] over N, one fixed order per row."""
    return (states * c[:, :, None, None, :]).sum(-1)


def chunked(
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor,
    segment_ids: Tensor,
    chunk_size: int,
) -> Tensor:
    """Run the recurrence over packed segments from zero states, in matrix form with gradients.

    Shapes as in `scan`; `segment_ids` int64 [T]. Returns y [T, H, P]. The backward pass keeps the
    inputs alone, with native kernels also the states between chunks, and makes the rest again.
    """
    inputs = (x, dt, a, b, c, d, segment_ids, chunk_size)
    if _native.runs_on(x, dt, a, b, c, d):
        return _Native.apply(*inputs)
    return checkpoint(_in_chunks, *inputs, use_reentrant=False, preserve_rng_state=False)


def _in_chunks(
    x: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Tensor,
    segment_ids: Tensor,
    chunk_size: int,
) -> Tensor:
    num_tokens, groups = x.shape[0], b.shape[1]
    pad = -num_tokens % chunk_size
    # Padding joins the last segment with dt = 0: it neither decays the state nor adds to it.
    ids = F.pad(segment_ids, (0, pad), value=int(segment_ids[-1])).unflatten(0, (-1, chunk_size))
    xd, steps, b, c = (
        F.pad(t, (0, 0) * (t.dim() - 1) + (0, pad)).unflatten(0, (-1, chunk_size))
        for t in (x * dt.unsqueeze(-1), dt * a, b, c)
    )  # [n, C, H, P], [n, C, H], [n, C, G, N]
    total = steps.cumsum(1).permute(0, 2, 1).unflatten(1, (groups, -1))  # [n, G, H/G, C]
    xd = xd.permute(0, 2, 1, 3).unflatten(1, (groups, -1))  # [n, G, H/G, C, P]
    b, c = b.transpose(1, 2), c.transpose(1, 2)  # [n, G, C, N]
    # Inside a chunk: attention-like, with decays as weights.
    same = (ids.unsqueeze(2) == ids.unsqueeze(1)).tril()[:, None, None]  # [n, 1, 1, C, C]
    decays = (total.unsqueeze(-1) - total.unsqueeze(-2)).masked_fill(~same, -torch.inf).exp()
    scores = (c @ b.transpose(-1, -2)).unsqueeze(2) * decays  # [n, G, H/G, C, C]
    y = scores @ xd
    # Across chunks: each chunk's contribution to the state at its end, carried forward.
    last = total[..., -1:]
    reaches_end = (ids == ids[:, -1:])[:, None, None]
    to_end = (last - total).masked_fill(~reaches_end, -torch.inf).exp()  # [n, G, H/G, C]
    added = (xd * to_end.unsqueeze(-1)).transpose(-1, -2) @ b.unsqueeze(2)  # [n, G, H/G, P, N]
    before = torch.cat((ids[:1, 0], ids[:-1, -1]))
    whole = (before == ids[:, -1])[:, None, None, None]
    carried = last.masked_fill(~whole, -torch.inf).exp().unsqueeze(-1)
    entering = _Carry.apply(added, carried)  # [n, G, H/G, P, N]
    continues = (ids == before[:, None])[:, None, None]
    from_start = total.masked_fill(~continues, -torch.inf).exp()
    y = y + (c.unsqueeze(2) @ entering.transpose(-1, -2)) * from_start.unsqueeze(-1)
    y = y.flatten(1, 2).transpose(1, 2).flatten(0, 1)[:num_tokens]  # [T, H, P]
    return y + x * d[:, None]


class _Native(torch.autograd.Function):
    """The same by native kernels: chunks begin anew with each segment."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        dt: Tensor,
        a: Tensor,
        b: Tensor,
        c: Tensor,
        d: Tensor,
        segment_ids: Tensor,
        chunk_size: int,
    ) -> Tensor:
        machine, library = _native.shared(), _native.library()
        assert library is not None
        x, b, c = (_by_rows(t) for t in (x, b, c))
        dt, a, d = (t.contiguous() for t in (dt, a, d))
        _, heads, head_dim = x.shape
        sizes = (heads, b.shape[1], head_dim, b.shape[2], chunk_size)
        lengths = torch.unique_consecutive(segment_ids, return_counts=True)[1]
        chunks = library.Chunks(lengths.tolist(), chunk_size)
        state = (-(-b.shape[2] // 16) * 16, -(-head_dim // 16) * 16)
        states = x.new_empty(chunks.num_states, heads, *state)
        y = x.new_empty(x.shape)
        inputs, rows = (x, dt, a, b, c, d), tuple(t.stride(0) for t in (x, b, c))
        addresses = tuple(t.data_ptr() for t in inputs)
        machine.ssd_forward(chunks, addresses, rows, sizes, states.data_ptr(), y.data_ptr())
        ctx.save_for_backward(*inputs, states)
        ctx.call = (machine, chunks, rows, sizes)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Return gradients with respect to x, dt, a, b, c and d."""
        *inputs, states = ctx.saved_tensors
        machine, chunks, rows, sizes = ctx.call
        found = tuple(t.new_empty(t.shape) for t in inputs)
        addresses, to = (tuple(t.data_ptr() for t in each) for each in (inputs, found))
        grad_y = grads[0].contiguous()
        machine.ssd_backward(
            chunks, addresses, rows, sizes, states.data_ptr(), grad_y.data_ptr(), to
        )
        return *found, None, None


def _by_rows(t: Tensor) -> Tensor:
    """Return `t` [T, ...] with each row in one piece; rows may have gaps between them."""
    return t if t[:1].is_contiguous() else t.contiguous()


class _Carry(torch.autograd.Function):
    """The recurrence over chunks: out[0] = 0, out[i + 1] = added[i] + carried[i] * out[i]."""

    @staticmethod
    def forward(ctx: Any, added: Tensor, carried: Tensor) -> Tensor:
        """Return the state entering each chunk, shaped as `added` [n, ...]."""
        out = torch.zeros_like(added)
        for i in range(added.shape[0] - 1):
            torch.addcmul(added[i], carried[i], out[i], out=out[i + 1])
        ctx.save_for_backward(carried, out)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        """Return gradients with respect to `added` and `carried`."""
        carried, out = ctx.saved_tensors
        (grad_out,) = grads
        grad_added = torch.zeros_like(out)
        for i in range(out.shape[0] - 2, -1, -1):
            torch.addcmul(grad_out[i + 1], carried[i + 1], grad_added[i + 1], out=grad_added[i])
        grad_carried = (grad_added * out).sum((-1, -2), keepdim=True)
        return grad_added, grad_carried
