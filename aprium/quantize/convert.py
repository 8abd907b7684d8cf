"""Rewrite a quantised checkpoint: ModelOpt's layout, compressed-tensors' layout, or plain BF16.

Between the layouts codes and block scales are copied as they are; global scales, which one
multiplies by and the other divides by, become their reciprocals. Tensors stream from the mapped
source, so memory holds one at a time. Source: docs/numerics.md.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor

from aprium.base.errors import CheckpointError, QuantizeError
from aprium.checkpoint.load import Plan, read_plan
from aprium.checkpoint.names import NVFP4_FORMATS, tensor_table
from aprium.checkpoint.safetensors import DTYPE_NAMES, Entry, MappedFiles, write_directory
from aprium.checkpoint.save import DEFAULT_SHARD_BYTES, assembled, write_texts
from aprium.model.config import NVFP4_TENSORS, QuantConfig
from aprium.ops import fp8, nvfp4

Layout = Literal["modelopt", "compressed-tensors", "bf16"]
LAYOUTS = get_args(Layout)


def convert(source: Path, target: Path, to: Layout) -> int:
    """Write the quantised checkpoint in `source` to `target` in layout `to`; return its bytes.

    Raises QuantizeError for an unknown layout and for a source that is not quantised.
    """
    if to not in LAYOUTS:
        raise QuantizeError(f"unknown layout {to!r}: use one of {', '.join(LAYOUTS)}")
    if source.resolve() == target.resolve():
        raise QuantizeError(f"{target} is the source itself: name another directory to write")
    plan = read_plan(source)
    if not plan.quant.formats:
        raise QuantizeError(f"{source} is not quantised: there is nothing to convert")
    quant = QuantConfig() if to == "bf16" else replace(plan.quant, layout=to)
    tensors = _Tensors(plan, to)
    table = tensor_table(plan.config, quant)
    entries = [Entry(name, *tensors.kind(name, spec.shape)) for name, spec in table.items()]
    try:
        with assembled(target) as complete:
            write_texts(plan.path, complete, quant, plan.config)
            write_directory(complete, entries, tensors.fetch, DEFAULT_SHARD_BYTES)
    except OSError as error:
        raise CheckpointError(f"cannot write {target}: {error.strerror or error}") from error
    read_plan(target)  # what was written must load
    return sum(entry.num_bytes for entry in entries)


class _Tensors:
    """The tensors of the target, each made from those of the source when it is asked for."""

    def __init__(self, plan: Plan, to: Layout) -> None:
        self._plan, self._to = plan, to
        self._files = MappedFiles()
        self._made = {} if to == "bf16" else self._renamed()

    def _renamed(self) -> dict[str, str]:
        """Return the source's leaf for each leaf that an NVFP4 matrix has in the target."""
        mine, theirs = NVFP4_TENSORS[self._plan.quant.layout], NVFP4_TENSORS[self._to]
        return dict(zip(theirs, mine, strict=True))

    def kind(self, name: str, shape: tuple[int, ...]) -> tuple[str, tuple[int, ...]]:
        """Return dtype and shape of target tensor `name`, which the table gives `shape`."""
        module, _, leaf = name.rpartition(".")
        fmt = self._plan.quant.formats.get(module)
        if self._to == "bf16" and fmt is not None and leaf == "weight":
            return "BF16", shape
        if fmt in NVFP4_FORMATS and leaf in self._made:
            dtype = self._plan.tensors[f"{module}.{self._made[leaf]}"].dtype
        else:
            dtype = self._plan.tensors[name].dtype
        scalar = not shape and fmt is not None
        return dtype, (1,) if scalar and self._to == "compressed-tensors" else shape

    def fetch(self, name: str) -> Tensor:
        """Return target tensor `name`."""
        module, _, leaf = name.rpartition(".")
        fmt = self._plan.quant.formats.get(module)
        if self._to == "bf16" and fmt is not None and leaf == "weight":
            return decode(self._plan, module, self._read).bfloat16()
        if fmt in NVFP4_FORMATS and leaf in self._made:
            value = self._read(f"{module}.{self._made[leaf]}")
            changes = self._to != self._plan.quant.layout and value.dtype == torch.float32
            value = 1.0 / value if changes else value
        else:
            value = self._read(name)
        scalar = value.numel() == 1 and "scale" in leaf
        dtype, shape = self.kind(name, () if scalar else tuple(value.shape))
        assert DTYPE_NAMES[value.dtype] == dtype
        return value.reshape(shape)

    def _read(self, name: str) -> Tensor:
        return self._files.tensor(self._plan.tensors[name])


def decode(plan: Plan, module: str, read: Callable[[str], Tensor]) -> Tensor:
    """Return the values of a quantised `module`, float32; `read` gives tensors by name."""
    if plan.quant.formats[module] == "fp8":
        return fp8.dequantize(*(read(f"{module}.{n}") for n in ("weight", "weight_scale")))
    packed, scale_2, _ = NVFP4_TENSORS[plan.quant.layout]
    modelopt = plan.quant.layout == "modelopt"
    decoder = nvfp4.dequantize if modelopt else nvfp4.dequantize_divided
    return decoder(*(read(f"{module}.{leaf}") for leaf in (packed, "weight_scale", scale_2)))
