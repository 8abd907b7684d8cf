"""GPTQ: round a matrix column by column, pushing each column's error onto those not yet rounded.

The error that counts is that of the outputs over the calibration inputs, ||(W - Q) X||^2, whose
curvature is the Hessian X X^T. Block scales are chosen when rounding reaches a block, from weights
that carry the errors so far. The codes are ordinary NVFP4 codes that every reader takes.
Source: arXiv 2210.17323 (GPTQ), 2509.23202 (in NVFP4).
"""

import torch
from torch import Tensor

from aprium.base.errors import QuantizeError
from aprium.ops import fp8, nvfp4
from aprium.ops.nvfp4 import BLOCK, Encoded, Rule

_LAZY = 128  # columns whose errors are gathered before they reach the rest


def hessian(x: Tensor) -> Tensor:
    """Return the mean of x x^T over the rows of `x` [T, K], float32 [K, K]."""
    x = x.float()
    return (x.T @ x) / max(x.shape[0], 1)


def floor_importance(importance: Tensor) -> Tensor:
    """Return `importance` [*lead, K] with no column below a thousandth of the mean.

    An input that samples did not show may come all the same.
    """
    return importance.clamp(min=1e-3 * importance.mean(-1, keepdim=True))


def gptq(
    weight: Tensor,
    curvature: Tensor,
    rule: Rule = "max",
    *,
    amax: Tensor | None = None,
    damping: float = 0.01,
    name: str = "tensor",
) -> Encoded:
    """Encode `weight` [N, K] for inputs with the Hessian `curvature` float32 [K, K].

    `rule` chooses block scales as in `nvfp4.encode`, weighing columns by the Hessian's diagonal
    where it searches; `amax` float32 [] sets the global scale. `damping` is added to the diagonal
    as a share of its mean, ten times as much as often as the matrix is still not positive definite.
    Columns whose input was always zero are rounded to nearest. Raises QuantizeError as `encode`
    does, and for a Hessian that is not finite.
    """
    found = nvfp4.check(weight, name)
    amax = found if amax is None else amax.float()
    inverse = _inverse_factor(curvature, damping, name)
    importance = floor_importance(curvature.diagonal().float())
    work = weight.float().clone()
    result = nvfp4.encode(work, rule, amax=amax, name=name)
    columns = work.shape[1]
    for begin in range(0, columns, _LAZY):
        end = min(begin + _LAZY, columns)
        errors = torch.empty_like(work[:, begin:end])
        for block in range(begin, end, BLOCK):
            _round_block(work, result, inverse, errors, block, begin, end, amax, rule, importance)
        work[:, end:] -= errors @ inverse[begin:end, end:]
    return result


def _round_block(
    work: Tensor,
    result: Encoded,
    inverse: Tensor,
    errors: Tensor,
    block: int,
    begin: int,
    end: int,
    amax: Tensor,
    rule: Rule,
    importance: Tensor,
) -> None:
    """Round 16 columns of `work` into `result`; columns up to `end` take on the errors at once."""
    columns = slice(block, block + BLOCK)
    weights = None if rule == "max" else importance[columns]
    local = nvfp4.encode(work[:, columns], rule, amax=amax, importance=weights)
    factor = fp8.to_float(local.scale) * local.scale_2  # [N, 1]
    codes = torch.empty_like(work[:, columns], dtype=torch.uint8)
    for i in range(BLOCK):
        column, at = block + i, block + i - begin
        code, value = nvfp4.round_to(work[:, column], factor[:, 0])
        codes[:, i] = code
        error = (work[:, column] - value) / inverse[column, column]
        work[:, column:end] -= error.unsqueeze(1) * inverse[column, column:end]
        errors[:, at] = error
    result.packed[:, block // 2 : block // 2 + BLOCK // 2] = codes[:, ::2] | codes[:, 1::2] << 4
    result.scale.view(torch.uint8)[:, block // BLOCK] = local.scale.view(torch.uint8)[:, 0]


def _inverse_factor(curvature: Tensor, damping: float, name: str) -> Tensor:
    """Return the upper Cholesky factor of the damped Hessian's inverse."""
    if not bool(curvature.isfinite().all()):
        raise QuantizeError(
            f"{name}: its calibration inputs are too large or not numbers: use method rtn for it"
        )
    matrix = curvature.double().clone()
    diagonal = matrix.diagonal()
    diagonal[diagonal == 0] = 1
    mean = diagonal.mean()
    while True:
        diagonal += damping * mean
        factor, failed = torch.linalg.cholesky_ex(matrix)
        if not int(failed):
            inverse = torch.cholesky_inverse(factor)
            upper, failed = torch.linalg.cholesky_ex(inverse, upper=True)
            if not int(failed):
                return upper.float()
        damping *= 10
