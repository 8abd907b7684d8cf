"""Load a checkpoint: from a directory of files to a model with every parameter filled.

The configuration says what must be there, the files' headers say what is there, and the two must
agree tensor by tensor before a byte is read. Tensors are then read, several at a time and each
once, into one piece of memory in the stored dtypes ("memory"), or stay in the mapped files and are
paged in as they are used ("mmap"). Values are not inspected, except scales.
"""

import concurrent.futures
import math
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from aprium.base.errors import CheckpointError, ConfigError
from aprium.base.log import get_logger
from aprium.base.memory import available_bytes
from aprium.checkpoint.hub import resolve
from aprium.checkpoint.names import (
    NVFP4_FORMATS,
    Naming,
    TensorSpec,
    matrices,
    parameter_of,
    tensor_table,
)
from aprium.checkpoint.quant_config import Declared, read_quant
from aprium.checkpoint.safetensors import (
    DTYPES,
    Arena,
    Entry,
    FileReader,
    MappedFiles,
    StoredTensor,
    read_directory,
)
from aprium.checkpoint.transposed import read_transposed
from aprium.model.config import NVFP4_TENSORS, ModelConfig, QuantConfig, read_hf_config
from aprium.model.linear import Matrix
from aprium.model.model import HybridModel
from aprium.model.presets import PRESETS
from aprium.model.quant_presets import QUANT_PRESETS, quant_preset

logger = get_logger("checkpoint")
_LISTED = 8  # names of each kind in a message
_DIVISORS = ("weight_global_scale", "input_global_scale")
_SCALES = ("weight_scale", "weight_scale_2", "input_scale", "k_scale", "v_scale", *_DIVISORS)
_LARGEST_E4M3 = 0x7E  # 448; above it lie NaN and all negative values
_DUMMY_SEED = 0
LoadMode = Literal["auto", "memory", "mmap"]
LOAD_MODES = get_args(LoadMode)
_READERS = 4  # threads that read files
_SPARE_BYTES = 3 << 29  # what else a process needs beside its weights: 1.5 GiB


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A loaded model and where it came from.

    `path` holds tokenizer and template files; None for random weights of a preset. `entries` and
    `naming` are how the files held the tensors, which `save_checkpoint` gives back. `load` is
    where the weights are: "memory", or "mmap" in the files; `transposed` tells whether down
    projections came from the derived file.
    """

    path: Path | None
    config: ModelConfig
    quant: QuantConfig
    model: HybridModel
    generation_config: dict[str, Any] = field(default_factory=dict)
    entries: tuple[Entry, ...] = ()
    naming: Naming = field(default_factory=Naming)
    load: LoadMode = "memory"
    transposed: bool = False


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What the files in `path` hold: tensors by published name, in the order of the files."""

    path: Path
    config: ModelConfig
    quant: QuantConfig
    naming: Naming
    tensors: Mapping[str, StoredTensor]


def load_checkpoint(
    source: str | Path,
    *,
    dtype: torch.dtype | None = None,
    load_format: Literal["auto", "dummy"] = "auto",
    load: LoadMode = "auto",
    transposed: bool = False,
) -> Checkpoint:
    """Load the model that `source` names: a directory, "pico", "toy", or a hub id.

    `dtype` is that of activations (float32 by default); weights keep their stored dtype.
    `load_format` "dummy" draws random weights for a directory's `config.json` or a preset, also a
    quantised one such as "nano-nvfp4". `load` is "memory", "mmap", or "auto": memory where the
    weights fit into what is free. `transposed` takes down projections by columns where
    `checkpoint.transposed` has laid them out. Raises CheckpointError naming file and tensor.
    """
    if load not in LOAD_MODES:
        raise CheckpointError(f"unknown load mode {load!r}: use one of {', '.join(LOAD_MODES)}")
    compute_dtype = dtype or torch.float32
    if load_format == "dummy" or (str(source) == "toy" and not Path(source).is_dir()):
        return _load_dummy(source, compute_dtype)
    if load_format != "auto":
        raise CheckpointError(f"unknown load format {load_format!r}: use 'auto' or 'dummy'")
    started = time.monotonic()
    plan = read_plan(resolve(source))
    with torch.device("meta"):
        model = HybridModel(plan.config, plan.quant, compute_dtype=compute_dtype)
    tensors = dict(plan.tensors)
    derived = _take_transposed(model, plan) if transposed else {}
    tensors |= derived
    stored = tensors.values()
    size = sum(tensor.end - tensor.start for tensor in stored)
    if load == "auto":
        load = choose_load(size)
    if load == "memory":
        fill(model, tensors)
    else:
        attach(model, tensors)
    seconds = time.monotonic() - started
    how = "read into memory" if load == "memory" else "mapped from the file"
    if derived:
        how += ", down projections by columns"
    logger.info(
        "%s: %d tensors, %.2f GB %s in %.1f s", plan.path, len(stored), size / 1e9, how, seconds
    )
    return Checkpoint(
        path=plan.path,
        config=plan.config,
        quant=plan.quant,
        model=model.eval(),
        generation_config=_read_generation_config(plan.path),
        entries=tuple(Entry(t.name, t.dtype, t.shape) for t in plan.tensors.values()),
        naming=plan.naming,
        load=load,
        transposed=bool(derived),
    )


