"""FP8 decoding against torch's own conversion and the published table."""

from pathlib import Path

import numpy as np
import pytest
import torch

from aprium.ops import fp8

VECTORS = np.load(Path(__file__).parents[1] / "vectors" / "nvfp4_vectors.npz")


def test_every_code_equals_the_table():
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    np.testing.assert_array_equal(fp8.to_float(codes).numpy(), VECTORS["tables/e4m3fn"])


def test_one_scale_a_matrix():
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(3, 5, 7, generator=generator).to(torch.float8_e4m3fn)
    scale = torch.rand(3, generator=generator)
    wanted = weight.float() * scale[:, None, None]
    assert torch.equal(fp8.dequantize(weight, scale), wanted)
    assert torch.equal(fp8.dequantize(weight, scale[:, None]), wanted)
    for shape in ((), (1,)):
        decoded = fp8.dequantize(weight[1], scale[1].reshape(shape))
        assert torch.equal(decoded, wanted[1])


def test_transposed_codes():
    weight = torch.randn(4, 6).to(torch.float8_e4m3fn).t()
    assert torch.equal(fp8.to_float(weight), weight.float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_encoding_rounds_to_the_nearest_code(dtype):
    x = (torch.randn(3, 8, 32, generator=torch.Generator().manual_seed(0)) * 0.1).to(dtype)
    codes, scale = fp8.encode(x)
    assert scale.shape == (3,) and torch.equal(scale, x.abs().amax((1, 2)).float() / 448)
    decoded = fp8.dequantize(codes, scale)
    off = (decoded - x.float()).abs() / scale[:, None, None]
    size = (x.float().abs() / scale[:, None, None]).clamp(min=2**-6)
    slack = 2**-4 if dtype == torch.float32 else 2**-4 + 2**-8  # half a step, and bfloat16's
    assert bool((off <= size * slack + 2**-10).all())


def test_encoding_zeros_gives_a_scale_of_one():
    codes, scale = fp8.encode(torch.zeros(4, 16))
    assert float(scale) == 1.0 and not codes.view(torch.uint8).any()


def test_casts_saturate():
    found = fp8.to_fp8(torch.tensor([1e9, -1e9, 460.0, 0.0]))
    assert found.float().tolist() == [448.0, -448.0, 448.0, 0.0]
