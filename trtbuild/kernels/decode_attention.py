"""Attention of one new token a sequence, from its projections to what `o_proj` reads, in one launch.

`decode_attention(qkv, cos, sin, factors, position_ids, key_cache, ...)` equals, for every sequence `b`, query head `h`
and its KV head `g = h // (heads / kv_heads)`, with `p = position_ids[b]` and `n = p + 1`,

    q, k, v = Rotate of qkv by cos and sin; SplitHeads without them; then q *= factors
    key_cache[b, g, p], value_cache[b, g, p] = k[b, g], v[b, g]                 rounded as the caches are
    keys, values = key_cache[b, g, :n] * key_scale[g], value_cache[b, g, :n] * value_scale[g]
    output[b, h] = softmax(keys @ q[b, h] * head_dim**-0.5 + slopes[h] * (arange(n) - p)) @ values
    quantize_rows(output, scale, dtype)                                         without `quantize` the output

With a table `pages` (`trtbuild.kernels.cache`) sequence `b` has its row `b`.

A step reads the cache and little else, and one sequence has fewer KV heads than a GPU has multiprocessors. So the cache
is split along its length: a program attends over one part for all query heads of a KV head, and the program that ends
last merges the parts of its sequence and KV head, always in the same order ("Flash-Decoding", which arXiv 2311.01282
builds on). Scales are applied to scores and outputs, never to the cache. How it is split follows from shapes, the GPU
and the sequence's own length, so results are always the same.

`position_ids` and the first tile of a part are read before the kernels in front have ended. Earlier steps wrote them,
and every step begins with an ordinary launch (its embedding), which waits for all of these.

One query head a KV head is a matter of multiplying and adding what is read, on CUDA cores: every row of a tile keeps
a maximum and a sum of its own, so that nothing in the loop waits for other threads. More heads use tensor cores.
"""

import functools
import math

import torch
import triton
import triton.language as tl

from trtbuild.kernels.cache import origin, page_of, rotated, scaled, stored, table, widened
from trtbuild.kernels.conversion import from_fp8, from_pairs
from trtbuild.kernels.dependent_launch import dependent_launch, trigger, wait
from trtbuild.kernels.processors import processors
from trtbuild.kernels.quantize_rows import Quantize, narrow_rows, rounded

MIN_PART = 128  # positions; a shorter part costs more in merging than it gains
READ = 8192  # values of a tile of keys or values
MANY = 8  # programs a multiprocessor
SHORT = 512  # positions; for no more, half a tile
MERGED = 4096  # values of parts that a program merges at a time
COUNTERS = 1 << 16
LOG2_E = tl.constexpr(math.log2(math.e))
LOWEST = tl.constexpr(-1e30)  # below every score, and finite: the difference of two of them is 0


