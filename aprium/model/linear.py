"""Weights of a model: linear layers and stacks of experts in the format that their file has.

A module's parameters are the file's tensors, kept as stored; the format is a property of each
matrix. The reference path turns a matrix into the activation dtype where it is used and keeps
nothing; `substitute` puts another product in its place, for training in another precision or with
adapters. Formats: None (stored as BF16, F32 or F16), "fp8" (one scale a matrix), "nvfp4" and
"w4a16_nvfp4" (codes, block scales, one global scale). Activations stay unquantised here, so an
`input_scale` is carried for saving and not read. Source: docs/numerics.md.
"""

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from aprium.base.errors import CheckpointError
from aprium.model.config import NVFP4_BLOCK, NVFP4_TENSORS, QuantConfig
from aprium.ops import fp8, moe, nvfp4
from aprium.ops.matmul import linear
from aprium.parallel.collectives import all_to_all_counts, exchange, reduce_from
from aprium.parallel.mesh import Axis

# Maps rows [T, in] to [T, out] by a matrix, or by that of one expert of a stack.
Product = Callable[[Tensor, int | None], Tensor]


def _frozen(shape: tuple[int, ...], dtype: torch.dtype) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape, dtype=dtype), requires_grad=False)


class Matrix(nn.Module):
    """A weight [*lead, out, in] in one of the formats; `lead` is (E,) for a stack of experts.

    Raises CheckpointError when the input width does not divide into NVFP4 blocks.
    """

    def __init__(
        self, shape: tuple[int, ...], fmt: str | None, layout: str, dtype: torch.dtype, name: str
    ) -> None:
        super().__init__()
        self.shape, self.format, self.layout = shape, fmt, layout
        self.parts: dict[str, list[Tensor]] = {}
        self.transposed = False
        self.substitute: Callable[[torch.dtype], Product] | None = None
        *lead, rows, columns = shape
        head = tuple(lead)
        if fmt is None:
            self.weight = nn.Parameter(torch.empty(shape, dtype=dtype))
        elif fmt == "fp8":
            self.weight = _frozen(shape, torch.float8_e4m3fn)
            self.weight_scale = _frozen(head, torch.float32)
            self.input_scale = _frozen(head, torch.float32)
        elif fmt in ("nvfp4", "w4a16_nvfp4"):
            if columns % NVFP4_BLOCK:
                raise CheckpointError(f"{name}: input width {columns} is not a multiple of 16")
            packed, scales = (*head, rows, columns // 2), (*head, rows, columns // NVFP4_BLOCK)
            scalar = (*head, 1) if layout == "compressed-tensors" else head
            names = NVFP4_TENSORS[layout]
            self.register_parameter(names[0], _frozen(packed, torch.uint8))
            self.weight_scale = _frozen(scales, torch.float8_e4m3fn)
            self.register_parameter(names[1], _frozen(scalar, torch.float32))
            if fmt == "nvfp4":
                self.register_parameter(names[2], _frozen(scalar, torch.float32))
        else:
            raise CheckpointError(f"{name}: unknown weight format {fmt!r}")

    def set_parts(self, name: str, parts: list[Tensor]) -> None:
        """Hold tensor `name` of a stack as one tensor an expert, as a mapped file does."""
        delattr(self, name)
        self.parts[name] = parts

    def set_transposed(self) -> None:
        """Expect the weight by columns from now on (see `ops.nvfp4.transpose`)."""
        assert self.format in ("nvfp4", "w4a16_nvfp4")
        packed = NVFP4_TENSORS[self.layout][0]
        *lead, rows, half = getattr(self, packed).shape
        columns = 2 * half
        with torch.device("meta"):
            setattr(self, packed, _frozen((*lead, columns, rows // 2), torch.uint8))
            scales = (*lead, columns // NVFP4_BLOCK, rows)
            self.weight_scale = _frozen(scales, torch.float8_e4m3fn)
        self.transposed = True

    def pick(self, name: str, expert: int | None = None) -> Tensor:
        """Return a stored tensor, or that of one expert of a stack."""
        if expert is None:
            return getattr(self, name)
        return self.parts[name][expert] if name in self.parts else getattr(self, name)[expert]

    def dense(self, dtype: torch.dtype, expert: int | None = None) -> Tensor:
        """Return the matrix (of one expert of a stack) as values of `dtype`, [out, in]."""
        if self.format is None:
            return self.pick("weight", expert).to(dtype)
        pick = functools.partial(self.pick, expert=expert)
        if self.format == "fp8":
            return fp8.dequantize(pick("weight"), pick("weight_scale")).to(dtype)
        packed, scale_2, _ = NVFP4_TENSORS[self.layout]
        decode = nvfp4.dequantize
        if self.layout == "compressed-tensors":
            decode = nvfp4.dequantize_divided
        codes, scales = pick(packed), pick("weight_scale")
        if self.transposed:
            codes, scales = nvfp4.untranspose(codes, scales)
        return decode(codes, scales, pick(scale_2)).to(dtype)

    @property
    def trains(self) -> bool:
        """Whether the matrix is a parameter that gets gradients, with its own product."""
        mine = self.format is None and self.substitute is None and not self.parts
        return mine and self.weight.requires_grad

    def product(self, dtype: torch.dtype) -> Product:
        """Return the product with this matrix in `dtype`, for one pass; a bias is not added."""
        if self.substitute is not None:
            return self.substitute(dtype)
        return lambda rows, expert: linear(rows, self.dense(dtype, expert))


class Linear(Matrix):
    """y = x W^T + b over packed tokens; W is looked up in `quant` by the module's disk name.

    `kv_scale` names the FP8 cache scale ("k_scale" or "v_scale") that the module carries, if any.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        name: str,
        quant: QuantConfig,
        dtype: torch.dtype,
        bias: bool = False,
        kv_scale: str | None = None,
    ) -> None:
        fmt = quant.formats.get(name)
        super().__init__((out_features, in_features), fmt, quant.layout, dtype, name)
        self.bias = nn.Parameter(torch.empty(out_features, dtype=dtype)) if bias else None
        if kv_scale is not None:
            self.register_parameter(kv_scale, _frozen((), torch.float32))

    def forward(self, x: Tensor) -> Tensor:
        """Map `x` [T, in] to [T, out] in the dtype of `x`."""
        y = self.product(x.dtype)(x, None)
        return y if self.bias is None else y + self.bias.to(y.dtype)


def row_parallel(layer: Linear, x: Tensor, axis: Axis) -> Tensor:
    """Apply `layer`, of which each process of `axis` holds the columns that its `x` [T, in] has.

    The column-parallel form is its counterpart: the layer itself, its rows cut, on an input that
    came through `copy_to`.
    """
    if axis.size == 1:
        return layer(x)
    y = reduce_from(layer.product(x.dtype)(x, None), axis)
    return y if layer.bias is None else y + layer.bias.to(y.dtype)


class Experts(nn.Module):
    """The routed experts of one layer: stacked up [E, I, d] and down [E, d, I], no bias.

    Each process of `axis` holds an equal share of them, in order, and runs the rows of all.
    """

    def __init__(
        self,
        num_experts: int,
        dim: int,
        hidden: int,
        *,
        name: str,
        quant: QuantConfig,
        dtype: torch.dtype,
        axis: Axis,
    ) -> None:
        super().__init__()
        self.num_experts, self.axis = num_experts, axis
        for matrix, shape in (("up_proj", (hidden, dim)), ("down_proj", (dim, hidden))):
            formats = {quant.formats.get(f"{name}.{e}.{matrix}") for e in range(num_experts)}
            if len(formats) > 1:
                found = ", ".join(sorted(str(f or "unquantised") for f in formats))
                raise CheckpointError(
                    f"{name}: experts of one layer store {matrix} in several formats ({found}); "
                    "requantise them to one"
                )
            stack = Matrix((num_experts, *shape), formats.pop(), quant.layout, dtype, name)
            self.add_module(matrix, stack)

    def forward(self, x: Tensor, weights: Tensor, experts: Tensor) -> Tensor:
        """Return the weighted sum [T, d] of each token's `experts` [T, A] on `x` [T, d]."""
        run = self._run if self.axis.size == 1 else self._run_dispatched
        return moe.grouped_experts(x, weights, experts, run)

    def _run(self, rows: Tensor, experts: Tensor) -> Tensor:
        """Run `rows` [R, d], sorted by `experts` [R]: down(relu(up(rows))^2)."""
        stacks = [self.stack(name) for name in ("up_proj", "down_proj")]
        if torch.is_grad_enabled() and all(stack.trains for stack in stacks):
            return moe.run_stacked(rows, experts, *(stack.weight for stack in stacks))
        up, down = (stack.product(rows.dtype) for stack in stacks)

        def apply(expert: int, rows: Tensor) -> Tensor:
            return down(F.relu(up(rows, expert)).square(), expert)

        return moe.run_sorted(rows, experts, apply)

    def _run_dispatched(self, rows: Tensor, experts: Tensor) -> Tensor:
        """Send rows [R, d], sorted by expert, to who holds the experts; return what comes back."""
        axis, local = self.axis, self.num_experts // self.axis.size
        counts = experts.bincount(minlength=self.num_experts).unflatten(0, (axis.size, local))
        arriving = all_to_all_counts(counts, axis)  # [source, expert]
        send, receive = counts.sum(1).tolist(), arriving.sum(1).tolist()
        arrived = exchange(rows, send, receive, axis)
        numbers = torch.arange(local, device=rows.device).repeat(axis.size)
        numbers = numbers.repeat_interleave(arriving.flatten())
        order = numbers.argsort(stable=True)
        done = self._run(arrived[order], numbers[order])
        inverse = torch.empty_like(order)
        inverse[order] = torch.arange(len(order), device=order.device)
        return exchange(done[inverse], receive, send, axis)

    def stack(self, name: str) -> Matrix:
        """Return the stack "up_proj" or "down_proj"."""
        matrix = self.get_submodule(name)
        assert isinstance(matrix, Matrix)
        return matrix
