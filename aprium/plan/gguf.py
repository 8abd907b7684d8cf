"""GGUF files for planning: exact bytes from a header, and sizes by type where there is no file.

Names of quantised GGUF files do not say what is in them: types with blocks of 256 weights do not
divide rows of 1856 or 2688, llama.cpp puts other types there, and mixes raise some matrices. A
header is exact; a size by type is an estimate. Source: the GGUF specification of ggml-org/ggml.
"""

import dataclasses
import math
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from aprium.base.errors import CheckpointError, ConfigError
from aprium.checkpoint.info import role_of
from aprium.checkpoint.names import Matrix, tensor_table, walk
from aprium.model.config import ModelConfig
from aprium.plan.shapes import Shape, Tensor, assemble

# ggml type -> name, weights a block, bytes a block.
TYPES: dict[int, tuple[str, int, int]] = {
    0: ("f32", 1, 4),
    1: ("f16", 1, 2),
    2: ("q4_0", 32, 18),
    3: ("q4_1", 32, 20),
    6: ("q5_0", 32, 22),
    7: ("q5_1", 32, 24),
    8: ("q8_0", 32, 34),
    10: ("q2_k", 256, 84),
    11: ("q3_k", 256, 110),
    12: ("q4_k", 256, 144),
    13: ("q5_k", 256, 176),
    14: ("q6_k", 256, 210),
    16: ("iq2_xxs", 256, 66),
    17: ("iq2_xs", 256, 74),
    18: ("iq3_xxs", 256, 98),
    19: ("iq1_s", 256, 50),
    20: ("iq4_nl", 32, 18),
    21: ("iq3_s", 256, 110),
    22: ("iq2_s", 256, 82),
    23: ("iq4_xs", 256, 136),
    24: ("i8", 1, 1),
    25: ("i16", 1, 2),
    26: ("i32", 1, 4),
    27: ("i64", 1, 8),
    28: ("f64", 1, 8),
    29: ("iq1_m", 256, 56),
    30: ("bf16", 1, 2),
    39: ("mxfp4", 32, 17),
    40: ("nvfp4", 64, 36),
}
_BY_NAME = {name: (block, size) for name, block, size in TYPES.values()}
# Types that may be asked for by name, and what stands in where rows are no multiple of 256.
_FALLBACK = {"q2_k": "iq4_nl", "q3_k": "iq4_nl", "q4_k": "q5_0", "q5_k": "q5_1", "q6_k": "q8_0"}
_FALLBACK |= {"iq4_xs": "iq4_nl"}
PLANNED = ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "mxfp4", "iq4_nl", *_FALLBACK)
# Metadata values by type code: struct letter.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q"}
_SCALARS |= {12: "d"}
_STRING, _ARRAY = 8, 9
_LONGEST = 1 << 28  # bytes of a string or entries of an array that a sane header has


def family_weights(one: ModelConfig, precision: str) -> Iterator[Tensor]:
    """Yield the tensors of a model with one expert a layer, all matrices of a GGUF type.

    Raises ConfigError when `precision` is none.
    """
    if precision not in PLANNED:
        known = ", ".join(("bf16", "fp8", "nvfp4", *PLANNED))
        raise ConfigError(f"unknown precision {precision!r}: the known ones are {known}")
    quantised = {name: item for name, item in walk(one) if isinstance(item, Matrix)}
    for name, spec in tensor_table(one).items():
        count = math.prod(spec.shape)
        matrix = name.removesuffix(".weight") in quantised or "embeddings" in name
        fmt = _fitting(precision, spec.shape[-1]) if matrix and count > 1 else "f32"
        block, size = _BY_NAME[fmt]
        mtp = name.startswith("mtp.")
        layer = int(name.split(".")[2]) if mtp or ".layers." in name else None
        role = _role(name, one, mtp)
        yield Tensor(layer, mtp, role, count, count / block * size, fmt)


def _role(name: str, config: ModelConfig, mtp: bool) -> str:
    from aprium.plan.shapes import mtp_role

    role = mtp_role(name, config, int(name.split(".")[2])) if mtp else role_of(name, config)
    return "attention kv" if role == "attention" and name.endswith(_KV) else role


_KV = ("k_proj.weight", "v_proj.weight")


def _fitting(precision: str, columns: int) -> str:
    """Return the type that llama.cpp stores rows of `columns` in."""
    fmt = precision
    if columns % _BY_NAME[fmt][0]:
        fmt = _FALLBACK.get(fmt, fmt)
    return fmt if columns % _BY_NAME[fmt][0] == 0 else "f16"