def decode_attention(
    qkv: torch.Tensor,
    cos: torch.Tensor | None,
    sin: torch.Tensor | None,
    factors: torch.Tensor | None,
    position_ids: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    key_scale: torch.Tensor | None,
    value_scale: torch.Tensor | None,
    slopes: torch.Tensor | None,
    kv_bound: int,
    heads: int,
    quantize: Quantize = None,
    pages: torch.Tensor | None = None,
    late: bool = True,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`[batch, (heads + 2 kv_heads) * head_dim]`, float16 or bfloat16, to `[batch, heads * head_dim]` and, where that
    is rounded to 8 bits, its scales; caches in place.

    `cos` and `sin` `[batch, head_dim]` as `RotaryEmbedding` makes them, or None; `factors` `[batch]` of the queries, or
    None; `position_ids` int32 `[batch]`, all below `kv_bound`. Caches `[slots, kv_heads, max_length, head_dim]`, of
    which sequence `b` has slot `b`, in float16, bfloat16, or int8 or float8_e4m3fn with scales float32 `[kv_heads]`;
    for ALiBi `slopes`, float32 `[heads]`. `head_dim` a multiple of 8 up to 256.
    `quantize`: int8 or float8_e4m3fn, and a scale, float32 `[1]`; the scales are that one, `[batch, 1]`.
    `pages` of caches `[pages, kv_heads, page_size, head_dim]`. Of several sequences the next kernel may start when
    attention ends, or unless `late`, where they are short, when it begins.
    """
    _, kv_heads, _, head_dim = key_cache.shape
    group, grid, block_d = heads // kv_heads, len(qkv) * kv_heads, max(16, triton.next_power_of_2(head_dim))
    block_h = 1 if group == 1 else max(16, triton.next_power_of_2(group))
    per_processor = 2
    if group > 1 and block_h * block_d <= 2048:  # in a program of one warp nothing waits for other threads
        per_processor, options = 8, {"BLOCK": 16, "STAGES": 5, "num_warps": 1}
    elif group > 1 or grid < processors(qkv.device):
        # A program that needs much shared memory cannot start beside the product in front of it.
        in_registers = group == 1 and key_cache.dtype.itemsize == 2
        options = {"BLOCK": min(128, READ // block_d), "STAGES": 1 if in_registers else 3, "num_warps": 4}
    elif grid >= MANY * processors(qkv.device):
        # Small programs, of which many share a multiprocessor, begin and end beside each other.
        block = min(128, (READ if kv_bound > SHORT else READ // 2) // block_d)
        options = {"BLOCK": block, "STAGES": 3, "num_warps": block * block_d // 2048}
    elif not late and kv_bound <= SHORT and key_cache.dtype.itemsize == 2:
        options = {"BLOCK": min(128, READ // 2 // block_d), "STAGES": 4, "num_warps": 2, "LATE": False}
    else:
        read = READ // 2 if key_cache.dtype.itemsize == 1 else READ  # they have to be widened: more warps a byte
        options = {"BLOCK": min(128, read // block_d), "STAGES": 3, "num_warps": 4}
    parts = 1
    if grid <= COUNTERS:
        programs = per_processor * processors(qkv.device)  # to keep enough loads in flight
        parts = max(1, min(programs // grid, triton.cdiv(kv_bound - 1, MIN_PART)))
    return _launch(
        qkv, cos, sin, factors, position_ids, key_cache, value_cache, key_scale, value_scale, slopes, heads, parts,
        quantize, pages, MIN_PART=MIN_PART, PLAIN=group == 1, BLOCK_H=block_h,
        **{"LATE": group == 1 and len(qkv) > 1} | options,
    )  # fmt: skip


def _launch(
    qkv, cos, sin, factors, position_ids, key_cache, value_cache, key_scale, value_scale, slopes, heads, parts,
    quantize, pages, BLOCK_H, **options,
):  # fmt: skip
    _, kv_heads, _, head_dim = key_cache.shape
    batch, group = len(qkv), heads // kv_heads
    output, scales, given, limit = narrow_rows(qkv, heads * head_dim, quantize)
    pages, pages_stride, page_size = table(pages, key_cache)
    partial = sums = counters = None  # one part is the result
    if parts > 1:
        partial = qkv.new_empty(batch, heads, parts, head_dim, dtype=torch.float32)
        sums = qkv.new_empty(2, batch, heads, parts, dtype=torch.float32)
        counters = _counters(qkv.device)
    block_d, block_g = max(16, triton.next_power_of_2(head_dim)), triton.next_power_of_2(group)
    _decode_attention_kernel[parts, kv_heads, batch](
        qkv, cos, sin, factors, position_ids, key_cache, value_cache, key_scale, value_scale, slopes,
        pages, output, scales, given, partial, sums, counters,
        qkv.stride(0), *key_cache.stride()[:2], pages_stride, head_dim**-0.5 * math.log2(math.e),
        PAGE=page_size, LIMIT=limit, KV_HEADS=kv_heads, GROUP=group, BLOCK_H=BLOCK_H, HEAD_DIM=head_dim,
        BLOCK_D=block_d, BLOCK_G=block_g, MERGED=max(1, min(16, MERGED // (block_g * block_d))),
        **options, **dependent_launch(qkv.device),
    )  # fmt: skip
    return output, scales


@functools.cache
def _counters(device: torch.device) -> torch.Tensor:
    """How many parts of a sequence's KV head have ended. Zero between launches, of which one runs at a time."""
    return torch.zeros(COUNTERS, dtype=torch.int32, device=device)


@triton.jit
def _decode_attention_kernel(
    qkv, cos, sin, factors, position_ids, key_cache, value_cache, key_scale, value_scale, slopes,
    pages, output, scales, given, partial, sums, counters,
    qkv_stride, cache_stride, cache_head_stride, pages_stride, score_scale,
    PAGE: tl.constexpr, LIMIT: tl.constexpr,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, BLOCK_H: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_G: tl.constexpr, MERGED: tl.constexpr, MIN_PART: tl.constexpr, PLAIN: tl.constexpr, BLOCK: tl.constexpr,
    STAGES: tl.constexpr, LATE: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    """Scores are in units of log 2, so that `exp2` does for the softmax."""
    part, kv_head, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    member = tl.arange(0, BLOCK_H)  # of the query heads that share the KV head
    head = kv_head * GROUP + member
    d = tl.arange(0, BLOCK_D)
    in_head = d < HEAD_DIM
    real = (member[:, None] < GROUP) & in_head[None, :]

    # The part's positions, `begin` to `end`; the last part also has the new one.
    past = tl.load(position_ids + b)
    size = tl.cdiv(tl.maximum(MIN_PART, tl.cdiv(past, tl.num_programs(0))), BLOCK) * BLOCK
    parts = tl.maximum(1, tl.cdiv(past, size))
    begin = part * size
    end = tl.minimum(begin + size, past)
    newest = part == parts - 1

    at = begin + tl.arange(0, BLOCK)
    start_of_head = kv_head * cache_head_stride
    own = past * HEAD_DIM  # from the head's start on, where the new position is
    if pages is None:
        start_of_head = b * cache_stride + start_of_head
    else:
        pages += b * pages_stride
        own = tl.load(pages + past // PAGE).to(tl.int64) * cache_stride + past % PAGE * HEAD_DIM
    key_cache += start_of_head
    value_cache += start_of_head
    page = page_of(pages, begin, end, PAGE, BLOCK)
    held = origin(pages, page, begin, cache_stride, PAGE, BLOCK, HEAD_DIM)
    PAIRS: tl.constexpr = not PLAIN and value_cache.dtype.element_ty.primitive_bitwidth == 8
    k, v = _tile(key_cache + held, at, d, end, HEAD_DIM), _values(value_cache + held, at, end, PAIRS, HEAD_DIM, BLOCK_D)
    page = page_of(pages, begin + BLOCK, end, PAGE, BLOCK)  # the next tile's
    k_factor, v_factor = None, None
    if key_scale is not None:
        k_factor, v_factor = tl.load(key_scale + kv_head), tl.load(value_scale + kv_head)
        score_scale *= k_factor
    slope = None
    if slopes is not None:
        slope = tl.load(slopes + head, mask=member < GROUP, other=0.0) * LOG2_E
    if not LATE:
        trigger(DEPENDENT)
    if part >= parts:
        return  # without waiting: others of this launch do
    wait(DEPENDENT)

    qkv += b * qkv_stride
    partner = tl.where(d < HEAD_DIM // 2, d + HEAD_DIM // 2, d - HEAD_DIM // 2)
    c, s = None, None
    if cos is not None:
        c = tl.load(cos + b * HEAD_DIM + d, mask=in_head, other=0.0)
        s = tl.load(sin + b * HEAD_DIM + d, mask=in_head, other=0.0)
    if PLAIN:
        q = _head(qkv + kv_head * HEAD_DIM, d, partner, c, s, in_head)
    else:
        rows = head[:, None] * HEAD_DIM
        q = _head(qkv, rows + d[None, :], rows + partner[None, :], c, s, real)
    if factors is not None:
        q = scaled(q, tl.load(factors + b))
    new_k = qkv + (KV_HEADS * GROUP + kv_head) * HEAD_DIM
    own_k = _head(new_k, d, partner, c, s, in_head & newest)
    own_v = tl.load(new_k + KV_HEADS * HEAD_DIM + d, mask=in_head & newest, other=0.0)
    own_k = stored(own_k, k_factor, key_cache.dtype.element_ty)
    own_v = stored(own_v, v_factor, value_cache.dtype.element_ty)
    tl.store(key_cache + own + d, own_k, mask=in_head & newest)
    tl.store(value_cache + own + d, own_v, mask=in_head & newest)
    own_k, own_v = _just_rounded(own_k, q), _just_rounded(own_v, q)
    own_score = tl.sum(q.to(tl.float32) * own_k, len(q.shape) - 1) * score_scale
    own_score = tl.where(newest, own_score, tl.full((BLOCK_H,), LOWEST, tl.float32))

    # What the part has seen: the highest score, the sum of the weights, and their sum over the values.
    if PLAIN:
        wide_q = q.to(tl.float32) * score_scale
        rows = (
            tl.full((BLOCK,), LOWEST, tl.float32),
            tl.zeros((BLOCK,), tl.float32),
            tl.zeros((BLOCK, BLOCK_D), tl.float32),
        )
        if STAGES == 1:
            for start in tl.range(begin, end, BLOCK, num_stages=1):  # the next tile comes into registers meanwhile
                at = start + tl.arange(0, BLOCK)
                held = origin(pages, page, start + BLOCK, cache_stride, PAGE, BLOCK, HEAD_DIM)
                page = page_of(pages, start + 2 * BLOCK, end, PAGE, BLOCK)
                next_k = _tile(key_cache + held, at + BLOCK, d, end, HEAD_DIM)
                next_v = _tile(value_cache + held, at + BLOCK, d, end, HEAD_DIM)
                rows = _plain(rows, wide_q, k, v, at, past, end, slope, q)
                k, v = next_k, next_v
        else:
            rows = _plain(rows, wide_q, k, v, at, past, end, slope, q)
            for start in tl.range(begin + BLOCK, end, BLOCK, num_stages=STAGES):
                at = start + tl.arange(0, BLOCK)
                held = origin(pages, page, start, cache_stride, PAGE, BLOCK, HEAD_DIM)
                page = page_of(pages, start + BLOCK, end, PAGE, BLOCK)
                k, v = _tile(key_cache + held, at, d, end, HEAD_DIM), _tile(value_cache + held, at, d, end, HEAD_DIM)
                rows = _plain(rows, wide_q, k, v, at, past, end, slope, q)
        highest = tl.full((1,), tl.max(rows[0], 0), tl.float32)
        weights = tl.exp2(rows[0] - highest)
        weight_sum = tl.full((1,), tl.sum(rows[1] * weights, 0), tl.float32)
        total = tl.sum(rows[2] * weights[:, None], 0)[None, :]
    else:
        NARROW: tl.constexpr = BLOCK_D // 2 if PAIRS else BLOCK_D
        state = (
            tl.full((BLOCK_H,), LOWEST, tl.float32), tl.zeros((BLOCK_H,), tl.float32),
            tl.zeros((BLOCK_H, NARROW), tl.float32), tl.zeros((BLOCK_H, NARROW if PAIRS else 1), tl.float32),
        )  # fmt: skip
        dtype: tl.constexpr = value_cache.dtype.element_ty
        state = _dots(state, q, k, v, at, past, end, slope, score_scale, PAIRS, dtype)
        for start in tl.range(begin + BLOCK, end, BLOCK, num_stages=STAGES):
            at = start + tl.arange(0, BLOCK)
            held = origin(pages, page, start, cache_stride, PAGE, BLOCK, HEAD_DIM)
            page = page_of(pages, start + BLOCK, end, PAGE, BLOCK)
            k = _tile(key_cache + held, at, d, end, HEAD_DIM)
            v = _values(value_cache + held, at, end, PAIRS, HEAD_DIM, BLOCK_D)
            state = _dots(state, q, k, v, at, past, end, slope, score_scale, PAIRS, dtype)
        highest, weight_sum, total, odd = state
        if PAIRS:
            total = tl.reshape(tl.join(total, odd), (BLOCK_H, BLOCK_D))
    if LATE:
        trigger(DEPENDENT)
    higher = tl.maximum(highest, own_score)
    shrink, own_weight = tl.exp2(highest - higher), tl.exp2(own_score - higher)
    weight_sum = weight_sum * shrink + own_weight
    total = total * shrink[:, None] + own_weight[:, None] * own_v[None, :]
    if v_factor is not None:
        total *= v_factor

    output += b * KV_HEADS * GROUP * HEAD_DIM
    if partial is None or parts == 1:
        result = output + head[:, None] * HEAD_DIM + d[None, :]
        attended = (total / weight_sum[:, None]).to(qkv.dtype.element_ty)
        _store(result, attended, scales, given, b, kv_head, real, LIMIT)
    else:
        row = (b * KV_HEADS + kv_head) * GROUP * tl.num_programs(0)  # the group's first
        weight_sums = sums + tl.num_programs(2) * KV_HEADS * GROUP * tl.num_programs(0)
        mine = row + member * tl.num_programs(0) + part
        tl.store(sums + mine, higher, mask=member < GROUP)
        tl.store(weight_sums + mine, weight_sum, mask=member < GROUP)
        tl.store(partial + mine[:, None] * HEAD_DIM + d[None, :], total, mask=real)
        tl.debug_barrier()  # all threads have written before one counts the part
        ended = tl.atomic_add(counters + b * KV_HEADS + kv_head, 1, sem="acq_rel")
        if ended == parts - 1:
            tl.debug_barrier()
            tl.store(counters + b * KV_HEADS + kv_head, 0)
            output += kv_head * GROUP * HEAD_DIM
            merged, there = _merge(sums, weight_sums, partial, row, parts, d, GROUP, HEAD_DIM, BLOCK_G, MERGED)
            to = output + tl.arange(0, BLOCK_G)[:, None] * HEAD_DIM + d[None, :]
            _store(to, merged.to(qkv.dtype.element_ty), scales, given, b, kv_head, there, LIMIT)


@triton.jit
def _just_rounded(x, like):
    """`widened` in float32; of what was just rounded to FP8 ptxas 12.8 lost every fourth value: its bits are moved."""
    if x.dtype == tl.float8e4nv:
        return from_fp8(x, like).to(tl.float32)
    else:
        return widened(x, like).to(tl.float32)


@triton.jit
def _head(x, at, partner, cos, sin, inside):
    """What is at `x + at`, rotated if there are `cos` and `sin`."""
    values = tl.load(x + at, mask=inside, other=0.0)
    if cos is None:
        return values
    else:
        return rotated(values, tl.load(x + partner, mask=inside, other=0.0), cos, sin)


@triton.jit
def _merge(
    sums, weight_sums, partial, row, parts, d,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_G: tl.constexpr, MERGED: tl.constexpr,
):  # fmt: skip
    """A group's output and which of it is there, of parts that begin at `row`; other programs wrote them, so they are
    read past the L1 cache."""
    member = tl.arange(0, BLOCK_G)
    highest = tl.full((BLOCK_G,), LOWEST, tl.float32)
    weight_sum = tl.zeros((BLOCK_G,), tl.float32)
    total = tl.zeros((BLOCK_G, d.shape[0]), tl.float32)
    for first in range(0, parts, MERGED):
        part = first + tl.arange(0, MERGED)
        inside = (part[:, None] < parts) & (member[None, :] < GROUP)
        at = row + member[None, :] * tl.num_programs(0) + part[:, None]
        values = tl.load(
            partial + at[:, :, None] * HEAD_DIM + d[None, None, :],
            mask=inside[:, :, None] & (d[None, None, :] < HEAD_DIM), other=0.0, cache_modifier=".cg",
        )  # fmt: skip
        scores = tl.load(sums + at, mask=inside, other=LOWEST, cache_modifier=".cg")
        some = tl.load(weight_sums + at, mask=inside, other=0.0, cache_modifier=".cg")
        higher = tl.maximum(highest, tl.max(scores, 0))
        weights, shrink = tl.exp2(scores - higher[None, :]), tl.exp2(highest - higher)
        weight_sum = weight_sum * shrink + tl.sum(some * weights, 0)
        total = total * shrink[:, None] + tl.sum(values * weights[:, :, None], 0)
        highest = higher
    real = (member[:, None] < GROUP) & (d[None, :] < HEAD_DIM)
    return total / tl.where(member < GROUP, weight_sum, 1.0)[:, None], real


@triton.jit
def _store(to, attended, scales, given, b, kv_head, inside, LIMIT: tl.constexpr):
    """What a group has attended to, rounded to 8 bits if a scale is given."""
    if given is not None:
        scale = tl.load(given)
        attended = rounded(attended, scale, LIMIT, to.dtype.element_ty)
        if kv_head == 0:
            tl.store(scales + b, scale)
    tl.store(to, attended, mask=inside)


@triton.jit
def _tile(cache, at, d, end, HEAD_DIM: tl.constexpr):
    """Positions `at` of a head's cache that are below `end`."""
    inside = at[:, None] < end if d.shape[0] == HEAD_DIM else (at[:, None] < end) & (d[None, :] < HEAD_DIM)
    return tl.load(cache + at[:, None] * HEAD_DIM + d[None, :], mask=inside, other=0.0)


@triton.jit
def _values(cache, at, end, PAIRS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """A tile; of 8-bit values in words of two, since tensor cores' transposed operands are read from 16-bit ones."""
    if PAIRS:
        words = cache.to(tl.pointer_type(tl.int16), bitcast=True)
        return _tile(words, at, tl.arange(0, BLOCK_D // 2), end, HEAD_DIM // 2)
    else:
        return _tile(cache, at, tl.arange(0, BLOCK_D), end, HEAD_DIM)


@triton.jit
def _plain(rows, q, k, v, at, past, end, slope, like):
    """A tile of keys and values `[BLOCK, BLOCK_D]` for one query, float32 and scaled; the rows' own sums."""
    highest, weight_sum, total = rows
    scores = tl.sum(widened(k, like).to(tl.float32) * q[None, :], 1)
    if slope is not None:
        scores += slope * (at - past)
    scores = tl.where(at < end, scores, float("-inf"))
    higher = tl.maximum(highest, scores)
    weights, shrink = tl.exp2(scores - higher), tl.exp2(highest - higher)
    total = total * shrink[:, None] + weights[:, None] * widened(v, like).to(tl.float32)
    return higher, weight_sum * shrink + weights, total


@triton.jit
def _dots(state, q, k, v, at, past, end, slope, score_scale, PAIRS: tl.constexpr, dtype: tl.constexpr):
    """A tile of keys and values for the queries of a group."""
    highest, weight_sum, total, odd = state
    scores = tl.dot(q, widened(k, q).T) * score_scale
    if slope is not None:
        scores += slope[:, None] * (at - past)[None, :]
    scores = tl.where(at[None, :] < end, scores, float("-inf"))
    higher = tl.maximum(highest, tl.max(scores, 1))
    weights, shrink = tl.exp2(scores - higher[:, None]), tl.exp2(highest - higher)
    narrow = weights.to(q.dtype)
    if PAIRS:
        low, high = from_pairs(v, dtype, q)
        total = tl.dot(narrow, low, total * shrink[:, None])
        odd = tl.dot(narrow, high, odd * shrink[:, None])
    else:
        total = tl.dot(narrow, widened(v, q), total * shrink[:, None])
    return higher, weight_sum * shrink + tl.sum(weights, 1), total, odd
