"""What the kernels of attention share: heads rotated, rounded to what a KV cache holds, and read from there.

All of it gives the bits that `Rotate`, `ScaleTokens` and `Attention` give in 16 bits: products of two 16-bit numbers
are exact in float32, so that it does not matter how a compiler joins them with the sum that follows.
"""

import torch
import triton
import triton.language as tl

from trtbuild.kernels import has_type
from trtbuild.kernels.conversion import from_fp8, from_int8


def takes(x: torch.Tensor, head_dim: int, cache: torch.Tensor) -> bool:
    """Whether these kernels take activations like `x` over such a cache; where not, there are the operations."""
    known = x.dtype in (torch.float16, torch.bfloat16) and has_type(x.device, cache.dtype)
    return known and head_dim % 8 == 0 and head_dim <= 256


@triton.jit
def rotated(x, partner, cos, sin):
    """`x * cos + partner * sin` of 16-bit values, rounded as `Rotate` does: the first product, and the sum."""
    first = (x.to(tl.float32) * cos.to(tl.float32)).to(x.dtype)
    return (first.to(tl.float32) + partner.to(tl.float32) * sin.to(tl.float32)).to(x.dtype)


@triton.jit
def scaled(x, factor):
    """`x * factor` in 16 bits."""
    return (x.to(tl.float32) * factor.to(tl.float32)).to(x.dtype)


@triton.jit
def stored(x, scale, dtype: tl.constexpr):
    """`x` as a cache of `dtype` holds it: `trtbuild.tensors.rounding.quantize` of `x` by the tensor `scale`, if any."""
    if scale is None:
        return x.to(dtype)
    else:
        x = tl.div_rn(x.to(tl.float32), scale + tl.zeros(x.shape, tl.float32))
        if dtype == tl.int8:  # a float32 of 1.5 * 2**23 and more has no fraction: adding that rounds to nearest even
            return ((tl.clamp(x, -128.0, 127.0) + 12582912.0) - 12582912.0).to(dtype)
        else:
            return tl.clamp(x, -448.0, 448.0, propagate_nan=tl.PropagateNan.ALL).to(dtype)


@triton.jit
def widened(x, like):
    """What was read from a cache in the dtype of `like`, without its scale."""
    if x.dtype == tl.int8:
        return from_int8(x, like)
    elif x.dtype == tl.float8e4nv:
        return from_fp8(x, like)
    else:
        return x.to(like.dtype)
