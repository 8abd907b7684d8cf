"""Native kernels of training, each instruction set: outputs and gradients against float64.

The definitions are PyTorch's references in the same files, which `test_gradients.py`,
`test_ssd.py`, `test_conv.py` and `test_attention.py` compare with what is written out by hand.
"""

from collections.abc import Callable, Iterator
from itertools import product

import pytest
import torch
from torch import Tensor

from aprium.ops import _native, attention, conv, norm, ssd

LIBRARY = _native.library()
SUPPORTED = LIBRARY.supported() if LIBRARY else []
pytestmark = pytest.mark.skipif(not SUPPORTED, reason="the native library is not installed")

LENGTHS = ([1], [65], [1, 7, 2, 13], [64, 63, 1, 130])
Op = Callable[..., Tensor]


@pytest.fixture(params=SUPPORTED)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    use(monkeypatch, request.param, 2)
    yield request.param


def use(monkeypatch: pytest.MonkeyPatch, isa: str, num_threads: int) -> None:
    assert LIBRARY is not None
    machine = LIBRARY.Machine(isa, num_threads)
    monkeypatch.setattr(_native, "shared", lambda: machine)


def layout(lengths: list[int]) -> tuple[Tensor, Tensor]:
    """Return the segment and the position of every token."""
    counts = torch.tensor(lengths)
    ids = torch.arange(len(lengths)).repeat_interleave(counts)
    return ids, torch.cat([torch.arange(n) for n in lengths])


def draw(seed: int, *shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def run(op: Op, inputs: list[Tensor]) -> list[Tensor]:
    """Return the result of `op` and its gradients in a fixed direction."""
    leaves = [t.detach().clone().requires_grad_() for t in inputs]
    out = op(*leaves)
    direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    direction = direction.to(torch.bfloat16).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, leaves, direction)]


def compare(op: Op, inputs: list[Tensor], limit: float = 2e-5) -> None:
    """Check `op` in the dtypes of `inputs` against itself in float64, which is the reference."""
    assert any(t.dtype != torch.float64 for t in inputs)
    wanted = run(op, [t.double() for t in inputs])
    for i, (found, exact) in enumerate(zip(run(op, inputs), wanted, strict=True)):
        scale = max(float(exact.abs().max()), 1.0)
        error = float((found.double() - exact).abs().max()) / scale
        assert error < limit, (i, error)


def steps(num_tokens: int, heads: int) -> Tensor:
    return torch.nn.functional.softplus(draw(2, (num_tokens, heads))[0])


SIZES = [
    (2, 1, 1, 1, 1),
    (6, 3, 5, 7, 4),
    (3, 1, 16, 16, 16),
    (4, 2, 17, 33, 37),
    (2, 2, 32, 48, 64),
]


@pytest.mark.parametrize(("lengths", "sizes"), [*product(LENGTHS, SIZES)])
def test_recurrence(isa: str, lengths: list[int], sizes: tuple[int, ...]) -> None:
    heads, groups, head_dim, size, chunk = sizes
    tokens, (ids, _) = sum(lengths), layout(lengths)
    x, b, c, a, d = draw(
        0,
        (tokens, heads, head_dim),
        (tokens, groups, size),
        (tokens, groups, size),
        (heads,),
        (heads,),
    )

    def op(*inputs: Tensor) -> Tensor:
        return ssd.chunked(*inputs, ids, chunk)

    compare(op, [x, steps(tokens, heads), -a.exp(), b, c, d], 5e-5)


def test_recurrence_with_long_decays(isa: str) -> None:
    """Decays that vanish inside a chunk neither overflow nor give what is not a number."""
    x, b, c = draw(0, (200, 2, 16), (200, 1, 16), (200, 1, 16))
    ids, a, d = torch.zeros(200, dtype=torch.int64), torch.tensor([-50.0, -0.01]), torch.ones(2)
    compare(
        lambda *inputs: ssd.chunked(*inputs, ids, 64), [x, 20 * steps(200, 2), a, b, c, d], 1e-4
    )


