"""LoRA: train small factors beside frozen matrices, over a base in any stored format.

y = W x + (alpha / r) B A x, where only A and B are trained. W stays as its file has it; it is
decoded where it is used, and again in the backward pass, so that a graph holds no dense copy of it.
Adapters are files that PEFT reads and writes, under the names of the public layout.
Source: arXiv 2106.09685; docs/training.md.
"""

import functools
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from aprium.base.config import require_finite, require_seed
from aprium.base.errors import CheckpointError, ConfigError
from aprium.checkpoint.names import Naming, matrices, matrix_role, parameter_of, tensors_of
from aprium.checkpoint.safetensors import DTYPE_NAMES, Entry, MappedFile, read_header, write_file
from aprium.model.config import ModelConfig
from aprium.model.linear import Matrix, Product
from aprium.model.model import HybridModel
from aprium.ops.matmul import linear
from aprium.train.precision import keyed_generator, seed_of

CONFIG_NAME, WEIGHTS_NAME = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_SIDES = ("lora_A", "lora_B")
_ROLES = (
    *("mamba_in", "mamba_out", "attention_qkv", "attention_out"),
    *("mlp", "shared_expert", "expert", "latent", "mtp"),
)
# What PEFT can store and this product does not have: key -> the values that ask for nothing.
_PLAIN: dict[str, tuple[Any, ...]] = {
    "bias": (None, "none"),
    "use_dora": (None, False),
    "fan_in_fan_out": (None, False),
    "modules_to_save": (None, [], ()),
    "rank_pattern": (None, {}),
    "alpha_pattern": (None, {}),
}


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Which matrices get factors, and of which size.

    `r` is the rank, `alpha` / `r` the factor of their product, `dropout` the share of inputs of A
    that training leaves out. A target is a role (mamba_in, mamba_out, attention_qkv,
    attention_out, mlp, shared_expert, expert, latent, mtp), the end of a module's name ("q_proj",
    "experts.up_proj"), or a pattern of whole names ("backbone.layers.[0-3].*"). Experts of a layer
    are taken together; the prediction head only by its role or by a pattern that starts with "mtp".
    The default leaves out what PEFT cannot load into transformers' model: Mamba's output
    projection, whose weight its kernels take past the layer, and the experts, which it stacks.
    """

    r: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    targets: tuple[str, ...] = (
        *("mamba_in", "attention_qkv", "attention_out"),
        *("mlp", "shared_expert"),
    )
    seed: int = 0

    def __post_init__(self) -> None:
        """Check ranges."""
        require_finite(self, "lora")
        require_seed(self.seed, "lora.seed")
        if self.r < 1:
            raise ConfigError(f"lora.r is {self.r}: it must be positive")
        if self.alpha <= 0:
            raise ConfigError(f"lora.alpha is {self.alpha}: it must be positive")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"lora.dropout is {self.dropout}: it must be in 0..1, without 1")
        if not self.targets:
            raise ConfigError("lora.targets is empty: name roles or modules, as in ['q_proj']")


class Factors(NamedTuple):
    """What is added to one matrix: scale * b @ a, with a [r, in] and b [out, r]."""

    a: Tensor
    b: Tensor
    scale: float

    def delta(self) -> Tensor:
        """Return what is added, float32 [out, in]."""
        return (self.b.float() @ self.a.float()) * self.scale


class Adapter:
    """Factors beside matrices of a frozen model: attached at once, until `detach`.

    They are parameters `lora_A` [r, in] and `lora_B` [out, r] of their matrices (stacked for
    experts), float32, and the model's only trainable ones. `names` are the matrices that have
    them. B begins at zero, so that nothing changes at first. Train them with AdamW (`muon_lr`
    None: Muon is for whole matrices) and `bias_rate` 0, which leaves the router alone. Raises
    ConfigError for a target that names no matrix.
    """

    def __init__(self, model: HybridModel, config: LoraConfig) -> None:
        self.model, self.config = model, config
        self.scale = config.alpha / config.r
        self._matrices = {n: m for n, m in model.named_modules() if isinstance(m, Matrix)}
        self.names = select(self._matrices, config.targets)
        if any(matrix.substitute is not None for matrix in self._matrices.values()):
            raise ConfigError(
                "the model's products are replaced already, by another adapter or for training in "
                "NVFP4: detach that first"
            )
        model.native = None  # the kernels know nothing of factors
        model.requires_grad_(False)
        generator = torch.Generator().manual_seed(config.seed)
        for name, matrix in self._matrices.items():
            if name in self.names:
                *lead, outputs, inputs = matrix.shape
                bound = 1 / math.sqrt(inputs)
                a = torch.empty(*lead, config.r, inputs).uniform_(
                    -bound, bound, generator=generator
                )
                matrix.register_parameter("lora_A", nn.Parameter(a))
                matrix.register_parameter(
                    "lora_B", nn.Parameter(torch.zeros(*lead, outputs, config.r))
                )
                matrix.substitute = functools.partial(self._product, name, matrix)
            else:
                matrix.substitute = functools.partial(_frozen_product, matrix)

    def begin(self, step: int) -> None:
        """Say that step number `step` is next: dropout is a function of it and the seed.

        PyTorch's default generator is seeded, whose state a layer that runs again for its gradient
        gets back: so it leaves out what it left out before.
        """
        torch.default_generator.manual_seed(seed_of(f"{self.config.seed} {step}"))

    def detach(self) -> None:
        """Take the factors away; the model stays frozen."""
        for name, matrix in self._matrices.items():
            matrix.substitute = None
            if name in self.names:
                del matrix.lora_A, matrix.lora_B

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return the trainable parameters by name."""
        return {
            f"{name}.{side}": getattr(self._matrices[name], side)
            for name in self.names
            for side in _SIDES
        }

    def factors(self) -> dict[str, Factors]:
        """Return the factors of each published module, those of experts one by one."""
        found = {}
        count = self.model.config.num_experts
        for name in self.names:
            a, b = (getattr(self._matrices[name], side).detach() for side in _SIDES)
            modules = [n.removesuffix(".weight") for n in tensors_of(f"{name}.weight", count)]
            stacked = a.dim() == 3
            for e, module in enumerate(modules):
                found[module] = Factors(a[e] if stacked else a, b[e] if stacked else b, self.scale)
        return found

    def _product(self, name: str, matrix: Matrix, dtype: torch.dtype) -> Product:
        dropout = self.config.dropout if torch.is_grad_enabled() else 0.0
        drawn = int(torch.randint(1 << 62, ())) if dropout else 0
        a, b = (getattr(matrix, side) for side in _SIDES)
        parts = tuple(zip(a.unbind(0), b.unbind(0), strict=True)) if a.dim() == 3 else ((a, b),)
        frozen = _frozen_product(matrix, dtype)

        def multiply(rows: Tensor, expert: int | None) -> Tensor:
            one, two = parts[expert or 0]
            kept = rows
            if dropout:
                kept = _drop(rows, dropout, f"{drawn} {name} {expert}")
            return frozen(rows, expert) + self.scale * linear(linear(kept, one), two)

        return multiply


