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
from trtbuild.kernels.processors import processors, shared_memory
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

    `unroll` times `k` channels are a step. Where `swap`, the weight is the first operand of tensor cores: from shared
    memory as it is, or from registers where it is converted. INT4's scales are those of sums, or with `scale_weight` of
    the weight, rounded to 16 bits: many rows have more sums than weights.
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
    sums = None if parts == 1 else torch.empty(parts, rows, out, dtype=torch.float32, device=device)
    _few_rows_product_kernel[row_tiles, blocks, parts](
        x.contiguous(), row_scale, weight, scales, zeros, bias,
        None if residual is None else residual.contiguous(),
        sums, None if parts == 1 else _counters(device), output, rows, columns, width, part_steps,
        GROUP=group or 0, BLOCK=block or 0, EVEN_K=width % step == 0,
        PER_ROW=row_scale is not None and row_scale.numel() > 1, SWIGLU=swiglu, PARTS=parts,
        BLOCK_M=tiles.m, BLOCK_N=tiles.n, BLOCK_K=tiles.k, UNROLL=tiles.unroll, SWAP=tiles.swap,
        SCALE_WEIGHT=tiles.scale_weight, STAGES=tiles.stages, LATE=weight.itemsize < 2,
        EVICT="evict_first" if row_tiles == 1 else "",
        num_warps=tiles.warps, **dependent_launch(device),
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
    if block is not None:
        if m > 64:
            return Tiles(m, 128, block, 3, warps=8, swap=True, scale_weight=True)
        if swiglu and m == 16 and width % (2 * block) == 0:
            return Tiles(m, 32, block, 3, unroll=2)
        return Tiles(m, 64, block, 4, swap=True)
    k = 256 // weight.itemsize
    if weight.itemsize < x.itemsize:
        if m > 64:
            return Tiles(64 if swiglu else m, 64, 64, 3 if swiglu else 4, swap=True)
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
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    gate = tl.minimum(n, columns - 1)
    # Of INT4 a step has words of four channels each, which lie a quarter of an interleaved block apart.
    QUARTER: tl.constexpr = BLOCK // 4
    K: tl.constexpr = BLOCK_K // 4 if INT4 else BLOCK_K
    k = tl.arange(0, K)
    begin = tl.program_id(2) * part_steps * UNROLL * BLOCK_K
    end = tl.minimum(begin + part_steps * UNROLL * BLOCK_K, width)
    # Tiles are [channels, rows] and [outputs, channels] where they swap, else [rows, channels], [channels, outputs].
    if SWAP:
        m_, k_x, n_, k_w, gate_ = m[None, :], k[:, None], n[:, None], k[None, :], gate[:, None]
    else:
        m_, k_x, n_, k_w, gate_ = m[:, None], k[None, :], n[None, :], k[:, None], gate[None, :]
    if INT4:
        stride = tl.multiple_of(width // 4, 8)  # blocks have 32 channels or more
        gate_tile = weight.to(tl.pointer_type(tl.int16)) + gate_.to(tl.int64) * stride + k_w
        if K > QUARTER:
            k_x = k_x // QUARTER * BLOCK + k_x % QUARTER
            k_w = k_w // QUARTER * BLOCK
    else:
        stride = width
        gate_tile = weight + gate_.to(tl.int64) * stride + k_w
    x_tile = x + m_ * width + k_x
    up_tile = gate_tile + columns.to(tl.int64) * stride
    if not LATE:
        trigger(DEPENDENT)
    wait(DEPENDENT)
    if SWAP:
        total = tl.zeros((BLOCK_N, BLOCK_M), tl.int32 if x.dtype.element_ty == tl.int8 else tl.float32)
    else:
        total = tl.zeros((BLOCK_M, BLOCK_N), tl.int32 if x.dtype.element_ty == tl.int8 else tl.float32)
    up = total
    if INT4:
        for first in tl.range(begin, end, UNROLL * BLOCK_K, num_stages=STAGES):
            for u in tl.static_range(UNROLL):
                start = first + u * BLOCK_K
                mask = m_ < rows
                inside = n_ < columns
                at = start // GROUP * out + n_
                if not EVEN_K:
                    mask = mask & (start + k_x < width)
                if K > QUARTER:
                    inside = inside & (start + k_w < width)
                    at = (start + k_w) // GROUP * out + n_
                a = tl.load(x_tile + start, mask=mask, other=0.0)
                b = tl.load(x_tile + (start + QUARTER), mask=mask, other=0.0)
                c = tl.load(x_tile + (start + 2 * QUARTER), mask=mask, other=0.0)
                d = tl.load(x_tile + (start + 3 * QUARTER), mask=mask, other=0.0)
                if EVEN_K:
                    q = tl.load(gate_tile + start // 4, eviction_policy=EVICT)
                else:
                    q = tl.load(gate_tile + start // 4, mask=start + k_w < width, other=0, eviction_policy=EVICT)
                total = _int4_step(total, a, b, c, d, q, scales, zeros, at, inside, SWAP, SCALE_WEIGHT)
                if SWIGLU:
                    if EVEN_K:
                        q = tl.load(up_tile + start // 4, eviction_policy=EVICT)
                    else:
                        q = tl.load(up_tile + start // 4, mask=start + k_w < width, other=0, eviction_policy=EVICT)
                    up = _int4_step(up, a, b, c, d, q, scales, zeros, at + columns, inside, SWAP, SCALE_WEIGHT)
    else:
        for start in tl.range(begin, end, BLOCK_K, num_stages=STAGES):
            if EVEN_K:
                a = tl.load(x_tile + start, mask=m_ < rows, other=0.0)
                q = tl.load(gate_tile + start, eviction_policy=EVICT)
            else:
                a = tl.load(x_tile + start, mask=(m_ < rows) & (start + k_x < width), other=0.0)
                q = tl.load(gate_tile + start, mask=start + k_w < width, other=0.0, eviction_policy=EVICT)
            total = _step(total, a, q, SWAP)
            if SWIGLU:
                if EVEN_K:
                    q = tl.load(up_tile + start, eviction_policy=EVICT)
                else:
                    q = tl.load(up_tile + start, mask=start + k_w < width, other=0.0, eviction_policy=EVICT)
                up = _step(up, a, q, SWAP)
    if LATE:
        trigger(DEPENDENT)
    total = total.to(tl.float32)
    up = up.to(tl.float32)
    mask = (m_ < rows) & (n_ < columns)
    if PARTS > 1:
        at = m_ * out + n_
        own = sums + tl.program_id(2) * rows * out + at
        tl.store(own, total, mask=mask)
        if SWIGLU:
            tl.store(own + columns, up, mask=mask)
        tl.debug_barrier()  # all threads have written before one counts the part
        counter = counters + (tl.program_id(1) * tl.num_programs(0) + tl.program_id(0))
        if tl.atomic_add(counter, 1, sem="acq_rel") == PARTS - 1:
            tl.store(counter, 0)
            total = tl.zeros_like(total)
            up = tl.zeros_like(up)
            for part in tl.static_range(PARTS):
                total += tl.load(sums + part * rows * out + at, mask=mask, other=0, cache_modifier=".cg")
                if SWIGLU:
                    up += tl.load(sums + part * rows * out + at + columns, mask=mask, other=0, cache_modifier=".cg")
            _finish(
                total, up, row_scale, scales, bias, residual, output, m, n, m_, n_, rows, columns,
                SWIGLU, PER_ROW, INT4, SWAP,
            )  # fmt: skip
    else:
        _finish(
            total, up, row_scale, scales, bias, residual, output, m, n, m_, n_, rows, columns,
            SWIGLU, PER_ROW, INT4, SWAP,
        )  # fmt: skip


@triton.jit
def _step(total, a, q, SWAP: tl.constexpr):
    return _dot(total, a, from_int8(q, a) if q.dtype != a.dtype else q, SWAP)


@triton.jit
def _int4_step(
    total, a, b, c, d, q, scales, zeros, at, inside, SWAP: tl.constexpr, SCALE_WEIGHT: tl.constexpr
):  # fmt: skip
    scale = tl.load(scales + at, mask=inside, other=0)
    zero = None
    if zeros is not None:
        zero = tl.load(zeros + at, mask=inside, other=0).to(a.dtype)
    e, f, g, h = from_nibbles(q, zero, a)
    if SCALE_WEIGHT:
        scale = scale.to(a.dtype)
        e, f, g, h = e * scale, f * scale, g * scale, h * scale
        part = total
    else:
        part = tl.zeros_like(total)
    part = _dot(_dot(_dot(_dot(part, a, e, SWAP), b, f, SWAP), c, g, SWAP), d, h, SWAP)
    if SCALE_WEIGHT:
        return part
    else:
        return total + part * scale


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
def _along_outputs(values, SWAP: tl.constexpr):
    return values[:, None] if SWAP else values[None, :]


@triton.jit
def _finish(
    total, up, row_scale, scales, bias, residual, output, m, n, m_, n_, rows, columns,
    SWIGLU: tl.constexpr, PER_ROW: tl.constexpr, INT4: tl.constexpr, SWAP: tl.constexpr,
):  # fmt: skip
    """Scales, bias, SwiGLU and residual, in float32, then the rounding."""
    inside = n < columns
    if row_scale is not None:
        if PER_ROW:
            r = tl.load(row_scale + m, mask=m < rows, other=0)
            r = r[None, :] if SWAP else r[:, None]
        else:
            r = tl.load(row_scale)
        total *= r
        up *= r
    total = _column(total, None if INT4 else scales, bias, n, inside, SWAP)
    if SWIGLU:
        up = _column(up, None if INT4 else scales, bias, n + columns, inside, SWAP)
        total = total * tl.sigmoid(total) * up
    mask = (m_ < rows) & (n_ < columns)
    at = m_ * columns + n_
    if residual is not None:
        total += tl.load(residual + at, mask=mask, other=0).to(tl.float32)
    tl.store(output + at, total.to(output.dtype.element_ty), mask=mask)


@triton.jit
def _column(total, scales, bias, n, inside, SWAP: tl.constexpr):
    if scales is not None:
        total *= _along_outputs(tl.load(scales + n, mask=inside, other=0), SWAP)
    if bias is not None:
        total += _along_outputs(tl.load(bias + n, mask=inside, other=0).to(tl.float32), SWAP)
    return total
