"""Sums over ranks that reach each other's memory, alone or with residual and RMSNorm, in one kernel a GPU.

    all_reduce(memory, x)                                     x.copy_(sum(of(rank, x).float() for rank in ranks))
    all_reduce_add_rms_norm(memory, x, residual, weight, eps) total = residual + sum(...), rounded once
                                                              total, total * rsqrt(mean(total^2) + eps) * weight

with equal bits on every rank, whose terms are added in the order of the ranks.

Small tensors go in words that carry the number of the call: one way over the link, and no fence. A norm needs its whole
row, so several programs, which all run at once, send a piece of it each and receive all of it. Larger tensors go in
rows with flags, a program each, of which more than run at once: so links and memory are busy at the same time. Between
more than two ranks large ones go in two shots: every rank adds up a share of the rows and sends out the sums.
"""

import torch
import triton
import triton.language as tl

from trtbuild.kernels.dependent_launch import dependent_launch, trigger, wait
from trtbuild.kernels.peer_memory import (
    CAPACITY,
    PROGRAMS,
    PeerMemory,
    end_call,
    next_call,
    receive_row,
    receive_words,
    send_row,
    send_words,
)
from trtbuild.kernels.processors import processors

IN_WORDS = 1 << 18  # bytes of the largest tensor that goes in words
IN_ONE_SHOT = 1 << 19  # and of the largest that goes in one shot between more than two ranks
PIECES = 2  # of a row that goes in words
FLAT = 2048  # values of a row where there is no norm
WARP = 1024  # values of a row with flags that a warp has
TYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