def test_recurrence_of_parts_of_a_tensor(isa: str) -> None:
    """Rows may lie apart, and what is not finite stays seen."""
    (mixed,) = draw(0, (70, 4 * 8 + 2 * 2 * 16))
    ids = torch.zeros(70, dtype=torch.int64)
    x, b, c = mixed.split((32, 32, 32), -1)
    apart = [x.unflatten(-1, (4, 8)), *(t.unflatten(-1, (2, 16)) for t in (b, c))]
    rest = (steps(70, 4), -torch.ones(4), torch.ones(4))

    def op(x: Tensor, b: Tensor, c: Tensor) -> Tensor:
        return ssd.chunked(x, rest[0], rest[1], b, c, rest[2], ids, 16)

    assert torch.equal(op(*apart), op(*(t.contiguous() for t in apart)))
    apart[0][40] = torch.nan
    assert not torch.isfinite(op(*apart)[40:]).any(-1).all(-1).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kernel", [1, 2, 4, 7])
@pytest.mark.parametrize(("channels", "biased"), [(1, True), (16, False), (65, True), (130, True)])
def test_convolution(
    isa: str, dtype: torch.dtype, kernel: int, channels: int, biased: bool
) -> None:
    for lengths in LENGTHS:
        _, positions = layout(lengths)
        wide, weight, bias = draw(0, (sum(lengths), channels + 3), (channels, kernel), (channels,))
        x = wide[:, 1 : channels + 1].to(dtype)

        def op(x: Tensor, weight: Tensor, *bias: Tensor, at: Tensor = positions) -> Tensor:
            y = conv.silu_conv(x, weight, bias[0] if bias else None, at)
            assert y.dtype in (torch.float32, torch.float64)
            return y

        inputs = [x, weight, bias] if biased else [x, weight]
        compare(op, inputs, 2e-5 if dtype == torch.float32 else 5e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("size", "groups"), [(1, 1), (15, 1), (48, 3), (66, 2), (257, 1)])
def test_norms(isa: str, dtype: torch.dtype, size: int, groups: int) -> None:
    limit = 2e-5 if dtype == torch.float32 else 1e-2
    for tokens in (1, 64, 131):
        y, wide, weight = draw(0, (tokens, size), (tokens, size + 5), (size,))
        gate = wide[:, :size].to(dtype)
        compare(lambda x, w: norm.rms_norm(x, w, 1e-5), [y.to(dtype), weight], limit)
        compare(
            lambda y, g, w: norm.gated_group_norm(y, g, w, groups, 1e-5), [y, gate, weight], limit
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sizes", [(1, 1, 1), (6, 2, 8), (3, 3, 17), (4, 1, 32)])
def test_attention(isa: str, dtype: torch.dtype, sizes: tuple[int, int, int]) -> None:
    heads, kv_heads, head_dim = sizes
    for lengths in LENGTHS:
        tokens = sum(lengths)
        narrow = (tokens, kv_heads, head_dim)
        q, k, v = (t.to(dtype) for t in draw(0, (tokens, heads, head_dim), narrow, narrow))
        limit = 2e-5 if dtype == torch.float32 else 2e-2
        compare(lambda *qkv, n=lengths: attention.packed(*qkv, n), [3 * q, k, v], limit)


def test_threads_change_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does what a segment is packed with change its results."""
    lengths = [64, 63, 1, 130]
    tokens, (ids, positions) = sum(lengths), layout(lengths)
    a, d = -torch.ones(4), torch.ones(4)
    mixed, weight, gate, scale = draw(0, (tokens, 96), (96, 4), (tokens, 32), (32,))
    q, k = draw(3, (tokens, 4, 8), (tokens, 2, 8))

    def op(*inputs: Tensor) -> Tensor:
        mixed, weight, gate, scale, q, k = inputs
        x, b, c = conv.silu_conv(mixed, weight, None, positions).split(32, -1)
        x, b, c = (t.unflatten(-1, (-1, n)) for t, n in ((x, 8), (b, 16), (c, 16)))
        y = ssd.chunked(x, steps(tokens, 4), a, b, c, d, ids, 16).flatten(1)
        y = norm.gated_group_norm(y, gate, scale, 2, 1e-5)
        return torch.cat((y, attention.packed(q, k, k, lengths).flatten(1)), 1)

    inputs = [mixed, weight, gate, scale, q, k]
    for isa in SUPPORTED:
        results = []
        for threads in (1, 2, 3):
            use(monkeypatch, isa, threads)
            results.append(run(op, inputs))
        for other in results[1:]:
            assert all(map(torch.equal, results[0], other))
