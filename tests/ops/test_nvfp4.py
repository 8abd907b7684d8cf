"""NVFP4 decoding against the bytes and values that other libraries produced."""

from pathlib import Path

import numpy as np
import pytest
import torch

from aprium.ops import nvfp4
from tests import modelopt_layout

VECTORS = dict(np.load(Path(__file__).parents[1] / "vectors" / "nvfp4_vectors.npz"))


def cases(library: str) -> list[str]:
    return [key.rsplit("/", 1)[0] for key in VECTORS if key.endswith(f"/{library}/deq")]


def tensors(case: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    packed, scale, global_scale = (
        torch.from_numpy(VECTORS[f"{case}/{name}"]) for name in ("packed", "scale", "gscale")
    )
    return packed, scale.view(torch.float8_e4m3fn), global_scale


def same(found: torch.Tensor, wanted: np.ndarray) -> bool:
    """Equal value for value; one NaN is as good as another, and so is one zero."""
    return np.array_equal(found.numpy(), wanted, equal_nan=True)


MODELOPT = cases("modelopt") + cases("modelopt_static") + cases("modelopt_static46")


def test_vectors_are_all_there():
    assert len(MODELOPT) >= 30
    assert len(cases("ct")) >= 15


@pytest.mark.parametrize("case", MODELOPT)
def test_equals_modelopt_exactly(case):
    decoded = nvfp4.dequantize(*tensors(case))
    assert decoded.dtype == torch.float32
    assert same(decoded, VECTORS[f"{case}/deq"])


@pytest.mark.parametrize("case", cases("ct"))
def test_equals_compressed_tensors(case):
    decoded = nvfp4.dequantize_divided(*tensors(case))
    assert same(decoded, VECTORS[f"{case}/deq"])
    # Their own decoder scales in the weight's dtype: one bfloat16 step apart at most.
    rounded = torch.from_numpy(VECTORS[f"{case}/deq_bf16"]).view(torch.bfloat16).float()
    torch.testing.assert_close(decoded, rounded, rtol=2**-7, atol=0)


def test_code_table():
    packed = torch.arange(256, dtype=torch.uint8).view(16, 16)
    scale = torch.full((16, 2), 1.0).to(torch.float8_e4m3fn)
    decoded = nvfp4.dequantize(packed, scale, torch.tensor(1.0)).view(256, 2)
    byte = np.arange(256)
    assert same(decoded[:, 0], VECTORS["tables/e2m1"][byte & 15])
    assert same(decoded[:, 1], VECTORS["tables/e2m1"][byte >> 4])


@pytest.mark.parametrize("case", ["randn_f32", "zero_blocks", "scale_underflow", "scale_ties"])
def test_encoder_of_the_tests_is_modelopts(case):
    """Checkpoints made for other tests hold the bytes that ModelOpt would have written."""
    encoded = modelopt_layout.encode_nvfp4(torch.from_numpy(VECTORS[f"{case}/x"]))
    wanted = tensors(f"{case}/modelopt")
    for found, stored in zip(encoded, wanted, strict=True):
        assert torch.equal(found.float(), stored.float())


@pytest.mark.parametrize("lead", [(), (3,), (2, 3)])
@pytest.mark.parametrize("decode", [nvfp4.dequantize, nvfp4.dequantize_divided])
@pytest.mark.parametrize("trailing", [(), (1,)])
def test_stacks_decode_like_their_matrices(lead, decode, trailing):
    generator = torch.Generator().manual_seed(1)
    packed = torch.randint(0, 256, (*lead, 5, 24), dtype=torch.uint8, generator=generator)
    scale = torch.rand((*lead, 5, 3), generator=generator).to(torch.float8_e4m3fn)
    scale_2 = torch.rand((*lead, *trailing), generator=generator) + 0.1
    stacked = decode(packed, scale, scale_2)
    assert stacked.shape == (*lead, 5, 48)
    for index in np.ndindex(*lead):
        assert torch.equal(stacked[index], decode(packed[index], scale[index], scale_2[index]))


def test_slices_of_a_stack_need_not_be_contiguous():
    packed = torch.arange(128, dtype=torch.uint8).view(8, 16).t()
    scale = torch.ones(2, 16).to(torch.float8_e4m3fn).t()[:, :1]
    one = torch.tensor(1.0)
    wanted = nvfp4.dequantize(packed.contiguous(), scale.contiguous(), one)
    assert torch.equal(nvfp4.dequantize(packed, scale, one), wanted)
