"""INT8 and INT4 weights to 16 bits, and the layout in which kernels read INT4.

`widen` equals, for weights as checkpoints hold them,

    (weight * scales[:, None]).to(dtype)                        INT8: `[out, in]` int8, scales float32 `[out]`
    trtbuild.linear.int4.dequantize(weight, scales, zeros)      INT4: `[out, in / 2]` uint8, scales `[out, groups]`

INT8 also without the fractions of the scales (`conversion.fraction`), by which what follows the product multiplies.
Such weights are integers times powers of two, whose last bits are zeros: at the GPU's power limit their products are 5%
faster (four products of 2,048 rows, 32 times: 33.3 ms for 35.0).

INT4 weights are kept in the order of `interleave_int4`, which makes the first nibbles of neighbouring 16-bit words
neighbouring channels, and so the second, third and fourth: what 16-bit tensor cores take; scales and zeros are
transposed, `[groups, out]`, to be read along with a block of outputs, and float32: fewer than the four bytes of
an asynchronous copy would not be prefetched, and each step would wait for them.
"""

import torch
import triton
import triton.language as tl

from trtbuild.kernels.conversion import from_nibbles, power

MIN_BLOCK, MAX_BLOCK = 32, 128  # INT4: channels of an interleaved block, which lies within one group
NATURAL_BLOCK = 2  # INT4 as checkpoints hold it: for groups that no larger block divides


def widen(
    weight: torch.Tensor,
    scales: torch.Tensor,
    zeros: torch.Tensor | None,
    dtype: torch.dtype,
    fractions: bool = True,
) -> torch.Tensor:
    """`[out, in]` in `dtype`: int8 `weight` `[out, in]` with `scales` `[out]`, or all three of `interleave_int4`."""
    out = len(weight)
    if weight.dtype == torch.int8:
        wide = torch.empty(weight.shape, dtype=dtype, device=weight.device)
        grid = (triton.cdiv(out, 16), triton.cdiv(weight.shape[1], 512))
        _widen_int8_kernel[grid](
            weight, scales, wide, out, weight.shape[1], FRACTIONS=fractions, BLOCK_N=16, BLOCK_K=512
        )
        return wide
    width = 2 * weight.shape[1]
    group = width // len(scales)
    block = int4_block(group)
    if block == NATURAL_BLOCK:
        values = torch.stack((weight & 15, weight >> 4), -1).reshape(out, -1, group).float() - 8
        if zeros is not None:
            values -= zeros.t()[..., None]
        return (values * scales.t()[..., None]).flatten(1).to(dtype)
    wide = torch.empty(out, width, dtype=dtype, device=weight.device)
    grid = (triton.cdiv(width, 1024), triton.cdiv(out, 4))
    _widen_int4_kernel[grid](
        weight, scales, zeros, wide, out, width, group, BLOCK_N=4, BLOCKS=1024 // block, QUARTER=block // 4
    )
    return wide


def interleave_int4(
    weight: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Weight uint8 `[out, in / 2]`, scales and zeros `[out, groups]`, as the kernels want them.

    Each group is cut into blocks of up to 128 channels. The 16-bit word `i` of a block of `n` channels holds, from its
    lowest nibble on, channels `i`, `i + n / 4`, `i + n / 2` and `i + 3 * n / 4`, with 8 added so that none is negative.
    """
    block = int4_block(2 * weight.shape[1] // scales.shape[1])
    packed = weight ^ 0x88
    if block > NATURAL_BLOCK:
        nibbles = torch.stack((packed & 15, packed >> 4), -1).flatten(1)
        a, b, c, d = nibbles.unflatten(1, (-1, 4, block // 4)).unbind(2)
        packed = torch.stack((a | b << 4, c | d << 4), -1).flatten(1)
    return packed, scales.t().float().contiguous(), None if zeros is None else zeros.t().float().contiguous()


def int4_block(group_size: int) -> int:
    """Channels of an interleaved block: the largest power of two that divides a group and that kernels take."""
    block = min(group_size & -group_size, MAX_BLOCK)
    return block if block >= MIN_BLOCK else NATURAL_BLOCK


@triton.jit
def _widen_int8_kernel(
    weight, scales, wide, out, width, FRACTIONS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr
):
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]
    at, mask = n.to(tl.int64) * width + k, (n < out) & (k < width)
    scale = tl.load(scales + n, mask=n < out, other=0)
    if not FRACTIONS:
        scale = power(scale)
    values = tl.load(weight + at, mask=mask, other=0).to(tl.float32) * scale
    tl.store(wide + at, values.to(wide.dtype.element_ty), mask=mask)


@triton.jit
def _widen_int4_kernel(
    weight, scales, zeros, wide, out, width, group,
    BLOCK_N: tl.constexpr, BLOCKS: tl.constexpr, QUARTER: tl.constexpr,
):  # fmt: skip
    """A program does `BLOCKS` blocks of 4 times `QUARTER` channels of `BLOCK_N` outputs."""
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)[:, None, None]
    block = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)[None, :, None]
    i = tl.arange(0, QUARTER)[None, None, :]
    first = block * (4 * QUARTER)
    row = n.to(tl.int64)
    inside = (n < out) & (first < width)
    words = weight.to(tl.pointer_type(tl.int16)) + row * tl.multiple_of(width // 4, 8) + (block * QUARTER + i)
    words = tl.load(words, mask=inside, other=0)
    at = first // group * out + n
    scale, zero = tl.load(scales + at, mask=inside, other=0).to(tl.float32), None
    if zeros is not None:
        zero = tl.load(zeros + at, mask=inside, other=0).to(tl.float16)
    a, b, c, d = from_nibbles(words, zero, tl.zeros((1,), tl.float16))
    target = wide + row * width + (first + i)
    _store_quarter(target, a, scale, inside)
    _store_quarter(target + QUARTER, b, scale, inside)
    _store_quarter(target + 2 * QUARTER, c, scale, inside)
    _store_quarter(target + 3 * QUARTER, d, scale, inside)


@triton.jit
def _store_quarter(target, values, scale, inside):
    tl.store(target, (values.to(tl.float32) * scale).to(target.dtype.element_ty), mask=inside)
