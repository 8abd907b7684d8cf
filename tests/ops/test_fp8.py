"""FP8 decoding against torch's own conversion and the published table."""

from pathlib import Path

import numpy as np
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
