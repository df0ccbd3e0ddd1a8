"""Residual addition and the RMSNorm that follows it in one launch, which reads and writes every value once.

`add_rms_norm(a, b, weight, eps)` equals

    total = a + b                                                           in their dtype
    total, (total * rsqrt(mean(total^2) + eps) * weight).to(total.dtype)    the norm in float32

A program does one row.
"""

import torch
import triton
import triton.language as tl


def add_rms_norm(
    a: torch.Tensor, b: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Two `[rows, hidden]` and `weight` `[hidden]`, all float16, bfloat16 or float32: the sum and its norm."""
    rows, width = a.shape
    a, b = a.contiguous(), b.contiguous()
    total, normed = torch.empty_like(a), torch.empty_like(a)
    block = triton.next_power_of_2(width)
    warps = min(16, max(1, block // 512))
    _kernel[(rows,)](a, b, weight, total, normed, width, eps, BLOCK=block, num_warps=warps)
    return total, normed


@triton.jit
def _kernel(a, b, weight, total, normed, width, eps, BLOCK: tl.constexpr):
    column = tl.arange(0, BLOCK)
    inside = column < width
    at = tl.program_id(0).to(tl.int64) * width + column
    scale = tl.load(weight + column, mask=inside, other=0).to(tl.float32)  # waits for no sum
    x = tl.load(a + at, mask=inside, other=0).to(tl.float32) + tl.load(b + at, mask=inside, other=0).to(tl.float32)
    rounded = x.to(total.dtype.element_ty)  # the norm is that of the sum as the next layer reads it
    tl.store(total + at, rounded, mask=inside)
    x = rounded.to(tl.float32)
    x *= tl.rsqrt(tl.sum(x * x, 0) / width + eps) * scale
    tl.store(normed + at, x.to(normed.dtype.element_ty), mask=inside)