def _take_transposed(model: HybridModel, plan: Plan) -> dict[str, StoredTensor]:
    """Return the tensors that are there by columns, and make `model` expect them so."""
    derived = read_transposed(plan.path, plan.tensors)
    for name in derived:
        matrix = model.get_submodule(parameter_of(name)[0].rpartition(".")[0])
        assert isinstance(matrix, Matrix)
        if not matrix.transposed:
            matrix.set_transposed()
    return derived


def choose_load(num_bytes: int) -> Literal["memory", "mmap"]:
    """Return what "auto" means here for weights of `num_bytes`: memory where they fit."""
    return "memory" if num_bytes + _SPARE_BYTES <= available_bytes() else "mmap"


def read_plan(path: Path) -> Plan:
    """Read the configuration and all headers in directory `path`, and check that they agree.

    Raises CheckpointError naming the file and the tensor or module where they do not.
    """
    config = read_model_config(path)
    stored = read_directory(path)
    naming = Naming.detect(stored)
    tensors = {naming.to_published(name): tensor for name, tensor in stored.items()}
    if config.tie_embeddings and "lm_head.weight" in tensors:
        # transformers ignores the flag for this family and saves a projection of its own.
        config = replace(config, tie_embeddings=False)
    if config.num_mtp_layers and not any(name.startswith("mtp.") for name in tensors):
        logger.info("%s has no tensors of its prediction head: loading without it", path)
        config = config.without_mtp()
    quant = _quantisation(path, config, tensors)
    _account(path, stored, tensor_table(config, quant, naming=naming))
    return Plan(path=path, config=config, quant=quant, naming=naming, tensors=tensors)


def read_model_config(path: Path) -> ModelConfig:
    """Read the shape in `path`/config.json; raise CheckpointError naming the file."""
    try:
        return ModelConfig.load(path)
    except ConfigError as error:
        raise CheckpointError(f"{path / 'config.json'}: {error}") from error


def _read_generation_config(path: Path) -> dict[str, Any]:
    file = path / "generation_config.json"
    return read_hf_config(file) if file.exists() else {}


def _quantisation(
    path: Path, config: ModelConfig, tensors: Mapping[str, StoredTensor]
) -> QuantConfig:
    """Find the format of each matrix from its tensors, and check it against what is declared."""
    declared = read_quant(path, config) or Declared("config.json", QuantConfig())
    found = {module: _format(module, tensors) for module in matrices(config)}
    static = any(fmt == "nvfp4" for _, fmt in found.values())
    formats: dict[str, str] = {}
    for module, (tensor, fmt) in found.items():
        wanted = declared.quant.formats.get(module)
        if tensor is None or (static and (fmt, wanted) == ("w4a16_nvfp4", "nvfp4")):
            fmt = wanted  # something is missing: let the accounting name it
        elif fmt is None and module.startswith("mtp."):
            # Exporters pass the prediction head through without naming it among the exceptions.
            wanted = None
        same = fmt == wanted or (fmt in NVFP4_FORMATS and wanted in NVFP4_FORMATS)
        if tensor is not None and not same:
            raise CheckpointError(
                f"{tensor.file}: {module} is stored as {fmt or 'an unquantised matrix'}, but "
                f"{declared.source} declares it {wanted or 'unquantised'}"
            )
        if fmt is not None:
            formats[module] = fmt
    kv_scales = any(name.endswith((".k_scale", ".v_scale")) for name in tensors)
    return replace(declared.quant, formats=formats, kv_scales=kv_scales)


