"""Merge a LoRA adapter into a checkpoint: as BF16, or encoded anew in the base's own formats.

Tensors stream from the mapped base, so memory holds a few at a time. What the adapter does not
touch stays byte for byte, except that BF16 of a quantised base decodes everything. Matrices that
servers fuse (q, k and v) go on sharing their global scale: those touched keep the base's where
their values fit under it, and otherwise all of them are encoded anew.
"""

from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path

import torch
from torch import Tensor

from aprium.base.errors import CheckpointError, QuantizeError
from aprium.checkpoint.load import Plan, read_plan
from aprium.checkpoint.names import Naming, parameter_of, tensor_table, tensors_of
from aprium.checkpoint.safetensors import DTYPES, Entry, MappedFiles, write_directory
from aprium.checkpoint.save import DEFAULT_SHARD_BYTES, assembled, copy_texts, write_texts
from aprium.model.config import NVFP4_TENSORS, QuantConfig
from aprium.ops import fp8, nvfp4
from aprium.ops.nvfp4 import Rule
from aprium.quantize.convert import decode
from aprium.quantize.encode import FUSED
from aprium.train import lora
from aprium.train.lora import Factors

# Up to here the largest number of E4M3 is still the nearest, so a scale loses nothing by staying.
_ROOM = 464 / 448


def merge(
    base: Path, adapter: Path, target: Path, *, requantize: bool = False, rule: Rule = "max"
) -> int:
    """Write `base` with the factors of `adapter` added to directory `target`; return its bytes.

    A quantised base becomes BF16 as a whole, or with `requantize` keeps its formats, block scales
    of touched matrices being chosen by `rule`. Raises QuantizeError where there is nothing to
    requantise or `target` is the base, CheckpointError for files that cannot be used.
    """
    if target.exists() and target.resolve() in (base.resolve(), adapter.resolve()):
        raise QuantizeError(f"{target} is one of the sources: name another directory to write")
    if rule not in nvfp4.RULES:
        raise QuantizeError(f"unknown scale rule {rule!r}: use one of {', '.join(nvfp4.RULES)}")
    plan = read_plan(base)
    factors = lora.read(adapter, plan.config)
    if requantize and not plan.quant.formats.keys() & factors.keys():
        raise QuantizeError(
            f"no matrix that the adapter changes is quantised in {base}: leave out --requantize"
        )
    decodes = bool(plan.quant.formats) and not requantize
    merged = _Merged(plan, factors, rule)
    entries = merged.plain_entries() if decodes else merged.entries()
    naming = Naming() if decodes else plan.naming

    def fetch(name: str) -> Tensor:
        return merged.fetch(naming.to_published(name), decodes)

    try:
        with assembled(target) as complete:
            if decodes:
                write_texts(plan.path, complete, QuantConfig(), plan.config)
            else:
                copy_texts(plan.path, complete)
            write_directory(complete, entries, fetch, DEFAULT_SHARD_BYTES)
    except OSError as error:
        raise CheckpointError(f"cannot write {target}: {error.strerror or error}") from error
    read_plan(target)  # what was written must load
    return sum(entry.num_bytes for entry in entries)


class Overlay:
    """What adapters change of checkpoint `base`, in its own formats: for a model that stays loaded.

    `num_bytes` is what the base takes. Nothing of it is held here: tensors are read when asked for.
    """

    def __init__(self, base: Path) -> None:
        self._plan = read_plan(base)
        self._files = MappedFiles()
        self.num_bytes = sum(t.end - t.start for t in self._plan.tensors.values())

    def changed(self, adapter: Path) -> dict[str, Callable[[], Tensor]]:
        """Return the tensors that `adapter` changes: published name -> what makes the merged one.

        They are those that `merge` writes; of a quantised base with `requantize`. Raises
        CheckpointError for an adapter that does not fit.
        """
        merged = _Merged(self._plan, lora.read(adapter, self._plan.config), "max")
        return {
            name: partial(merged.fetch, name, False)
            for name in self._plan.tensors
            if merged.changes(name)
        }

    def original(self, name: str) -> Tensor:
        """Return a tensor as the base has it, by its published name."""
        return self._files.tensor(self._plan.tensors[name])


