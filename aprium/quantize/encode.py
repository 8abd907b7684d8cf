"""Encode the matrices of one layer: formats, scales, compensation, and what each cost.

Matrices that a server fuses (q, k and v) share their global scale and input scale. Experts are
encoded one by one; one that too few tokens reached is rounded to nearest whatever the method, and
counted. Source: docs/numerics.md.
"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from aprium.base.errors import QuantizeError
from aprium.checkpoint.names import matrix_role
from aprium.model.linear import Experts, Linear, Matrix
from aprium.ops import fp8, nvfp4
from aprium.ops.gptq import floor_importance, gptq, hessian
from aprium.ops.matmul import linear
from aprium.quantize.recipes import BITS, Recipe
from aprium.quantize.streams import Inputs, expert_hidden

FEW_TOKENS = 64  # below which an expert's inputs say too little about it
FUSED = ("q_proj", "k_proj", "v_proj")


@dataclass(frozen=True, kw_only=True)
class MatrixReport:
    """What encoding one matrix, or all experts' matrices of one name, cost.

    Errors are relative root mean squares: of the weights, and of the outputs on held-out inputs
    (None without). `fell_back` counts experts that saw too few tokens for the method.
    """

    layer: int | None
    role: str
    module: str
    format: str | None
    bits: float
    weights: int
    weight_error: float
    output_error: float | None
    fell_back: int = 0


@dataclass
class Encoder:
    """Encodes matrices by `recipe`; `tensors` collects what goes to the file, by published name."""

    recipe: Recipe
    formats: Mapping[str, str]
    tensors: dict[str, Tensor] = field(default_factory=dict)
    reports: list[MatrixReport] = field(default_factory=list)

    @torch.no_grad()
    def layer(
        self,
        mixer: nn.Module,
        name: str,
        index: int | None,
        seen: Inputs | None,
        held: Inputs | None,
    ) -> None:
        """Encode what is to be encoded in `mixer`, called `name`, and put the decoded values there.

        `seen` are the calibration inputs, `held` the held-out ones. Every matrix of the layer is
        calibrated with what it was given before any of them changed.
        """
        linears = [(n, m) for n, m in mixer.named_modules() if isinstance(m, Linear)]
        shared = self._fused_amax(linears, name)
        for leaf, module in linears:
            rows = seen.rows[leaf] if seen else None
            held_rows = held.rows[leaf] if held else None
            self._linear(module, f"{name}.{leaf}", index, rows, held_rows, shared.get(leaf))
        experts = getattr(mixer, "experts", None)
        if isinstance(experts, Experts):
            self._experts(experts, f"{name}.experts", index, seen, held)

    def matrix(self, module: Linear, name: str, seen: Tensor | None, held: Tensor | None) -> None:
        """Encode a matrix outside the layers."""
        self._linear(module, name, None, seen, held, None)

    def _fused_amax(self, linears: list[tuple[str, Linear]], name: str) -> dict[str, Tensor]:
        """Return the shared largest magnitude of the matrices that servers fuse."""
        group = [
            (leaf, module)
            for leaf, module in linears
            if leaf in FUSED and self.formats.get(f"{name}.{leaf}") is not None
        ]
        if not group:
            return {}
        amax = torch.stack(
            [fp8.largest_magnitude(m.weight, f"{name}.{leaf}") for leaf, m in group]
        ).max()
        return {leaf: amax for leaf, _ in group}

    def _linear(
        self,
        module: Linear,
        name: str,
        index: int | None,
        seen: Tensor | None,
        held: Tensor | None,
        amax: Tensor | None,
    ) -> None:
        weight, fmt = module.weight.detach(), self.formats.get(name)
        if module.bias is not None:
            self.tensors[f"{name}.bias"] = module.bias
        if fmt is None:
            self.tensors[f"{name}.weight"] = weight
            self._report(name, index, fmt, weight.numel(), 0.0, 0.0 if held is not None else None)
            return
        decoded = self._encode(weight, name, fmt, seen, amax, self.recipe)
        if seen is not None and fmt in ("fp8", "nvfp4"):
            self._input_scale(name, fmt, _largest(seen, name))
        before = float(weight.float().square().sum())
        off = float((decoded - weight.float()).square().sum())
        output = None
        if held is not None:
            output = _ratio(*_output_error(held, weight, decoded))
        self._report(name, index, fmt, weight.numel(), _ratio(off, before), output)
        _replace(module, decoded)

    def _encode(
        self,
        weight: Tensor,
        name: str,
        fmt: str,
        seen: Tensor | None,
        amax: Tensor | None,
        recipe: Recipe,
    ) -> Tensor:
        """Encode one matrix into `tensors` and return its decoded values, float32."""
        if fmt == "fp8":
            codes, scale = fp8.encode(weight, amax=amax, name=name)
            self.tensors |= {f"{name}.weight": codes, f"{name}.weight_scale": scale}
            return fp8.dequantize(codes, scale)
        if recipe.method == "gptq":
            assert seen is not None
            encoded = gptq(weight, hessian(seen), recipe.rule, amax=amax, name=name)
        else:
            importance = None
            if recipe.weighted and seen is not None:
                importance = floor_importance(seen.square().mean(0))
            encoded = nvfp4.encode(weight, recipe.rule, amax=amax, importance=importance, name=name)
        self.tensors |= {
            f"{name}.weight": encoded.packed,
            f"{name}.weight_scale": encoded.scale,
            f"{name}.weight_scale_2": encoded.scale_2,
        }
        return nvfp4.dequantize(*encoded)

    def _input_scale(self, name: str, fmt: str, largest: float) -> None:
        divisor = 448.0 if fmt == "fp8" else 6 * 448.0
        self.tensors[f"{name}.input_scale"] = torch.tensor(largest / divisor or 1.0)

    def _experts(
        self,
        experts: Experts,
        name: str,
        index: int | None,
        seen: Inputs | None,
        held: Inputs | None,
    ) -> None:
        up, down = experts.get_submodule("up_proj"), experts.get_submodule("down_proj")
        assert isinstance(up, Matrix) and isinstance(down, Matrix)
        tally = {leaf: _Tally() for leaf in ("up_proj", "down_proj")}
        decoded = {
            leaf: torch.empty(matrix.weight.shape)
            for leaf, matrix in (("up_proj", up), ("down_proj", down))
            if self.formats.get(f"{name}.0.{leaf}") is not None
        }
        for expert in range(up.weight.shape[0]):
            weights = {"up_proj": up.weight[expert], "down_proj": down.weight[expert]}
            given = _expert_inputs(seen, expert, weights["up_proj"])
            checked = _expert_inputs(held, expert, weights["up_proj"])
            for leaf, weight in weights.items():
                value = self._expert(
                    f"{name}.{expert}.{leaf}",
                    weight,
                    given.get(leaf),
                    checked.get(leaf),
                    tally[leaf],
                )
                if value is not None:
                    decoded[leaf][expert] = value
        for leaf, matrix in (("up_proj", up), ("down_proj", down)):
            counted, fmt = tally[leaf], self.formats.get(f"{name}.0.{leaf}")
            self._fill_input_scales(f"{name}", leaf, fmt, counted)
            output = _ratio(counted.output_off, counted.output) if held else None
            error = _ratio(counted.off, counted.weight)
            self._report(
                f"{name}.{leaf}",
                index,
                fmt,
                matrix.weight.numel(),
                error,
                output,
                counted.fell_back,
            )
            if fmt is not None:
                _replace(matrix, decoded[leaf])

    def _expert(
        self, name: str, weight: Tensor, seen: Tensor | None, held: Tensor | None, tally: "_Tally"
    ) -> Tensor | None:
        """Encode one expert's matrix; return its decoded values, None where it stays as it is."""
        fmt = self.formats.get(name)
        if fmt is None:
            self.tensors[f"{name}.weight"] = weight
            return None
        recipe = self.recipe
        calibrated = recipe.method == "gptq" or recipe.weighted
        if seen is not None and len(seen) < FEW_TOKENS and calibrated and fmt != "fp8":
            recipe = dataclasses.replace(recipe, method="rtn", weighted=False)
            tally.fell_back += 1
        decoded = self._encode(weight, name, fmt, seen, None, recipe)
        tally.largest.append(_largest(seen, name) if seen is not None and len(seen) else None)
        tally.weight += float(weight.float().square().sum())
        tally.off += float((decoded - weight.float()).square().sum())
        if held is not None and len(held):
            off, whole = _output_error(held, weight, decoded)
            tally.output_off += off
            tally.output += whole
        return decoded

    def _fill_input_scales(self, name: str, leaf: str, fmt: str | None, tally: "_Tally") -> None:
        """Give experts that saw no token the largest input scale of their layer."""
        known = [value for value in tally.largest if value is not None]
        if fmt not in ("fp8", "nvfp4") or not known:
            return
        for expert, largest in enumerate(tally.largest):
            value = max(known) if largest is None else largest
            self._input_scale(f"{name}.{expert}.{leaf}", fmt, value)

    def _report(
        self,
        name: str,
        index: int | None,
        fmt: str | None,
        weights: int,
        error: float,
        output: float | None,
        fell_back: int = 0,
    ) -> None:
        self.reports.append(
            MatrixReport(
                layer=index,
                role=matrix_role(name),
                module=name,
                format=fmt,
                bits=BITS[fmt],
                weights=weights,
                weight_error=error,
                output_error=output,
                fell_back=fell_back,
            )
        )


