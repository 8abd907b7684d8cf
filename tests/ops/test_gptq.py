"""GPTQ: less output error than rounding to nearest, ordinary codes, safe where inputs are thin."""

import pytest
import torch

from aprium.base.errors import QuantizeError
from aprium.ops import nvfp4
from aprium.ops.gptq import gptq, hessian


def problem(rows: int = 48, columns: int = 192) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(columns, columns, generator=generator) / columns**0.5
    x = torch.randn(2048, columns, generator=generator) @ mixing
    x[:, 7] *= 20  # one input that matters more than others
    return torch.randn(rows, columns, generator=generator) * 0.05, x


def output_error(encoded: nvfp4.Encoded, weight: torch.Tensor, x: torch.Tensor) -> float:
    return float((x @ (nvfp4.dequantize(*encoded) - weight).T).square().mean())


@pytest.mark.parametrize("rule", nvfp4.RULES)
def test_lowers_the_error_of_outputs(rule):
    weight, x = problem()
    plain = output_error(nvfp4.encode(weight, rule), weight, x)
    found = gptq(weight, hessian(x), rule)
    assert output_error(found, weight, x) < 0.75 * plain
    assert found.packed.shape == (48, 96) and found.scale.shape == (48, 12)


def test_matches_the_textbook_recursion():
    """Against the definition: eliminate one input after another from the inverse Hessian."""
    weight, x = problem(rows=3, columns=16)
    curvature = hessian(x).double()
    curvature += 0.01 * curvature.diagonal().mean() * torch.eye(16, dtype=torch.float64)
    inverse = torch.linalg.inv(curvature)
    found = gptq(weight, hessian(x))
    factor = (found.scale.float() * found.scale_2).double()
    values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)
    values = torch.cat((-values.flip(0), values))
    w, wanted = weight.double().clone(), torch.empty(3, 16, dtype=torch.float64)
    for i in range(16):
        near = (w[:, i : i + 1] / factor - values).abs().argmin(1)
        wanted[:, i] = values[near] * factor[:, 0]
        error = (w[:, i] - wanted[:, i]) / inverse[i, i]
        w -= error[:, None] * inverse[i]
        inverse = inverse - inverse[:, i : i + 1] @ inverse[i : i + 1] / inverse[i, i]
    torch.testing.assert_close(nvfp4.dequantize(*found).double(), wanted, rtol=1e-5, atol=1e-7)


def test_without_correlations_is_rounding_to_nearest():
    weight, _ = problem()
    found, plain = gptq(weight, torch.eye(192)), nvfp4.encode(weight)
    assert torch.equal(found.packed, plain.packed)
    assert torch.equal(found.scale.view(torch.uint8), plain.scale.view(torch.uint8))


def test_inputs_that_never_come_and_few_samples_are_no_fault():
    weight, x = problem()
    x[:, 20:40] = 0
    found = gptq(weight, hessian(x[:5]))
    assert bool(nvfp4.dequantize(*found).isfinite().all())


def test_columns_whose_inputs_were_zero_are_rounded_to_nearest():
    weight, x = problem()
    x[:, 20:40] = 0
    decoded = nvfp4.dequantize(*gptq(weight, hessian(x), "max"))
    plain = nvfp4.dequantize(*nvfp4.encode(weight))
    unseen = (decoded - weight)[:, 20:40].square().mean()
    assert float(unseen) < 1.2 * float((plain - weight)[:, 20:40].square().mean())


def test_refuses_inputs_that_are_not_finite():
    weight, x = problem()
    curvature = hessian(x)
    curvature[3, 3] = float("inf")
    with pytest.raises(QuantizeError, match=r"layer\.up: its calibration inputs"):
        gptq(weight, curvature, name="layer.up")


def test_refuses_what_encoding_refuses():
    weight, x = problem()
    weight[3, 4] = float("nan")
    with pytest.raises(QuantizeError, match=r"layer\.up"):
        gptq(weight, hessian(x), name="layer.up")