def attach(model: HybridModel, config: LoraConfig) -> Adapter:
    """Freeze `model` and put trainable factors beside the matrices that `config` names."""
    return Adapter(model, config)


def select(names: Iterable[str], targets: Iterable[str]) -> tuple[str, ...]:
    """Return which matrices of a model, by name, `targets` mean (see `LoraConfig`).

    Raises ConfigError for a target that means none.
    """
    candidates = [name for name in names if matrix_role(name) in _ROLES]
    found = set()
    for target in targets:
        hits = {name for name in candidates if _means(target, name)}
        if not hits:
            raise ConfigError(
                f"lora.targets names {target!r}: no matrix of the model has that role or name; "
                f"the roles are {', '.join(_ROLES)}, and a name is like 'q_proj' or "
                "'backbone.layers.0.*'"
            )
        found |= hits
    return tuple(name for name in candidates if name in found)


def _means(target: str, name: str) -> bool:
    role = matrix_role(name)
    if target in _ROLES:
        return role == target
    if role == "mtp" and not target.startswith("mtp"):
        return False
    return fnmatchcase(name, target) or fnmatchcase(name, f"*.{target}")


class _Frozen(torch.autograd.Function):
    """Rows by a matrix that has no gradient: decoded in both passes, kept in neither."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, matrix: Matrix, expert: int | None) -> Tensor:
        ctx.matrix, ctx.expert = matrix, expert
        return linear(rows, matrix.dense(rows.dtype, expert))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (dy,) = gradients
        return dy @ ctx.matrix.dense(dy.dtype, ctx.expert), None, None


def _frozen_product(matrix: Matrix, dtype: torch.dtype) -> Product:
    return lambda rows, expert: _Frozen.apply(rows, matrix, expert)


def _drop(rows: Tensor, share: float, key: str) -> Tensor:
    generator = keyed_generator(key, rows.device)
    drawn = torch.rand(rows.shape, generator=generator, device=rows.device)
    return rows * ((drawn >= share).to(rows.dtype) / (1 - share))


# ---- files ----


def save(adapter: Adapter, directory: str | Path, *, base: str | Path | None = None) -> None:
    """Write `adapter` to `directory` as PEFT does; `base` is noted as the model it belongs to."""
    target = Path(directory)
    tensors = {
        f"{_PREFIX}{module}.{side}.weight": value
        for module, factors in adapter.factors().items()
        for side, value in zip(_SIDES, (factors.a, factors.b), strict=True)
    }
    entries = [
        Entry(name, DTYPE_NAMES[value.dtype], tuple(value.shape)) for name, value in tensors.items()
    ]
    modules = {name.removeprefix(_PREFIX).rsplit(".", 2)[0] for name in tensors}
    described = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None if base is None else str(base),
        "r": adapter.config.r,
        "lora_alpha": adapter.config.alpha,
        "lora_dropout": adapter.config.dropout,
        "target_modules": _target_modules(modules, adapter.model.config),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": None,
        "use_dora": False,
        "use_rslora": False,
    }
    try:
        target.mkdir(parents=True, exist_ok=True)
        partial = target / f".{WEIGHTS_NAME}.partial"
        write_file(partial, entries, tensors.__getitem__)
        partial.replace(target / WEIGHTS_NAME)
        text = json.dumps(described, indent=2) + "\n"
        (target / CONFIG_NAME).write_text(text, encoding="utf-8")
    except OSError as error:
        raise CheckpointError(f"cannot write {target}: {error.strerror or error}") from error


def _target_modules(modules: set[str], config: ModelConfig) -> list[str]:
    """Return the ends of names where these mean just `modules`, otherwise whole names."""
    ends = {module.rpartition(".")[2] for module in modules}
    meant = {name for name in matrices(config) if name.rpartition(".")[2] in ends}
    # Without "backbone.", which is not what every implementation calls it.
    return sorted(ends if meant == modules else {m.removeprefix("backbone.") for m in modules})


def read(directory: str | Path, config: ModelConfig) -> dict[str, Factors]:
    """Read an adapter for a model of shape `config`: factors by published module name.

    Raises CheckpointError naming the file and what does not fit.
    """
    path = Path(directory)
    described = _read_config(path / CONFIG_NAME)
    rank, alpha = described["r"], described["lora_alpha"]
    scale = alpha / (math.sqrt(rank) if described.get("use_rslora") else rank)
    file = path / WEIGHTS_NAME
    header = read_header(file)
    mapped = MappedFile(file)
    bare = {name: name.removeprefix(_PREFIX) for name in header}
    naming = Naming.detect(bare.values())
    sides: dict[str, dict[str, Tensor]] = {}
    for name, stored in header.items():
        parts = naming.to_published(bare[name]).rsplit(".", 2)
        if not name.startswith(_PREFIX) or len(parts) != 3 or parts[1] not in _SIDES:
            raise CheckpointError(
                f"{file}: tensor {name!r} is not a factor of a linear layer: only LoRA of matrices "
                "under their names in the public layout can be read"
            )
        sides.setdefault(parts[0], {})[parts[1]] = mapped.tensor(stored)
    known = matrices(config)
    found = {}
    for module, pair in sides.items():
        matrix = known.get(module)
        if matrix is None or matrix_role(module) not in _ROLES:
            raise CheckpointError(f"{file}: the model has no matrix {module!r} that takes factors")
        shapes = {"lora_A": (rank, matrix.columns), "lora_B": (matrix.rows, rank)}
        for side, shape in shapes.items():
            if side not in pair:
                raise CheckpointError(f"{file}: {module} has no {side}: the adapter is incomplete")
            if tuple(pair[side].shape) != shape:
                raise CheckpointError(
                    f"{file}: {side} of {module} has shape {list(pair[side].shape)}, but the model "
                    f"and r = {rank} make it {list(shape)}"
                )
        found[module] = Factors(pair["lora_A"], pair["lora_B"], scale)
    if not found:
        raise CheckpointError(f"{file} holds no factors")
    return found


def _read_config(file: Path) -> Mapping[str, Any]:
    try:
        described = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(
            f"cannot read {file}: {error.strerror}: name the directory of an adapter"
        ) from error
    except ValueError as error:
        raise CheckpointError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(described, dict) or described.get("peft_type") != "LORA":
        raise CheckpointError(f"{file} does not describe a LoRA adapter (peft_type 'LORA')")
    for key, values in _PLAIN.items():
        if described.get(key) not in values:
            raise CheckpointError(
                f"{file}: {key} is {described[key]!r}: only plain factors of one rank can be read"
            )
    for key in ("r", "lora_alpha"):
        value = described.get(key)
        if not isinstance(value, int | float) or isinstance(value, bool) or value <= 0:
            raise CheckpointError(f"{file}: {key} is {value!r}: it must be a positive number")
    return described


@torch.no_grad()
def load(model: HybridModel, directory: str | Path) -> Adapter:
    """Attach the adapter in `directory` to `model`, to use it or to train it further.

    Raises CheckpointError as `read` does. Experts that have no factors get some of zero.
    """
    factors = read(directory, model.config)
    described = _read_config(Path(directory) / CONFIG_NAME)
    placed: dict[str, list[tuple[int | None, Factors]]] = {}
    for module, one in factors.items():
        parameter, expert = parameter_of(f"{module}.weight")
        placed.setdefault(parameter.removesuffix(".weight"), []).append((expert, one))
    scale = next(iter(factors.values())).scale
    rank = int(described["r"])
    config = LoraConfig(
        r=rank,
        alpha=scale * rank,
        dropout=float(described.get("lora_dropout") or 0.0),
        targets=tuple(placed),
    )
    adapter = Adapter(model, config)
    for name, parts in placed.items():
        matrix = model.get_submodule(name)
        for expert, one in parts:
            for side, value in zip(_SIDES, (one.a, one.b), strict=True):
                whole = getattr(matrix, side)
                (whole if expert is None else whole[expert]).copy_(value)
    return adapter
