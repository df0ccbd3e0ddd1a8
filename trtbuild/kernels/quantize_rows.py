"""Activations to 8 bits before a product of 8-bit numbers, and its result back to 16 bits: one launch each.

`quantize_rows(x, scale, dtype)` equals, with `quantize` and `scale_for` of trtbuild.tensors.rounding,

    scale = scale_for(x.float().abs().amax(-1, keepdim=True), dtype)    where none is given
    quantize(x.float(), scale, dtype), scale

and `scale_product(product, row_scale, column_scale, bias, dtype)` equals

    (product.float() * row_scale * column_scale + bias).to(dtype)
"""

from typing import Any

import torch
import triton
import triton.language as tl

from trtbuild.kernels.dependent_launch import dependent_launch, trigger, wait
from trtbuild.tensors.rounding import LIMIT

Quantize = tuple[torch.dtype, torch.Tensor | None] | None  # int8 or float8_e4m3fn, and its scale, None for one a row


def quantize_rows(
    x: torch.Tensor, scale: torch.Tensor | None, dtype: torch.dtype, min_rows: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """`[rows, width]` as int8 or float8_e4m3fn, and the scale: float32 `[1]` if given, else `[rows, 1]`, made here.

    With `min_rows` the result has at least that many; those that `x` lacks hold anything.
    """
    rows, width = x.shape
    x = x.contiguous()
    narrow, scales, rounding = narrow_rows(x, width, (dtype, scale), min_rows)
    block = triton.next_power_of_2(width)
    _quantize_kernel[(rows,)](
        x, narrow, scales, width, BLOCK=block, num_warps=warps(rows, block), **rounding, **dependent_launch(x.device)
    )
    return narrow, scales


def narrow_rows(
    x: torch.Tensor, width: int, quantize: Quantize, min_rows: int = 0
) -> tuple[torch.Tensor, Any, dict[str, Any]]:
    """Memory for a result with the rows of `x` and for its scales (None without `quantize`), and how to round it."""
    rows = max(len(x), min_rows)
    if quantize is None:
        return x.new_empty(rows, width), None, {"STATIC": False, "LIMIT": 0.0}
    dtype, scale = quantize
    rounding = {"STATIC": scale is not None, "LIMIT": LIMIT[dtype]}
    scales = x.new_empty(len(x), 1, dtype=torch.float32) if scale is None else scale
    return x.new_empty(rows, width, dtype=dtype), scales, rounding


def warps(rows: int, block: int) -> int:
    """Of a program for a row of `block` values: few rows have many, to be short; many share the GPU."""
    return min(16, max(1, block // (256 if rows <= 128 else 512)))


def scale_product(
    product: torch.Tensor,
    row_scale: torch.Tensor,
    column_scale: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """int32 or float32 `[rows, out]` to `dtype`; `row_scale` float32 `[rows, 1]` or `[1]`, `column_scale` `[out]`."""
    rows, out = product.shape
    result = product.new_empty(rows, out, dtype=dtype)
    grid = (triton.cdiv(out, 1024), rows)
    _scale_kernel[grid](
        product,
        row_scale,
        column_scale,
        bias,
        result,
        out,
        product.stride(0),
        PER_ROW=row_scale.numel() > 1,
        BLOCK=1024,
    )
    return result


@triton.jit
def _quantize_kernel(
    x, narrow, scales, width,
    STATIC: tl.constexpr, LIMIT: tl.constexpr, BLOCK: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    trigger(DEPENDENT)
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    wait(DEPENDENT)
    values = tl.load(x + row * width + column, mask=column < width, other=0)
    values = round_rows(values, scales, row, STATIC, LIMIT, narrow.dtype.element_ty)
    tl.store(narrow + row * width + column, values, mask=column < width)


@triton.jit
def round_rows(values, scales, row, STATIC: tl.constexpr, LIMIT: tl.constexpr, dtype: tl.constexpr):
    """`values` in `dtype`, with the scale at `scales` if `STATIC`; else they are all of a row, whose scale is kept."""
    values = values.to(tl.float32)
    if STATIC:
        scale = tl.load(scales)
    else:
        # As integers, magnitudes are in the same order, with NaN, which a maximum of floats would hide, on top.
        largest = tl.max(values.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 0).to(tl.float32, bitcast=True)
        scale = tl.div_rn(largest, LIMIT)
        scale = tl.where(scale == 0, 1.0, scale)
        tl.store(scales + row, scale)
    values = tl.div_rn(values, tl.full(values.shape, scale, tl.float32))
    if dtype == tl.int8:  # a float32 of 1.5 * 2**23 and more has no fraction: adding that rounds to nearest even
        values = (tl.clamp(values, -LIMIT - 1, LIMIT) + 12582912.0) - 12582912.0
    else:
        values = tl.clamp(values, -LIMIT, LIMIT, propagate_nan=tl.PropagateNan.ALL)
    return values.to(dtype)


@triton.jit
def _scale_kernel(
    product, row_scale, column_scale, bias, result, out, stride, PER_ROW: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(1).to(tl.int64)
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = column < out
    values = tl.load(product + row * stride + column, mask=mask, other=0).to(tl.float32)
    values *= tl.load(row_scale + (row if PER_ROW else 0))
    values *= tl.load(column_scale + column, mask=mask, other=0)
    if bias is not None:
        values += tl.load(bias + column, mask=mask, other=0).to(tl.float32)
    tl.store(result + row * out + column, values.to(result.dtype.element_ty), mask=mask)
