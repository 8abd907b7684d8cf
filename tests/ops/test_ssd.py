"""The recurrence written out in float64 against the scan and the chunked form, with gradients."""

import pytest
import torch
from torch import Tensor

from aprium.ops import ssd


def inputs(num_tokens: int, heads: int = 6, groups: int = 3, head_dim: int = 5, size: int = 7):
    generator = torch.Generator().manual_seed(num_tokens)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x = normal(num_tokens, heads, head_dim)
    dt = torch.nn.functional.softplus(normal(num_tokens, heads))
    a, d = -torch.exp(normal(heads)), normal(heads)
    return x, dt, a, normal(num_tokens, groups, size), normal(num_tokens, groups, size), d


def written_out(x, dt, a, b, c, d, lengths, state):
    """The definition: token by token, head by head."""
    outputs, after, offset = [], [], 0
    repeat = x.shape[1] // b.shape[1]
    b, c = (t.repeat_interleave(repeat, 1) for t in (b, c))
    for i, length in enumerate(lengths):
        s = state[i]
        for t in range(offset, offset + length):
            s = torch.exp(dt[t] * a)[:, None, None] * s
            s = s + dt[t][:, None, None] * x[t][:, :, None] * b[t][:, None, :]
            outputs.append((s * c[t][:, None, :]).sum(-1) + d[:, None] * x[t])
        after.append(s)
        offset += length
    return torch.stack(outputs), torch.stack(after)


@pytest.mark.parametrize("lengths", [[1], [9], [1, 1, 1], [3, 1, 20, 1], [2, 2], [40]])
def test_scan_equals_definition(lengths: list[int]) -> None:
    values = inputs(sum(lengths))
    state = torch.randn(len(lengths), 6, 5, 7, dtype=torch.float64)
    expected, after = written_out(*values, lengths, state)
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    found, found_after = ssd.scan(*values, starts, lengths, state)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(found_after, after)


def test_scan_in_blocks_equals_scan_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    values = [t.float() for t in inputs(23)]
    state = torch.randn(1, 6, 5, 7)
    whole = ssd.scan(*values, [0], [23], state)
    monkeypatch.setattr(ssd, "_BLOCK_BYTES", 4 * 6 * 5 * 7 * 4)
    for found, expected in zip(ssd.scan(*values, [0], [23], state), whole, strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("chunk_size", [1, 4, 16, 64])
@pytest.mark.parametrize("lengths", [[1], [16], [17], [5, 1, 30, 8], [1] * 9, [31, 2]])
def test_chunked_equals_definition_with_gradients(lengths: list[int], chunk_size: int) -> None:
    values = [t.requires_grad_() for t in inputs(sum(lengths))]
    state = torch.zeros(len(lengths), 6, 5, 7, dtype=torch.float64)
    expected, _ = written_out(*values, lengths, state)
    ids = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    found = ssd.chunked(*values, ids, chunk_size)
    torch.testing.assert_close(found, expected)
    weights = torch.randn_like(expected)
    wanted = torch.autograd.grad((expected * weights).sum(), values)
    gradients = torch.autograd.grad((found * weights).sum(), values)
    for gradient, want in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(gradient, want)


def test_long_decays_neither_overflow_nor_give_nan() -> None:
    x, dt, a, b, c, d = (t.float() for t in inputs(300))
    dt = dt * 50
    ids = torch.zeros(300, dtype=torch.int64)
    dt.requires_grad_()
    y = ssd.chunked(x, dt, a, b, c, d, ids, 64)
    (gradient,) = torch.autograd.grad(y.sum(), dt)
    assert torch.isfinite(y).all() and torch.isfinite(gradient).all()


def test_step_size_limit() -> None:
    dt, bias = torch.linspace(-5, 5, 12).reshape(2, 6), torch.zeros(6)
    free = ssd.step_size(dt, bias, (0.0, float("inf")))
    assert torch.equal(ssd.step_size(dt, bias, (0.5, 2.0)), free.clamp(0.5, 2.0))
