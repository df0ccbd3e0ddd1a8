"""The product of one row of activations with a weight of any format, with what comes before it and after it in a layer.

`product` equals, rounded once at the end,

    y = linear(x * rsqrt(mean(x^2) + eps) * norm)           norm where given; the linear layer of the weight's format
    y += bias
    y = silu(y[:out / 2]) * y[out / 2:]                      swiglu
    y += residual

A step of one token reads every weight once and computes little, so the kernel is made for reading. A program sums
products of `BLOCK_N` rows of the weight over tiles of `BLOCK_K` of their numbers, and always has the next tile in
flight; the first one is under way before the kernel waits for its predecessor. Threads keep sums of their own and add
them up at the end, in an order that the sizes alone decide.

Products are those of CUDA cores (int8 with int8: of four at once), since one row leaves most of a tensor core idle, but
for INT4, whose conversion would take longer than reading it: trtbuild.kernels.quads, where groups allow it. Scales and
offsets of INT4 come after the sums over 16 bytes, a part of a group: sum((q - z) * x) = sum(q * x) - z * sum(x).

Activations in 8 bits are rounded here, by each program for itself; what they are divided by must be known first, so
that there is a pass over the row before (not for a static scale without a norm).
"""

import torch
import triton
import triton.language as tl

from trtbuild.kernels import has_type
from trtbuild.kernels.conversion import ASSEMBLY, from_int8, wide_nibbles
from trtbuild.kernels.dependent_launch import dependent_launch, trigger, wait
from trtbuild.kernels.quads import CHANNELS, quad_sums
from trtbuild.kernels.widen import NATURAL_BLOCK, int4_block
from trtbuild.tensors.rounding import LIMIT

PIECE = 16  # bytes that a thread reads at once, and INT4 weights' unit of sums: no group begins within one
DTYPES = (torch.float16, torch.bfloat16)


