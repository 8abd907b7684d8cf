"""Training in NVFP4: the published recipe's three matrix products, emulated on any device.

Operands are rounded to NVFP4 and multiplied as float32, which gives what hardware gives up to the
order of sums, without its speed. Forward: activations in blocks of 16 along the inputs, weights
in tiles of 16 x 16. Gradients of inputs: output gradients rounded stochastically, the weights' same
codes. Gradients of weights: both operands turned by a 16 x 16 random Hadamard matrix along the
tokens, which cancels in the product and spreads outliers. The most sensitive matrices stay in the
model's own dtype. Source: arXiv 2509.25149; the Nemotron 3 Ultra report; docs/training.md.
"""

import functools
import hashlib
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from aprium.base.errors import ConfigError
from aprium.checkpoint.names import matrix_role
from aprium.model.linear import Matrix, Product
from aprium.model.model import HybridModel
from aprium.ops.matmul import linear
from aprium.ops.nvfp4 import BLOCK, round_training

# What the published runs trained in NVFP4; everything else kept a higher precision.
ROLES = ("mamba_in", "expert", "shared_expert", "mlp")
# The signs of Transformer Engine's Hadamard matrix: one fixed vector for all layers and steps.
_SIGNS = (1, 1, 1, -1, 1, -1, -1, -1, -1, -1, -1, 1, -1, 1, -1, -1)
_UNBIASED = 17 / 16  # headroom of scales with which no largest value of a block is clipped


@dataclass(frozen=True, kw_only=True)
class PrecisionConfig:
    """In which numbers the matrix products of training are computed.

    Recipe "bf16" leaves them in the model's own dtype. "nvfp4" rounds those of Mamba's input
    projections, experts, shared experts and MLPs, except in the last `keep_last_fraction` of the
    blocks. `hadamard`, `stochastic_rounding` and `weights_2d` turn parts of the recipe off;
    `unbiased_scales` leaves room above the largest value of a block of gradients, whose rounding
    is otherwise 1 % too small. Before step `begin_at_step` nothing is rounded: what a run learns at
    its end suffices for weights that are to be quantised. From step `switch_at_step` on the forward
    pass is no longer rounded, which the published runs did near the end. `seed` is that of
    stochastic rounding.
    """

    recipe: Literal["bf16", "nvfp4"] = "bf16"
    keep_last_fraction: float = 0.15
    hadamard: bool = True
    stochastic_rounding: bool = True
    weights_2d: bool = True
    unbiased_scales: bool = False
    begin_at_step: int = 0
    switch_at_step: int | None = None
    kernels: Literal["emulated", "transformer_engine"] = "emulated"
    seed: int = 0

    def __post_init__(self) -> None:
        """Check ranges."""
        if not 0 <= self.keep_last_fraction <= 1:
            raise ConfigError(
                f"precision.keep_last_fraction is {self.keep_last_fraction}: it must be in 0..1"
            )
        if self.begin_at_step < 0:
            raise ConfigError(
                f"precision.begin_at_step is {self.begin_at_step}: it cannot be negative; leave it "
                "out to round from the beginning"
            )
        if self.switch_at_step is not None and self.switch_at_step < self.begin_at_step:
            raise ConfigError(
                f"precision.switch_at_step is {self.switch_at_step}: it cannot be before "
                f"begin_at_step, {self.begin_at_step}; leave it out to round to the end"
            )
        if self.kernels == "transformer_engine":
            raise ConfigError(
                "precision.kernels is 'transformer_engine': its NVFP4 kernels are not called from "
                "here; use 'emulated', which has the same numbers on any device and not the speed"
            )


class Rules(NamedTuple):
    """Which of the three products of a matrix are rounded in a pass, and how."""

    forward: bool = True
    input_gradient: bool = True
    weight_gradient: bool = True
    hadamard: bool = True
    stochastic: bool = True
    weights_2d: bool = True
    headroom: float = 1.0