def _format(
    module: str, published: Mapping[str, StoredTensor]
) -> tuple[StoredTensor | None, str | None]:
    """Return the tensor that holds the weight of `module`, and its format."""
    for packed, _, input_scale in NVFP4_TENSORS.values():
        tensor = published.get(f"{module}.{packed}")
        if tensor is not None and tensor.dtype == "U8":
            static = f"{module}.{input_scale}" in published
            return tensor, "nvfp4" if static else "w4a16_nvfp4"
    tensor = published.get(f"{module}.weight")
    return tensor, "fp8" if tensor is not None and tensor.dtype == "F8_E4M3" else None


def _account(
    path: Path, stored: Mapping[str, StoredTensor], table: Mapping[str, TensorSpec]
) -> None:
    """Check that the files hold exactly the tensors of `table`, in the right shapes and dtypes."""
    missing, unexpected = table.keys() - stored.keys(), stored.keys() - table.keys()
    if missing or unexpected:
        parts = [
            f"{len(names)} {kind}: {_some(names)}"
            for kind, names in (("missing", missing), ("unexpected", unexpected))
            if names
        ]
        raise CheckpointError(f"{path}: tensors do not fit the configuration; {'; '.join(parts)}")
    for name, spec in table.items():
        tensor = stored[name]
        scalar = not spec.shape and tensor.shape == (1,)
        if tensor.shape != spec.shape and not scalar:
            raise CheckpointError(
                f"{tensor.file}: tensor {name!r} has shape {list(tensor.shape)}, "
                f"but the configuration makes it {list(spec.shape)}"
            )
        if tensor.dtype not in spec.dtypes:
            raise CheckpointError(
                f"{tensor.file}: tensor {name!r} has dtype {tensor.dtype}, "
                f"expected {' or '.join(spec.dtypes)}"
            )


def _some(names: Iterable[str]) -> str:
    """List a few names and how many more there are."""
    ordered = sorted(names)
    more = len(ordered) - _LISTED
    return ", ".join(ordered[:_LISTED]) + (f" and {more} more" if more > 0 else "")


