"""Products with a weight that is widened a block of outputs at a time, so that it is never held wide as a whole."""

from collections.abc import Callable, Sequence

import torch

from trtbuild.linear.cpu import cpu_linear

BLOCK_ELEMENTS = 1 << 20  # 4 MB in float32: stays in a core's share of the cache


def blockwise_linear(
    x: torch.Tensor,
    shape: Sequence[int],
    widen: Callable[[slice], torch.Tensor],
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """`x @ weight.T`, multiplied in float32, for a weight of `shape` `[out, in]`; `widen(rows)` gives `[rows, in]`
    float32.
    """
    x, (out, width) = x.float(), shape
    rows = max(1, BLOCK_ELEMENTS // width)
    if rows >= out:
        return cpu_linear(x, widen(slice(0, out))).to(dtype)
    result = x.new_empty(x.shape[0], out, dtype=dtype)
    for start in range(0, out, rows):
        block = slice(start, min(start + rows, out))
        result[:, block] = cpu_linear(x, widen(block))
    return result
