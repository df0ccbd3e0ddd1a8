"""Products with a weight that is widened a block of outputs at a time, so that it is never held wide as a whole."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

BLOCK_ELEMENTS = 1 << 20  # 4 MB in float32: stays in a core's share of the cache


def blockwise_linear(x: torch.Tensor, shape: Sequence[int], widen: Callable[[slice], torch.Tensor]) -> torch.Tensor:
    """`x @ weight.T` in float32 for a weight of `shape` `[out, in]`; `widen(rows)` gives `[rows, in]` float32."""
    x = x.float()
    result = x.new_empty(x.shape[0], shape[0])
    rows = max(1, BLOCK_ELEMENTS // shape[1])
    for start in range(0, shape[0], rows):
        block = slice(start, min(start + rows, shape[0]))
        result[:, block] = F.linear(x, widen(block))
    return result
