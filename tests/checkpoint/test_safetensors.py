"""Reading and writing safetensors files, against the safetensors library and against damage."""

import json
import struct
from pathlib import Path

import pytest
import safetensors
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from aprium.base.errors import CheckpointError
from aprium.checkpoint.safetensors import (
    DTYPES,
    Arena,
    Entry,
    FileReader,
    MappedFile,
    read_directory,
    read_header,
    write_directory,
    write_file,
)


def read_all(directory: Path) -> dict[str, torch.Tensor]:
    return {n: MappedFile(t.file).tensor(t) for n, t in read_directory(directory).items()}


def bits(tensor: torch.Tensor) -> tuple[torch.dtype, tuple[int, ...], bytes]:
    data = tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    return tensor.dtype, tuple(tensor.shape), data


def random_tensor(dtype: str, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    if dtype == "BOOL":
        return torch.rand(shape, generator=generator) > 0.5
    width = DTYPES[dtype].itemsize
    raw = torch.randint(0, 256, (*shape, width), dtype=torch.uint8, generator=generator)
    return raw.view(DTYPES[dtype]).reshape(shape)


TENSORS = st.lists(
    st.tuples(st.sampled_from(sorted(DTYPES)), st.lists(st.integers(0, 5), max_size=3).map(tuple)),
    min_size=1,
    max_size=8,
)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(specs=TENSORS, max_shard_bytes=st.integers(1, 600))
def test_what_is_written_is_read(tmp_path_factory, specs, max_shard_bytes):
    directory = tmp_path_factory.mktemp("written")
    tensors = {f"t.{i}": random_tensor(*spec, seed=i) for i, spec in enumerate(specs)}
    entries = [Entry(f"t.{i}", *spec) for i, spec in enumerate(specs)]
    write_directory(directory, entries, tensors.__getitem__, max_shard_bytes)
    wanted = {name: bits(tensor) for name, tensor in tensors.items()}
    assert {name: bits(tensor) for name, tensor in read_all(directory).items()} == wanted
    theirs = {}
    for file in directory.glob("*.safetensors"):
        part = load_file(file)
        assert len(part) == 1 or sum(t.nbytes for t in part.values()) <= max_shard_bytes
        theirs |= part
    assert {name: bits(tensor) for name, tensor in theirs.items()} == wanted


def test_reads_what_the_library_writes(tmp_path):
    tensors = {f"a.{d}": random_tensor(d, (3, 5), seed=7) for d in DTYPES}
    tensors["scalar"] = torch.tensor(2.5)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt", "a": "b"})
    found = read_all(tmp_path)
    assert {n: bits(t) for n, t in found.items()} == {n: bits(t) for n, t in tensors.items()}


def test_reader_fills_an_arena(tmp_path):
    tensors = {"a": torch.randn(1 << 20), "b": torch.arange(3), "c": torch.empty(0, 4)}
    save_file(tensors, tmp_path / "model.safetensors")
    stored = read_header(tmp_path / "model.safetensors")
    arena = Arena(sum(Arena.size_of(t.shape, t.dtype) for t in tensors.values()))
    reader = FileReader(tmp_path / "model.safetensors", forget=True)
    for name, tensor in tensors.items():
        target = arena.tensor(tensor.shape, tensor.dtype)
        assert target.data_ptr() % 64 == 0 or not target.numel()
        reader.read(stored[name], target)
        assert torch.equal(target, tensor)
    reader.close()


def write_raw(file: Path, header: object, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return file


def entry(start: int, end: int, dtype: str = "U8", shape: list | None = None) -> dict:
    return {"dtype": dtype, "shape": shape or [end - start], "data_offsets": [start, end]}


def test_misaligned_tensors_are_read(tmp_path):
    header = {"byte": entry(0, 1), "odd": entry(1, 9, "F32", [2])}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file = write_raw(tmp_path / "model.safetensors", text, b"\1" + struct.pack("<2f", 1.5, -2))
    odd = read_header(file)["odd"]
    assert MappedFile(file).tensor(odd).tolist() == [1.5, -2]


DAMAGE = {
    "empty file": (b"", "truncated"),
    "header cut": (struct.pack("<Q", 50) + b"{}", "truncated"),
    "absurd header": (struct.pack("<Q", 1 << 60) + b"{}", "not a safetensors file"),
    "not JSON": (struct.pack("<Q", 3) + b"{a}", "not valid JSON"),
    "not UTF-8": (struct.pack("<Q", 2) + b"\xff\xfe", "not valid JSON"),
    "a list": (struct.pack("<Q", 2) + b"[]", "not a JSON object"),
}
HEADERS = {
    "truncated": ({"a": entry(0, 4), "b": entry(4, 9)}, 8, "truncated: tensor 'b'"),
    "too long": ({"a": entry(0, 4)}, 5, "1 bytes after the last tensor"),
    "gap": ({"a": entry(0, 4), "b": entry(5, 9)}, 9, "'b' leaves a gap"),
    "gap at the start": ({"a": entry(1, 4)}, 4, "'a' leaves a gap"),
    "overlap": ({"a": entry(0, 4), "b": entry(3, 9)}, 9, "'b' overlaps"),
    "unknown dtype": ({"a": entry(0, 4, "F4")}, 4, "'a': unknown dtype 'F4'"),
    "size": ({"a": entry(0, 4, "F32", [2])}, 4, r"'a': F32 \[2\] takes 8 bytes"),
    "negative shape": ({"a": entry(0, 4, "U8", [-2, -2])}, 4, "'a': malformed"),
    "float shape": ({"a": entry(0, 4, "U8", [4.0])}, 4, "'a': malformed"),
    "text shape": ({"a": entry(0, 4, "U8", ["4"])}, 4, "'a': malformed"),
    "no offsets": ({"a": {"dtype": "U8", "shape": [4]}}, 4, "'a': malformed"),
    "three offsets": ({"a": entry(0, 4) | {"data_offsets": [0, 1, 4]}}, 4, "'a': malformed"),
    "not an object": ({"a": 3}, 4, "'a': malformed"),
    "list dtype": ({"a": entry(0, 4) | {"dtype": ["U8"]}}, 4, "'a': unknown dtype"),
    "twice": (b'{"a": {"x": 1}, "a": {"x": 1}}', 0, "names 'a' twice"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_start(tmp_path, damage):
    content, words = DAMAGE[damage]
    file = tmp_path / "x.safetensors"
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"x\.safetensors: .*{words}"):
        read_header(file)


@pytest.mark.parametrize("damage", HEADERS)
def test_damaged_header(tmp_path, damage):
    header, size, words = HEADERS[damage]
    file = write_raw(tmp_path / "x.safetensors", header, bytes(size))
    with pytest.raises(CheckpointError, match=rf"x\.safetensors: .*{words}"):
        read_header(file)
    with pytest.raises((safetensors.SafetensorError, RuntimeError, ValueError)):
        load_file(file)


@pytest.fixture
def sharded(tmp_path):
    entries = [Entry(f"t{i}", "F32", (4,)) for i in range(3)]
    write_directory(tmp_path, entries, lambda _: torch.ones(4), 16)
    return tmp_path


def edit_index(directory: Path, **changes) -> None:
    file = directory / "model.safetensors.index.json"
    data = json.loads(file.read_text())
    data["weight_map"] |= changes
    file.write_text(json.dumps(data))


def test_missing_shard(sharded):
    (sharded / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"00002-of-00003\.safetensors is missing.*'t1'"):
        read_directory(sharded)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"t9": "model-00001-of-00003.safetensors"}, "00001.*'t9' is in the index, not in"),
        ({"t1": "model-00001-of-00003.safetensors"}, "00001.*'t1' is in the index, not in"),
        ({"t1": "../x.safetensors"}, "'t1' lies in '../x.safetensors'"),
        ({"t1": 5}, "'t1' lies in 5"),
    ],
)
def test_index_that_disagrees(sharded, changes, words):
    edit_index(sharded, **changes)
    with pytest.raises(CheckpointError, match=words):
        read_directory(sharded)


def test_tensor_that_the_index_forgets(sharded):
    write_file(
        sharded / "model-00001-of-00003.safetensors",
        [Entry("t0", "U8", (1,)), Entry("extra", "U8", (1,))],
        lambda _: torch.zeros(1, dtype=torch.uint8),
    )
    with pytest.raises(CheckpointError, match="'extra' is in the file, not in the index"):
        read_directory(sharded)


def test_index_that_is_not_one(sharded):
    for text in ("{", "[]", '{"weight_map": {}}'):
        (sharded / "model.safetensors.index.json").write_text(text)
        with pytest.raises(CheckpointError, match=r"index\.json"):
            read_directory(sharded)


def test_directory_without_weights(tmp_path):
    with pytest.raises(CheckpointError, match=r"no \.safetensors file"):
        read_directory(tmp_path)
    for name in ("a", "b"):
        save_file({"x": torch.ones(1)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(CheckpointError, match=r"2 \.safetensors files, no model"):
        read_directory(tmp_path)


def test_unwritable_place(tmp_path):
    with pytest.raises(CheckpointError, match="cannot write"):
        write_file(tmp_path / "none" / "x.safetensors", [], lambda _: torch.ones(1))
