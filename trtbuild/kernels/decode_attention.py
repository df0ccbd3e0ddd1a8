"""Attention of one new token a sequence over its cache, with grouped heads and a cache of 16 or 8 bits.

`decode_attention(q, key_cache, value_cache, key_scale, value_scale, position_ids, kv_bound, slopes)` equals, for every
sequence `b`, query head `h` and its KV head `g = h // (heads / kv_heads)`, with `n = position_ids[b] + 1`,

    keys, values = key_cache[b, g, :n] * key_scale[g], value_cache[b, g, :n] * value_scale[g]
    output[b, h] = softmax(keys @ q[b, h] * head_dim**-0.5 + slopes[h] * (arange(n) - (n - 1))) @ values

A step reads the cache and little else, and one sequence has fewer KV heads than a GPU has multiprocessors. So the cache
is split along its length: a program attends over one part for all query heads of a KV head, and a second, small kernel
merges the parts by their softmax sums ("Flash-Decoding", which arXiv 2311.01282 builds on). Scales are applied to
scores and outputs, never to the cache. The number of parts follows from shapes alone, so results are always the same.
"""

import math

import torch
import triton
import triton.language as tl

from trtbuild.kernels.conversion import from_int8
from trtbuild.kernels.processors import processors

PROGRAMS_PER_PROCESSOR = 4  # to keep enough loads in flight
MIN_PART = 128  # positions; a shorter part costs more in merging than it gains
BLOCK = 64  # positions read at a time
LOG2_E = tl.constexpr(math.log2(math.e))


