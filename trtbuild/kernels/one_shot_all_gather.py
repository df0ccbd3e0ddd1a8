"""What all ranks have, side by side, through each other's memory, in one kernel a GPU.

`all_gather(memory, x)` equals `torch.cat([of(rank, x) for rank in ranks], 1)` on every rank.
"""

import torch
import triton
import triton.language as tl

from trtbuild.kernels.dependent_launch import dependent_launch, trigger, wait
from trtbuild.kernels.peer_memory import (
    PROGRAMS,
    WORDS,
    PeerMemory,
    end_call,
    next_call,
    receive_words,
    send_words,
)

BLOCK = 1024  # values of a program


def takes(x: torch.Tensor) -> bool:
    """Whether they are of 4 bytes each, and few enough."""
    return x.itemsize == 4 and x.numel() <= WORDS and x.shape[0] * triton.cdiv(x.shape[1], BLOCK) <= PROGRAMS


def all_gather(memory: PeerMemory, x: torch.Tensor) -> torch.Tensor:
    """`[rows, n]`, contiguous, to `[rows, n * size]`."""
    rows, width = x.shape
    out = x.new_empty(rows, width * memory.size)
    _all_gather_kernel[(rows, triton.cdiv(width, BLOCK))](
        x.view(torch.int32),
        out.view(torch.int32),
        memory.calls,
        memory.table,
        width,
        **memory.layout,
        BLOCK=BLOCK,
        num_warps=8,
        **dependent_launch(x.device),
    )
    return out


@triton.jit
def _all_gather_kernel(
    x,
    out,
    calls,
    table,
    width,
    RANK: tl.constexpr,
    RANKS: tl.constexpr,
    WORDS: tl.constexpr,
    CAPACITY: tl.constexpr,
    PROGRAMS: tl.constexpr,
    BLOCK: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    trigger(DEPENDENT)
    row, pieces = tl.program_id(0), tl.num_programs(1)
    program, programs = row * pieces + tl.program_id(1), tl.num_programs(0) * pieces
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    at = row * width + column
    wait(DEPENDENT)
    call = next_call(calls, program)
    values = tl.load(x + at, mask=inside, other=0)
    for rank in tl.static_range(RANKS):
        if rank != RANK:
            send_words(values, at, inside, call, table, rank, RANK, RANKS, WORDS)
    end_call(calls, call, program, programs, PROGRAMS)
    for rank in tl.static_range(RANKS):
        if rank != RANK:
            values = receive_words(at, inside, call, table, rank, RANK, RANKS, WORDS)
            tl.store(out + (row * RANKS + rank) * width + column, values, mask=inside)
    own = tl.load(x + at, mask=inside, other=0)
    tl.store(out + (row * RANKS + RANK) * width + column, own, mask=inside)