def all_reduce(memory: PeerMemory, x: torch.Tensor) -> torch.Tensor:
    """`x`, contiguous, float16, bfloat16 or float32, is written over."""
    flat = x.view(-1)
    for part in flat.split(min(CAPACITY // x.itemsize, PROGRAMS * FLAT)):
        _launch(memory, part, FLAT, part, part, part, part, 0.0, NORM=False)
    return x


def all_reduce_add_rms_norm(
    memory: PeerMemory, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """`x` and `residual` `[rows, hidden]`, `weight` `[hidden]`, of one dtype; `x`, contiguous, may be written over."""
    residual = residual.contiguous()
    total, normed = torch.empty_like(x), torch.empty_like(x)
    width = x.shape[1]
    tensors = (x, residual, total, normed)
    for a, b, c, d in zip(*(t.split(min(CAPACITY // (width * x.itemsize), PROGRAMS)) for t in tensors), strict=True):
        _launch(memory, a, width, b, weight, c, d, eps, NORM=True)
    return total, normed


def _launch(
    memory: PeerMemory,
    x: torch.Tensor,
    width: int,
    residual: torch.Tensor,
    weight: torch.Tensor,
    total: torch.Tensor,
    normed: torch.Tensor,
    eps: float,
    NORM: bool,
) -> None:
    rows = triton.cdiv(x.numel(), width)
    tensors = [x, residual, weight, total, normed]
    options = memory.layout | {"NORM": NORM} | dependent_launch(x.device)
    words = x.numel() // 2
    if x.dtype in TYPES and x.numel() % 2 == width % 2 == 0 and x.nbytes <= IN_WORDS and rows <= PROGRAMS:
        pairs = [t.view(torch.int32) for t in tensors]
        block = triton.next_power_of_2(width // 2)
        pieces = PIECES if NORM and block >= 64 * PIECES and rows * PIECES <= processors(x.device) else 1
        _all_reduce_words_kernel[(rows, pieces)](
            *pairs,
            memory.calls,
            memory.table,
            words,
            width // 2,
            eps,
            DTYPE=TYPES[x.dtype],
            BLOCK=block,
            PIECE=block // pieces,
            num_warps=min(16, max(1, block // 128)),
            **options,
        )
        return
    block = triton.next_power_of_2(width)
    _all_reduce_rows_kernel[(rows,)](
        *tensors,
        memory.calls,
        memory.table,
        x.numel(),
        width,
        eps,
        BLOCK=block,
        TWO_SHOT=memory.size > 2 and x.nbytes > IN_ONE_SHOT,
        num_warps=min(16, max(1, block // WARP)),
        **options,
    )


@triton.jit
def _wide(pairs, DTYPE: tl.constexpr):
    """Two 16-bit numbers in an int32 as two in float32."""
    low = (pairs & 0xFFFF).to(tl.uint16).to(DTYPE, bitcast=True)
    high = ((pairs >> 16) & 0xFFFF).to(tl.uint16).to(DTYPE, bitcast=True)
    return low.to(tl.float32), high.to(tl.float32)


@triton.jit
def _rounded(low, high, DTYPE: tl.constexpr):
    """And back."""
    low = low.to(DTYPE).to(tl.uint16, bitcast=True).to(tl.uint32)
    high = high.to(DTYPE).to(tl.uint16, bitcast=True).to(tl.uint32)
    return (low | (high << 16)).to(tl.int32, bitcast=True)


@triton.jit
def _all_reduce_words_kernel(
    x,
    residual,
    weight,
    total,
    normed,
    calls,
    table,
    length,
    width,
    eps,
    RANK: tl.constexpr,
    RANKS: tl.constexpr,
    WORDS: tl.constexpr,
    CAPACITY: tl.constexpr,
    PROGRAMS: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK: tl.constexpr,
    PIECE: tl.constexpr,
    NORM: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """Of pairs: `length` in all, `width` in a row."""
    trigger(DEPENDENT)
    row, piece, pieces = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    program, programs = row * pieces + piece, tl.num_programs(0) * pieces
    column = tl.arange(0, BLOCK)
    at = row * width + column
    inside = (column < width) & (at < length)
    if NORM:
        scale = tl.load(weight + column, mask=inside, other=0)
    wait(DEPENDENT)
    call = next_call(calls, program)
    own_column = piece * PIECE + tl.arange(0, PIECE)
    own_at = row * width + own_column
    own_inside = (own_column < width) & (own_at < length)
    sent = tl.load(x + own_at, mask=own_inside, other=0)
    for rank in tl.static_range(RANKS):
        if rank != RANK:
            send_words(sent, own_at, own_inside, call, table, rank, RANK, RANKS, WORDS)
    end_call(calls, call, program, programs, PROGRAMS)
    own = tl.load(x + at, mask=inside, other=0)
    if NORM:
        before = tl.load(residual + at, mask=inside, other=0)
    low = tl.zeros([BLOCK], tl.float32)
    high = tl.zeros([BLOCK], tl.float32)
    for rank in tl.static_range(RANKS):
        pairs = own
        if rank != RANK:
            pairs = receive_words(at, inside, call, table, rank, RANK, RANKS, WORDS)
        more_low, more_high = _wide(pairs, DTYPE)
        low += more_low
        high += more_high
    if NORM:
        more_low, more_high = _wide(before, DTYPE)
        both = _rounded(low + more_low, high + more_high, DTYPE)
        mine = inside & (column // PIECE == piece)
        tl.store(total + at, both, mask=mine)
        low, high = _wide(both, DTYPE)  # the norm is that of the sum as the next layer reads it
        factor = tl.rsqrt((tl.sum(low * low, 0) + tl.sum(high * high, 0)) / (2 * width) + eps)
        scale_low, scale_high = _wide(scale, DTYPE)
        tl.store(normed + at, _rounded(low * factor * scale_low, high * factor * scale_high, DTYPE), mask=mine)
    else:
        tl.store(x + at, _rounded(low, high, DTYPE), mask=inside)


@triton.jit
def _all_reduce_rows_kernel(
    x,
    residual,
    weight,
    total,
    normed,
    calls,
    table,
    length,
    width,
    eps,
    RANK: tl.constexpr,
    RANKS: tl.constexpr,
    WORDS: tl.constexpr,
    CAPACITY: tl.constexpr,
    PROGRAMS: tl.constexpr,
    BLOCK: tl.constexpr,
    TWO_SHOT: tl.constexpr,
    NORM: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """A row a program: while some wait for what others send, the next ones send."""
    trigger(DEPENDENT)
    row = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    at = row * width + column
    inside = (column < width) & (at < length)
    if NORM:
        scale = tl.load(weight + column, mask=column < width, other=0)
    wait(DEPENDENT)
    call = next_call(calls, row)
    own = tl.load(x + at, mask=inside, other=0)
    for rank in tl.static_range(RANKS):
        if rank != RANK:
            if TWO_SHOT:
                if row % RANKS == rank:
                    send_row(own, at, inside, row, call, table, rank, RANK, RANKS, WORDS, CAPACITY)
            else:
                send_row(own, at, inside, row, call, table, rank, RANK, RANKS, WORDS, CAPACITY)
    end_call(calls, call, row, tl.num_programs(0), PROGRAMS)
    if NORM:
        before = tl.load(residual + at, mask=inside, other=0)
    if TWO_SHOT:
        owner = row % RANKS
        if owner == RANK:
            value = _sum(own, at, inside, row, call, table, RANK, RANKS, WORDS, CAPACITY).to(own.dtype)
            for rank in tl.static_range(RANKS):
                if rank != RANK:
                    send_row(value, at, inside, row, call, table, rank, RANK, RANKS, WORDS, CAPACITY)
        else:
            value = receive_row(at, inside, row, call, table, owner, own.dtype, RANK, RANKS, WORDS, CAPACITY)
        value = value.to(tl.float32)
    else:
        value = _sum(own, at, inside, row, call, table, RANK, RANKS, WORDS, CAPACITY)
    if NORM:
        both = (value + before.to(tl.float32)).to(own.dtype)
        tl.store(total + at, both, mask=inside)
        value = both.to(tl.float32)  # the norm is that of the sum as the next layer reads it
        value *= tl.rsqrt(tl.sum(value * value, 0) / width + eps) * scale.to(tl.float32)
        tl.store(normed + at, value.to(own.dtype), mask=inside)
    else:
        tl.store(x + at, value.to(own.dtype), mask=inside)


@triton.jit
def _sum(
    own,
    at,
    inside,
    row,
    call,
    table,
    RANK: tl.constexpr,
    RANKS: tl.constexpr,
    WORDS: tl.constexpr,
    CAPACITY: tl.constexpr,
):
    """Of a row, in float32: this rank's and what the others send."""
    value = tl.zeros(own.shape, tl.float32)
    for rank in tl.static_range(RANKS):
        if rank == RANK:
            value += own.to(tl.float32)
        else:
            value += receive_row(at, inside, row, call, table, rank, own.dtype, RANK, RANKS, WORDS, CAPACITY).to(
                tl.float32
            )
    return value