class Precision:
    """A model whose products are rounded: attached at once, until `detach`.

    `names` are the matrices that are. Random numbers are a function of the seed, the step, the
    matrix, and which of the step's passes it is, so neither threads nor resuming change them.
    Raises ConfigError for a matrix that is stored quantised, and where none is left to round.
    """

    def __init__(self, model: HybridModel, config: PrecisionConfig) -> None:
        self.config = config
        chosen = rounded_matrices(model, config.keep_last_fraction)
        if not chosen:
            raise ConfigError(
                f"precision.keep_last_fraction is {config.keep_last_fraction}: no matrix is left "
                "to train in NVFP4; lower it, or use recipe 'bf16'"
            )
        for name, matrix in chosen.items():
            if matrix.format is not None:
                raise ConfigError(
                    f"{name} is stored as {matrix.format}: training in NVFP4 needs weights in BF16 "
                    "or float32; make them with `aprium convert --to bf16`"
                )
            if matrix.substitute is not None:
                raise ConfigError(
                    f"{name} has another product in its place already: detach an adapter before "
                    "training in NVFP4"
                )
        for name, matrix in chosen.items():
            matrix.substitute = functools.partial(self._product, name, matrix)
        self.names = tuple(chosen)
        self._matrices = tuple(chosen.values())
        self._step = 0
        self._passes: dict[str, int] = {}

    def begin(self, step: int) -> None:
        """Say that step number `step` is next, whatever was computed before."""
        self._step = step
        self._passes.clear()

    def detach(self) -> None:
        """Give the model its own products back."""
        for matrix in self._matrices:
            matrix.substitute = None

    def rules(self, step: int) -> Rules:
        """Return what is rounded in `step`."""
        config, switch = self.config, self.config.switch_at_step
        if step < config.begin_at_step:
            return Rules(forward=False, input_gradient=False, weight_gradient=False)
        return Rules(
            forward=switch is None or step < switch,
            hadamard=config.hadamard,
            stochastic=config.stochastic_rounding,
            weights_2d=config.weights_2d,
            headroom=_UNBIASED if config.unbiased_scales else 1.0,
        )

    def _product(self, name: str, matrix: Matrix, dtype: torch.dtype) -> Product:
        number = self._passes[name] = self._passes.get(name, 0) + 1
        seed = f"{self.config.seed} {self._step} {name} {number}"
        return product(matrix.weight, self.rules(self._step), seed)


def attach(model: HybridModel, config: PrecisionConfig) -> Precision | None:
    """Round the products of `model` as `config` says; None where it says to round none."""
    return None if config.recipe == "bf16" else Precision(model, config)


def rounded_matrices(model: HybridModel, keep_last_fraction: float) -> dict[str, Matrix]:
    """Return the matrices that the recipe computes in NVFP4, by name."""
    count = len(model.config.layers)
    kept = int(keep_last_fraction * count + 0.5)
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, Matrix) and matrix_role(name) in ROLES:
            block = int(name.split(".")[2])
            if block < count - kept:
                found[name] = module
    return found


def product(weight: Tensor, rules: Rules, seed: str) -> Product:
    """Return the product with `weight` [out, in] or the stack [E, out, in], for one pass.

    The weights are rounded here, once. `seed` and the expert determine the random numbers.
    """
    along_inputs, along_outputs = _round_weight(weight.detach(), rules)
    stacked = weight.dim() == 3
    parts = weight.unbind(0) if stacked else (weight,)
    rounded = (
        (along_inputs, along_outputs) if stacked else (along_inputs[None], along_outputs[None])
    )

    def multiply(rows: Tensor, expert: int | None) -> Tensor:
        e = expert or 0
        if not torch.is_grad_enabled():
            return _multiply(rows, rounded[0][e], rules)
        key = f"{seed} {e}"
        return _Rounded.apply(rows, parts[e], rounded[0][e], rounded[1][e], rules, key)

    return multiply


def _multiply(x: Tensor, weight: Tensor, rules: Rules) -> Tensor:
    """Return the product of the forward pass with a weight that is rounded already."""
    return linear(fake(x) if rules.forward else x, weight).to(x.dtype)


def keyed_generator(key: str, device: torch.device) -> torch.Generator:
    """Return a generator whose numbers are a function of `key`."""
    return torch.Generator(device).manual_seed(seed_of(key))


