"""Attention of chunks of prompts: their keys and values into the cache, and causal attention over what that holds.

`write_cache(qkv, cos, sin, ...)` does, for every row `i` of sequence `b`, with its position `p = position_ids[i]`,

    q, k, v = Rotate of qkv by cos and sin; SplitHeads without them; then q *= factors
    key_cache[slots[b], :, p], value_cache[slots[b], :, p] = k[i], v[i]         rounded as the caches are

and, where these have 8 bits and sequences are `LONG`, leaves in `qkv` what they now hold, in the place of `k[i]` and
`v[i]`.

`context_attention(qkv, cos, sin, ...)` then equals, with `g = h // (heads / kv_heads)` and `n = p + 1`,

    keys, values = key_cache[slots[b], g, :n] * key_scale[g], value_cache[slots[b], g, :n] * value_scale[g]
    output[i, h] = softmax(keys @ q[i, h] * head_dim**-0.5 + slopes[h] * (arange(n) - p)) @ values
    quantize_rows(output, scale, dtype)                                         without `quantize` the output

With a table `pages` (`trtbuild.kernels.cache`) sequence `b` has its row `slots[b]`.

All lengths are read on the device, so that a captured graph serves many steps: sequence `b` has the rows
`query_starts[b] .. query_starts[b + 1]` and `past_lengths[b]` positions of earlier steps, and the rows after
`query_starts[batch]` are padding, for which nothing is read or written. Any mix of sequences is one launch of each.

A program attends for a block of one sequence's rows and one head ("FlashAttention", arXiv 2205.14135); masks are needed
on the diagonal alone. Those that look back furthest start first. Scales are applied to scores and outputs. 8-bit tiles
are converted by every program that reads them; so those tiles of long sequences that hold nothing but new positions are
read from `qkv`, by the GPU's copies of tiles. Bits are the same. Some heads then come after the others, so that what
they read stays in the GPU's cache.
"""

import math

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from trtbuild.kernels import capability
from trtbuild.kernels.cache import origin, page_of, rotated, scaled, stored, table, widened
from trtbuild.kernels.dependent_launch import dependent_launch, trigger, wait
from trtbuild.kernels.many_rows import HOPPER
from trtbuild.kernels.processors import processors
from trtbuild.kernels.quantize_rows import Quantize, narrow_rows, rounded

WRITTEN = 4096  # values of a program that writes
READ = 8192  # values of a tile of keys or values
LONG = 512  # new positions of a sequence, in the mean, for which it pays to write them in 16 bits, too
HEADS_AT_ONCE = 8  # if that divides the heads
LOG2_E = tl.constexpr(math.log2(math.e))


