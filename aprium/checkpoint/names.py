"""The tensors of a checkpoint by name: what a shape and a quantisation imply, and back.

`tensor_table` says what the files of a model must hold; `parameter_of` says which parameter of
`HybridModel` each tensor fills; `Naming` covers the spellings in use. Names in the published
spelling are called module and tensor names throughout. Nothing here opens a file, and there is no
torch, so that counting the 198,887 tensors of Ultra takes a moment. Source: docs/architecture.md
(checkpoint keys).
"""

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from aprium.model.config import NVFP4_BLOCK, NVFP4_TENSORS, ModelConfig, QuantConfig

ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "U8": 1}
NVFP4_FORMATS = ("nvfp4", "w4a16_nvfp4")
_FLOATS = ("BF16", "F32", "F16", "F64")


class TensorSpec(NamedTuple):
    """What one tensor must be: its shape and the dtypes accepted, the published one first."""

    shape: tuple[int, ...]
    dtypes: tuple[str, ...]

    @property
    def num_bytes(self) -> int:
        """Size in bytes with the published dtype."""
        return math.prod(self.shape) * ITEM_BYTES[self.dtypes[0]]


class Matrix(NamedTuple):
    """A weight that a quantiser may encode: [rows, columns], with a bias beside it or not."""

    rows: int
    columns: int
    bias: bool = False


@dataclass(frozen=True, slots=True)
class Naming:
    """How a file spells names: prefixes, the embedding, and whether experts are stacked.

    The published spelling is the default. transformers keeps `model.` and stacked experts in
    memory; multimodal wrappers put `language_model.` before everything.
    """

    wrapper: str = ""
    backbone: str = "backbone."
    embeddings: str = "embeddings"
    stacked_experts: bool = False

    @staticmethod
    def detect(names: Iterable[str]) -> "Naming":
        """Find the spelling that `names` of a file use."""
        names = list(names)
        wrapped = any(name.startswith("language_model.") for name in names)
        wrapper = "language_model." if wrapped else ""
        model = any(name.startswith(wrapper + "model.") for name in names)
        short = any(name.endswith(".embedding.weight") for name in names)
        return Naming(
            wrapper=wrapper,
            backbone="model." if model else "backbone.",
            embeddings="embedding" if short else "embeddings",
            stacked_experts=any(_STACKED.search(name) for name in names),
        )

    def to_disk(self, name: str) -> str:
        """Spell a published tensor or module name as this file does."""
        if name.startswith("backbone."):
            rest = name.removeprefix("backbone.")
            if rest.startswith("embeddings"):
                rest = self.embeddings + rest.removeprefix("embeddings")
            name = self.backbone + rest
        return self.wrapper + name

    def to_published(self, name: str) -> str:
        """Undo `to_disk`; a name that this spelling never makes is returned as it is."""
        if self.wrapper and not name.startswith(self.wrapper):
            return name
        inner = name.removeprefix(self.wrapper)
        if not inner.startswith(self.backbone):
            return inner
        rest = inner.removeprefix(self.backbone)
        if rest.startswith(self.embeddings + "."):
            rest = "embeddings" + rest.removeprefix(self.embeddings)
        return "backbone." + rest


# The last part of a module's name, by the kind of its layer where that matters -> role.
_ROLES = {
    "in_proj": "mamba_in",
    "out_proj": "mamba_out",
    "q_proj": "attention_qkv",
    "k_proj": "attention_qkv",
    "v_proj": "attention_qkv",
    "o_proj": "attention_out",
    "fc1_latent_proj": "latent",
    "fc2_latent_proj": "latent",
    "lm_head": "head",
}
_STACKED = re.compile(r"\.mixer\.experts\.(up_proj|down_proj)$")
_EXPERT = re.compile(r"^(.*\.mixer\.experts)\.(\d+)\.(up_proj|down_proj)(\..+)$")


def parameter_of(name: str) -> tuple[str, int | None]:
    """Return the parameter of `HybridModel` that a published tensor name fills, and which expert.

    Experts are stacked in the model: the second value is the row of the stack, None for the whole
    parameter.
    """
    found = _EXPERT.match(name)
    if found:
        return f"{found[1]}.{found[3]}{found[4]}", int(found[2])
    return (f"{name}.weight", None) if _STACKED.search(name) else (name, None)


