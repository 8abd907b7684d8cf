"""GGUF headers: a file written here, and sizes by type."""

import math
import struct
from pathlib import Path

import pytest

from aprium.base.errors import CheckpointError
from aprium.plan.data import load_data
from aprium.plan.gguf import TYPES, file_shape, read_header
from aprium.plan.shapes import target_shape

_CODES = {name: code for code, (name, _, _) in TYPES.items()}


def _string(text: str) -> bytes:
    return struct.pack("<Q", len(text)) + text.encode()


def _write(path: Path, values: dict, tensors: dict[str, tuple[tuple[int, ...], str]]) -> None:
    parts = [b"GGUF", struct.pack("<IQQ", 3, len(tensors), len(values))]
    for key, value in values.items():
        parts.append(_string(key))
        if isinstance(value, str):
            parts += [struct.pack("<I", 8), _string(value)]
        elif isinstance(value, list):
            parts += [struct.pack("<IIQ", 9, 4, len(value))]
            parts += [struct.pack("<I", v) for v in value]
        else:
            parts += [struct.pack("<II", 4, value)]
    for name, (shape, fmt) in tensors.items():
        parts += [_string(name), struct.pack("<I", len(shape))]
        parts += [struct.pack("<Q", size) for size in reversed(shape)]
        parts += [struct.pack("<IQ", _CODES[fmt], 0)]
    path.write_bytes(b"".join(parts))


VALUES = {
    "general.architecture": "nemotron_h_moe",
    "nemotron_h_moe.block_count": 3,
    "nemotron_h_moe.embedding_length": 64,
    "nemotron_h_moe.attention.head_count": [0, 0, 4],
    "nemotron_h_moe.attention.head_count_kv": [0, 0, 2],
    "nemotron_h_moe.attention.key_length": 16,
    "nemotron_h_moe.ssm.time_step_rank": 8,
    "nemotron_h_moe.ssm.inner_size": 128,
    "nemotron_h_moe.ssm.state_size": 32,
    "nemotron_h_moe.ssm.group_count": 2,
    "nemotron_h_moe.ssm.conv_kernel": 4,
    "nemotron_h_moe.expert_count": 8,
    "nemotron_h_moe.expert_used_count": 2,
    "nemotron_h_moe.context_length": 4096,
    "tokenizer.ggml.tokens": "none",
}
TENSORS = {
    "token_embd.weight": ((320, 64), "q8_0"),
    "output.weight": ((320, 64), "q6_k"),
    "output_norm.weight": ((64,), "f32"),
    "blk.0.attn_norm.weight": ((64,), "f32"),
    "blk.0.ssm_in.weight": ((328, 64), "q4_0"),
    "blk.0.ssm_out.weight": ((64, 128), "q4_0"),
    "blk.1.attn_norm.weight": ((64,), "f32"),
    "blk.1.ffn_gate_inp.weight": ((8, 64), "f32"),
    "blk.1.ffn_up_exps.weight": ((8, 96, 64), "q4_0"),
    "blk.1.ffn_down_exps.weight": ((8, 64, 96), "iq4_nl"),
    "blk.1.ffn_up_shexp.weight": ((96, 64), "q4_0"),
    "blk.2.attn_norm.weight": ((64,), "f32"),
    "blk.2.attn_q.weight": ((64, 64), "q4_0"),
    "blk.2.attn_k.weight": ((32, 64), "q4_0"),
    "blk.2.attn_v.weight": ((32, 64), "q4_0"),
    "blk.2.attn_output.weight": ((64, 64), "q4_0"),
}


def test_a_file_is_read_exactly(tmp_path: Path) -> None:
    path = tmp_path / "small.gguf"
    _write(path, VALUES, TENSORS)
    shape = file_shape(path)
    expected = 0.0
    for dims, fmt in TENSORS.values():
        _, block, size = TYPES[_CODES[fmt]]
        expected += math.prod(dims) / block * size
    assert shape.num_bytes() == expected
    assert shape.params() == sum(math.prod(dims) for dims, _ in TENSORS.values())
    assert [layer.kind for layer in shape.layers] == ["mamba", "moe", "attention"]
    assert shape.exact and target_shape(str(path)) == shape
    assert shape.layers[2].kv_values == 2 * 2 * 16
    assert shape.layers[0].state_values == 128 * 32
    assert (shape.experts, shape.active, shape.expert_width) == (8, 2, 96)
    assert shape.layers[1].bytes_of("routed experts") == 8 * 96 * 64 * 18 / 32 * 2


def test_bad_files(tmp_path: Path) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(b"GGML" + bytes(40))
    with pytest.raises(CheckpointError, match="does not begin as a GGUF"):
        read_header(path)
    _write(path, VALUES, TENSORS)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(CheckpointError, match="ends inside its GGUF header"):
        read_header(path)
    _write(path, VALUES | {"general.architecture": "llama"}, TENSORS)
    with pytest.raises(CheckpointError, match="architecture 'llama'"):
        file_shape(path)


def test_sizes_by_type() -> None:
    # llama.cpp's Q4_0 of full-size Nano, written tensor by tensor: 17.80 GB.
    assert target_shape("nano", "q4_0").num_bytes() / 1e9 == pytest.approx(17.80, rel=0.002)


def test_estimates_by_type_of_mixed_files_are_near() -> None:
    # Mixes raise some matrices and fall back in others: without the header, an estimate.
    for row in load_data("published")["gguf"]:
        found = target_shape(row["model"], row["precision"]).num_bytes(mtp=False) / 1e9
        assert found == pytest.approx(row["gb"], rel=0.07)


def test_rows_that_no_block_divides_fall_back() -> None:
    assert target_shape("nano", "q4_k").num_bytes() > target_shape("nano", "q4_0").num_bytes()
