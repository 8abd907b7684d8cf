"""What a checkpoint says about its quantisation: ModelOpt's and compressed-tensors' JSON.

ModelOpt writes `hf_quant_config.json` and repeats it as `quantization_config` in `config.json`;
compressed-tensors uses the latter only. Both name modules by exact name, glob or regular
expression; here every matrix of the model gets its format by name, and `to_hf` writes the same
back. What the file's tensors are is compared with it when they are read. No torch.
Source: docs/architecture.md (quantised checkpoints).
"""

import fnmatch
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from aprium.base.errors import CheckpointError
from aprium.checkpoint.names import NVFP4_FORMATS, matrices
from aprium.model.config import NVFP4_BLOCK, ModelConfig, QuantConfig, read_hf_config

QUANT_FILE = "hf_quant_config.json"
_ALGORITHMS = {"FP8": "fp8", "NVFP4": "nvfp4", "W4A16_NVFP4": "w4a16_nvfp4"}
_ALGORITHM_OF = {fmt: name for name, fmt in _ALGORITHMS.items()}
_MIXED = "MIXED_PRECISION"
# Named by ModelOpt; refused by name, so that nobody takes them for a spelling mistake.
_UNSUPPORTED = (
    *("NVFP4_AWQ", "NVFP4_SVD", "W4A8_NVFP4_FP8", "MXFP8", "MXFP4", "W4A8_MXFP4_FP8", "FP8_PB_WO"),
    *("FP8_PB_REAL", "FP8_PER_CHANNEL_PER_TOKEN", "INT4_AWQ", "W4A16_AWQ", "W4A8_AWQ", "INT8_SQ"),
    *("W8A16", "W4A16", "INT8_WO"),
)
_PACKED_FORMATS = ("nvfp4-pack-quantized", "float-quantized", "mixed-precision")


class Declared(NamedTuple):
    """What a JSON file declares, and which file."""

    source: str
    quant: QuantConfig


def read_quant(directory: Path, config: ModelConfig) -> Declared | None:
    """Read how the checkpoint in `directory` says its matrices are stored; None when it does not.

    Raises CheckpointError naming the file and the algorithm, method or scheme that is not known.
    """
    modules = list(matrices(config))
    file = directory / QUANT_FILE
    if file.exists():
        data = read_hf_config(file).get("quantization")
        if not isinstance(data, dict):
            raise CheckpointError(f"{file}: no 'quantization' object")
        return Declared(QUANT_FILE, _read_modelopt(str(file), data, modules))
    file = directory / "config.json"
    data = read_hf_config(file).get("quantization_config")
    if data is None:
        return None
    method = data.get("quant_method")
    if str(method).startswith("modelopt"):
        return Declared("config.json", _read_modelopt(str(file), data, modules))
    if method == "compressed-tensors":
        return Declared("config.json", _read_compressed(str(file), data, modules))
    raise CheckpointError(
        f"{file}: unknown quantisation method {method!r}: known are 'modelopt' and "
        "'compressed-tensors'"
    )


def _read_modelopt(where: str, data: Mapping[str, Any], modules: list[str]) -> QuantConfig:
    algorithm = data.get("quant_algo")
    layers = data.get("quantized_layers")
    excluded = _Patterns(where, data.get("exclude_modules") or data.get("ignore") or ())
    formats: dict[str, str] = {}
    if layers:
        listed = {name: _format_of(where, entry, name) for name, entry in layers.items()}
        formats = _Patterns(where, listed).assign(listed, modules)
    elif algorithm == _MIXED or (algorithm is None and data.get("config_groups")):
        formats = _read_groups(where, data.get("config_groups"), modules)
    elif algorithm is not None:
        fmt = _format_of(where, data, None)
        formats = dict.fromkeys(modules, fmt)
    if not layers:
        formats = {name: fmt for name, fmt in formats.items() if not excluded.match(name)}
    return QuantConfig(formats=formats, kv_cache=_read_kv_cache(where, data))


