"""Routing and grouped experts against one token and one expert at a time."""

from functools import partial

import pytest
import torch

from aprium.ops.moe import choose, grouped_experts, run_sorted, weigh


def one_token(scores, bias, active, groups, active_groups, normalise, scale):
    """Routing of one token in plain Python; returns {expert: weight}."""
    keys = [s + b for s, b in zip(scores, bias, strict=True)]
    size = len(keys) // groups
    best = [sum(sorted(keys[g * size : (g + 1) * size])[-2:]) for g in range(groups)]
    kept = sorted(range(groups), key=lambda g: best[g])[-active_groups:]
    eligible = [e for g in kept for e in range(g * size, (g + 1) * size)]
    chosen = sorted(eligible, key=lambda e: keys[e])[-active:]
    total = sum(scores[e] for e in chosen) + 1e-20 if normalise else 1.0
    return {e: scores[e] / total * scale for e in chosen}


@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize(
    ("experts", "active", "groups", "kept"), [(8, 3, 1, 1), (12, 2, 4, 2), (6, 6, 2, 2)]
)
def test_route(experts: int, active: int, groups: int, kept: int, normalise: bool) -> None:
    generator = torch.Generator().manual_seed(experts)
    scores = torch.rand(20, experts, generator=generator, dtype=torch.float64)
    bias = torch.randn(experts, generator=generator)
    chosen = choose(scores, bias, num_active=active, num_groups=groups, num_active_groups=kept)
    weights = weigh(scores, chosen, normalise=normalise, scale=2.5)
    for t in range(20):
        expected = one_token(
            scores[t].tolist(), bias.tolist(), active, groups, kept, normalise, 2.5
        )
        assert chosen[t].tolist() == sorted(expected)
        for e, w in zip(chosen[t].tolist(), weights[t].tolist(), strict=True):
            assert w == pytest.approx(expected[e], rel=1e-6)


def test_bias_selects_but_does_not_weigh() -> None:
    scores = torch.tensor([[0.9, 0.1, 0.5]])
    chosen = choose(scores, torch.tensor([0.0, 64.0, 0.0]), num_active=1)
    weights = weigh(scores, chosen, normalise=False)
    assert chosen.tolist() == [[1]]
    assert weights.item() == pytest.approx(0.1)


def test_grouped_experts_and_gradients() -> None:
    torch.manual_seed(0)
    matrices = torch.randn(5, 4, 4, dtype=torch.float64, requires_grad=True)
    x = torch.randn(9, 4, dtype=torch.float64, requires_grad=True)
    chosen = torch.stack([torch.randperm(4)[:2].sort().values for _ in range(9)])
    weights = torch.rand(9, 2, dtype=torch.float64, requires_grad=True)
    run = partial(run_sorted, apply=lambda e, rows: rows @ matrices[e].T)
    found = grouped_experts(x, weights, chosen, run)
    expected = torch.stack(
        [sum(weights[t, a] * (matrices[chosen[t, a]] @ x[t]) for a in range(2)) for t in range(9)]
    )
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    leaves = (matrices, x, weights)
    for one, other in zip(
        torch.autograd.grad(found.sum(), leaves),
        torch.autograd.grad(expected.sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
