"""Products of few rows with a weight in any format: a decode step reads weights, little else.

`product(x, weight, ...)` equals, rounded once, the norm and the quantization of activations before it apart,

    y = F.linear(x, weight of any format, bias)
    gate, up = y.chunk(2, -1); y = silu(gate) * up                          with `swiglu`
    y + residual

A program multiplies all rows (at most `MAX_TILE` of them) with `BLOCK_N` outputs, streaming their weights once through
shared memory into tensor cores; with SwiGLU, an output's gate and up rows. Where that makes too few programs for the
GPU, the channels are split into parts; the last program of an output to finish adds up the float32 sums of all parts,
always in the same order. Shapes and GPU alone decide, so results are always the same, and a row's do not depend on the
others.

INT4 weights are in the layout of `trtbuild.kernels.widen`.
"""

from dataclasses import dataclass, replace
from functools import cache

import torch
import triton
import triton.language as tl

from trtbuild.kernels import has_type
from trtbuild.kernels.add_rms_norm import norm_rows
from trtbuild.kernels.conversion import from_int8, from_nibbles
from trtbuild.kernels.dependent_launch import dependent_launch, trigger, wait
from trtbuild.kernels.processors import processors, shared_memory, side_by_side
from trtbuild.kernels.quantize_rows import quantize_rows
from trtbuild.kernels.widen import MIN_BLOCK, NATURAL_BLOCK, int4_block

# Of INT8 and INT4 weights, 512 rows are as fast once the weight is widened, and 256 are not.
MAX_ROWS = {"16bit": 64, "8bit": 64, "weight-only": 256}
MAX_TILE = 128  # rows of a program
MIN_CHANNELS = 1024  # of a part of a sum; a shorter part costs more in adding than it gains
SHARED_MEMORY = 220 << 10  # bytes of a multiprocessor, for programs that run side by side on it
MAX_BLOCKS = 1 << 16  # of outputs of a product that is split


@dataclass(frozen=True)
class Tiles:
    """Sizes of a program's work: rows, outputs, channels, steps ahead that are read; and its warps.

    `unroll` times `k` channels are a step. Where `swap`, as always in INT4, the weight is the first operand of tensor
    cores: from shared memory as it is, or from registers where it is converted. INT4's scales are those of sums, or
    with `scale_weight` of the weight, rounded to 16 bits: many rows have more sums than weights.
    """

    m: int
    n: int
    k: int
    stages: int
    warps: int = 4
    swap: bool = False
    unroll: int = 1
    scale_weight: bool = False


