"""Down projections by columns: the same values and bits, made once, never used when stale."""

import dataclasses
import shutil
from pathlib import Path

import pytest
import torch

from aprium import cli
from aprium.base.errors import CheckpointError
from aprium.checkpoint.load import load_checkpoint, read_plan
from aprium.checkpoint.save import save_checkpoint
from aprium.checkpoint.transposed import FILE, write_transposed
from aprium.model.model import HybridModel
from aprium.model.native import bind
from aprium.model.presets import PRESETS
from aprium.ops import _native, nvfp4
from tests import modelopt_layout
from tests.model.test_model import run_schedule

SHAPE = dataclasses.replace(PRESETS["toy"], hidden_size=256, latent_size=128)
SUPPORTED = _native.library().supported() if _native.library() else []


def test_transpose_and_back() -> None:
    packed = torch.randint(0, 256, (256, 40), dtype=torch.uint8)
    scale = torch.randint(0, 0x7F, (256, 5), dtype=torch.uint8).view(torch.float8_e4m3fn)
    codes, scales = nvfp4.transpose(packed, scale)
    assert codes.shape == (80, 128) and scales.shape == (5, 256)
    # Byte 16 l + 4 m + i of column 3 holds row 16 m + 4 l + i and, above it, the row 64 further.
    byte, row = int(codes[3, 64 + 16 * 2 + 4 * 3 + 1]), 128 + 16 * 3 + 4 * 2 + 1
    assert byte & 15 == int(packed[row, 1]) >> 4 and byte >> 4 == int(packed[row + 64, 1]) >> 4
    back, back_scale = nvfp4.untranspose(codes, scales)
    assert torch.equal(back, packed)
    assert torch.equal(back_scale.view(torch.uint8), scale.view(torch.uint8))


@pytest.fixture(scope="module", params=["nvfp4", "compressed-tensors"])
def written(request, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp(request.param)
    modelopt_layout.write(path, SHAPE, request.param)
    assert cli.main(["transpose", str(path)]) == 0
    return path


def values(model: HybridModel) -> list[torch.Tensor]:
    experts = model.get_submodule("backbone.layers.2.mixer.experts.down_proj")
    shared = model.get_submodule("backbone.layers.2.mixer.shared_experts.down_proj")
    return [experts.dense(torch.float32, 3), shared.dense(torch.float32)]  # type: ignore[operator]


@pytest.mark.parametrize("load", ["memory", "mmap"])
def test_values_are_those_of_the_checkpoint(written: Path, load, tmp_path: Path) -> None:
    plain = load_checkpoint(written, load=load)
    derived = load_checkpoint(written, load=load, transposed=True)
    assert derived.transposed and not plain.transposed
    for one, other in zip(values(plain.model), values(derived.model), strict=True):
        assert torch.equal(one, other)
    with pytest.raises(CheckpointError, match=r"by columns|mapped"):
        save_checkpoint(derived, tmp_path / "copy")


@pytest.mark.parametrize("isa", SUPPORTED)
def test_bits_are_those_of_the_dense_layout(written: Path, isa: str) -> None:
    library = _native.library()
    assert library is not None
    plain = load_checkpoint(written).model
    derived = load_checkpoint(written, transposed=True).model
    prompts = [torch.arange(n) % 200 for n in (23, 5, 1, 9)]
    steps = [[23, 0, 1, 2], [0, 2, 0, 3], [0, 3, 0, 4]]
    for model in (plain, derived):
        bind(model, "int8", library.Machine(isa, 2))
    for one, other in zip(
        run_schedule(plain, prompts, steps), run_schedule(derived, prompts, steps), strict=True
    ):
        assert torch.equal(one, other)


def test_a_stale_or_foreign_file_is_not_used(written: Path, tmp_path: Path, caplog) -> None:
    path = tmp_path / "copy"
    shutil.copytree(written, path)
    assert load_checkpoint(path, transposed=True).transposed
    weights = path / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert not load_checkpoint(path, transposed=True).transposed
    (path / FILE).write_bytes(b"junk")
    with pytest.raises(CheckpointError, match="header"):
        load_checkpoint(path, transposed=True)


def test_nothing_to_lay_out_is_said(tmp_path: Path) -> None:
    modelopt_layout.write(tmp_path, PRESETS["toy"], "bf16")
    with pytest.raises(CheckpointError, match="nothing to lay out by columns"):
        write_transposed(tmp_path, read_plan(tmp_path).tensors)