class _Reader:
    """Reads little-endian values from the start of a file."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self.file, self.path = file, path

    def value(self, letter: str) -> Any:
        size = struct.calcsize("<" + letter)
        data = self.file.read(size)
        if len(data) != size:
            raise CheckpointError(f"{self.path} ends inside its GGUF header: fetch it again")
        return struct.unpack("<" + letter, data)[0]

    def count(self) -> int:
        number = self.value("Q")
        if number > _LONGEST:
            raise CheckpointError(f"{self.path}: {number} entries in a GGUF header are too many")
        return number

    def string(self) -> str:
        return self.file.read(self.count()).decode("utf-8", "replace")

    def metadata(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            inner = self.value("I")
            return [self.metadata(inner) for _ in range(self.count())]
        if kind not in _SCALARS:
            raise CheckpointError(f"{self.path}: unknown metadata type {kind} in the GGUF header")
        return self.value(_SCALARS[kind])


def read_header(path: Path) -> tuple[dict[str, Any], dict[str, tuple[tuple[int, ...], str]]]:
    """Read metadata and tensors of a GGUF file: name -> (shape, rows first; type).

    Raises CheckpointError when the file is no GGUF, or has a type that is not known.
    """
    with path.open("rb") as file:
        reader = _Reader(file, path)
        if file.read(4) != b"GGUF":
            raise CheckpointError(f"{path} does not begin as a GGUF file does")
        reader.value("I")
        num_tensors, num_values = reader.count(), reader.count()
        metadata = {}
        for _ in range(num_values):
            key = reader.string()
            metadata[key] = reader.metadata(reader.value("I"))
        tensors = {}
        for _ in range(num_tensors):
            name = reader.string()
            shape = tuple(reader.count() for _ in range(reader.value("I")))
            kind = reader.value("I")
            reader.value("Q")
            if kind not in TYPES:
                raise CheckpointError(f"{path}: tensor {name} has unknown GGUF type {kind}")
            tensors[name] = (shape[::-1], TYPES[kind][0])
    return metadata, tensors


# Part of a tensor's name in GGUF -> role; the order matters.
_ROLES = (
    ("token_embd", "embedding"),
    ("output_norm", "norms"),
    ("output.", "head"),
    ("_exps", "routed experts"),
    ("shexp", "shared experts"),
    ("ffn_gate_inp", "router"),
    ("exp_probs", "router"),
    ("latent", "latent projections"),
    ("attn_norm", "norms"),
    ("attn_k.", "attention kv"),
    ("attn_v.", "attention kv"),
    ("attn_", "attention"),
    ("ssm_", "mamba"),
    ("nextn", "projection"),
    ("ffn_", "mlp"),
)


def file_shape(path: Path) -> Shape:
    """Return the shape of a GGUF file of the family, bytes as its header has them.

    Raises CheckpointError when it holds another architecture.
    """
    metadata, tensors = read_header(path)
    arch = metadata.get("general.architecture")
    if arch not in ("nemotron_h", "nemotron_h_moe"):
        raise CheckpointError(
            f"{path} holds architecture {arch!r}: only nemotron_h and nemotron_h_moe can be planned"
        )
    config = _config(arch, metadata, tensors)
    shape = assemble(path.name, "gguf", config, list(_tensors(tensors, config)), stacked=True)
    return dataclasses.replace(shape, name=str(path), exact=True, kv_cache="bf16")


def _tensors(
    tensors: dict[str, tuple[tuple[int, ...], str]], config: ModelConfig
) -> Iterable[Tensor]:
    for name, (shape, fmt) in tensors.items():
        block, size = _BY_NAME[fmt]
        count = math.prod(shape)
        role = next((role for part, role in _ROLES if part in name), "norms")
        layer = int(name.split(".")[1]) if name.startswith("blk.") else None
        mtp = layer is not None and layer >= len(config.layers)
        if layer is not None and mtp:
            layer = 1 if "exp" in name or "latent" in name else 0
        yield Tensor(layer, mtp, role, count, count / block * size, fmt)


def _config(
    arch: str, metadata: dict[str, Any], tensors: dict[str, tuple[tuple[int, ...], str]]
) -> ModelConfig:
    def get(key: str, default: Any = None) -> Any:
        return metadata.get(f"{arch}.{key}", default)

    total = int(get("block_count"))
    mtp = int(get("nextn_predict_layers", 0) or 0)
    names: dict[int, str] = {}
    for name in tensors:
        if name.startswith("blk."):
            names[int(name.split(".")[1])] = names.get(int(name.split(".")[1]), "") + name
    kinds = tuple(_kind(names.get(i, "")) for i in range(total - mtp))
    heads = get("attention.head_count")
    narrow = get("attention.head_count_kv", heads)
    first = next((t for name, t in tensors.items() if name.endswith("ffn_up_exps.weight")), None)
    latent = first[0][-1] if first else None
    hidden = int(get("embedding_length"))
    return ModelConfig(
        vocab_size=tensors["token_embd.weight"][0][0],
        hidden_size=hidden,
        layers=kinds,
        mtp_layers=("attention", "moe") if mtp else (),
        num_mtp_layers=1 if mtp else 0,
        num_heads=max(heads) if isinstance(heads, list) else int(heads),
        num_kv_heads=max(narrow) if isinstance(narrow, list) else int(narrow),
        head_dim=int(get("attention.key_length", 128)),
        mamba_num_heads=int(get("ssm.time_step_rank", 64)),
        mamba_head_dim=int(get("ssm.inner_size", 4096)) // int(get("ssm.time_step_rank", 64)),
        ssm_state_size=int(get("ssm.state_size", 128)),
        num_groups=int(get("ssm.group_count", 8)),
        conv_kernel=int(get("ssm.conv_kernel", 4)),
        num_experts=int(get("expert_count", 0) or 128),
        num_active_experts=int(get("expert_used_count", 0) or 6),
        expert_intermediate_size=first[0][-2] if first else 1,
        latent_size=latent if latent and latent != hidden else None,
        max_position_embeddings=int(get("context_length", 262144)),
    )


def _kind(names: str) -> str:
    if "ssm_" in names:
        return "mamba"
    if "_exps" in names:
        return "moe"
    return "attention" if "attn_q" in names else "mlp"