def tensors_of(parameter: str, num_experts: int, stacked: bool = False) -> Iterator[str]:
    """Undo `parameter_of`: yield the published names that fill `parameter`, in order."""
    experts, found, leaf = parameter.partition(".mixer.experts.")
    if not found:
        yield parameter
    elif stacked:
        yield parameter.removesuffix(".weight")
    else:
        for expert in range(num_experts):
            yield f"{experts}.mixer.experts.{expert}.{leaf}"


def matrices(config: ModelConfig) -> dict[str, Matrix]:
    """Return every weight that may be quantised, by published module name."""
    found = {}
    for name, item in walk(config):
        if isinstance(item, Matrix):
            found[name] = item
    return found


def matrix_role(module: str) -> str:
    """Return the role of a matrix by its published module name."""
    if module.startswith("mtp."):
        return "mtp"
    leaf = module.rpartition(".")[2]
    if leaf in _ROLES:
        return _ROLES[leaf]
    if ".shared_experts." in module:
        return "shared_expert"
    return "expert" if ".experts." in module else "mlp"


def tensor_table(
    config: ModelConfig,
    quant: QuantConfig | None = None,
    *,
    naming: Naming | None = None,
    router_dtype: str = "BF16",
) -> dict[str, TensorSpec]:
    """Return the tensors that a checkpoint must hold: name on disk -> what it must be.

    `router_dtype` is the dtype that the publisher gave the router weights; either is accepted.
    """
    quant, naming = quant or QuantConfig(), naming or Naming()
    router = TensorSpec(
        (config.num_experts, config.hidden_size),
        (router_dtype, *(dtype for dtype in _FLOATS if dtype != router_dtype)),
    )
    encoder = _Encoder(quant)
    table: dict[str, TensorSpec] = {}
    for name, item in walk(config):
        if isinstance(item, Matrix):
            for leaf, spec in encoder.tensors(name, item):
                table[f"{name}.{leaf}"] = spec
        else:
            table[name] = router if name.endswith(".mixer.gate.weight") else item
    if naming.stacked_experts:
        table = _stack(table, config.num_experts)
    if naming == Naming():
        return table
    return {naming.to_disk(name): spec for name, spec in table.items()}


def _stack(table: Mapping[str, TensorSpec], num_experts: int) -> dict[str, TensorSpec]:
    """Merge the experts' weights as transformers does in memory."""
    stacked: dict[str, TensorSpec] = {}
    for name, spec in table.items():
        parameter, expert = parameter_of(name)
        if expert is None:
            stacked[name] = spec
        elif expert == 0:
            whole = TensorSpec((num_experts, *spec.shape), spec.dtypes)
            stacked[next(tensors_of(parameter, num_experts, stacked=True))] = whole
    return stacked


