"""The native library's choice of instruction set, and its single functions."""

import math
import os
import subprocess
import sys

import pytest
import torch

from aprium.ops import _native
from aprium.ops.norm import rms_norm

LIBRARY = _native.library()
SUPPORTED = LIBRARY.supported() if LIBRARY else []
needs_library = pytest.mark.skipif(not SUPPORTED, reason="the native library is not installed")
SIZES = (1, 15, 16, 17, 31, 33, 127, 257)


def isa_of(value: str) -> subprocess.CompletedProcess:
    code = "from aprium.ops import _native; print(_native.isa())"
    environment = os.environ | {"APRIUM_ISA": value}
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )


def test_the_environment_forces_an_instruction_set() -> None:
    for name in (*SUPPORTED, "none"):
        assert isa_of(name).stdout.strip() == name
    assert "APRIUM_ISA is 'sse2': use avx512, avx2, scalar or none" in isa_of("sse2").stderr


@needs_library
@pytest.mark.parametrize("isa", SUPPORTED)
@pytest.mark.parametrize("size", SIZES)
def test_norm_and_softmax(isa: str, size: int) -> None:
    assert LIBRARY is not None
    machine = LIBRARY.Machine(isa, 1)
    generator = torch.Generator().manual_seed(size)
    x, weight = torch.randn(3, size, generator=generator), torch.rand(size, generator=generator)
    out = torch.empty_like(x)
    machine.norm((weight.data_ptr(), size), 1e-5, x.data_ptr(), 3, out.data_ptr())
    torch.testing.assert_close(out, rms_norm(x, weight, 1e-5), rtol=1e-5, atol=1e-6)
    wide = torch.cat((x * 30, torch.full((1, size), -200.0)))
    for row, (token, peak, mass) in zip(
        wide, machine.log_softmax_at(wide.data_ptr(), 4, size), strict=True
    ):
        assert token == int(row.argmax()) and peak == float(row.max())
        assert peak + mass == pytest.approx(float(row.double().logsumexp(-1)), abs=1e-4)
    wide[1, size // 2] = torch.nan
    assert math.isnan(machine.log_softmax_at(wide.data_ptr(), 4, size)[1][1])


@needs_library
@pytest.mark.parametrize("isa", SUPPORTED)
@pytest.mark.parametrize("fmt", ["float32", "bfloat16", "float16", "fp8", "nvfp4"])
def test_products(isa: str, fmt: str) -> None:
    """Every format, row and token count, against the decoded weights in float64."""
    assert LIBRARY is not None
    machine = LIBRARY.Machine(isa, 2)
    generator = torch.Generator().manual_seed(0)
    columns = (16, 48, 256, 272, 1024) if fmt == "nvfp4" else SIZES
    for cols in columns:
        for rows in (1, 7, 16, 35):
            data, scales, scale, dense = _weight(fmt, rows, cols, generator)
            for tokens in (1, 2, 3, 4, 5, 9, 23):
                x = torch.randn(tokens, cols, generator=generator)
                expected = x.double() @ dense.double().T
                bound = (x.double().abs() @ dense.double().abs().T).clamp(min=1e-9)
                for dtype, limit in (("float32", 2e-6), ("bfloat16", 8e-3), ("int8", 2e-2)):
                    weight = LIBRARY.weight(
                        *(fmt, dtype, data.data_ptr(), scales.data_ptr()),
                        *(scale, rows, cols, (0, 0)),
                    )
                    out = torch.empty(tokens, rows)
                    machine.linear(weight, x.data_ptr(), tokens, out.data_ptr())
                    error = ((out - expected).abs() / bound).max()
                    assert error < limit, (cols, rows, tokens, dtype, float(error))


def _weight(fmt: str, rows: int, cols: int, generator: torch.Generator):
    """A random weight: its bytes, its block scales, its scale, its values."""
    from aprium.ops import fp8, nvfp4

    none = torch.empty(0, dtype=torch.uint8)
    if fmt == "nvfp4":
        codes = torch.randint(0, 256, (rows, cols // 2), generator=generator, dtype=torch.uint8)
        scales = torch.randint(1, 0x7F, (rows, cols // 16), generator=generator, dtype=torch.uint8)
        blocks = scales.view(torch.float8_e4m3fn)
        return codes, scales, 0.3, nvfp4.dequantize(codes, blocks, torch.tensor(0.3))
    dense = torch.randn(rows, cols, generator=generator)
    if fmt == "fp8":
        stored = dense.to(torch.float8_e4m3fn)
        return stored, none, 0.7, fp8.dequantize(stored, torch.tensor(0.7))
    stored = dense.to(getattr(torch, fmt))
    return stored, none, 1.0, stored.float()


@needs_library
@pytest.mark.parametrize("isa", SUPPORTED)
def test_int8_inputs_keep_zeros_extremes_and_nan(isa: str) -> None:
    assert LIBRARY is not None
    machine = LIBRARY.Machine(isa, 1)
    codes = torch.full((16, 24), 0x22, dtype=torch.uint8)  # every weight is 1
    scales = torch.full((16, 3), 0x38, dtype=torch.uint8)
    weight = LIBRARY.weight(
        "nvfp4", "int8", codes.data_ptr(), scales.data_ptr(), 1.0, 16, 48, (0, 0)
    )

    def product(x: torch.Tensor) -> torch.Tensor:
        out = torch.empty(x.shape[0], 16)
        machine.linear(weight, x.data_ptr(), x.shape[0], out.data_ptr())
        return out[:, 0]

    x = torch.zeros(5, 48)
    x[1, 3], x[2, :2] = 2.0**90, torch.tensor([2.0**-60, 2.0**60])
    x[3, 0], x[4, 47] = torch.nan, torch.inf
    found = product(x)
    assert found[:3].tolist() == [0.0, 2.0**90, 2.0**60]
    assert found[3:].isnan().all()