def product(
    x: torch.Tensor,
    weight: torch.Tensor,
    scales: torch.Tensor | None = None,
    zeros: torch.Tensor | None = None,
    input_scale: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    *,
    activations: str = "16bit",
    norm: torch.Tensor | None = None,
    eps: float = 0.0,
    swiglu: bool = False,
    residual: torch.Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """`[rows, in]` float16 or bfloat16 to `[rows, out]` in `dtype` (default: that of `x`); `[rows, out / 2]` of SwiGLU.

    `weight` `[out, in]` in the dtype of `x`, int8 or float8_e4m3fn, with `scales` float32 `[out]`; or INT4, with all
    three of `interleave_int4`. `activations`: "16bit", or in 8 bits with one `input_scale` float32 `[1]` ("static") or
    a scale a row ("token"). `norm` `[in]` and `eps`: of an RMSNorm before it. `swiglu`: the weight's first half are
    gate rows, the second up rows. `residual` is added last.
    """
    dtype, device = dtype or x.dtype, x.device
    quantize = None if activations == "16bit" else (weight.dtype, input_scale)
    row_scale = None
    if norm is not None:
        _, x, row_scale = norm_rows(x, norm, eps, quantize=quantize, late=weight.dtype == torch.uint8)
    elif quantize:
        x, row_scale = quantize_rows(x, input_scale, weight.dtype)
    (rows, width), out = x.shape, len(weight)
    columns = out // 2 if swiglu else out
    group = width // len(scales) if weight.dtype == torch.uint8 and scales is not None else None
    block = None if group is None else int4_block(group)
    tiles = _fitting(_tiles(x, weight, swiglu, block), x, weight, swiglu)
    step = tiles.k * tiles.unroll
    blocks, row_tiles, steps = triton.cdiv(columns, tiles.n), triton.cdiv(rows, tiles.m), triton.cdiv(width, step)
    part_steps = triton.cdiv(steps, _parts(tiles, blocks * row_tiles, x, weight, swiglu))
    parts = triton.cdiv(steps, part_steps)
    output = torch.empty(rows, columns, dtype=dtype, device=device)
    padded = parts, rows, blocks * tiles.n * (1 + swiglu)
    sums = None if parts == 1 else torch.empty(padded, dtype=torch.float32, device=device)
    _few_rows_product_kernel[row_tiles, blocks, parts](
        x.contiguous(), row_scale, weight, scales, zeros, bias,
        None if residual is None else residual.contiguous(),
        sums, None if parts == 1 else _counters(device), output, rows, columns, width, part_steps,
        GROUP=group or 0, BLOCK=block or 0, EVEN_K=width % step == 0,
        PER_ROW=row_scale is not None and row_scale.numel() > 1, SWIGLU=swiglu, PARTS=parts,
        BLOCK_M=tiles.m, BLOCK_N=tiles.n, BLOCK_K=tiles.k, UNROLL=tiles.unroll, SWAP=tiles.swap,
        SCALE_WEIGHT=tiles.scale_weight, STAGES=tiles.stages, EVICT="evict_first" if row_tiles == 1 else "",
        LATE=weight.itemsize < 2, num_warps=tiles.warps, **dependent_launch(device),
    )  # fmt: skip
    return output


def takes(
    x: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor | None, zeros: torch.Tensor | None, activations: str
) -> bool:
    """Whether `product` does; and is the fastest there is, as far as rows decide."""
    if x.dtype not in (torch.float16, torch.bfloat16) or not has_type(x.device, weight.dtype):
        return False
    if weight.dtype == torch.uint8 and (scales is None or int4_block(x.shape[1] // len(scales)) == NATURAL_BLOCK):
        return False
    kind = "16bit" if weight.dtype == x.dtype else "weight-only" if activations == "16bit" else "8bit"
    return len(x) <= MAX_ROWS[kind]


def _tiles(x: torch.Tensor, weight: torch.Tensor, swiglu: bool, block: int | None) -> Tiles:
    """What was fastest for LLaMA-7B on an H100; `block` is the number of channels of INT4's interleaved blocks.

    Two or more programs share a multiprocessor. Of a row of weights they read 256 bytes at a time, where enough rows of
    activations are not in the way.
    """
    rows, width = x.shape
    m = min(MAX_TILE, max(16, triton.next_power_of_2(rows)))
    if block == MIN_BLOCK:  # two of them, with scales of their own, for 16 words
        return Tiles(m, 64, 64, 3, swap=True, scale_weight=True)

    def count(n: int) -> int:
        return triton.cdiv(rows, m) * triton.cdiv(len(weight), n)

    if block is not None:
        if m > 64:  # with more steps ahead where a program is alone on a multiprocessor
            stages = 4 if count(128) <= processors(x.device) else 3
            return Tiles(m, 64 if swiglu else 128, block, stages, warps=8, swap=True, scale_weight=True)
        if swiglu and m <= 32:
            even = m == 16 and width % (2 * block) == 0
            return Tiles(m, 32, block, 3 if even else 4, swap=True, unroll=2 if even else 1)
        return Tiles(m, 64, block, 4, swap=True)
    k = 256 // weight.itemsize
    if weight.itemsize < x.itemsize:
        if m > 64:
            three = swiglu or side_by_side(count(64), processors(x.device)) == 3
            return Tiles(64 if swiglu else m, 64, 64, 3 if three else 4, swap=True)
        if m > 32:
            return Tiles(m, 64, 128, 3 if swiglu else 4, swap=True)
        if not swiglu:
            return Tiles(m, 64, k, 3)
        # With four stages two programs share a multiprocessor, with three three, if of 16 rows: two parts fit then.
        share = triton.cdiv(len(weight) // 2, 32) / processors(x.device)
        return Tiles(m, 32, k, 3 if m == 16 and 1 < share <= 1.5 else 4)
    if swiglu:
        return Tiles(m, 64, 128, 4, swap=True) if m > 32 or weight.itemsize > 1 else Tiles(m, 32, k, 4)
    return Tiles(m, 64, k, 4 if m <= 32 or weight.itemsize > 1 else 3, swap=True)


def _fitting(tiles: Tiles, x: torch.Tensor, weight: torch.Tensor, swiglu: bool) -> Tiles:
    """With no more steps ahead than shared memory holds, of which other GPUs than H100 have less."""
    most = int(shared_memory(x.device) / _bytes_of_step(tiles, x, weight, swiglu))
    return replace(tiles, stages=max(1, min(tiles.stages, most)))


def _bytes_of_step(tiles: Tiles, x: torch.Tensor, weight: torch.Tensor, swiglu: bool) -> float:
    """Of shared memory, for what is read of both."""
    bytes_of_weight = tiles.n * (1 + swiglu) * (0.5 if weight.dtype == torch.uint8 else weight.itemsize)
    return tiles.unroll * tiles.k * (tiles.m * x.itemsize + bytes_of_weight)


def _parts(tiles: Tiles, programs: int, x: torch.Tensor, weight: torch.Tensor, swiglu: bool) -> int:
    """Into how many a sum is split, so that all programs run side by side and fill the GPU."""
    own = tiles.stages * _bytes_of_step(tiles, x, weight, swiglu)
    there = min(SHARED_MEMORY, shared_memory(x.device))
    resident = processors(x.device) * max(1, min(16 // tiles.warps, int(there / own)))
    return max(1, min(resident // programs, x.shape[1] // MIN_CHANNELS))


@cache
def _counters(device: torch.device) -> torch.Tensor:
    """Parts of each block of outputs that have finished: zeros between launches, which follow one another."""
    return torch.zeros(MAX_BLOCKS, dtype=torch.int32, device=device)


@triton.jit(do_not_specialize=["rows", "part_steps"])
def _few_rows_product_kernel(
    x, row_scale, weight, scales, zeros, bias, residual, sums, counters, output, rows, columns, width, part_steps,
    GROUP: tl.constexpr, BLOCK: tl.constexpr, EVEN_K: tl.constexpr, PER_ROW: tl.constexpr, SWIGLU: tl.constexpr,
    PARTS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, UNROLL: tl.constexpr,
    SWAP: tl.constexpr, SCALE_WEIGHT: tl.constexpr, STAGES: tl.constexpr, EVICT: tl.constexpr, LATE: tl.constexpr,
    DEPENDENT: tl.constexpr,
):  # fmt: skip
    INT4: tl.constexpr = GROUP > 0
    out = columns * 2 if SWIGLU else columns
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    # Gate and up rows are in one tile; of many rows in two, which was faster (INT8 of 64 rows by 4%), but for INT4.
    APART: tl.constexpr = SWIGLU and not INT4 and BLOCK_M > 32
    N: tl.constexpr = 2 * BLOCK_N if SWIGLU and not APART else BLOCK_N
    i = tl.arange(0, N)
    if SWIGLU and not APART:  # eight gate rows, then the up rows of the same outputs: a thread has both
        n = tl.program_id(1) * BLOCK_N + i // 16 * 8 + i % 8
        up = i // 8 % 2 * columns
    else:
        n = tl.program_id(1) * BLOCK_N + i
        up = 0
    row = n + up
    k = tl.arange(0, BLOCK_K)
    word = k
    if INT4:  # a word has four channels, a quarter of an interleaved block apart: all first ones, all second ones, ...
        QUARTER: tl.constexpr = BLOCK // 4
        WORDS: tl.constexpr = BLOCK_K // 4
        word = tl.arange(0, WORDS)
        if WORDS > QUARTER:
            k = k % WORDS // QUARTER * BLOCK + k // WORDS * QUARTER + k % QUARTER
    begin = tl.program_id(2) * part_steps * UNROLL * BLOCK_K
    end = tl.minimum(begin + part_steps * UNROLL * BLOCK_K, width)
    # Tiles are [channels, rows] and [outputs, channels] where they swap, else [rows, channels], [channels, outputs].
    if SWAP:
        m_, k_x, i_, k_w = m[None, :], k[:, None], i[:, None], word[None, :]
    else:
        m_, k_x, i_, k_w = m[:, None], k[None, :], i[None, :], word[:, None]
    there = (tl.minimum(n, columns - 1) + up).to(tl.int64)
    x_tile = x + m_ * width + k_x
    if INT4:
        stride = tl.multiple_of(width // 4, 8)  # blocks have 32 channels or more
        weight_tile = weight.to(tl.pointer_type(tl.int16)) + _along_rows(there, SWAP) * stride + k_w
        k_w = k_w // QUARTER * BLOCK
    else:
        weight_tile = weight + _along_rows(there, SWAP) * width + k_w
    up_tile = weight_tile + columns.to(tl.int64) * width  # where apart
    if not LATE:
        trigger(DEPENDENT)
    wait(DEPENDENT)
    shape: tl.constexpr = (N, BLOCK_M) if SWAP else (BLOCK_M, N)
    total = tl.zeros(shape, tl.int32 if x.dtype.element_ty == tl.int8 else tl.float32)
    total_up = total
    for first in tl.range(begin, end, UNROLL * BLOCK_K, num_stages=STAGES):
        for u in tl.static_range(UNROLL):
            start = first + u * BLOCK_K
            along = start // 4 if INT4 else start
            if EVEN_K:
                a = tl.load(x_tile + start, mask=m_ < rows, other=0.0)
                q = tl.load(weight_tile + along, eviction_policy=EVICT)
            else:
                a = tl.load(x_tile + start, mask=(m_ < rows) & (start + k_x < width), other=0.0)
                q = tl.load(weight_tile + along, mask=start + k_w < width, other=0.0, eviction_policy=EVICT)
            if INT4:
                inside = _along_rows(n < columns, SWAP)
                of_group = start // GROUP * out
                if WORDS > QUARTER:
                    inside = inside & (start + k_w < width)
                    of_group = (start + k_w) // GROUP * out
                at = of_group + _along_rows(row, SWAP)
                total = _int4_step(total, a, q, scales, zeros, at, inside, SCALE_WEIGHT)
            else:
                total = _dot(total, a, from_int8(q, a) if q.dtype != a.dtype else q, SWAP)
                if APART:
                    if EVEN_K:
                        q = tl.load(up_tile + along, eviction_policy=EVICT)
                    else:
                        q = tl.load(up_tile + along, mask=start + k_w < width, other=0.0, eviction_policy=EVICT)
                    total_up = _dot(total_up, a, from_int8(q, a) if q.dtype != a.dtype else q, SWAP)
    if LATE:
        trigger(DEPENDENT)
    total, total_up = total.to(tl.float32), total_up.to(tl.float32)
    if PARTS > 1:
        OWN: tl.constexpr = 2 * N if APART else N
        across = tl.num_programs(1) * OWN
        at = m_ * across + (tl.program_id(1) * OWN + i_)
        own = sums + tl.program_id(2) * rows * across + at
        tl.store(own, total, mask=m_ < rows)
        if APART:
            tl.store(own + N, total_up, mask=m_ < rows)
        tl.debug_barrier()  # all threads have written before one counts the part
        counter = counters + (tl.program_id(1) * tl.num_programs(0) + tl.program_id(0))
        if tl.atomic_add(counter, 1, sem="acq_rel") == PARTS - 1:
            tl.store(counter, 0)
            total, total_up = tl.zeros_like(total), tl.zeros_like(total)
            for part in tl.static_range(PARTS):
                of_part = sums + part * rows * across + at
                total += tl.load(of_part, mask=m_ < rows, other=0, cache_modifier=".cg")
                if APART:
                    total_up += tl.load(of_part + N, mask=m_ < rows, other=0, cache_modifier=".cg")
            _finish(
                total, total_up, row_scale, None if INT4 else scales, bias, residual, output, m, row, n < columns, rows,
                columns, SWIGLU, APART, PER_ROW, SWAP, BLOCK_N,
            )  # fmt: skip
    else:
        _finish(
            total, total_up, row_scale, None if INT4 else scales, bias, residual, output, m, row, n < columns, rows,
            columns, SWIGLU, APART, PER_ROW, SWAP, BLOCK_N,
        )  # fmt: skip


@triton.jit
def _int4_step(total, x, q, scales, zeros, at, inside, SCALE_WEIGHT: tl.constexpr):
    """One dot of a step: the tensor cores' sums are waited for once."""
    scale = tl.load(scales + at, mask=inside, other=0)
    zero = None
    if zeros is not None:
        zero = tl.load(zeros + at, mask=inside, other=0).to(x.dtype)
    a, b, c, d = from_nibbles(q, zero, x)
    if SCALE_WEIGHT:
        scale = scale.to(x.dtype)
        return _dot(total, x, _side_by_side(a * scale, b * scale, c * scale, d * scale), True)
    else:
        return total + _dot(tl.zeros_like(total), x, _side_by_side(a, b, c, d), True) * scale


@triton.jit
def _side_by_side(a, b, c, d):
    """Four tiles `[rows, columns]` as one, whose threads have what they had."""
    four = tl.permute(tl.join(tl.join(a, c), tl.join(b, d)), (0, 2, 3, 1))
    return tl.reshape(four, (a.shape[0], 4 * a.shape[1]))


@triton.jit
def _dot(total, x, weight, SWAP: tl.constexpr):
    left, right = x, weight
    if SWAP:
        left, right = weight, x
    if left.dtype == tl.float8e4nv:  # tensor cores keep 14 bits of the sums of FP8 products
        terms: tl.constexpr = min(128, left.shape[1])
        return tl.dot(left, right, total, max_num_imprecise_acc=terms)
    else:
        return tl.dot(left, right, total, out_dtype=total.dtype)


@triton.jit
def _along_rows(values, SWAP: tl.constexpr):
    """What belongs to rows of the weight."""
    return values[:, None] if SWAP else values[None, :]


@triton.jit
def _finish(
    total, total_up, row_scale, scales, bias, residual, output, m, row, inside, rows, columns,
    SWIGLU: tl.constexpr, APART: tl.constexpr, PER_ROW: tl.constexpr, SWAP: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Scales, bias, SwiGLU and residual, in float32, then the rounding."""
    M: tl.constexpr = m.shape[0]
    total = _scaled(total, row_scale, scales, bias, m, rows, row, inside, PER_ROW, SWAP)
    if SWIGLU:
        if APART:
            gate = total
            up = _scaled(total_up, row_scale, scales, bias, m, rows, row + columns, inside, PER_ROW, SWAP)
        elif SWAP:
            gate, up = tl.split(tl.permute(tl.reshape(total, (BLOCK_N // 8, 2, 8, M)), (0, 2, 3, 1)))
        else:
            gate, up = tl.split(tl.permute(tl.reshape(total, (M, BLOCK_N // 8, 2, 8)), (0, 1, 3, 2)))
        total = tl.reshape(gate * tl.sigmoid(gate) * up, (BLOCK_N, M) if SWAP else (M, BLOCK_N))
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_, n_ = (m[None, :], n[:, None]) if SWAP else (m[:, None], n[None, :])
    mask, at = (m_ < rows) & (n_ < columns), m_ * columns + n_
    if residual is not None:
        total += tl.load(residual + at, mask=mask, other=0).to(tl.float32)
    tl.store(output + at, total.to(output.dtype.element_ty), mask=mask)


@triton.jit
def _scaled(total, row_scale, scales, bias, m, rows, row, inside, PER_ROW: tl.constexpr, SWAP: tl.constexpr):
    """With the scales of activations and weights, and the bias."""
    if row_scale is not None:
        if PER_ROW:
            r = tl.load(row_scale + m, mask=m < rows, other=0)
            total *= r[None, :] if SWAP else r[:, None]
        else:
            total *= tl.load(row_scale)
    if scales is not None:
        total *= _along_rows(tl.load(scales + row, mask=inside, other=0), SWAP)
    if bias is not None:
        total += _along_rows(tl.load(bias + row, mask=inside, other=0).to(tl.float32), SWAP)
    return total
