"""NVFP4 against the bytes and values that other libraries produced."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aprium.base.errors import QuantizeError
from aprium.ops import _native, fp8, nvfp4
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


# ---- encoding ----

ENCODED = [
    case for case in cases("modelopt") if not case.startswith(("zeros/", "nan_inf/", "inf_"))
]
INEXACT = ("ct", "te", "vllm")  # other orders of the same operations


def given_of(case: str) -> torch.Tensor:
    x = torch.from_numpy(VECTORS[f"{case.split('/')[0]}/x"])
    return x.view(torch.bfloat16) if x.dtype == torch.int16 else x


@pytest.fixture(params=["native", "reference"])
def encoder(request, monkeypatch):
    """Encode with the kernels at hand, or in PyTorch."""
    if request.param == "reference":
        monkeypatch.setattr(_native, "shared", lambda: None)
    elif _native.shared() is None:
        pytest.skip("no native library")
    return nvfp4.encode


def bits(encoded: nvfp4.Encoded) -> list[np.ndarray]:
    return [
        encoded.packed.numpy(),
        encoded.scale.view(torch.uint8).numpy(),
        encoded.scale_2.numpy().reshape(-1),
    ]


def stored(case: str) -> list[np.ndarray]:
    return [VECTORS[f"{case}/{name}"] for name in ("packed", "scale")] + [
        VECTORS[f"{case}/gscale"].reshape(-1)
    ]


@pytest.mark.parametrize("case", ENCODED)
def test_encodes_modelopts_bytes(case, encoder):
    x = given_of(case)
    amax = x.abs().max() if x.dim() == 3 else None  # their stacks share a global scale
    found = encoder(x, amax=amax)
    scale_2 = found.scale_2.reshape(-1)[:1]
    for mine, theirs in zip(bits(found._replace(scale_2=scale_2)), stored(case), strict=True):
        assert np.array_equal(mine, theirs)


@pytest.mark.parametrize("case", cases("modelopt_static"))
def test_static_order_gives_modelopts_bytes(case):
    x, amax, whole = (
        given_of(case),
        *(torch.from_numpy(VECTORS[f"{case}/{name}"]) for name in ("amax", "global_amax")),
    )
    scale, scale_2 = nvfp4.static_scales(amax, whole), nvfp4.global_scale(whole)
    found = nvfp4.Encoded(nvfp4.encode_with(x, scale, scale_2), scale, scale_2)
    assert all(map(np.array_equal, bits(found), stored(case)))


@pytest.mark.parametrize("case", cases("modelopt_static46"))
def test_four_over_six_gives_modelopts_bytes(case, encoder):
    assert all(map(np.array_equal, bits(encoder(given_of(case), "four_over_six")), stored(case)))


@pytest.mark.parametrize("library", INEXACT)
@pytest.mark.parametrize("case", ["randn_f32", "randn_bf16", "heavytail_bf16", "square_64_bf16"])
def test_other_libraries_differ_by_ties_alone(case, library):
    scale = bits(nvfp4.encode(given_of(case)))[1].astype(int)
    off = np.abs(scale - VECTORS[f"{case}/{library}/scale"])
    assert off.max() <= 1
    assert (off == 0).mean() >= 0.95


@pytest.mark.parametrize(("case", "tile"), [("te2d", 16), ("te1d_col", 1)])
def test_training_order_gives_transformer_engines_bytes(case, tile):
    x = torch.from_numpy(VECTORS["train/x"]).view(torch.bfloat16).float()
    for values, packed, scale in ((x, "packed", "scale"), (x.T, "packed_t", "scale_t")):
        found = bits(nvfp4.encode_training(values.contiguous(), tile=tile))
        assert np.array_equal(found[0], VECTORS[f"train/{case}/{packed}"])
        assert np.array_equal(found[1], VECTORS[f"train/{case}/{scale}"])


def test_tiles_of_sixteen_transpose_with_their_codes():
    x = torch.randn(48, 64, generator=torch.Generator().manual_seed(0))
    one, two = (nvfp4.dequantize(*nvfp4.encode_training(v, tile=16)) for v in (x, x.T.contiguous()))
    assert torch.equal(one.T, two)


def test_stochastic_rounding_is_right_on_average_and_only_takes_neighbours():
    x = torch.randn(4, 64, generator=torch.Generator().manual_seed(3))
    generator = torch.Generator().manual_seed(4)
    draws = torch.stack(
        [nvfp4.dequantize(*nvfp4.encode_training(x, generator=generator)) for _ in range(2000)]
    )
    nearest = nvfp4.encode_training(x)
    factor = fp8.to_float(nearest.scale) * nearest.scale_2
    scaled = (x.unflatten(-1, (-1, 16)) / factor[..., None]).flatten(-2)
    free = scaled.abs() < 6  # the largest of a block may be clipped, by the recipe
    bias = (draws.mean(0) - x) / factor.repeat_interleave(16, -1)
    assert float(bias[free].abs().max()) < 0.12  # a step is at most 2, so 5 sigma is 0.11
    assert abs(float(bias[free].mean())) < 0.01
    steps = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6.0])
    drawn = (draws / factor.repeat_interleave(16, -1)).abs().round(decimals=3)
    low = steps[(torch.bucketize(scaled.abs(), steps, right=True) - 1).clamp(0, 6)]
    high = steps[(torch.bucketize(scaled.abs(), steps, right=True)).clamp(1, 7)]
    assert bool((((drawn - low).abs() < 0.01) | ((drawn - high).abs() < 0.01)).all())


def test_rules_have_their_published_errors(encoder):
    x = torch.randn(256, 512, generator=torch.Generator().manual_seed(1))
    error = {
        rule: float((nvfp4.dequantize(*encoder(x, rule)) - x).square().mean())
        for rule in nvfp4.RULES
    }
    assert error["four_over_six"] / error["max"] - 1 == pytest.approx(-0.16, abs=0.015)
    assert error["sweep"] / error["max"] - 1 == pytest.approx(-0.27, abs=0.015)
    assert error["max"] ** 0.5 == pytest.approx(0.0953, abs=0.001)


def awkward(seed: int, rows: int, blocks: int, kind: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 16 * blocks, generator=generator)
    if kind == "bf16":
        return (x * 0.02).bfloat16()
    if kind == "wide":
        return x * torch.exp(6 * torch.randn(rows, 1, generator=generator))
    if kind == "sparse":
        return torch.where(x.abs() > 1, x, 0.0)
    return (x * 8).round() / 8  # many ties


@settings(max_examples=60)
@given(
    st.integers(0, 9999),
    st.integers(1, 35),
    st.integers(1, 9),
    st.sampled_from(["bf16", "wide", "sparse", "ties"]),
    st.sampled_from(nvfp4.RULES),
    st.booleans(),
)
def test_kernels_encode_the_bits_of_the_reference(seed, rows, blocks, kind, rule, weighted):
    x = awkward(seed, rows, blocks, kind)
    weights = torch.rand(16 * blocks, generator=torch.Generator().manual_seed(seed + 1))
    importance = weights.square() if weighted else None
    mine = nvfp4.encode(x, rule, importance=importance)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_native, "shared", lambda: None)
        reference = nvfp4.encode(x, rule, importance=importance)
    assert all(map(np.array_equal, bits(mine), bits(reference)))


def test_sweep_is_never_worse_than_any_scale():
    x = awkward(5, 9, 4, "wide")
    best = nvfp4.encode(x, "sweep")
    factor = best.scale_2
    chosen = (nvfp4.dequantize(*best) - x).square().unflatten(-1, (-1, 16)).sum(-1)
    for code in range(1, 127):
        scale = torch.full((9, 4), code, dtype=torch.uint8).view(torch.float8_e4m3fn)
        other = nvfp4.dequantize(nvfp4.encode_with(x, scale, factor), scale, factor)
        error = (other - x).square().unflatten(-1, (-1, 16)).sum(-1)
        assert bool((chosen <= error * (1 + 1e-5)).all())


@pytest.mark.parametrize("rule", nvfp4.RULES)
def test_zeros_stay_finite(rule, encoder):
    x = torch.zeros(2, 3, 32)
    x[1, 0, 3] = 1.0
    found = encoder(x, rule)
    assert torch.equal(found.scale_2[:1], torch.ones(1))
    assert not found.packed[0].any()
    assert bool((found.scale[0].float() == 1).all())
    decoded = nvfp4.dequantize(*found)
    assert bool(decoded.isfinite().all()) and float((decoded - x).abs().max()) < 1e-6


def test_stacks_encode_like_their_matrices(encoder):
    x = torch.randn(3, 5, 64, generator=torch.Generator().manual_seed(2))
    x *= torch.tensor([1.0, 10.0, 0.1])[:, None, None]
    importance = torch.rand(3, 64)
    whole = encoder(x, "sweep", importance=importance)
    for i in range(3):
        one = encoder(x[i], "sweep", importance=importance[i])
        assert torch.equal(one.packed, whole.packed[i]) and one.scale_2 == whole.scale_2[i]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_refuses_what_is_not_finite(bad, encoder):
    x = torch.ones(4, 32)
    x[2, 5] = bad
    with pytest.raises(QuantizeError, match=r"layer\.up holds NaN or infinity"):
        encoder(x, name="layer.up")
    with pytest.raises(QuantizeError, match=r"layer\.up"):
        fp8.encode(x, name="layer.up")


def test_refuses_odd_widths_and_unknown_rules(encoder):
    with pytest.raises(QuantizeError, match=r"layer\.up: its 40 columns"):
        encoder(torch.ones(4, 40), name="layer.up")
    with pytest.raises(QuantizeError, match="unknown scale rule 'best'"):
        encoder(torch.ones(4, 32), "best")