class _Merged:
    """The tensors of the merged checkpoint, each made when it is asked for."""

    def __init__(self, plan: Plan, factors: dict[str, Factors], rule: Rule) -> None:
        self._plan, self._factors = plan, factors
        self._rule: Rule = rule
        self._formats = plan.quant.formats
        self._files = MappedFiles()
        self._shared = self._fused_scales()
        # Tensors of a matrix follow each other in a file, so encoding it once is nearly always
        # enough.
        self._encoded = lru_cache(maxsize=2)(self._encode)

    def entries(self) -> list[Entry]:
        """Return the tensors of the base, as its files have them."""
        return [Entry(t.name, t.dtype, t.shape) for t in self._plan.tensors.values()]

    def plain_entries(self) -> list[Entry]:
        """Return the tensors of the base with every quantised matrix in BF16."""
        table = tensor_table(self._plan.config, QuantConfig())
        return [
            Entry(name, "BF16" if self._is_quantised(name) else self._stored(name), spec.shape)
            for name, spec in table.items()
        ]

    def fetch(self, name: str, decodes: bool) -> Tensor:
        """Return a tensor by its published name; `decodes` says that none is quantised any more."""
        module, _, leaf = name.rpartition(".")
        if module in self._formats and decodes and leaf == "weight":
            return self._values(module).bfloat16()
        if module in self._formats and not decodes and self._is_touched(module):
            value = self._encoded(module).get(leaf)
            if value is not None:
                stored = self._plan.tensors[name]
                assert DTYPES[stored.dtype] == value.dtype
                return value.reshape(stored.shape)
        raw = self._read(name)
        parameter, expert = parameter_of(name)
        if expert is None and parameter != name:  # a stack, as transformers stores experts
            return self._stack(parameter, raw)
        plain = module in self._factors and leaf == "weight"
        return self._values(module).to(raw.dtype) if plain else raw

    def changes(self, name: str) -> bool:
        """Whether a tensor, by its published name, may become another one."""
        parameter, expert = parameter_of(name)
        if expert is None and parameter != name:
            parts = tensors_of(parameter, self._plan.config.num_experts)
            return any(part.removesuffix(".weight") in self._factors for part in parts)
        module, _, leaf = name.rpartition(".")
        if module in self._formats:
            # Scales of what goes in are the base's own, whatever the weights become.
            return self._is_touched(module) and leaf not in ("input_scale", "input_global_scale")
        return module in self._factors and leaf == "weight"

    def _is_quantised(self, name: str) -> bool:
        module, _, leaf = name.rpartition(".")
        return leaf == "weight" and module in self._formats

    def _is_touched(self, module: str) -> bool:
        return module in self._factors or module in self._shared

    def _stored(self, name: str) -> str:
        return self._plan.tensors[name].dtype

    def _read(self, name: str) -> Tensor:
        return self._files.tensor(self._plan.tensors[name])

    def _values(self, module: str) -> Tensor:
        """Return the merged matrix in float32."""
        if module in self._formats:
            value = decode(self._plan, module, self._read)
        else:
            value = self._read(f"{module}.weight").float()
        factors = self._factors.get(module)
        return value if factors is None else value + factors.delta()

    def _stack(self, parameter: str, raw: Tensor) -> Tensor:
        names = tensors_of(parameter, self._plan.config.num_experts)
        parts = []
        for expert, name in enumerate(names):
            factors = self._factors.get(name.removesuffix(".weight"))
            part = raw[expert]
            parts.append(
                part if factors is None else (part.float() + factors.delta()).to(raw.dtype)
            )
        return torch.stack(parts)

    def _fused_scales(self) -> dict[str, Tensor | None]:
        """Return the new magnitude that fused matrices share; None where the base's scale stays.

        Only of matrices that are encoded anew.
        """
        found: dict[str, Tensor | None] = {}
        owners = dict.fromkeys(
            module.rpartition(".")[0]
            for module in self._factors
            if module.rpartition(".")[2] in FUSED and module in self._formats
        )
        for owner in owners:
            group = [f"{owner}.{leaf}" for leaf in FUSED if f"{owner}.{leaf}" in self._formats]
            largest = {module: self._values(module).abs().max() for module in group}
            touched = [module for module in group if module in self._factors]
            if all(largest[module] <= _ROOM * self._capacity(module) for module in touched):
                found |= dict.fromkeys(touched)
            else:
                found |= dict.fromkeys(group, torch.stack(list(largest.values())).max())
        return found

    def _global_scale(self, module: str) -> tuple[str, Tensor]:
        """Return the base's global scale of a matrix: the leaf of its name, and the tensor."""
        if self._formats[module] == "fp8":
            leaf = "weight_scale"
        else:
            leaf = NVFP4_TENSORS[self._plan.quant.layout][1]
        return leaf, self._read(f"{module}.{leaf}")

    def _capacity(self, module: str) -> Tensor:
        """Return the largest magnitude that the base's global scale is made for."""
        scale = self._global_scale(module)[1].float().reshape(())
        if self._formats[module] == "fp8":
            return scale * fp8.LARGEST
        if self._plan.quant.layout == "compressed-tensors":
            scale = 1.0 / scale
        limit = nvfp4.FOUR_OVER_SIX if self._rule == "four_over_six" else nvfp4.LARGEST
        return scale * (6.0 * limit)

    def _encode(self, module: str) -> dict[str, Tensor]:
        """Return the tensors of a touched matrix, in the base's format, by their leaf."""
        values = self._values(module)
        amax = self._shared.get(module)
        keeps = module in self._shared and amax is None
        if keeps:
            amax = self._capacity(module)
        if self._formats[module] == "fp8":
            codes, scale = fp8.encode(values, amax=amax, name=module)
            made = {"weight": codes, "weight_scale": scale}
        else:
            packed, scale_2, _ = NVFP4_TENSORS[self._plan.quant.layout]
            encoded = nvfp4.encode(values, self._rule, amax=amax, name=module)
            whole = encoded.scale_2
            if self._plan.quant.layout == "compressed-tensors":
                whole = 1.0 / whole
            made = {packed: encoded.packed, "weight_scale": encoded.scale, scale_2: whole}
        if keeps:
            made |= [self._global_scale(module)]  # what was computed back may be a bit off
        return made
