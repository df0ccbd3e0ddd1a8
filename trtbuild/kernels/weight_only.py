"""Products of a few rows of 16-bit activations with an INT8 or INT4 weight: a decode step reads weights, little else.

`weight_only_linear(x, weight, scales, zeros, bias)` equals `F.linear(x, widen(weight, scales, zeros, x.dtype), bias)`
(but that the weight is not rounded to 16 bits), and `widen` equals, for weights as checkpoints hold them,

    weight * scales[:, None]                                    INT8: `[out, in]` int8, scales float32 `[out]`
    trtbuild.linear.int4.dequantize(weight, scales, zeros)      INT4: `[out, in / 2]` uint8, scales `[out, groups]`

A program multiplies all rows with `BLOCK_N` outputs, streaming their weights once through shared memory into tensor
cores. Where that makes too few programs for the GPU, the channels are split into parts, whose float32 sums a second,
small kernel adds, always in the same order ("split-K"). Shapes and GPU alone decide, so results are always the same.

INT4 weights are kept in the order of `interleave_int4`, which makes both nibbles of neighbouring bytes neighbouring
channels; scales and zeros are transposed, `[groups, out]`, to be read along with a block of outputs. Zeros are float32:
fewer than the four bytes of an asynchronous copy would not be prefetched, and each step would wait for them.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from trtbuild.kernels.conversion import from_int8, from_nibbles
from trtbuild.kernels.processors import processors

MAX_ROWS = 64  # of a product that streams the weight; for more rows a 16-bit copy and cuBLAS are faster
MIN_STEPS = 4  # of a part of a sum; a shorter part costs more in adding than it gains
WIDE_OUT = 16384  # INT8: more outputs than these are enough programs also in blocks of 64
MIN_BLOCK, MAX_BLOCK = 32, 128  # INT4: channels of one step; an interleaved block lies within one group
NATURAL_BLOCK = 2  # INT4 as checkpoints hold it: for groups that the kernel does not take


def weight_only_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """`[rows, in]` to `[rows, out]`, both float16 or bfloat16.

    `weight` int8 `[out, in]` with `scales` float32 `[out]`; or all three of `interleave_int4`.
    """
    (rows, width), out = x.shape, len(weight)
    int4 = weight.dtype == torch.uint8
    block = _block(width // len(scales)) if int4 else None
    if rows > MAX_ROWS or x.dtype == torch.float32 or block == NATURAL_BLOCK:
        return F.linear(x, widen(weight, scales, zeros, x.dtype), bias)
    x = x.contiguous()
    tiles, step = _tiles(rows, out, width, block)
    blocks, steps = triton.cdiv(out, tiles["BLOCK_N"]), triton.cdiv(width, step)
    resident = (3 if rows <= 32 else 2) * processors(x.device)  # programs that shared memory and registers let run
    part_steps = triton.cdiv(steps, max(1, min(resident // blocks, steps // MIN_STEPS)))
    parts = triton.cdiv(steps, part_steps)
    output = x.new_empty(rows, out)
    sums, sums_bias = (output, bias) if parts == 1 else (x.new_empty(parts, rows, out, dtype=torch.float32), None)
    if block is not None:
        sizes = rows, out, weight.shape[1], part_steps
        options: dict[str, int] = {"GROUP_BLOCKS": width // len(scales) // block, "BLOCK_K": block} | tiles
        _int4_kernel[blocks, parts](x, weight, scales, zeros, sums_bias, sums, *sizes, **options)
    else:
        options = {"EVEN_K": width % step == 0} | tiles
        _int8_kernel[blocks, parts](x, weight, scales, sums_bias, sums, rows, out, width, part_steps, **options)
    if parts > 1:
        grid = (triton.cdiv(rows * out, 128),)
        _add_kernel[grid](sums, bias, output, rows * out, out, PARTS=parts, BLOCK=128)
    return output


def _tiles(rows: int, out: int, width: int, block: int | None) -> tuple[dict[str, int], int]:
    """Sizes of one program's work, and channels of one step of it: what was fastest for LLaMA-7B on an H100.

    `block` is the number of channels of the weight's interleaved blocks (None: INT8).
    """
    tiles = {"BLOCK_M": max(16, triton.next_power_of_2(rows)), "num_warps": 4}
    if block is None:
        if rows > 32:
            return tiles | {"BLOCK_N": 64, "BLOCK_K": 128, "STAGES": 4}, 128
        narrow = out <= WIDE_OUT
        return tiles | {"BLOCK_N": 32 if narrow else 64, "BLOCK_K": 256, "STAGES": 4 if narrow else 3}, 256
    if rows > 32:
        return tiles | {"BLOCK_N": 128, "UNROLL": 1, "STAGES": 4}, block
    unroll = 1 if width // block % 2 else 2
    return tiles | {"BLOCK_N": 64, "UNROLL": unroll, "STAGES": 3}, unroll * block


def widen(weight: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """The weight that the arguments of `weight_only_linear` stand for: `[out, in]` in `dtype`."""
    out = len(weight)
    if weight.dtype == torch.int8:
        wide = torch.empty(weight.shape, dtype=dtype, device=weight.device)
        grid = (triton.cdiv(out, 16), triton.cdiv(weight.shape[1], 512))
        _widen_int8_kernel[grid](weight, scales, wide, out, weight.shape[1], BLOCK_N=16, BLOCK_K=512)
        return wide
    width = 2 * weight.shape[1]
    wide = torch.empty(out, width, dtype=dtype, device=weight.device)
    block = _block(width // len(scales))
    group_blocks = width // len(scales) // block
    grid = (triton.cdiv(out, 64), width // block)
    _widen_int4_kernel[grid](weight, scales, zeros, wide, out, width, group_blocks, BLOCK_N=64, BLOCK_K=block)
    return wide


def interleave_int4(
    weight: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Weight uint8 `[out, in / 2]`, scales and zeros `[out, groups]`, as `weight_only_linear` wants them.

    Each group is cut into blocks of up to 128 channels. Byte `i` of a block of `n` channels holds channel `i` in its
    low nibble and channel `i + n / 2` in its high one, both with 8 added so that they are not negative.
    """
    block = _block(2 * weight.shape[1] // scales.shape[1])
    nibbles = torch.stack((weight & 15, weight >> 4), -1).flatten(1) ^ 8
    low, high = nibbles.unflatten(1, (-1, 2, block // 2)).unbind(2)
    packed = (low | high << 4).flatten(1)
    return packed, scales.t().contiguous(), None if zeros is None else zeros.t().float().contiguous()


def _block(group_size: int) -> int:
    """Channels of an interleaved block: the largest power of two that divides a group and that the kernel takes."""
    block = min(group_size & -group_size, MAX_BLOCK)
    return block if block >= MIN_BLOCK else NATURAL_BLOCK


@triton.jit(do_not_specialize=["rows", "part_steps"])
def _int8_kernel(
    x, weight, scales, bias, output, rows, out, width, part_steps,
    EVEN_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    m = tl.arange(0, BLOCK_M)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    x_tile = x + m[:, None] * width + k[None, :]
    weight_tile = weight + tl.minimum(n, out - 1).to(tl.int64)[None, :] * width + k[:, None]
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    begin = tl.program_id(1) * part_steps * BLOCK_K
    end = tl.minimum(begin + part_steps * BLOCK_K, width)
    for start in tl.range(begin, end, BLOCK_K, num_stages=STAGES):
        if EVEN_K:
            a = tl.load(x_tile + start, mask=m[:, None] < rows, other=0)
            q = tl.load(weight_tile + start, eviction_policy="evict_first")
        else:
            inside = start + k < width
            a = tl.load(x_tile + start, mask=(m[:, None] < rows) & inside[None, :], other=0)
            q = tl.load(weight_tile + start, mask=inside[:, None], other=0, eviction_policy="evict_first")
        total = tl.dot(a, from_int8(q, a), total)
    total *= tl.load(scales + n, mask=n < out, other=0)[None, :]
    _store(output, total, bias, m, n, rows, out)


@triton.jit(do_not_specialize=["rows", "part_steps"])
def _int4_kernel(
    x, weight, scales, zeros, bias, output, rows, out, row_bytes, part_steps, GROUP_BLOCKS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, UNROLL: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    HALF: tl.constexpr = BLOCK_K // 2
    m = tl.arange(0, BLOCK_M)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, HALF)
    x_tile = x + m[:, None] * (2 * row_bytes) + k[None, :]
    weight_tile = weight + tl.minimum(n, out - 1).to(tl.int64)[None, :] * row_bytes + k[:, None]
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    begin = tl.program_id(1) * part_steps * UNROLL
    end = tl.minimum(begin + part_steps * UNROLL, row_bytes // HALF)
    for first in tl.range(begin, end, UNROLL, num_stages=STAGES):
        for u in tl.static_range(UNROLL):
            block = first + u
            a = tl.load(x_tile + block * BLOCK_K, mask=m[:, None] < rows, other=0)
            b = tl.load(x_tile + (block * BLOCK_K + HALF), mask=m[:, None] < rows, other=0)
            q = tl.load(weight_tile + block * HALF, eviction_policy="evict_first")
            at = block // GROUP_BLOCKS * out + n
            scale = tl.load(scales + at, mask=n < out, other=0)
            low, high, offset = from_nibbles(q, a)
            if zeros is not None:
                offset += tl.load(zeros + at, mask=n < out, other=0).to(a.dtype)[None, :]
            part = tl.dot(a, low - offset)
            part = tl.dot(b, high - offset, part)
            total += part * scale.to(tl.float32)[None, :]
    _store(output, total, bias, m, n, rows, out)


@triton.jit
def _store(output, total, bias, m, n, rows, out):
    """To this program's part, the second index of the launch, of `output`, `[parts, rows, out]`."""
    if bias is not None:
        total += tl.load(bias + n, mask=n < out, other=0).to(tl.float32)[None, :]
    mask = (m[:, None] < rows) & (n[None, :] < out)
    at = (tl.program_id(1) * rows + m[:, None]) * out + n[None, :]
    tl.store(output + at, total.to(output.dtype.element_ty), mask=mask)


@triton.jit
def _add_kernel(sums, bias, output, size, out, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """`sums` float32 `[PARTS, size]` to `output` `[size]`, of rows of `out`."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = at < size
    total = tl.zeros((BLOCK,), tl.float32)
    for part in tl.static_range(PARTS):
        total += tl.load(sums + part * size + at, mask=mask, other=0)
    if bias is not None:
        total += tl.load(bias + at % out, mask=mask, other=0).to(tl.float32)
    tl.store(output + at, total.to(output.dtype.element_ty), mask=mask)


@triton.jit
def _widen_int8_kernel(weight, scales, wide, out, width, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]
    at, mask = n.to(tl.int64) * width + k, (n < out) & (k < width)
    values = tl.load(weight + at, mask=mask, other=0).to(tl.float32) * tl.load(scales + n, mask=n < out, other=0)
    tl.store(wide + at, values.to(wide.dtype.element_ty), mask=mask)


@triton.jit
def _widen_int4_kernel(
    weight, scales, zeros, wide, out, width, group_blocks, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr
):
    HALF: tl.constexpr = BLOCK_K // 2
    block = tl.program_id(1)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
    k = tl.arange(0, HALF)[None, :]
    mask = (n < out) & (k < HALF)
    q = tl.load(weight + n.to(tl.int64) * (width // 2) + (block * HALF + k), mask=mask, other=0)
    at = block // group_blocks * out + n
    scale = tl.load(scales + at, mask=n < out, other=0).to(tl.float32)
    zero = 8.0
    if zeros is not None:
        zero += tl.load(zeros + at, mask=n < out, other=0).to(tl.float32)
    target = wide + n.to(tl.int64) * width + (block * BLOCK_K + k)
    tl.store(target, (((q & 15).to(tl.float32) - zero) * scale).to(wide.dtype.element_ty), mask=mask)
    tl.store(target + HALF, (((q >> 4).to(tl.float32) - zero) * scale).to(wide.dtype.element_ty), mask=mask)
