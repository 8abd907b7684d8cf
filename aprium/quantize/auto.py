"""Choose a format for every matrix under a budget of effective bits a weight.

The sensitivity of a unit (matrices that must share a format) to a format is the KL divergence at
the logits, in nats a token, when that unit alone has it. Divergences are taken to add up, and the
choice of least total under the budget is an integer linear programme. Source: docs/numerics.md;
the idea is ModelOpt's AutoQuantize.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import scipy.optimize
import torch
from torch import Tensor

from aprium.base.errors import QuantizeError
from aprium.checkpoint.names import matrices, matrix_role
from aprium.model.config import ModelConfig
from aprium.model.linear import Matrix
from aprium.model.model import Block, HybridModel
from aprium.ops import fp8, nvfp4
from aprium.ops.logprob import kl_divergence
from aprium.quantize.progress import progress
from aprium.quantize.recipes import BITS, Recipe
from aprium.quantize.streams import Stream


@dataclass(frozen=True, kw_only=True)
class Unit:
    """Matrices that share a format: by parameter of the model, and by published module name.

    `blocks` tells whether all have widths that NVFP4's blocks divide.
    """

    name: str
    layer: int
    role: str
    parameters: tuple[str, ...]
    modules: tuple[str, ...]
    weights: int
    blocks: bool = True


@dataclass(frozen=True, kw_only=True)
class Choice:
    """What was measured of a unit, in nats a token by format, and the format it got."""

    unit: Unit
    divergence: Mapping[str, float]
    format: str | None


def units(config: ModelConfig) -> list[Unit]:
    """Return the units of the backbone's layers: q, k and v are one, a layer's experts are one."""
    grouped: dict[str, list[str]] = {}
    found_matrices = matrices(config)
    for module in found_matrices:
        role = matrix_role(module)
        if role in ("mtp", "head"):
            continue
        mixer = ".".join(module.split(".")[:4])
        fused = {"attention_qkv": f"{mixer}.qkv_proj", "expert": f"{mixer}.experts"}
        grouped.setdefault(fused.get(role, module), []).append(module)
    found = []
    for name, members in grouped.items():
        modules = tuple(members)
        shapes = [found_matrices[module] for module in modules]
        if name.endswith(".experts"):
            parameters = (f"{name}.up_proj", f"{name}.down_proj")
        else:
            parameters = modules
        found.append(
            Unit(
                name=name,
                layer=int(name.split(".")[2]),
                role=matrix_role(modules[0]),
                parameters=parameters,
                modules=modules,
                weights=sum(shape.rows * shape.columns for shape in shapes),
                blocks=all(shape.columns % nvfp4.BLOCK == 0 for shape in shapes),
            )
        )
    return found


def search(
    model: HybridModel, samples: Sequence[Sequence[int]], recipe: Recipe, budget: float
) -> list[Choice]:
    """Choose NVFP4, FP8 or neither for every unit of `model`, at most `budget` bits a weight.

    `model` has unquantised weights, which are as before afterwards; `samples` are token sequences.
    Experts take the NVFP4 of `recipe`, with or without input scales, and its rule for scales.
    Raises QuantizeError for a budget that NVFP4 everywhere does not meet.
    """
    found = units(model.config)
    four = recipe.formats.expert if recipe.formats.expert in BITS else None
    four = "w4a16_nvfp4" if four in (None, "fp8") else four
    options = (four, "fp8")
    least = min(BITS[fmt] for fmt in options)
    if budget < least:
        raise QuantizeError(f"a budget of {budget} bits is below the {least} of NVFP4: give more")
    table = measure(model, samples, found, options, recipe)
    formats = solve(found, table, options, budget)
    return [
        Choice(unit=unit, divergence=row, format=fmt)
        for unit, row, fmt in zip(found, table, formats, strict=True)
    ]


@torch.no_grad()
def measure(
    model: HybridModel,
    samples: Sequence[Sequence[int]],
    found: Sequence[Unit],
    options: Sequence[str],
    recipe: Recipe,
) -> list[dict[str, float]]:
    """Return for each unit the mean KL divergence at the logits that each format causes alone."""
    layers = [block for block in model.backbone.layers if isinstance(block, Block)]
    stream = Stream.start(samples, model.backbone.embeddings.weight)
    before: list[Tensor] = []  # hidden states in front of each layer
    for block in layers:
        before.append(stream.hidden.clone())
        stream.advance(block)
    head = model.head_weight
    final = model.backbone.norm_f(stream.hidden)
    table = []
    with progress() as bar:
        for unit in bar.track(found, description="measuring"):
            row = {}
            for fmt in options if unit.blocks else ("fp8",):
                kept = _put(model, unit, fmt, recipe)
                stream.hidden = before[unit.layer].clone()
                for block in layers[unit.layer :]:
                    stream.advance(block)
                hidden = model.backbone.norm_f(stream.hidden)
                row[fmt] = float(kl_divergence(hidden, head, final, head).mean())
                _restore(model, kept)
            table.append(row)
    return table


def _put(model: HybridModel, unit: Unit, fmt: str, recipe: Recipe) -> dict[str, torch.nn.Parameter]:
    """Round the weights of `unit` to `fmt`; return what was there."""
    kept = {}
    for name in unit.parameters:
        module = model.get_submodule(name)
        assert isinstance(module, Matrix)
        weight = kept[name] = module.weight
        if fmt == "fp8":
            value = fp8.dequantize(*fp8.encode(weight, name=name))
        else:
            value = nvfp4.dequantize(*nvfp4.encode(weight, recipe.rule, name=name))
        module.weight = torch.nn.Parameter(value, requires_grad=False)
    return kept


def _restore(model: HybridModel, kept: Mapping[str, torch.nn.Parameter]) -> None:
    for name, weight in kept.items():
        model.get_submodule(name).weight = weight


def solve(
    found: Sequence[Unit],
    table: Sequence[Mapping[str, float]],
    options: Sequence[str],
    budget: float,
) -> list[str | None]:
    """Return the format of each unit: least total divergence within `budget` bits a weight."""
    choices: list[str | None] = [*options, None]
    costs = np.array([[row.get(fmt, 0.0) if fmt else 0.0 for fmt in choices] for row in table])
    possible = np.array([[fmt is None or fmt in row for fmt in choices] for row in table])
    total = sum(unit.weights for unit in found)
    bits = np.array([[BITS[fmt] * u.weights / total for fmt in choices] for u in found])
    one_each = np.kron(np.eye(len(found)), np.ones(len(choices)))
    result = scipy.optimize.milp(
        costs.ravel(),
        integrality=np.ones(costs.size),
        bounds=scipy.optimize.Bounds(0, possible.ravel().astype(float)),  # type: ignore[arg-type]
        constraints=[
            scipy.optimize.LinearConstraint(one_each, 1, 1),
            scipy.optimize.LinearConstraint(bits.ravel()[None], -np.inf, budget + 1e-9),
        ],
    )
    if not result.success:
        raise QuantizeError(f"no choice of formats meets {budget} bits: give more")
    taken = result.x.reshape(costs.shape).argmax(1)
    return [choices[i] for i in taken]


def formats_of(choices: Sequence[Choice]) -> dict[str, str]:
    """Return the formats by published module name, as `pipeline.quantize` takes them."""
    return {
        module: choice.format
        for choice in choices
        if choice.format is not None
        for module in choice.unit.modules
    }


def render(choices: Sequence[Choice]) -> str:
    """Return the choices as a table, one line a unit."""
    options = list(max((choice.divergence for choice in choices), key=len))
    lines = [f"{'unit':44}{'weights':>12}" + "".join(f"{f:>14}" for f in options) + "  format"]
    for choice in choices:
        known = choice.divergence
        row = "".join(f"{known[f]:>14.2e}" if f in known else f"{'':>14}" for f in options)
        name = choice.unit.name.removeprefix("backbone.layers.")
        lines.append(f"{name:44}{choice.unit.weights:>12,}{row}  {choice.format or 'bf16'}")
    return "\n".join(lines)