class _Encoder:
    """Lists the tensors of a matrix in its format; specs are shared between equal matrices."""

    def __init__(self, quant: QuantConfig) -> None:
        self.quant = quant
        self._made: dict[tuple[str | None, Matrix], tuple[tuple[str, TensorSpec], ...]] = {}

    def tensors(self, name: str, matrix: Matrix) -> Iterable[tuple[str, TensorSpec]]:
        key = (self.quant.formats.get(name), matrix)
        made = self._made.get(key)
        if made is None:
            made = self._made[key] = tuple(self._encode(*key))
        scaled = self.quant.kv_scales and name.endswith(("k_proj", "v_proj"))
        if scaled and name.startswith("backbone."):
            return (*made, (f"{name[-len('k_proj')]}_scale", _SCALAR))
        return made

    def _encode(self, fmt: str | None, matrix: Matrix) -> Iterator[tuple[str, TensorSpec]]:
        rows, columns = matrix.rows, matrix.columns
        if fmt is None:
            yield "weight", TensorSpec((rows, columns), _FLOATS)
        elif fmt == "fp8":
            yield "weight", TensorSpec((rows, columns), ("F8_E4M3",))
            yield "weight_scale", _SCALAR
            yield "input_scale", _SCALAR
        else:
            packed, scale_2, input_scale = NVFP4_TENSORS[self.quant.layout]
            yield packed, TensorSpec((rows, columns // 2), ("U8",))
            yield "weight_scale", TensorSpec((rows, columns // NVFP4_BLOCK), ("F8_E4M3",))
            yield scale_2, _SCALAR
            if fmt == "nvfp4":
                yield input_scale, _SCALAR
        if matrix.bias:
            yield "bias", TensorSpec((rows,), _FLOATS)


# A scalar may also be stored with shape [1].
_SCALAR = TensorSpec((), ("F32",))


def walk(config: ModelConfig) -> Iterator[tuple[str, Matrix | TensorSpec]]:
    """Yield matrices by module name and all other tensors by tensor name, in file order."""
    width, vocab = config.hidden_size, config.vocab_size
    norm = _plain(width)
    yield "backbone.embeddings.weight", _plain(vocab, width)
    for i, kind in enumerate(config.layers):
        name = f"backbone.layers.{i}"
        yield f"{name}.norm.weight", norm
        yield from _MIXERS[kind](config, f"{name}.mixer")
    yield "backbone.norm_f.weight", norm
    if not config.tie_embeddings:
        yield "lm_head", Matrix(vocab, width)
    last = len(config.mtp_layers) - 1
    for i in range(config.num_mtp_layers * len(config.mtp_layers)):
        name, place = f"mtp.layers.{i}", i % len(config.mtp_layers)
        yield f"{name}.norm.weight", norm
        if place == 0:
            yield f"{name}.enorm.weight", norm
            yield f"{name}.hnorm.weight", norm
            yield f"{name}.eh_proj", Matrix(width, 2 * width)
        yield from _MIXERS[config.mtp_layers[place]](config, f"{name}.mixer")
        if place == last:
            yield f"{name}.final_layernorm.weight", norm


def _plain(*shape: int) -> TensorSpec:
    return TensorSpec(shape, _FLOATS)


_Tensors = Iterator[tuple[str, Matrix | TensorSpec]]


def _mamba(config: ModelConfig, name: str) -> _Tensors:
    heads, bias = config.mamba_num_heads, config.mamba_proj_bias
    yield f"{name}.in_proj", Matrix(config.in_proj_dim, config.hidden_size, bias)
    yield f"{name}.conv1d.weight", _plain(config.conv_dim, 1, config.conv_kernel)
    if config.conv_bias:
        yield f"{name}.conv1d.bias", _plain(config.conv_dim)
    for leaf in ("A_log", "D", "dt_bias"):
        yield f"{name}.{leaf}", _plain(heads)
    yield f"{name}.norm.weight", _plain(config.mamba_inner)
    yield f"{name}.out_proj", Matrix(config.hidden_size, config.mamba_inner, bias)


def _attention(config: ModelConfig, name: str) -> _Tensors:
    dim, head_dim = config.hidden_size, config.head_dim
    wide, narrow = config.num_heads * head_dim, config.num_kv_heads * head_dim
    yield f"{name}.q_proj", Matrix(wide, dim)
    yield f"{name}.k_proj", Matrix(narrow, dim)
    yield f"{name}.v_proj", Matrix(narrow, dim)
    yield f"{name}.o_proj", Matrix(dim, wide)


def _mlp(config: ModelConfig, name: str, hidden: int | None = None) -> _Tensors:
    dim, bias = config.hidden_size, config.mlp_bias
    hidden = config.intermediate_size if hidden is None else hidden
    yield f"{name}.up_proj", Matrix(hidden, dim, bias)
    yield f"{name}.down_proj", Matrix(dim, hidden, bias)


def _moe(config: ModelConfig, name: str) -> _Tensors:
    dim, hidden = config.expert_dim, config.expert_intermediate_size
    yield f"{name}.gate.weight", _plain(config.num_experts, config.hidden_size)
    bias = TensorSpec((config.num_experts,), ("F32", "BF16", "F16", "F64"))
    yield f"{name}.gate.e_score_correction_bias", bias
    up, down = Matrix(hidden, dim), Matrix(dim, hidden)
    for expert in range(config.num_experts):
        yield f"{name}.experts.{expert}.up_proj", up
        yield f"{name}.experts.{expert}.down_proj", down
    yield from _mlp(config, f"{name}.shared_experts", config.shared_expert_intermediate_size)
    if config.latent_size is not None:
        width, bias = config.hidden_size, config.mlp_bias
        yield f"{name}.fc1_latent_proj", Matrix(config.latent_size, width, bias)
        yield f"{name}.fc2_latent_proj", Matrix(width, config.latent_size, bias)


_MIXERS = {"mamba": _mamba, "attention": _attention, "mlp": _mlp, "moe": _moe}