def fill(model: HybridModel, tensors: Mapping[str, StoredTensor], prefix: str = "") -> None:
    """Read `tensors` (by published name) into the parameters of `model`, replacing those.

    With a `prefix` only parameters and tensors whose names begin with it. All memory is one piece;
    several threads read. Raises CheckpointError for a parameter that is filled twice or not at
    all, and for a scale that is not a finite positive number.
    """
    tensors = {name: tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    places = _place(model, tensors, prefix)
    parameters = dict(model.named_parameters())
    dtypes = {name: DTYPES[parts[0].tensor.dtype] for name, parts in places.items()}
    sizes = {name: Arena.size_of(parameters[name].shape, d) for name, d in dtypes.items()}
    arena = Arena(sum(sizes.values()))
    values = {name: arena.tensor(parameters[name].shape, d) for name, d in dtypes.items()}
    # What the system caches of the files would push out the model where memory is short.
    forget = 2 * sum(sizes.values()) > available_bytes()
    files = dict.fromkeys(tensor.file for tensor in tensors.values())
    readers = {file: FileReader(file, forget=forget) for file in files}

    def read(name: str, part: _Part) -> None:
        target = values[name] if part.expert is None else values[name][part.expert]
        readers[part.tensor.file].read(part.tensor, target)
        _check_scale(part.tensor, target)

    # In the order of the files, so that the disk reads ahead.
    jobs = sorted(
        ((name, part) for name, parts in places.items() for part in parts),
        key=lambda job: (job[1].tensor.file, job[1].tensor.start),
    )
    try:
        with concurrent.futures.ThreadPoolExecutor(_READERS) as pool:
            for done in [pool.submit(read, *job) for job in jobs]:
                done.result()
    finally:
        for reader in readers.values():
            reader.close()
    for name, value in values.items():
        set_parameter(model, name, value)


@torch.no_grad()
def update_weights(checkpoint: Checkpoint, source: str | Path | Mapping[str, Tensor]) -> None:
    """Replace weights of a loaded model in place.

    `source` is a checkpoint of the same shape and formats, or tensors by published name, which may
    be some of them; values are converted to the dtype that the parameter has. Raises
    CheckpointError, before anything is changed, for what does not fit.
    """
    if checkpoint.load == "mmap" or checkpoint.transposed:
        how = "in mapped files" if checkpoint.load == "mmap" else "laid out by columns"
        raise CheckpointError(
            f"the weights are {how} and cannot be replaced: load the model with load 'memory' and "
            "without derived files"
        )
    model = checkpoint.model
    if not isinstance(source, Mapping):
        plan = read_plan(resolve(source))
        for name in ("config", "quant"):
            if getattr(plan, name) != getattr(checkpoint, name):
                raise CheckpointError(
                    f"{plan.path}: its {name} is not that of the running model: start anew with it"
                )
        fill(model, plan.tensors)
        return
    parameters = dict(model.named_parameters())
    changes: list[tuple[Tensor, Tensor]] = []
    for published, value in source.items():
        name, expert = parameter_of(published)
        if name not in parameters:
            raise CheckpointError(f"tensor {published!r} belongs to no parameter of this model")
        target = parameters[name] if expert is None else parameters[name][expert]
        if value.shape != target.shape or (value.dtype != target.dtype and target.itemsize == 1):
            raise CheckpointError(
                f"tensor {published!r} is {value.dtype} {list(value.shape)}: the model has "
                f"{target.dtype} {list(target.shape)}"
            )
        changes.append((target, value))
    for target, value in changes:
        target.copy_(value)


def attach(model: HybridModel, tensors: Mapping[str, StoredTensor]) -> None:
    """Make views of the mapped files the parameters of `model`; stacks become lists of views.

    Raises CheckpointError as `fill` does.
    """
    files = MappedFiles()
    parameters = dict(model.named_parameters())
    for name, parts in _place(model, tensors).items():
        views = []
        for part in parts:
            view = files.tensor(part.tensor)
            if part.tensor.dtype != "F8_E4M3":  # reading all block scales would page them in
                _check_scale(part.tensor, view)
            views.append(view)
        if parts[0].expert is None:
            set_parameter(model, name, views[0].view(parameters[name].shape))
            continue
        owner, _, leaf = name.rpartition(".")
        matrix = model.get_submodule(owner)
        assert isinstance(matrix, Matrix)
        order = sorted(range(len(parts)), key=lambda i: parts[i].expert or 0)
        matrix.set_parts(leaf, [views[i] for i in order])


class _Part(NamedTuple):
    """A tensor that fills a parameter, or row `expert` of one."""

    tensor: StoredTensor
    expert: int | None


def _place(
    model: HybridModel, tensors: Mapping[str, StoredTensor], prefix: str = ""
) -> dict[str, list[_Part]]:
    """Return the parts of each parameter; each must be filled once, in one dtype."""
    parameters = {name: p for name, p in model.named_parameters() if name.startswith(prefix)}
    places: dict[str, list[_Part]] = {}
    filled: dict[str, set[int | None]] = {}
    for published, tensor in tensors.items():
        name, expert = parameter_of(published)
        file = tensor.file
        if name not in parameters:
            raise CheckpointError(f"{file}: tensor {tensor.name!r} belongs to no parameter")
        parts = places.setdefault(name, [])
        if parts and parts[0].tensor.dtype != tensor.dtype:
            kind = str(DTYPES[parts[0].tensor.dtype]).removeprefix("torch.")
            raise CheckpointError(
                f"{file}: tensor {tensor.name!r} is {tensor.dtype}, but other parts of {name} "
                f"are {kind}: they must be stored alike"
            )
        if expert in filled.setdefault(name, set()):
            raise CheckpointError(f"{file}: tensor {tensor.name!r} fills {name} a second time")
        filled[name].add(expert)
        parts.append(_Part(tensor, expert))
    unfilled = [n for n, value in parameters.items() if not _complete(value, filled.get(n, set()))]
    if unfilled:
        raise CheckpointError(f"{len(unfilled)} parameters not filled: {_some(unfilled)}")
    return places


def _complete(parameter: Tensor, parts: set[int | None]) -> bool:
    return parts == {None} or (None not in parts and 0 < len(parts) == parameter.shape[0])


def set_parameter(model: nn.Module, name: str, value: Tensor) -> None:
    """Put `value` in place of parameter `name`, trainable if that was."""
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    trainable = getattr(module, leaf).requires_grad
    setattr(module, leaf, nn.Parameter(value, requires_grad=trainable))


def _check_scale(tensor: StoredTensor, value: Tensor) -> None:
    """Raise CheckpointError if `value` is a scale with a NaN, an infinity or a sign."""
    leaf = tensor.name.rpartition(".")[2]
    if leaf not in _SCALES:
        return
    if value.dtype == torch.float8_e4m3fn:
        codes = value.view(torch.uint8)
        if not codes.numel() or int(codes.max()) <= _LARGEST_E4M3:
            return
        bad = int(codes[codes > _LARGEST_E4M3][0])
        kind = "NaN" if bad & 0x7F == 0x7F else "a negative value"
    else:
        number = float(value)
        usable = number > 0 if leaf in _DIVISORS else number >= 0
        if usable and math.isfinite(number):
            return
        kind = str(number)
    raise CheckpointError(
        f"{tensor.file}: tensor {tensor.name!r} holds {kind}: a scale must be finite and positive; "
        "the file is damaged or was quantised wrongly"
    )


def _load_dummy(source: str | Path, compute_dtype: torch.dtype) -> Checkpoint:
    """Draw random weights for the preset or the directory that `source` names."""
    name, path, quant = str(source), Path(source).expanduser(), QuantConfig()
    if path.is_dir():
        config = read_model_config(path)
        declared = read_quant(path, config)
        quant = declared.quant if declared else quant
    elif name in QUANT_PRESETS:
        config, quant, path = PRESETS[QUANT_PRESETS[name].base], quant_preset(name), None
    elif name in PRESETS:
        config, path = PRESETS[name], None
    else:
        known = ", ".join((*PRESETS, *QUANT_PRESETS))
        raise CheckpointError(f"no preset or directory {name!r}: the presets are {known}")
    with torch.device("meta"):
        model = HybridModel(config, quant, compute_dtype=compute_dtype)
    generator = torch.Generator().manual_seed(_DUMMY_SEED)
    parameters = dict(model.named_parameters())
    for parameter, meta in parameters.items():
        set_parameter(model, parameter, torch.empty(meta.shape, dtype=meta.dtype, device="cpu"))
    model.init_weights(generator)
    _randomise_quantised(model, generator)
    generation = _read_generation_config(path) if path else {}
    return Checkpoint(
        path=path, config=config, quant=quant, model=model.eval(), generation_config=generation
    )


@torch.no_grad()
def _randomise_quantised(model: HybridModel, generator: torch.Generator) -> None:
    """Give quantised matrices random codes, and scales that make values of the usual size."""
    deviation = model.config.initializer_range
    for name, parameter in model.named_parameters():
        leaf = name.rpartition(".")[2]
        if parameter.dtype == torch.uint8:
            parameter.random_(0, 256, generator=generator)
        elif parameter.dtype == torch.float8_e4m3fn and leaf == "weight":
            drawn = torch.empty(parameter.shape).normal_(0, 1, generator=generator)
            parameter.copy_(drawn)
        elif leaf in _SCALES:
            # Codes have a deviation near 3, FP8 weights one of 1.
            block = parameter.dtype == torch.float8_e4m3fn
            small = {"weight_scale_2": deviation / 3, "weight_scale": 1.0 if block else deviation}
            divided = {"weight_global_scale": 3 / deviation}
            parameter.fill_((small | divided).get(leaf, 1.0))
