"""Matrix product of packed tokens with a weight, the same bits for a row whatever is beside it.

BLAS libraries choose another order of summation for a handful of rows than for many, so a token's
result would depend on what it was batched with. Rows are therefore padded to a multiple of
`ROW_TILE`, from where on the order is the same for every row (tests/ops/test_row_invariance.py).
"""

import torch.nn.functional as F
from torch import Tensor

ROW_TILE = 8


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return `x @ weight.T + bias`.

    `x` [T, in] decides the dtype of the result; `weight` [out, in] and `bias` [out] are converted
    to it. Returns [T, out].
    """
    num_rows = x.shape[0]
    weight = weight.to(x.dtype)
    pad = -num_rows % ROW_TILE
    if pad:
        x = F.pad(x, (0, 0, 0, pad))
    y = F.linear(x, weight)
    if pad:
        y = y[:num_rows]
    return y if bias is None else y + bias.to(y.dtype)
