"""Rows of an embedding's table in one launch, zeros for words that another rank has.

An ordinary launch, which waits for the step before: so all later kernels of a step may read what that has written
before they wait (`kernels/dependent_launch.py`).
"""

import torch
import triton
import triton.language as tl

BLOCK = 2048  # values of a program


def embedding(input_ids: torch.Tensor, table: torch.Tensor, first: int = 0) -> torch.Tensor:
    """`[tokens]` int32 ids and a `[words, hidden]` table of the ids from `first` on to `[tokens, hidden]`."""
    words, width = table.shape
    out = table.new_empty(len(input_ids), width)
    block = min(BLOCK, triton.next_power_of_2(width))
    _embedding_kernel[(len(input_ids), triton.cdiv(width, block))](
        input_ids, table.contiguous(), out, first, words, width, BLOCK=block, num_warps=max(1, block // 256)
    )
    return out


@triton.jit(do_not_specialize=["first"])
def _embedding_kernel(input_ids, table, out, first, words, width, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(input_ids + token).to(tl.int64) - first
    inside = column < width
    values = tl.load(table + row * width + column, mask=inside & (row >= 0) & (row < words), other=0)
    tl.store(out + token * width + column, values, mask=inside)
