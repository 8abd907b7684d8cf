"""The native kernel library: whether it is there, and which instruction set of it runs.

`native/` is compiled into one extension that registers faster implementations of what this package
and the model define in PyTorch. Without it (no compiler when the package was installed) the same
program runs in PyTorch, slower. `APRIUM_ISA` in the environment forces an instruction set, "none"
meaning PyTorch; otherwise the fastest that the processor has is taken.
"""

import functools
import importlib
import os
from types import ModuleType
from typing import Any

import torch

from aprium.base.errors import ConfigError

_library: ModuleType | None = None
_missing: str | None = None
try:
    _library = importlib.import_module("aprium.ops._kernels")
except ImportError as _error:  # built without a compiler, or for another machine
    _missing = str(_error)

ISAS = ("avx512", "avx2", "scalar")
FLOATS = (torch.float32, torch.bfloat16)  # activations that kernels of training take


def library() -> ModuleType | None:
    """Return the extension module, or None where it is not installed."""
    return _library


def missing() -> str | None:
    """Say why there is no library; None when there is one."""
    return _missing


@functools.cache
def isa() -> str:
    """Return the instruction set that kernels use: "avx512", "avx2", "scalar", or "none" (PyTorch).

    Raises ConfigError when `APRIUM_ISA` names one that is unknown or that this machine lacks.
    """
    supported = list(_library.supported()) if _library else []
    wanted = os.environ.get("APRIUM_ISA")
    if not wanted:
        return supported[0] if supported else "none"
    if wanted not in (*ISAS, "none"):
        raise ConfigError(f"APRIUM_ISA is {wanted!r}: use {', '.join(ISAS)} or none")
    if wanted not in (*supported, "none"):
        have = ", ".join(supported) or "no native library"
        raise ConfigError(f"APRIUM_ISA is {wanted!r}, but this machine has {have}")
    return wanted


def machine(num_threads: int | None = None) -> Any:
    """Return a new pool of kernels with torch's number of threads; None where `isa` is "none"."""
    if isa() == "none":
        return None
    assert _library is not None
    return _library.Machine(isa(), num_threads or torch.get_num_threads())


@functools.cache
def shared() -> Any:
    """Return the pool of kernels that functions on tensors use; None where `isa` is "none"."""
    return machine()


def runs_on(*tensors: torch.Tensor, dtypes: tuple[torch.dtype, ...] = (torch.float32,)) -> bool:
    """Tell whether kernels of training take these tensors: of `dtypes`, on the CPU."""
    mine = all(t.dtype in dtypes and t.device.type == "cpu" for t in tensors)
    return mine and shared() is not None
