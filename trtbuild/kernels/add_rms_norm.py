"""Residual addition, RMSNorm and rounding to 8 bits in one launch, which reads and writes every value once.

`norm_rows(a, weight, eps, b=b, quantize=(dtype, scale))` equals

    total = a + b                                               in their dtype
    normed = weight * (total * rsqrt(mean(total^2) + eps))      in float32; the bracket and the result are rounded
    quantize_rows(normed, scale, dtype)

with `b` times the fractions of `b_scales` (`trtbuild.kernels.widen`) where these are given, and
where without `b` the norm is that of `a`, and without `quantize` the result is `normed`. A program does one row.
"""

import torch
import triton
import triton.language as tl

from trtbuild.kernels.conversion import fraction
from trtbuild.kernels.dependent_launch import dependent_launch, trigger, wait
from trtbuild.kernels.quantize_rows import Quantize, narrow_rows, round_rows, warps


def norm_rows(
    a: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    *,
    b: torch.Tensor | None = None,
    b_scales: torch.Tensor | None = None,
    quantize: Quantize = None,
    late: bool = False,
) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor | None]:
    """`a` and `b` `[rows, hidden]`, `weight` `[hidden]`, all float16, bfloat16 or float32; `b_scales` float32.

    Returns the sum (None without `b`), the norm in their dtype or as `quantize` has it, and its scales, float32
    `[rows, 1]` (None without `quantize`). The next kernel may start when a norm begins, or `late`, when it ends.
    """
    rows, width = a.shape
    a, b = a.contiguous(), None if b is None else b.contiguous()
    total = None if b is None else torch.empty_like(a)
    normed, scales, given, limit = narrow_rows(a, width, quantize)
    block = triton.next_power_of_2(width)
    _rms_norm_kernel[(rows,)](
        a, b, b_scales, weight, total, normed, scales, given, width, eps, LIMIT=limit, BLOCK=block, LATE=late,
        num_warps=warps(block), **dependent_launch(a.device),
    )  # fmt: skip
    return total, normed, scales


@triton.jit
def _rms_norm_kernel(
    a, b, b_scales, weight, total, normed, scales, given, width, eps,
    LIMIT: tl.constexpr, BLOCK: tl.constexpr, LATE: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    if not LATE:
        trigger(DEPENDENT)
    column = tl.arange(0, BLOCK)
    inside = column < width
    row = tl.program_id(0).to(tl.int64)
    factor = tl.load(weight + column, mask=inside, other=0).to(tl.float32)
    if b_scales is not None:
        shares = fraction(tl.load(b_scales + column, mask=inside, other=0))
    wait(DEPENDENT)
    at = row * width + column
    x = tl.load(a + at, mask=inside, other=0)
    if b is not None:
        y = tl.load(b + at, mask=inside, other=0).to(tl.float32)
        if b_scales is not None:
            y *= shares
        x = (x.to(tl.float32) + y).to(x.dtype)
        tl.store(total + at, x, mask=inside)
    wide = x.to(tl.float32)
    bracket = (wide * tl.rsqrt(tl.sum(wide * wide, 0) / width + eps)).to(x.dtype)
    y = (bracket.to(tl.float32) * factor).to(x.dtype)
    if scales is not None:
        y = round_rows(y, scales + row, given, LIMIT, normed.dtype.element_ty)
    if LATE:
        trigger(DEPENDENT)
    tl.store(normed + at, y, mask=inside)
