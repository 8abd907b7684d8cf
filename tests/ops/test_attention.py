"""Paged and packed attention against softmax written out in float64."""

import pytest
import torch

from aprium.ops import attention


def written_out(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, first: int) -> torch.Tensor:
    """Queries [L, H, P] at positions first, ... over keys [N, K, P]."""
    repeat = q.shape[1] // k.shape[1]
    k, v = (t.repeat_interleave(repeat, 1).double() for t in (k, v))
    scores = torch.einsum("lhp,nhp->hln", q.double(), k) * q.shape[2] ** -0.5
    seen = torch.arange(k.shape[0]) <= torch.arange(first, first + q.shape[0])[:, None]
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    return torch.einsum("hln,nhp->lhp", weights, v)


@pytest.mark.parametrize("page_size", [1, 16, 48])
@pytest.mark.parametrize(
    ("context", "lengths"), [([0], [1]), ([0, 5], [7, 1]), ([600, 0], [3, 530])]
)
def test_paged(context: list[int], lengths: list[int], page_size: int) -> None:
    torch.manual_seed(0)
    heads, kv, dim = 6, 2, 8
    counts = [-(-(c + n) // page_size) for c, n in zip(context, lengths, strict=True)]
    order = torch.randperm(sum(counts))
    ids = list(order.split(counts))
    pages = [torch.full((sum(counts), page_size, kv, dim), 9.0) for _ in range(2)]
    queries, expected = [], []
    for done, length, own in zip(context, lengths, ids, strict=True):
        k, v = torch.randn(done + length, kv, dim), torch.randn(done + length, kv, dim)
        q = torch.randn(length, heads, dim)
        for target, values in zip(pages, (k, v), strict=True):
            if done:
                attention.write_pages(target, values[:done], own, 0)
            attention.write_pages(target, values[done:], own, done)
        queries.append(q)
        expected.append(written_out(q, k, v, done))
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    found = attention.paged(torch.cat(queries), *pages, starts, lengths, context, ids)
    torch.testing.assert_close(found.double(), torch.cat(expected), rtol=1e-5, atol=1e-5)


def test_packed() -> None:
    lengths = [1, 9, 4]
    q, k, v = torch.randn(14, 6, 8), torch.randn(14, 2, 8), torch.randn(14, 2, 8)
    found = attention.packed(q, k, v, lengths)
    parts = zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True)
    expected = torch.cat([written_out(*part, 0) for part in parts])
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("heads", "kv", "dim"), [(3, 3, 10), (4, 2, 12), (6, 2, 32), (5, 1, 7)])
def test_bits_do_not_depend_on_chunks(heads: int, kv: int, dim: int) -> None:
    torch.manual_seed(0)
    length, page_size = 300, 16
    q, k, v = (torch.randn(length, n, dim) for n in (heads, kv, kv))
    ids = torch.randperm(19)
    pages = [torch.zeros(19, page_size, kv, dim) for _ in range(2)]
    for target, values in zip(pages, (k, v), strict=True):
        attention.write_pages(target, values, ids, 0)
    whole = attention.paged(q, *pages, [0], [length], [0], [ids])
    for size in (1, 3, 8, 37, 255):
        parts = [
            attention.paged(part, *pages, [0], [len(part)], [size * i], [ids])
            for i, part in enumerate(q.split(size))
        ]
        assert torch.equal(torch.cat(parts), whole)