def _format_of(where: str, entry: Mapping[str, Any], module: str | None) -> str:
    algorithm = entry.get("quant_algo")
    subject = f"module {module!r}: " if module else ""
    if algorithm not in _ALGORITHMS:
        kind = "unsupported" if algorithm in _UNSUPPORTED else "unknown"
        raise CheckpointError(
            f"{where}: {subject}{kind} quantisation algorithm {algorithm!r}: this program reads "
            f"{', '.join(_ALGORITHMS)} and {_MIXED} of these"
        )
    fmt = _ALGORITHMS[algorithm]
    size = entry.get("group_size") or NVFP4_BLOCK
    if fmt in NVFP4_FORMATS and size != NVFP4_BLOCK:
        raise CheckpointError(f"{where}: {subject}group_size is {size}: NVFP4 has groups of 16")
    return fmt


def _read_kv_cache(where: str, data: Mapping[str, Any]) -> str | None:
    algorithm, scheme = data.get("kv_cache_quant_algo"), data.get("kv_cache_scheme")
    if algorithm is None and scheme is None:
        return None
    fp8 = isinstance(scheme, dict) and (scheme.get("num_bits"), scheme.get("type")) == (8, "float")
    if algorithm == "FP8" or (algorithm is None and fp8):
        return "fp8"
    raise CheckpointError(
        f"{where}: unknown KV-cache quantisation {algorithm or scheme!r}: only FP8 is known"
    )


def _read_compressed(where: str, data: Mapping[str, Any], modules: list[str]) -> QuantConfig:
    packing = data.get("format")
    if packing not in _PACKED_FORMATS:
        known = ", ".join(_PACKED_FORMATS)
        raise CheckpointError(f"{where}: unknown format {packing!r}: this program reads {known}")
    formats = _read_groups(where, data.get("config_groups"), modules)
    ignored = _Patterns(where, data.get("ignore") or ())
    return QuantConfig(
        formats={name: fmt for name, fmt in formats.items() if not ignored.match(name)},
        kv_cache=_read_kv_cache(where, data),
        layout="compressed-tensors",
    )


def _read_groups(where: str, groups: Any, modules: list[str]) -> dict[str, str]:
    if not isinstance(groups, dict) or not groups:
        raise CheckpointError(f"{where}: neither quantized_layers nor config_groups is there")
    formats: dict[str, str] = {}
    for name, group in groups.items():
        if group.get("weights") is None:
            continue
        fmt = _group_format(f"{where}: {name}", group)
        targets = _Patterns(where, group.get("targets") or ())
        formats |= {module: fmt for module in modules if targets.match(module)}
    return formats


def _group_format(where: str, group: Mapping[str, Any]) -> str:
    weights, activations = group["weights"], group.get("input_activations")
    scheme = (weights.get("num_bits"), weights.get("type"))
    if scheme == (4, "float") and weights.get("group_size", NVFP4_BLOCK) == NVFP4_BLOCK:
        return "nvfp4" if activations else "w4a16_nvfp4"
    if scheme == (8, "float"):
        strategy = weights.get("strategy") or "tensor"
        if strategy != "tensor" or weights.get("group_size"):
            raise CheckpointError(f"{where}: FP8 scaled by {strategy}: only by tensor is known")
        if not activations or activations.get("dynamic"):
            raise CheckpointError(f"{where}: FP8 without a stored input scale is not supported")
        return "fp8"
    raise CheckpointError(
        f"{where}: unknown scheme of {scheme[0]}-bit {scheme[1]} weights in groups of "
        f"{weights.get('group_size')}: known are NVFP4 (4-bit float, 16) and FP8 (8-bit float)"
    )