def write_cache(
    qkv: torch.Tensor,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    position_ids: torch.Tensor,
    query_starts: torch.Tensor,
    slots: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    key_scale: torch.Tensor | None,
    value_scale: torch.Tensor | None,
    heads: int,
    pages: torch.Tensor | None = None,
) -> None:
    """Of `[tokens, (heads + 2 kv_heads) * head_dim]`, float16 or bfloat16, the keys and values, which it may overwrite.

    `cos` and `sin` `[tokens, head_dim]` as `RotaryEmbedding` makes them, or None; `position_ids` `[tokens]`,
    `query_starts` `[batch + 1]` and `slots` `[batch]`, all int32. Caches `[slots, kv_heads, max_length, head_dim]` in
    float16, bfloat16, or int8 or float8_e4m3fn with scales float32 `[kv_heads]`. `head_dim` a multiple of 8 up to 256.
    `pages` of caches `[pages, kv_heads, page_size, head_dim]`.
    """
    batch, (_, kv_heads, _, head_dim) = len(slots), key_cache.shape
    block_d = triton.next_power_of_2(head_dim)
    block_h = min(triton.next_power_of_2(kv_heads), max(1, WRITTEN // block_d))
    programs = 2 * triton.cdiv(kv_heads, block_h) * len(qkv)  # in one dimension: others of a grid end at 65535
    pages, pages_stride, page_size = table(pages, key_cache)
    _cache_write_kernel[(programs,)](
        qkv, cos, sin, position_ids, query_starts, slots, key_cache, value_cache, key_scale, value_scale, pages,
        batch, qkv.stride(0), *key_cache.stride()[:2], pages_stride, PAGE=page_size,
        HEADS=heads, KV_HEADS=kv_heads, BLOCK_H=block_h, HALF=head_dim // 2, BLOCK_HALF=block_d // 2,
        BATCH=max(16, triton.next_power_of_2(batch)), LEAVE=_leaves(qkv, slots, key_cache), num_warps=4,
        **dependent_launch(qkv.device),
    )  # fmt: skip


def _leaves(qkv: torch.Tensor, slots: torch.Tensor, cache: torch.Tensor) -> bool:
    """Whether new keys and values are left in `qkv`."""
    head_dim, copies = cache.shape[-1], qkv.device.type != "cuda" or capability(qkv.device) >= HOPPER
    return cache.dtype.itemsize == 1 and len(qkv) >= LONG * len(slots) and head_dim in (16, 32, 64, 128, 256) and copies


def context_attention(
    qkv: torch.Tensor,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    factors: torch.Tensor | None,
    query_starts: torch.Tensor,
    past_lengths: torch.Tensor,
    slots: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    key_scale: torch.Tensor | None,
    value_scale: torch.Tensor | None,
    slopes: torch.Tensor | None,
    heads: int,
    quantize: Quantize = None,
    pages: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What `write_cache` was given, to `[tokens, heads * head_dim]` and, where that is rounded to 8 bits, its scales.

    `factors` `[tokens]` of the queries, or None; `past_lengths` int32 `[batch]`; for ALiBi `slopes`, float32 `[heads]`.
    `quantize`: int8 or float8_e4m3fn, and a scale, float32 `[1]`; the scales are that one, `[tokens, 1]`.
    """
    tokens, batch, (_, kv_heads, _, head_dim) = len(qkv), len(slots), key_cache.shape
    output, scales, given, limit = narrow_rows(qkv, heads * head_dim, quantize)
    block_d = max(16, triton.next_power_of_2(head_dim))
    block = min(64, READ // block_d)
    new = None
    if _leaves(qkv, slots, key_cache):
        new = TensorDescriptor(qkv, list(qkv.shape), list(qkv.stride()), [block, head_dim])
    # Where 8-bit tiles are converted by every program that reads them more rows a program pay; 64 start sooner.
    converts = key_cache.dtype.itemsize == 1 and new is None
    rows = 128 if converts and tokens * heads >= 256 * processors(qkv.device) else 64
    blocks = (tokens + batch * (rows - 1)) // rows  # there are no more, however long the sequences are
    pages, pages_stride, page_size = table(pages, key_cache)
    _context_attention_kernel[(heads * blocks,)](
        qkv, cos, sin, factors, key_cache, value_cache, key_scale, value_scale, query_starts, past_lengths, slots,
        slopes, pages, output, scales, given, new,
        batch, qkv.stride(0), *key_cache.stride()[:2], pages_stride, head_dim**-0.5 * math.log2(math.e), PAGE=page_size,
        HEADS=heads, GROUP=heads // kv_heads, HALF=head_dim // 2, BLOCK_HALF=block_d // 2, LIMIT=limit,
        AT_ONCE=heads if new is None or heads % HEADS_AT_ONCE else HEADS_AT_ONCE,
        BATCH=max(16, triton.next_power_of_2(batch)), BLOCK_M=rows, BLOCK_N=block,
        num_warps=rows // 16, num_stages=3, **dependent_launch(qkv.device),
    )  # fmt: skip
    return output, scales


@triton.jit(do_not_specialize=["batch"])
def _cache_write_kernel(
    qkv, cos, sin, position_ids, query_starts, slots, key_cache, value_cache, key_scale, value_scale, pages,
    batch, qkv_stride, cache_stride, cache_head_stride, pages_stride,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, BLOCK_H: tl.constexpr, HALF: tl.constexpr, BLOCK_HALF: tl.constexpr,
    BATCH: tl.constexpr, PAGE: tl.constexpr, LEAVE: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """Some heads of one token: keys or values."""
    trigger(DEPENDENT)
    wait(DEPENDENT)
    blocks: tl.constexpr = (KV_HEADS + BLOCK_H - 1) // BLOCK_H
    part, token = tl.program_id(0) % (2 * blocks), (tl.program_id(0) // (2 * blocks)).to(tl.int64)
    sequences = tl.arange(0, BATCH)
    ends = tl.load(query_starts + 1 + sequences, mask=sequences < batch, other=0)
    b = tl.sum(((ends <= token) & (sequences < batch)).to(tl.int32), 0)
    if b == batch:
        return
    head = part % blocks * BLOCK_H + tl.arange(0, BLOCK_H)
    d = tl.arange(0, BLOCK_HALF)
    there, position = tl.load(slots + b).to(tl.int64), tl.load(position_ids + token)
    if pages is not None:
        there = tl.load(pages + there * pages_stride + position // PAGE).to(tl.int64)
        position %= PAGE
    there = there * cache_stride + position * 2 * HALF
    inside = (head[:, None] < KV_HEADS) & (d[None, :] < HALF)
    own = qkv + token * qkv_stride + (HEADS + head[:, None]) * (2 * HALF)
    if part < blocks:
        first, second = _rotated(own, cos, sin, token, d[None, :], inside, HALF)
        to = key_cache + there
        _store(to, cache_head_stride, key_scale, own, first, second, head, d, inside, KV_HEADS, HALF, LEAVE)
    else:
        values = own + KV_HEADS * 2 * HALF
        first, second = _rotated(values, None, None, token, d[None, :], inside, HALF)
        to = value_cache + there
        _store(to, cache_head_stride, value_scale, values, first, second, head, d, inside, KV_HEADS, HALF, LEAVE)


@triton.jit
def _rotated(x, cos, sin, token, d, inside, HALF: tl.constexpr):
    """Both halves of heads that begin at `x`, each of a token; rotated if there are `cos` and `sin`."""
    first, second = tl.load(x + d, mask=inside, other=0.0), tl.load(x + HALF + d, mask=inside, other=0.0)
    if cos is not None:
        at = token * (2 * HALF) + d
        real = inside & (d < HALF)
        c, s = tl.load(cos + at, mask=real, other=0.0), tl.load(sin + at, mask=real, other=0.0)
        at += HALF
        c2, s2 = tl.load(cos + at, mask=real, other=0.0), tl.load(sin + at, mask=real, other=0.0)
        first, second = rotated(first, second, c, s), rotated(second, first, c2, s2)
    return first, second


@triton.jit
def _store(
    to, head_stride, scale, own, first, second, head, d, inside,
    HEADS: tl.constexpr, HALF: tl.constexpr, LEAVE: tl.constexpr,
):  # fmt: skip
    """Both halves into a cache, and, to leave what that holds, where they come from."""
    factor = None
    if scale is not None:
        factor = tl.load(scale + head, mask=head < HEADS, other=1.0)[:, None]
    at = to + head[:, None].to(tl.int64) * head_stride + d[None, :]
    low, high = stored(first, factor, to.dtype.element_ty), stored(second, factor, to.dtype.element_ty)
    tl.store(at, low, mask=inside)
    tl.store(at + HALF, high, mask=inside)
    if LEAVE:
        tl.store(own + d[None, :], widened(low, first), mask=inside)
        tl.store(own + HALF + d[None, :], widened(high, first), mask=inside)


@triton.jit(do_not_specialize=["batch"])
def _context_attention_kernel(
    qkv, cos, sin, factors, key_cache, value_cache, key_scale, value_scale, query_starts, past_lengths, slots,
    slopes, pages, output, scales, given, new,
    batch, qkv_stride, cache_stride, cache_head_stride, pages_stride, score_scale,
    HEADS: tl.constexpr, GROUP: tl.constexpr, HALF: tl.constexpr, BLOCK_HALF: tl.constexpr, LIMIT: tl.constexpr,
    AT_ONCE: tl.constexpr, BATCH: tl.constexpr, PAGE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    DEPENDENT: tl.constexpr,
):  # fmt: skip
    """Scores are in units of log 2, so that `exp2` does for the softmax."""
    trigger(DEPENDENT)
    wait(DEPENDENT)
    count = tl.num_programs(0) // HEADS
    place = tl.program_id(0) % (AT_ONCE * count)
    head = tl.program_id(0) // (AT_ONCE * count) * AT_ONCE + place % AT_ONCE
    block = count - 1 - place // AT_ONCE
    sequences = tl.arange(0, BATCH)
    real = sequences < batch
    starts = tl.load(query_starts + sequences, mask=real, other=0)
    blocks = tl.cdiv(tl.load(query_starts + sequences + 1, mask=real, other=0) - starts, BLOCK_M)
    b = tl.sum((tl.cumsum(blocks, 0) <= block).to(tl.int32), 0)
    if b >= batch:
        return
    start = tl.load(query_starts + b)
    length = tl.load(query_starts + b + 1) - start
    past = tl.load(past_lengths + b)
    slot = tl.load(slots + b).to(tl.int64)
    first = (block - tl.sum(tl.where(sequences < b, blocks, 0), 0)) * BLOCK_M

    row = first + tl.arange(0, BLOCK_M)
    token = (start + row).to(tl.int64)
    d = tl.arange(0, BLOCK_HALF)[None, :]
    inside = (row[:, None] < length) & (d < HALF)
    q = qkv + token[:, None] * qkv_stride + head * (2 * HALF)
    low, high = _rotated(q, cos, sin, token[:, None], d, inside, HALF)
    if factors is not None:
        factor = tl.load(factors + token, mask=row < length, other=0.0)[:, None]
        low, high = scaled(low, factor), scaled(high, factor)
    queries = tl.reshape(tl.permute(tl.join(low, high), (0, 2, 1)), (BLOCK_M, 2 * BLOCK_HALF))
    start_of_head = (head // GROUP) * cache_head_stride
    if pages is None:
        start_of_head = slot * cache_stride + start_of_head
    else:
        pages += slot * pages_stride
    key_cache += start_of_head
    value_cache += start_of_head
    if key_scale is not None:
        score_scale *= tl.load(key_scale + head // GROUP)
    slope = None
    if slopes is not None:
        slope = tl.load(slopes + head) * LOG2_E

    state = (
        tl.full((BLOCK_M,), float("-inf"), tl.float32), tl.zeros((BLOCK_M,), tl.float32),
        tl.zeros((BLOCK_M, 2 * BLOCK_HALF), tl.float32),
    )  # fmt: skip
    position = past + row
    seen_by_all = (past + first + 1) // BLOCK_N * BLOCK_N
    end = past + tl.minimum(first + BLOCK_M, length)
    fresh = end  # from where on tiles are read from `new`
    if new is not None:
        fresh = tl.minimum(tl.cdiv(past, BLOCK_N) * BLOCK_N, end)
    state = _over(
        state, queries, key_cache, value_cache, pages, cache_stride, position, slope, score_scale,
        0, tl.minimum(seen_by_all, fresh), end, False, PAGE, HALF, BLOCK_HALF, BLOCK_N,
    )  # fmt: skip
    state = _over(
        state, queries, key_cache, value_cache, pages, cache_stride, position, slope, score_scale,
        seen_by_all, fresh, end, True, PAGE, HALF, BLOCK_HALF, BLOCK_N,
    )  # fmt: skip
    if new is not None:
        key = (HEADS + head // GROUP) * (2 * HALF)
        value = key + HEADS // GROUP * (2 * HALF)
        state = _over_new(
            state, queries, new, start - past, key, value, position, slope, score_scale,
            fresh, seen_by_all, end, False, BLOCK_N,
        )  # fmt: skip
        state = _over_new(
            state, queries, new, start - past, key, value, position, slope, score_scale,
            tl.maximum(seen_by_all, fresh), end, end, True, BLOCK_N,
        )  # fmt: skip
    _, weight_sum, total = state
    scale = 1 / weight_sum
    if value_scale is not None:
        scale *= tl.load(value_scale + head // GROUP)
    attended = (total * scale[:, None]).to(qkv.dtype.element_ty)
    if given is not None:
        input_scale = tl.load(given)
        attended = rounded(attended, input_scale, LIMIT, output.dtype.element_ty)
        if head == 0:
            tl.store(scales + token, tl.full((BLOCK_M,), input_scale, tl.float32), mask=row < length)
    column, real = _columns(HALF, BLOCK_HALF)
    at = token[:, None] * (HEADS * 2 * HALF) + head * (2 * HALF) + column[None, :]
    tl.store(output + at, attended, mask=(row[:, None] < length) & real[None, :])


@triton.jit
def _columns(HALF: tl.constexpr, BLOCK_HALF: tl.constexpr):
    """The channels of a head whose halves lie in blocks of a power of two, and which of them are there."""
    d = tl.arange(0, 2 * BLOCK_HALF)
    if HALF == BLOCK_HALF:
        return d, d < 2 * HALF
    else:
        return d // BLOCK_HALF * HALF + d % BLOCK_HALF, d % BLOCK_HALF < HALF


@triton.jit
def _over(
    state, queries, keys, values, pages, cache_stride, position, slope, score_scale, begin, stop, end,
    MASKED: tl.constexpr, PAGE: tl.constexpr, HALF: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Attends to the positions from `begin` to `stop`; where masked, none beyond a query's own."""
    column, real = _columns(HALF, BLOCK_HALF)
    page = page_of(pages, begin, end, PAGE, BLOCK_N)
    for n in range(begin, stop, BLOCK_N):
        at = n + tl.arange(0, BLOCK_N)
        places = at[:, None] * (2 * HALF) + column[None, :]
        held = origin(pages, page, n, cache_stride, PAGE, BLOCK_N, 2 * HALF)
        page = page_of(pages, n + BLOCK_N, end, PAGE, BLOCK_N)
        if MASKED:
            inside = (at[:, None] < end) & real[None, :]
            k = tl.load(keys + held + places, mask=inside, other=0.0)
            v = tl.load(values + held + places, mask=inside, other=0.0)
        elif HALF == BLOCK_HALF:
            k, v = tl.load(keys + held + places), tl.load(values + held + places)
        else:
            inside = real[None, :]
            k = tl.load(keys + held + places, mask=inside, other=0.0)
            v = tl.load(values + held + places, mask=inside, other=0.0)
        k, v = widened(k, queries), widened(v, queries)
        state = _attended(state, queries, k, v, at, position, slope, score_scale, MASKED)
    return state


@triton.jit
def _over_new(
    state, queries, new, row, key, value, position, slope, score_scale, begin, stop, end,
    MASKED: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The same of positions `n` in the rows `row + n` of `new`, in the columns from `key` and `value` on."""
    for n in range(begin, stop, BLOCK_N):
        at = n + tl.arange(0, BLOCK_N)
        k, v = new.load([row + n, key]), new.load([row + n, value])
        if MASKED:  # what comes after the sequence may be anything
            v = tl.where(at[:, None] < end, v, 0.0)
        state = _attended(state, queries, k, v, at, position, slope, score_scale, MASKED)
    return state


@triton.jit
def _attended(state, queries, k, v, at, position, slope, score_scale, MASKED: tl.constexpr):
    """After a tile of keys and values, of the positions `at`."""
    highest, weight_sum, total = state
    scores = tl.dot(queries, k.T)
    weights, higher = _weights(scores, highest, at, position, slope, score_scale, MASKED)
    shrink = tl.exp2(highest - higher)
    weight_sum = weight_sum * shrink + tl.sum(weights, 1)
    total = tl.dot(weights.to(queries.dtype), v, total * shrink[:, None])
    return higher, weight_sum, total


@triton.jit
def _weights(scores, highest, at, position, slope, score_scale, MASKED: tl.constexpr):
    """The softmax's of a tile, before they are divided by their sum, and the highest score so far."""
    if slope is not None:  # rounded in one way, wherever a tile is read from
        scores = tl.fma(scores, score_scale + tl.zeros_like(scores), slope * (at[None, :] - position[:, None]))
    if MASKED:
        scores = tl.where(at[None, :] <= position[:, None], scores, float("-inf"))
    if slope is None:
        higher = tl.maximum(highest, tl.max(scores, 1) * score_scale)
        weights = tl.exp2(scores * score_scale - higher[:, None])
    else:
        higher = tl.maximum(highest, tl.max(scores, 1))
        weights = tl.exp2(scores - higher[:, None])
    return weights, higher
