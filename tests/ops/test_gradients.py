"""Every op that training goes through: its float32 gradients against float64 by definition.

The definitions are written with elementary operations, in float64, and differentiated by PyTorch.
"""

from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from aprium.ops import attention, conv, moe, norm, ssd
from aprium.ops.activation import relu_squared, sigmoid, silu, softplus
from aprium.ops.logprob import kl_divergence, weighted_logprob
from aprium.ops.matmul import linear

LENGTHS = (1, 7, 2, 13)
NUM_TOKENS = sum(LENGTHS)
POSITIONS = torch.cat([torch.arange(n) for n in LENGTHS])
IDS = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))
GENERATOR = torch.Generator().manual_seed(0)


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=GENERATOR)


def gated(y: Tensor, gate: Tensor, weight: Tensor) -> Tensor:
    wide = (y * gate * torch.sigmoid(gate)).unflatten(-1, (2, -1))
    wide = wide / torch.sqrt(wide.square().mean(-1, keepdim=True) + 1e-5)
    return wide.flatten(-2) * weight


def convolution(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    parts = []
    for part in x.split(LENGTHS):
        padded = F.pad(part.T.unsqueeze(0), (weight.shape[1] - 1, 0))
        parts.append(F.conv1d(padded, weight.unsqueeze(1), bias, groups=x.shape[1])[0].T)
    return torch.cat(parts)


def recurrence(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
    repeat = x.shape[1] // b.shape[1]
    outputs = []
    for t in range(x.shape[0]):
        if POSITIONS[t] == 0:
            state = x.new_zeros(x.shape[1], x.shape[2], b.shape[2])
        keys, reads = (m[t].repeat_interleave(repeat, 0) for m in (b, c))
        update = (dt[t, :, None] * x[t])[:, :, None] * keys[:, None, :]
        state = state * torch.exp(dt[t] * a)[:, None, None] + update
        outputs.append((state * reads[:, None, :]).sum(-1) + d[:, None] * x[t])
    return torch.stack(outputs)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    outputs = []
    for one_q, one_k, one_v in zip(*(t.split(LENGTHS) for t in (q, k, v)), strict=True):
        keys, values = (t.repeat_interleave(2, 1) for t in (one_k, one_v))
        scores = torch.einsum("qhp,khp->hqk", one_q, keys) / q.shape[-1] ** 0.5
        mask = torch.ones(scores.shape[1:], dtype=torch.bool).tril()
        weights = scores.masked_fill(~mask, -torch.inf).softmax(-1)
        outputs.append(torch.einsum("hqk,khp->qhp", weights, values))
    return torch.cat(outputs)


BIAS = normal(6)


def experts(x: Tensor, scores: Tensor, up: Tensor, down: Tensor) -> Tensor:
    chosen = (torch.sigmoid(scores).float() + BIAS).topk(2, -1).indices
    every = torch.sigmoid(scores)
    weights = every.gather(1, chosen)
    weights = 2.5 * weights / weights.sum(-1, keepdim=True)
    hidden = torch.einsum("td,eid->tei", x, up).relu().square()
    results = torch.einsum("tei,edi->ted", hidden, down)
    picked = results.gather(1, chosen.unsqueeze(-1).expand(-1, -1, x.shape[1]))
    return (picked * weights.unsqueeze(-1)).sum(1)


def our_stacked(x: Tensor, scores: Tensor, up: Tensor, down: Tensor) -> Tensor:
    every = sigmoid(scores)
    chosen = moe.choose(every, BIAS, num_active=2)
    weights = moe.weigh(every, chosen, scale=2.5)
    return moe.grouped_experts(x, weights, chosen, lambda r, e: moe.run_stacked(r, e, up, down))


def our_experts(x: Tensor, scores: Tensor, up: Tensor, down: Tensor) -> Tensor:
    every = sigmoid(scores)
    chosen = moe.choose(every, BIAS, num_active=2)

    def apply(expert: int, rows: Tensor) -> Tensor:
        return linear(F.relu(linear(rows, up[expert])).square(), down[expert])

    weights = moe.weigh(every, chosen, scale=2.5)
    return moe.grouped_experts(x, weights, chosen, lambda r, e: moe.run_sorted(r, e, apply))


TARGETS = torch.randint(0, 11, (NUM_TOKENS,), generator=GENERATOR)


def logprob(hidden: Tensor, weight: Tensor) -> Tensor:
    return (hidden @ weight.T).log_softmax(-1).gather(1, TARGETS.unsqueeze(1)).squeeze(1)


FACTORS = normal(NUM_TOKENS)
TEACHER, TEACHER_HEAD = normal(NUM_TOKENS, 8), normal(11, 8)


def divergence(hidden: Tensor, weight: Tensor) -> Tensor:
    wanted = (TEACHER.double() @ TEACHER_HEAD.double().T).log_softmax(-1)
    return (wanted.exp() * (wanted - (hidden @ weight.T).log_softmax(-1))).sum(-1)


T = NUM_TOKENS
STEPS = softplus(normal(T, 4))
CASES: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor], Sequence[Tensor]]] = {
    "silu": (silu, F.silu, [4 * normal(T, 9)]),
    "sigmoid": (sigmoid, torch.sigmoid, [4 * normal(T, 9)]),
    "softplus": (softplus, F.softplus, [4 * normal(T, 9)]),
    "rms_norm": (
        lambda x, w: norm.rms_norm(x, w, 1e-5),
        lambda x, w: x / torch.sqrt(x.square().mean(-1, keepdim=True) + 1e-5) * w,
        [normal(T, 12), normal(12)],
    ),
    "gated_group_norm": (
        lambda y, gate, w: norm.gated_group_norm(y, gate, w, 2, 1e-5),
        gated,
        [normal(T, 12), normal(T, 12), normal(12)],
    ),
    "causal_conv": (
        lambda x, w, b: conv.causal_conv(x, w, b, POSITIONS),
        convolution,
        [normal(T, 5), normal(5, 4), normal(5)],
    ),
    "ssd": (
        lambda *inputs: ssd.chunked(*inputs, IDS, 4),
        recurrence,
        [normal(T, 4, 3), STEPS, -normal(4).exp(), normal(T, 2, 5), normal(T, 2, 5), normal(4)],
    ),
    "attention": (
        lambda q, k, v: attention.packed(q, k, v, LENGTHS),
        attend,
        [normal(T, 4, 8), normal(T, 2, 8), normal(T, 2, 8)],
    ),
    "experts": (
        our_experts,
        experts,
        [normal(T, 8), normal(T, 6), normal(6, 10, 8), normal(6, 8, 10)],
    ),
    "stacked experts": (
        our_stacked,
        experts,
        [normal(T, 8), normal(T, 6), normal(6, 10, 8), normal(6, 8, 10)],
    ),
    "relu_squared": (relu_squared, lambda x: F.relu(x).square(), [normal(T, 9)]),
    "silu_conv": (
        lambda x, w, b: conv.silu_conv(x, w, b, POSITIONS),
        lambda x, w, b: F.silu(convolution(x, w, b)),
        [normal(T, 5), normal(5, 4), normal(5)],
    ),
    "linear": (linear, F.linear, [normal(T, 6), normal(7, 6), normal(7)]),
    "wide linear": (linear, F.linear, [normal(T, 6), normal(301, 6), normal(301)]),
    "weighted_logprob": (
        lambda h, w: weighted_logprob(h, w, TARGETS, FACTORS.to(h.dtype))[0],
        lambda h, w: (logprob(h, w) * FACTORS).sum(),
        [normal(T, 8), normal(11, 8)],
    ),
    "kl_divergence": (
        lambda h, w: kl_divergence(h, w, TEACHER.to(h.dtype), TEACHER_HEAD.to(h.dtype)),
        divergence,
        [normal(T, 8), normal(11, 8)],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_those_of_the_definition(name: str) -> None:
    ours, definition, inputs = CASES[name]
    narrow = [t.clone().requires_grad_() for t in inputs]
    wide = [t.double().requires_grad_() for t in inputs]
    found, wanted = ours(*narrow), definition(*wide)
    torch.testing.assert_close(found.double(), wanted, rtol=2e-5, atol=2e-5)
    direction = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(1))
    grads = torch.autograd.grad(found, narrow, direction)
    for grad, exact in zip(
        grads, torch.autograd.grad(wanted, wide, direction.double()), strict=True
    ):
        scale = float(exact.abs().max())
        torch.testing.assert_close(grad.double() / scale, exact / scale, rtol=1e-4, atol=1e-5)