def decode_attention(
    q: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    key_scale: torch.Tensor | None,
    value_scale: torch.Tensor | None,
    position_ids: torch.Tensor,
    kv_bound: int,
    slopes: torch.Tensor | None = None,
) -> torch.Tensor:
    """`[batch, heads, head_dim]` to `[batch, heads * head_dim]`.

    Caches `[batch, kv_heads, max_length, head_dim]` in float16, bfloat16, or int8 or float8_e4m3fn with scales float32
    `[kv_heads]`; `position_ids` int32 `[batch]`, all below `kv_bound`; `head_dim` a power of two; for ALiBi
    `slopes`, float32 `[heads]`.
    """
    batch, heads, head_dim = q.shape
    kv_heads = key_cache.shape[1]
    programs = PROGRAMS_PER_PROCESSOR * processors(q.device)
    parts = max(1, min(programs // (batch * kv_heads), triton.cdiv(kv_bound, MIN_PART)))
    output = q.new_empty(batch, heads * head_dim)
    partial, sums = output, None  # one part is the result
    if parts > 1:
        partial = q.new_empty(batch, heads, parts, head_dim, dtype=torch.float32)
        sums = q.new_empty(batch, heads, parts, dtype=torch.float32)
    _part_kernel[parts, kv_heads, batch](
        q, key_cache, value_cache, key_scale, value_scale, position_ids, slopes, partial, sums,
        *q.stride()[:2], *key_cache.stride()[:2], heads, head_dim**-0.5 * math.log2(math.e),
        GROUP=heads // kv_heads, BLOCK_H=max(16, triton.next_power_of_2(heads // kv_heads)), BLOCK=BLOCK,
        HEAD_DIM=head_dim, num_warps=4, num_stages=2,
    )  # fmt: skip
    if parts > 1:
        _merge_kernel[heads, batch](
            partial, sums, output, heads, parts, PARTS=triton.next_power_of_2(parts), HEAD_DIM=head_dim
        )
    return output


@triton.jit
def _part_kernel(
    q, key_cache, value_cache, key_scale, value_scale, position_ids, slopes, partial, sums,
    q_stride, q_head_stride, cache_stride, cache_head_stride, heads, score_scale,
    GROUP: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK: tl.constexpr, HEAD_DIM: tl.constexpr,
):  # fmt: skip
    """Scores are in units of log 2, so that `exp2` does for the softmax."""
    part, kv_head, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    parts = tl.num_programs(0)
    member = tl.arange(0, BLOCK_H)  # of the query heads that share the KV head
    head = kv_head * GROUP + member
    d = tl.arange(0, HEAD_DIM)
    t = tl.arange(0, BLOCK)
    length = tl.load(position_ids + b) + 1
    size = tl.cdiv(tl.cdiv(length, parts), BLOCK) * BLOCK
    begin = part * size
    end = tl.minimum(begin + size, length)
    q_at = b * q_stride + head[:, None] * q_head_stride + d[None, :]
    queries = tl.load(q + q_at, mask=member[:, None] < GROUP, other=0)
    start_of_head = b * cache_stride + kv_head * cache_head_stride
    keys = key_cache + start_of_head + d[:, None]
    values = value_cache + start_of_head + d[None, :]
    if key_scale is not None:
        score_scale *= tl.load(key_scale + kv_head)
    if slopes is not None:
        slope = tl.load(slopes + head, mask=member < GROUP, other=0.0) * LOG2_E

    highest = tl.full((BLOCK_H,), float("-inf"), tl.float32)
    weight_sum = tl.zeros((BLOCK_H,), tl.float32)
    total = tl.zeros((BLOCK_H, HEAD_DIM), tl.float32)
    for start in range(begin, end, BLOCK):
        at = start + t
        k = tl.load(keys + at[None, :] * HEAD_DIM, mask=at[None, :] < end, other=0.0)
        scores = tl.dot(queries, _widened(k, queries), input_precision="ieee") * score_scale
        if slopes is not None:
            scores += slope[:, None] * (at + 1 - length)[None, :]
        scores = tl.where(at[None, :] < end, scores, float("-inf"))
        higher = tl.maximum(highest, tl.max(scores, 1))
        weights = tl.exp2(scores - higher[:, None])
        shrink = tl.exp2(highest - higher)
        v = tl.load(values + at[:, None] * HEAD_DIM, mask=at[:, None] < end, other=0.0)
        weight_sum = weight_sum * shrink + tl.sum(weights, 1)
        total = total * shrink[:, None]
        total = tl.dot(weights.to(queries.dtype), _widened(v, queries), total, input_precision="ieee")
        highest = higher

    if value_scale is not None:
        total *= tl.load(value_scale + kv_head)
    row = (b * heads + head) * parts + part
    at = row[:, None] * HEAD_DIM + d[None, :]
    weight_sum = tl.where(weight_sum > 0, weight_sum, 1.0)  # 0 in an empty part, whose `highest` is minus infinity
    if sums is not None:
        tl.store(sums + row, highest + tl.log2(weight_sum), mask=member < GROUP)
    tl.store(partial + at, (total / weight_sum[:, None]).to(partial.dtype.element_ty), mask=member[:, None] < GROUP)


@triton.jit
def _merge_kernel(partial, sums, output, heads, parts, PARTS: tl.constexpr, HEAD_DIM: tl.constexpr):
    """`sums` are the logarithms (to base 2) of the parts' softmax denominators, minus infinity for empty parts."""
    row = tl.program_id(1).to(tl.int64) * heads + tl.program_id(0)
    part = tl.arange(0, PARTS)
    d = tl.arange(0, HEAD_DIM)
    logs = tl.load(sums + row * parts + part, mask=part < parts, other=float("-inf"))
    weights = tl.exp2(logs - tl.max(logs, 0))
    at = (row * parts + part[:, None]) * HEAD_DIM + d[None, :]
    values = tl.load(partial + at, mask=part[:, None] < parts, other=0)
    merged = tl.sum(values * weights[:, None], 0) / tl.sum(weights, 0)
    tl.store(output + row * HEAD_DIM + d, merged.to(output.dtype.element_ty))


@triton.jit
def _widened(x, like):
    return from_int8(x, like) if x.dtype == tl.int8 else x.to(like.dtype)