def seed_of(key: str) -> int:
    """Return a seed that is a function of `key`."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:7], "little")


class _Rounded(torch.autograd.Function):
    """y = x W^T, where each of the three products has operands of its own."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        along_inputs: Tensor,
        along_outputs: Tensor,
        rules: Rules,
        seed: str,
    ) -> Tensor:
        ctx.rules, ctx.seed, ctx.dtype = rules, seed, weight.dtype
        kept = x
        if rules.weight_gradient and ctx.needs_input_grad[1]:
            kept = fake(_by_tokens(x, rules))
        ctx.save_for_backward(kept, along_outputs)
        return _multiply(x, along_inputs, rules)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        (dy,) = gradients
        rules, (kept, weight) = ctx.rules, ctx.saved_tensors
        dx = dw = None

        def round_gradient(value: Tensor, which: str) -> Tensor:
            generator = None
            if rules.stochastic:
                generator = keyed_generator(f"{ctx.seed} {which}", value.device)
            return fake(value, generator=generator, headroom=rules.headroom)

        if ctx.needs_input_grad[0]:
            left = round_gradient(dy, "inputs") if rules.input_gradient else dy
            dx = (left @ weight.to(left.dtype)).to(dy.dtype)
        if ctx.needs_input_grad[1]:
            left = dy.T
            if rules.weight_gradient:
                left, kept = round_gradient(_by_tokens(dy, rules), "weights"), kept.T
            dw = (left @ kept.to(left.dtype)).to(ctx.dtype)
        return dx, dw, None, None, None, None


def fake(
    x: Tensor, *, tile: int = 1, generator: torch.Generator | None = None, headroom: float = 1.0
) -> Tensor:
    """Round `x` [*lead, N, K] to NVFP4 in blocks along K and decode it, float32 of that shape.

    Rows and columns that do not fill a block or tile are rounded as if zeros followed.
    """
    rows, columns = x.shape[-2:]
    missing = (-columns % BLOCK, -rows % tile)
    if any(missing):
        x = F.pad(x, (0, missing[0], 0, missing[1]))
    rounded = round_training(x, tile=tile, generator=generator, headroom=headroom).dequantize()
    return rounded[..., :rows, :columns] if any(missing) else rounded


def rotate(x: Tensor) -> Tensor:
    """Multiply each 16 columns of `x` [N, K] by the random Hadamard matrix, in the dtype of `x`."""
    blocks = x.float().unflatten(-1, (-1, BLOCK))
    return (blocks @ hadamard(x.device)).flatten(-2).to(x.dtype)


@functools.cache
def hadamard(device: torch.device) -> Tensor:
    """Return the orthogonal matrix diag(signs) H / 4, float32 [16, 16]."""
    matrix = torch.ones((1, 1), device=device)
    for _ in range(4):
        top = torch.cat((matrix, matrix), 1)
        matrix = torch.cat((top, torch.cat((matrix, -matrix), 1)))
    return torch.tensor(_SIGNS, device=device).unsqueeze(1) * matrix / 4


def _by_tokens(x: Tensor, rules: Rules) -> Tensor:
    """Return `x` [T, F] as [F, T], zeros up to a multiple of 16, turned where the rules say so."""
    turned = F.pad(x.T, (0, -x.shape[0] % BLOCK))
    return rotate(turned) if rules.hadamard else turned


def _round_weight(weight: Tensor, rules: Rules) -> tuple[Tensor, Tensor]:
    """Return `weight` as the forward pass sees it, and as the gradient of inputs does."""
    along_inputs = along_outputs = weight
    tile = BLOCK if rules.weights_2d else 1
    if rules.forward:
        along_inputs = fake(weight, tile=tile)
    if rules.input_gradient:
        shared = rules.weights_2d and rules.forward
        along_outputs = along_inputs if shared else _round_outputs(weight, tile)
    return along_inputs, along_outputs


def _round_outputs(weight: Tensor, tile: int) -> Tensor:
    return fake(weight.mT.contiguous(), tile=tile).mT