@dataclass
class _Tally:
    """Sums over the experts of one layer."""

    weight: float = 0.0
    off: float = 0.0
    output: float = 0.0
    output_off: float = 0.0
    fell_back: int = 0
    largest: list[float | None] = field(default_factory=list)


def _expert_inputs(inputs: Inputs | None, expert: int, up: Tensor) -> dict[str, Tensor]:
    if inputs is None:
        return {}
    rows = inputs.of_expert(expert)
    return {"up_proj": rows, "down_proj": expert_hidden(rows, up)}


def _output_error(rows: Tensor, weight: Tensor, decoded: Tensor) -> tuple[float, float]:
    """Return the squared error of the outputs of `rows`, and their squared size."""
    whole = linear(rows, weight.float())
    return float((linear(rows, decoded) - whole).square().sum()), float(whole.square().sum())


def _largest(seen: Tensor, name: str) -> float:
    largest = float(seen.abs().max())
    if not math.isfinite(largest):
        raise QuantizeError(f"{name}: its calibration inputs are not finite: the model is damaged")
    return largest


def _ratio(off: float, whole: float) -> float:
    return (off / whole) ** 0.5 if whole > 0 else 0.0


def _replace(module: Matrix, value: Tensor) -> None:
    module.weight = nn.Parameter(value, requires_grad=False)