class _Patterns:
    """Module names, parents of modules, globs, `re:` expressions and the class name "Linear"."""

    def __init__(self, where: str, patterns: Iterable[str]) -> None:
        self._exact: dict[str, str] = {}
        self._expressions: list[tuple[re.Pattern[str], str]] = []
        for pattern in patterns:
            try:
                self._add(pattern)
            except (re.error, AttributeError, TypeError) as error:
                message = f"{where}: bad module pattern {pattern!r}: {error}"
                raise CheckpointError(message) from error

    def _add(self, pattern: str) -> None:
        if pattern.startswith("re:"):
            self._expressions.append((re.compile(pattern[3:]), pattern))
            return
        name = pattern.removeprefix("language_model.")
        if name.startswith("model."):
            name = "backbone." + name.removeprefix("model.")
        if name == "Linear":
            self._expressions.append((re.compile(""), pattern))
        elif any(letter in name for letter in "*?["):
            self._expressions.append((re.compile(fnmatch.translate(name)), pattern))
        else:
            self._exact[name] = pattern

    def match(self, module: str) -> str | None:
        """Return the pattern that covers `module`, the nearest parent first; None if none does."""
        name = module
        while name:
            if name in self._exact:
                return self._exact[name]
            name = name.rpartition(".")[0]
        if not self._expressions:
            return None
        spellings = [module]
        if module.startswith("backbone."):
            spellings.append("model." + module.removeprefix("backbone."))
        for expression, pattern in self._expressions:
            if any(expression.match(spelling) for spelling in spellings):
                return pattern
        return None

    def assign(self, formats: Mapping[str, str], modules: list[str]) -> dict[str, str]:
        """Return the format of every module that a pattern covers."""
        covered = ((module, self.match(module)) for module in modules)
        return {module: formats[pattern] for module, pattern in covered if pattern is not None}


def to_hf(quant: QuantConfig, config: ModelConfig) -> tuple[dict[str, Any] | None, dict[str, Any]]:
    """Return `hf_quant_config.json` (None for compressed-tensors) and `quantization_config`.

    Reading them again gives `quant` back, `kv_scales` apart, which the tensors tell.
    """
    if quant.layout == "compressed-tensors":
        return None, _compressed_json(quant, config)
    producer = {"name": "aprium"}
    used = set(quant.formats.values())
    body: dict[str, Any] = {"quant_algo": _MIXED}
    layers = {name: _entry(fmt) for name, fmt in quant.formats.items()}
    excluded: list[str] = []
    if len(used) == 1:
        body = _entry(used.pop())
        layers = {}
        excluded = [name for name in matrices(config) if name not in quant.formats]
    body["kv_cache_quant_algo"] = quant.kv_cache.upper() if quant.kv_cache else None
    if layers:
        body["quantized_layers"] = layers
    first = {"producer": producer, "quantization": body | {"exclude_modules": excluded}}
    second = {"quant_method": "modelopt", "producer": producer} | body | {"ignore": excluded}
    return first, second


def _entry(fmt: str) -> dict[str, Any]:
    entry: dict[str, Any] = {"quant_algo": _ALGORITHM_OF[fmt]}
    return entry | ({"group_size": NVFP4_BLOCK} if fmt in NVFP4_FORMATS else {})


def _compressed_json(quant: QuantConfig, config: ModelConfig) -> dict[str, Any]:
    used = sorted(set(quant.formats.values()))
    modules = list(matrices(config))
    groups = {}
    for number, fmt in enumerate(used):
        named = [name for name in modules if quant.formats.get(name) == fmt]
        targets = ["Linear"] if len(used) == 1 else named
        groups[f"group_{number}"] = _group(fmt) | {"targets": targets}
    packing = "mixed-precision" if len(used) > 1 else "nvfp4-pack-quantized"
    if used == ["fp8"]:
        packing = "float-quantized"
    scheme = {"num_bits": 8, "type": "float", "dynamic": False}
    return {
        "quant_method": "compressed-tensors",
        "format": packing,
        "config_groups": groups,
        "ignore": [name for name in modules if name not in quant.formats],
        "kv_cache_scheme": scheme if quant.kv_cache else None,
    }


def _group(fmt: str) -> dict[str, Any]:
    """Return the scheme of a compressed-tensors group."""
    common: dict[str, Any] = {"type": "float", "symmetric": True}
    if fmt == "fp8":
        scheme = common | {"num_bits": 8, "strategy": "tensor", "dynamic": False}
        return {"weights": scheme, "input_activations": scheme}
    scheme = common | {"num_bits": 4, "strategy": "tensor_group", "group_size": NVFP4_BLOCK}
    activations = scheme | {"dynamic": "local"} if fmt == "nvfp4" else None
    return {"weights": scheme | {"dynamic": False}, "input_activations": activations}
