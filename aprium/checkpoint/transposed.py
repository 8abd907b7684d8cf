"""Down projections by columns, in a file beside the checkpoint: made once, on request.

Squared ReLU makes many inputs of a down projection zero; kernels that find its NVFP4 weights by
columns skip those columns, and give the same bits. The file holds nothing that the checkpoint does
not, and is read in place of those tensors, so nothing is in memory twice. A fingerprint of the
files it was made from says whether it still belongs to them; one that does not is not used.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from aprium.base.errors import CheckpointError
from aprium.base.log import get_logger
from aprium.checkpoint.safetensors import (
    Entry,
    MappedFile,
    StoredTensor,
    read_header,
    read_metadata,
    write_file,
)
from aprium.model.config import NVFP4_BLOCK, NVFP4_TENSORS
from aprium.ops import nvfp4

FILE = "aprium-transposed.bin"
_GROUP = 128  # rows that the layout takes together
_SAMPLE_BYTES = 1 << 16  # of each end of a file that the fingerprint covers
logger = get_logger("checkpoint")


def write_transposed(path: Path, tensors: Mapping[str, StoredTensor]) -> int:
    """Write the file for the checkpoint in `path`; return how many matrices it holds.

    `tensors` are the checkpoint's, by published name. Raises CheckpointError when there is nothing
    to lay out, or the file cannot be written.
    """
    modules = _modules(tensors)
    if not modules:
        raise CheckpointError(
            f"{path} has no NVFP4 down projection with a multiple of {_GROUP} rows: "
            "there is nothing to lay out by columns"
        )
    entries = []
    for codes, scales in modules.values():
        rows, half = tensors[codes].shape
        entries.append(Entry(codes, "U8", (2 * half, rows // 2)))
        entries.append(Entry(scales, "F8_E4M3", (2 * half // NVFP4_BLOCK, rows)))
    files: dict[Path, MappedFile] = {}
    other = {name: pair for pair in modules.values() for name in pair}
    made: dict[str, Tensor] = {}

    def fetch(name: str) -> Tensor:
        if name not in made:
            for stored in (tensors[part] for part in other[name]):
                files.setdefault(stored.file, MappedFile(stored.file))
            codes, scales = (files[tensors[n].file].tensor(tensors[n]) for n in other[name])
            made.update(zip(other[name], nvfp4.transpose(codes, scales), strict=True))
        return made.pop(name)

    target, partial = path / FILE, path / f".{FILE}.partial"
    try:
        write_file(partial, entries, fetch, {"fingerprint": fingerprint(tensors)})
        partial.replace(target)
    except OSError as error:
        raise CheckpointError(f"cannot write {target}: {error.strerror}") from error
    finally:
        partial.unlink(missing_ok=True)
    return len(modules)


def read_transposed(path: Path, tensors: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Return the tensors of the file in `path` by published name; none without a fitting file."""
    file = path / FILE
    if not file.exists():
        return {}
    if read_metadata(file).get("fingerprint") != fingerprint(tensors):
        logger.warning("%s was made from other files: not used, make it again", file)
        return {}
    found = read_header(file)
    wanted = {name for pair in _modules(tensors).values() for name in pair}
    if found.keys() != wanted:
        logger.warning("%s does not hold the tensors of this checkpoint: not used", file)
        return {}
    return found


def fingerprint(tensors: Mapping[str, StoredTensor]) -> str:
    """Return a digest of the files that hold `tensors`: their headers, sizes and both ends."""
    digest = hashlib.sha256()
    for file in sorted({tensor.file for tensor in tensors.values()}):
        size = file.stat().st_size
        digest.update(json.dumps([file.name, size]).encode())
        with file.open("rb") as stream:
            for start in (0, max(size // 2 - _SAMPLE_BYTES, 0), max(size - _SAMPLE_BYTES, 0)):
                stream.seek(start)
                digest.update(stream.read(_SAMPLE_BYTES))
    return digest.hexdigest()


def _modules(tensors: Mapping[str, StoredTensor]) -> dict[str, tuple[str, str]]:
    """Return the names of codes and scales of each matrix that can be laid out by columns."""
    found = {}
    for packed, _, _ in NVFP4_TENSORS.values():
        for name, tensor in tensors.items():
            module, _, leaf = name.rpartition(".")
            nvfp4_down = leaf == packed and tensor.dtype == "U8" and module.endswith(".down_proj")
            if nvfp4_down and tensor.shape[0] % _GROUP == 0:
                found[module] = (name, f"{module}.weight_scale")
    return found
