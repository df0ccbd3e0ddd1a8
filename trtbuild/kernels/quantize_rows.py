"""Activations to 8 bits before a product of 8-bit numbers.

`quantize_rows(x, scale, dtype)` equals, with `quantize` and `scale_for` of trtbuild.tensors.rounding,

    scale = scale_for(x.float().abs().amax(-1, keepdim=True), dtype)    where none is given
    quantize(x.float(), scale, dtype), scale.expand(rows, 1)

and is for what no kernel makes that can round it itself: `norm_rows` and `swiglu` do, by what is here. A program does
one row.
"""

import torch
import triton
import triton.language as tl

from trtbuild.kernels.conversion import divided
from trtbuild.kernels.dependent_launch import dependent_launch, trigger, wait
from trtbuild.tensors.rounding import LIMIT

Quantize = tuple[torch.dtype, torch.Tensor | None] | None  # int8 or float8_e4m3fn, and its scale, None for one a row
ROWS = 64  # up to a multiple of which there is memory behind rows of 8 bits, for `many_rows`


def quantize_rows(x: torch.Tensor, scale: torch.Tensor | None, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """`[rows, width]` as int8 or float8_e4m3fn, and its scales, float32 `[rows, 1]`; `scale` float32 `[1]` or None."""
    rows, width = x.shape
    x = x.contiguous()
    narrow, scales, given, limit = narrow_rows(x, width, (dtype, scale))
    assert scales is not None
    block = triton.next_power_of_2(width)
    _quantize_rows_kernel[(rows,)](
        x, narrow, scales, given, width, LIMIT=limit, BLOCK=block, num_warps=warps(block),
        **dependent_launch(x.device),
    )  # fmt: skip
    return narrow, scales


def narrow_rows(
    x: torch.Tensor, width: int, quantize: Quantize
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, float]:
    """For the rows of `x` made `width` wide: memory, that of their scales (None without `quantize`), the given scale
    and the limit that `round_rows` wants."""
    if quantize is None:
        return x.new_empty(len(x), width), None, None, 0.0
    dtype, scale = quantize
    narrow = x.new_empty(triton.cdiv(len(x), ROWS) * ROWS, width, dtype=dtype)[: len(x)]
    return narrow, x.new_empty(len(x), 1, dtype=torch.float32), scale, LIMIT[dtype]


def warps(block: int) -> int:
    """Of a program for a row of `block` values: of many, a warp has 256 or more."""
    return min(16, max(1, triton.next_power_of_2(block) // 256))


@triton.jit
def _quantize_rows_kernel(
    x, narrow, scales, given, width, LIMIT: tl.constexpr, BLOCK: tl.constexpr, DEPENDENT: tl.constexpr
):
    trigger(DEPENDENT)
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    wait(DEPENDENT)
    values = tl.load(x + row * width + column, mask=column < width, other=0)
    values = round_rows(values, scales + row, given, LIMIT, narrow.dtype.element_ty)
    tl.store(narrow + row * width + column, values, mask=column < width)


@triton.jit
def round_rows(values, scale_at, given, LIMIT: tl.constexpr, dtype: tl.constexpr):
    """`values` of a row in `dtype`, by the scale at `given`, or, of a whole row, its own; that goes to `scale_at`."""
    scale = row_scale(magnitude(values), LIMIT) if given is None else tl.load(given)
    tl.store(scale_at, scale)
    return rounded(values, scale, LIMIT, dtype)


@triton.jit
def magnitude(values):
    """The largest, as the integer of its bits: these are in the same order, with NaN, which a maximum hides, on top."""
    return tl.max(values.to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF, 0)


@triton.jit
def row_scale(magnitude, LIMIT: tl.constexpr):
    """`scale_for`."""
    scale = tl.div_rn(magnitude.to(tl.float32, bitcast=True), LIMIT)
    return tl.where(scale == 0, 1.0, scale)


@triton.jit
def rounded(values, scale, LIMIT: tl.constexpr, dtype: tl.constexpr):
    """`quantize`."""
    values = divided(values.to(tl.float32), scale)
    if dtype == tl.int8:  # a float32 of 1.5 * 2**23 and more has no fraction: adding that rounds to nearest even
        values = (tl.clamp(values, -LIMIT - 1, LIMIT) + 12582912.0) - 12582912.0
    else:
        values = tl.clamp(values, -LIMIT, LIMIT, propagate_nan=tl.PropagateNan.ALL)
    return values.to(dtype)
