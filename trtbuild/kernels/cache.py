"""What the kernels of attention share: heads rotated, rounded to what a KV cache holds, and read from there.

All of it gives the bits that `Rotate`, `ScaleTokens` and `Attention` give in 16 bits: products of two 16-bit numbers
are exact in float32, so that it does not matter how a compiler joins them with the sum that follows.

**Pages.** A cache is `[pages, kv_heads, page_size, head_dim]`, and of a table, int32 `[sequences, pages_per_sequence]`,
entry `j` of a row is the page of its positions from `j * page_size` on. Without a table a sequence is one page, its
slot. Page 0 is nobody's: entries that are not given are 0, and what rows without a sequence write goes there.
"""

import torch
import triton
import triton.language as tl

from trtbuild.kernels import has_type
from trtbuild.kernels.conversion import divided, from_int8


def takes(x: torch.Tensor, head_dim: int, cache: torch.Tensor) -> bool:
    """Whether these kernels take activations like `x` over such a cache; where not, there are the operations."""
    known = x.dtype in (torch.float16, torch.bfloat16) and has_type(x.device, cache.dtype)
    return known and head_dim % 8 == 0 and head_dim <= 256


def table(pages: torch.Tensor | None, cache: torch.Tensor) -> tuple[torch.Tensor | None, int, int]:
    """What kernels take of it: itself, entries from row to row, and positions of a page."""
    return (None, 0, 0) if pages is None else (pages, pages.stride(0), cache.shape[2])


@triton.jit
def page_of(pages, start, end, PAGE: tl.constexpr, BLOCK: tl.constexpr):
    """The page of a tile, positions `start` to `start + BLOCK`; where tiles do not divide pages, of each of these.

    `pages` is the sequence's row; nothing is looked up from `end` on. Looked up a tile ahead nobody waits for it.
    """
    if pages is None:
        return start
    elif PAGE % BLOCK == 0:
        return tl.load(pages + start // PAGE, mask=start < end, other=0)
    else:
        at = start + tl.arange(0, BLOCK)
        return tl.load(pages + at // PAGE, mask=at < end, other=0)


@triton.jit
def origin(pages, page, start, stride, PAGE: tl.constexpr, BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr):
    """Where position 0 would be, from the cache's first page on, if all were where a tile's positions are."""
    if pages is None:
        return 0
    elif PAGE % BLOCK == 0:
        return page.to(tl.int64) * stride - start // PAGE * (PAGE * HEAD_DIM)
    else:
        at = start + tl.arange(0, BLOCK)
        return (page.to(tl.int64) * stride - at // PAGE * (PAGE * HEAD_DIM))[:, None]


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
        x = divided(x.to(tl.float32), scale)
        if dtype == tl.int8:  # a float32 of 1.5 * 2**23 and more has no fraction: adding that rounds to nearest even
            return ((tl.clamp(x, -128.0, 127.0) + 12582912.0) - 12582912.0).to(dtype)
        else:
            return tl.clamp(x, -448.0, 448.0, propagate_nan=tl.PropagateNan.ALL).to(dtype)


@triton.jit
def widened(x, like):
    """What was read from a cache in the dtype of `like`, without its scale; FP8 by the GPU's own conversion."""
    if x.dtype == tl.int8:
        return from_int8(x, like)
    elif x.dtype == tl.float8e4nv:
        return x.to(tl.float16).to(like.dtype)
    else:
        return x.to(like.dtype)
