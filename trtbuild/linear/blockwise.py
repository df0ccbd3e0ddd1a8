"""Products with a weight that is widened a block of outputs at a time, so that it is never held wide as a whole."""

from collections.abc import Callable, Sequence

import torch

from trtbuild.linear.cpu import cpu_linear

BLOCK_ELEMENTS = 1 << 20  # 4 MB in float32: stays in a core's share of the cache


def blockwise_linear(
    x: torch.Tensor,
    shape: Sequence[int],
    widen: Callable[[slice], torch.Tensor],
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """`x @ weight.T` for a weight of `shape` `[out, in]`; `widen(rows)` gives `[rows, in]` of it in the dtype of `x`.

    That is one which the CPU multiplies (`tensors.cpu`). The result has it too, or `dtype`.
    """
    dtype, (out, width) = dtype or x.dtype, shape
    rows = max(1, BLOCK_ELEMENTS // width)
    if rows >= out:
        return cpu_linear(x, widen(slice(0, out))).to(dtype)
    result = x.new_empty(x.shape[0], out, dtype=dtype)
    for start in range(0, out, rows):
        block = slice(start, min(start + rows, out))
        result[:, block] = cpu_linear(x, widen(block))
    return result