def takes(
    x: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor | None, zeros: torch.Tensor | None, activations: str
) -> bool:
    """Whether `product` can do it; else the operations themselves have to."""
    if len(x) != 1 or x.dtype not in DTYPES or not has_type(x.device, weight.dtype):
        return False
    return weight.dtype != torch.uint8 or (scales is not None and int4_block(x.shape[1] // len(scales)) > NATURAL_BLOCK)


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
    """`[1, in]` in float16 or bfloat16 to `[1, out]`, or with `swiglu` (gate rows first) `[1, out / 2]`, in `dtype`.

    `weight` `[out, in]` in the dtype of `x`, int8 or float8_e4m3fn with `scales` float32 `[out]`, or uint8
    `[out, in / 2]` with `scales` and `zeros` `[groups, out]`, as `interleave_int4` gives them. `activations`: "16bit",
    "static" (divided by `input_scale`, float32 `[1]`) or "token" (by their largest magnitude over the type's limit).
    `norm` `[in]`, `bias` `[out]`, `residual` `[1, out]`.
    """
    out = len(weight) // 2 if swiglu else len(weight)
    result = x.new_empty(1, out, dtype=dtype or x.dtype)
    group_size = x.shape[1] // len(scales) if weight.dtype == torch.uint8 and scales is not None else 0
    aligned = weight.data_ptr() % PIECE == 0 and weight.shape[1] % PIECE == 0  # so are then threads' pieces
    block_n, block_k, warps = _tiles(weight, activations != "16bit")
    block_k = min(block_k, max(PIECE, triton.next_power_of_2(weight.shape[1])))
    results = block_n // 2 if swiglu else block_n  # of a program
    _one_row_product_kernel[(triton.cdiv(out, results),)](
        x.contiguous(), weight, scales, zeros, input_scale, bias, norm, residual, result, out, eps,
        WIDTH=weight.shape[1], GROUP=group_size // 2, BLOCK=int4_block(group_size) // 2 if group_size else 0,
        QUADS=aligned and group_size > 0 and group_size % CHANNELS == 0, ALIGNED=aligned,
        LIMIT=None if activations == "16bit" else LIMIT[weight.dtype], SWIGLU=swiglu, EVEN=out % results == 0,
        BLOCK_N=block_n, BLOCK_K=block_k, num_warps=warps, **dependent_launch(x.device),
    )  # fmt: skip
    return result


def _tiles(weight: torch.Tensor, rounded: bool) -> tuple[int, int, int]:
    """Rows of the weight of a program, bytes or numbers of these in a tile, and warps: the fastest for LLaMA-7B.

    A thread reads 16 bytes of each row of a tile, or 32. What a program does once for all of its rows costs most in
    INT4, then where activations are rounded; else fewer rows make more programs to begin with. INT4's tiles
    are converted whole: of half the size for rows of which they leave an eighth less empty, such as of 5,120 numbers.
    """
    few = len(weight) <= 4096
    if weight.dtype.itemsize == 2:
        return (2 if few else 4), 2048, 4
    if weight.dtype == torch.uint8:
        whole, halves = triton.cdiv(weight.shape[1], 1024), triton.cdiv(weight.shape[1], 512)
        return 16, 512 if halves <= 1.75 * whole else 1024, 4
    return (8, 2048, 4) if few or rounded else (4, 4096, 4)


@triton.jit
def _row(i, out, BLOCK_N: tl.constexpr, SWIGLU: tl.constexpr, EVEN: tl.constexpr):
    """Of the weight, the `i`-th of a program's `BLOCK_N`; with SwiGLU the second half has what the first one gates."""
    N: tl.constexpr = BLOCK_N // 2 if SWIGLU else BLOCK_N
    n = tl.program_id(0) * N + i % N
    if not EVEN:
        n = tl.minimum(n, out - 1)
    return n + i // N * out


@triton.jit
def _load(weight, row, START: tl.constexpr, WIDTH: tl.constexpr, BLOCK_K: tl.constexpr):
    """A tile of weights: those are read once in a step."""
    k = START + tl.arange(0, BLOCK_K)
    at = weight + row.to(tl.int64)[:, None] * WIDTH + k[None, :]
    if START + BLOCK_K <= WIDTH:
        return tl.load(at, eviction_policy="evict_first")
    else:
        return tl.load(at, mask=(k < WIDTH)[None, :], other=0.0, eviction_policy="evict_first")


@triton.jit
def _load_scales(
    scales, out, START: tl.constexpr, GROUP: tl.constexpr, WIDTH: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr, SWIGLU: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Of INT4, or zeros: for each row and piece of a tile, four rows at a time."""
    i = (tl.arange(0, BLOCK_N // 4) * 4)[:, None] + tl.arange(0, 4)[None, :]
    group = tl.minimum((START + tl.arange(0, BLOCK_K // 16) * 16) // GROUP, WIDTH // GROUP - 1)
    at = group[None, None, :] * (2 * out if SWIGLU else out) + _row(i, out, BLOCK_N, SWIGLU, EVEN)[:, :, None]
    return tl.reshape(tl.load(scales + at), (BLOCK_N, BLOCK_K // 16))


@triton.jit
def _load_row(x, at, SECOND: tl.constexpr, MASKED: tl.constexpr, WIDTH: tl.constexpr):
    """What meets weights' pieces: `x` at `at` `[pieces, 8]`, each with 8 more that begin `SECOND` after it if not 0.

    `[pieces * 8]` or `[pieces * 16]`, 0 from `WIDTH` on. So a thread reads what meets its weights, 16 bytes at a time.
    """
    values = tl.load(x + at, mask=at < WIDTH, other=0) if MASKED else tl.load(x + at)
    if SECOND > 0:
        at += SECOND
        others = tl.load(x + at, mask=at < WIDTH, other=0) if MASKED else tl.load(x + at)
        values = tl.permute(tl.join(values, others), (0, 2, 1))
    return tl.reshape(values, (at.shape[0] * (16 if SECOND > 0 else 8),))


@triton.jit
def _by_pieces(products, P: tl.constexpr):
    """`[rows, columns]` to sums of `P` neighbours in a row, which one thread has."""
    return tl.sum(tl.reshape(products, (products.shape[0], products.shape[1] // P, P)), 2)


@triton.jit
def _dot_of_four(a, b, ALIGNED: tl.constexpr):
    """Products of int8 in int32, or sums of four neighbours', which a thread has, in one of these and 0 in three."""
    if ASSEMBLY and ALIGNED:
        return tl.inline_asm_elementwise(
            "dp4a.s32.s32 $0, $4, $5, 0; mov.b32 $1, 0; mov.b32 $2, 0; mov.b32 $3, 0;",
            "=r,=r,=r,=r,r,r", [a, b], dtype=tl.int32, is_pure=True, pack=4,
        )  # fmt: skip
    else:
        return a.to(tl.int32) * b.to(tl.int32)


@triton.jit
def _sums(tile, x, P: tl.constexpr, ALIGNED: tl.constexpr):
    """Sums of a tile's products with `x`, float32 or int8 `[BLOCK_K]`, by pieces."""
    if x.dtype == tl.int8:
        products = _dot_of_four(tile, x[None, :], ALIGNED)
    elif tile.dtype == tl.int8:
        products = from_int8(tile, tl.zeros((1,), tl.float16)).to(tl.float32) * x[None, :]
    elif tile.dtype == tl.float8e4nv:  # the GPU's own conversion, to float16, is faster than moving bits here
        products = tile.to(tl.float16).to(tl.float32) * x[None, :]
    else:
        products = tile.to(tl.float32) * x[None, :]
    return _by_pieces(products, P)


@triton.jit
def _int4_sums(tile, low, high, scales, zeros, P: tl.constexpr):
    """The same of INT4, scaled; `low` and `high` meet the nibbles of even bytes, then those of odd ones, by pieces."""
    PIECES: tl.constexpr = tile.shape[1] // P
    low = tl.reshape(tl.permute(tl.reshape(low, (PIECES, 2, P // 2)), (0, 2, 1)), (PIECES * P,))
    high = tl.reshape(tl.permute(tl.reshape(high, (PIECES, 2, P // 2)), (0, 2, 1)), (PIECES * P,))
    a, b = wide_nibbles(tile)
    sums = _by_pieces(a * low[None, :], P) + _by_pieces(b * (high * 0.0625)[None, :], P)
    sums -= tl.sum(tl.reshape(1032 * low + 72 * high, (PIECES, P)), 1)[None, :]
    if zeros is not None:
        sums -= zeros * tl.sum(tl.reshape(low + high, (PIECES, P)), 1)[None, :]
    return sums * scales


@triton.jit
def _square_and_largest(x, norm, k, P: tl.constexpr, WIDTH: tl.constexpr, BLOCK_K: tl.constexpr):
    """The sum of squares of `x`, and the largest magnitude of `x * norm`."""
    square, largest = tl.zeros((BLOCK_K,), tl.float32), tl.zeros((BLOCK_K,), tl.float32)
    for start in tl.static_range(0, WIDTH, BLOCK_K):
        values = _load_row(x, start + k, 8 if P == 16 else 0, start + BLOCK_K > WIDTH, WIDTH).to(tl.float32)
        square += values * values
        if norm is not None:
            values *= _load_row(norm, start + k, 8 if P == 16 else 0, start + BLOCK_K > WIDTH, WIDTH).to(tl.float32)
        largest = tl.maximum(largest, tl.abs(values))
    return tl.sum(square), tl.max(largest)


@triton.jit
def _round(x, divisor, inverse, LIMIT: tl.constexpr, INTEGER: tl.constexpr):
    """`x / divisor` as int8 or, in float32, as float8_e4m3fn; `inverse` is `1 / divisor`, rounded to nearest.

    The quotient is so, too (Markstein 1990).
    """
    quotient = x * inverse
    quotient = tl.fma(tl.fma(-quotient, divisor, x), inverse, quotient)
    if INTEGER:  # to nearest even where a float32 of 1.5 * 2**23 and more has its last bits
        rounded = tl.clamp(quotient, -LIMIT - 1, LIMIT) + 12582912.0
        rounded = rounded.to(tl.int32, bitcast=True).to(tl.int8)
    else:
        rounded = tl.clamp(quotient, -LIMIT, LIMIT).to(tl.float8e4nv).to(tl.float32)
    return rounded


@triton.jit
def _one_row_product_kernel(
    x, weight, scales, zeros, input_scale, bias, norm, residual, output, out, eps,
    WIDTH: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr, LIMIT: tl.constexpr, SWIGLU: tl.constexpr,
    QUADS: tl.constexpr, ALIGNED: tl.constexpr, EVEN: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    DEPENDENT: tl.constexpr,
):  # fmt: skip
    """`out` counts results; `WIDTH` counts what is stored in a row: in INT4 bytes, as do `GROUP` and `BLOCK`."""
    INT4: tl.constexpr = GROUP > 0
    ROUNDED: tl.constexpr = LIMIT is not None or QUADS  # are activations, after the norm
    INTEGER: tl.constexpr = LIMIT is not None and weight.dtype.element_ty == tl.int8
    IN: tl.constexpr = 2 * WIDTH if INT4 else WIDTH
    N: tl.constexpr = BLOCK_N // 2 if SWIGLU else BLOCK_N
    P: tl.constexpr = 8 if weight.dtype.element_ty.primitive_bitwidth == 16 else 16
    row = _row(tl.arange(0, BLOCK_N), out, BLOCK_N, SWIGLU, EVEN)
    # Where a row has the first 8 numbers that meet a piece (in INT4 8 words of the layout, of 4 channels each).
    QUARTER: tl.constexpr = BLOCK // 2
    SECOND: tl.constexpr = 2 * QUARTER if INT4 else 8 * (P // 16)
    eight = tl.arange(0, 8)[None, :]
    k = (tl.arange(0, BLOCK_K // P) * P)[:, None] + eight
    word = (tl.arange(0, BLOCK_K // P) * 8)[:, None] + eight
    at = word // QUARTER * (4 * QUARTER) + word % QUARTER if INT4 else k

    # Before the wait: what does not depend on earlier kernels, and may come from far away.
    tile = _load(weight, row, 0, WIDTH, BLOCK_K)
    zero = 0
    if INT4:
        scale = _load_scales(scales, out, 0, GROUP, WIDTH, BLOCK_K, BLOCK_N, SWIGLU, EVEN)
        if zeros is not None:
            zero = _load_scales(zeros, out, 0, GROUP, WIDTH, BLOCK_K, BLOCK_N, SWIGLU, EVEN)
    elif scales is not None:
        scale = tl.load(scales + row)
    if bias is not None:
        offset = tl.load(bias + row).to(tl.float32)
    if norm is not None:
        gain = _load_row(norm, at, SECOND, BLOCK_K > WIDTH, IN)
        if INT4:
            high_gain = _load_row(norm, at + QUARTER, SECOND, BLOCK_K > WIDTH, IN)
    trigger(DEPENDENT)
    wait(DEPENDENT)

    factor = 1.0
    if ROUNDED and (norm is not None or (LIMIT is not None and input_scale is None)):
        square, largest = _square_and_largest(x, norm, k, P, IN, BLOCK_K)
        if norm is not None:
            factor = tl.rsqrt(square / IN + eps)
    if LIMIT is not None:
        if input_scale is None:
            divisor = tl.div_rn(largest * factor, LIMIT)
            divisor = tl.where(divisor > 0, divisor, 1.0)
        else:
            divisor = tl.load(input_scale)
        inverse = tl.div_rn(1.0, divisor)

    squares = tl.zeros((BLOCK_K,), tl.float32)
    added = tl.zeros((BLOCK_K,), tl.float32)
    total = tl.zeros((BLOCK_N, BLOCK_K // P), tl.int32 if INTEGER else tl.float32)
    for start in tl.static_range(0, WIDTH, BLOCK_K):
        values = _load_row(x, start * (IN // WIDTH) + at, SECOND, start + BLOCK_K > WIDTH, IN).to(tl.float32)
        if norm is not None:
            squares += values * values
            values *= gain.to(tl.float32)
        if INT4:
            high = _load_row(x, 2 * start + at + QUARTER, SECOND, start + BLOCK_K > WIDTH, IN).to(tl.float32)
            if norm is not None:
                squares += high * high
                high *= high_gain.to(tl.float32)
        if ROUNDED:
            values *= factor
        if LIMIT is not None:
            added += values
            total += _sums(tile, _round(values, divisor, inverse, LIMIT, INTEGER), P, ALIGNED)
        elif QUADS:
            narrow, high = values.to(x.dtype.element_ty), (high * factor).to(x.dtype.element_ty)
            total += quad_sums(tile, narrow, high, scale, None if zeros is None else zero)
        elif INT4:
            total += _int4_sums(tile, values, high, scale, None if zeros is None else zero, P)
        else:
            total += _sums(tile, values, P, ALIGNED)
        if start + BLOCK_K < WIDTH:
            tile = _load(weight, row, start + BLOCK_K, WIDTH, BLOCK_K)
            if INT4:
                scale = _load_scales(scales, out, start + BLOCK_K, GROUP, WIDTH, BLOCK_K, BLOCK_N, SWIGLU, EVEN)
                if zeros is not None:
                    zero = _load_scales(zeros, out, start + BLOCK_K, GROUP, WIDTH, BLOCK_K, BLOCK_N, SWIGLU, EVEN)
            if norm is not None:
                at_next = (start + BLOCK_K) * (IN // WIDTH) + at
                gain = _load_row(norm, at_next, SECOND, start + 2 * BLOCK_K > WIDTH, IN)
                if INT4:
                    high_gain = _load_row(norm, at_next + QUARTER, SECOND, start + 2 * BLOCK_K > WIDTH, IN)

    y = tl.sum(total, 1).to(tl.float32)
    if LIMIT is not None:
        y *= divisor + tl.sum(added) * 0.0  # NaN where an activation was NaN or infinite, which rounding hides
    elif norm is not None and not ROUNDED:
        y *= tl.rsqrt(tl.sum(squares) / IN + eps)
    if scales is not None and not INT4:
        y *= scale
    if bias is not None:
        y += offset
    if SWIGLU:
        gate, up = tl.split(tl.trans(tl.reshape(y, (2, N))))
        y = gate * tl.sigmoid(gate) * up
    n = tl.program_id(0) * N + tl.arange(0, N)
    if residual is not None:
        y += tl.load(residual + (n if EVEN else tl.minimum(n, out - 1))).to(tl.float32)
    if EVEN:
        tl.store(output + n, y.to(output.dtype.element_ty))
    else:
        tl.store(output + n, y.to(output.dtype.element_ty), mask=n < out)
