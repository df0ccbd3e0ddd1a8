"""The kernels of a step of chunks, interpreted: rotation with cache write, and attention."""

import pytest
import torch
from paged_caches import from_pages, in_pages

from trtbuild.models.alibi import alibi_slopes
from trtbuild.network.ops.attention import Attention
from trtbuild.network.ops.rotate import Rotate
from trtbuild.network.ops.scale_tokens import ScaleTokens
from trtbuild.network.ops.split_heads import SplitHeads
from trtbuild.tensors.rounding import quantize

pytest.importorskip("triton", "3.7")  # earlier interpreters fail with numpy 2.4

from trtbuild.kernels import context_attention as module
from trtbuild.kernels.context_attention import context_attention, write_cache

FP8 = torch.float8_e4m3fn
TOLERANCE = {torch.float16: 2e-3, torch.int8: 2e-2, FP8: 0.2}  # the interpreter rounds to FP8 in its own way
PADDING = 3  # rows after the last sequence
RAGGED = [(1, 129), (0, 0), (6, 0), (5, 60)]  # tokens and past of every sequence; one has nothing to do
CASES = [  # heads, kv_heads, head_dim, chunks, cache, position
    (1, 1, 64, [(66, 0)], torch.float16, "rope"),
    (4, 1, 16, RAGGED, torch.float16, "rope"),
    (2, 2, 16, RAGGED, torch.int8, "rope"),
    (2, 2, 16, RAGGED, FP8, "rope"),
    (2, 1, 40, [(2, 3), (4, 62)], torch.float16, "alibi"),
    (1, 1, 128, [(3, 2)], torch.int8, "alibi"),
    (2, 1, 16, [(140, 0), (70, 68)], torch.int8, "alibi"),
]


# New keys and values of long sequences are left beside caches of 8 bits alone.
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "chunks", "cache_dtype", "position", "long"),
    [(*case, long) for case in CASES for long in (False, True) if not long or case[4].itemsize == 1],
)
def test_chunks(heads, kv_heads, head_dim, chunks, cache_dtype, position, long, monkeypatch):
    """Against the operations in float64; rows of padding and what lies beyond a sequence are poisoned."""
    monkeypatch.setattr(module, "LONG", 0 if long else 1 << 30)
    alibi = position == "alibi"
    torch.manual_seed(heads)
    batch, lengths = len(chunks), [n for n, _ in chunks]
    tokens = sum(lengths)
    qkv = torch.randn(tokens + PADDING, (heads + 2 * kv_heads) * head_dim).half()
    qkv[tokens:] = float("nan")
    past = torch.tensor([p for _, p in chunks], dtype=torch.int32)
    starts = torch.tensor([0, *lengths]).cumsum(0).int()
    positions = torch.cat([*(torch.arange(p, p + n) for n, p in chunks), torch.full((PADDING,), 999)]).int()
    slots = torch.arange(1, batch + 1).flip(0).int()
    caches, scales = [*torch.randn(2, batch + 1, kv_heads, 140, head_dim).half()], (None, None)
    if cache_dtype.itemsize == 1:
        scales = tuple(torch.rand(2, kv_heads) * 0.02 + 0.01)
        caches = [quantize(c.float(), s[:, None, None], cache_dtype) for c, s in zip(caches, scales, strict=True)]
    if cache_dtype != torch.int8:
        for cache in caches:
            for slot, (n, p) in zip(slots, chunks, strict=True):
                cache[slot, :, p + n :] = float("nan")
    angles = torch.rand(tokens + PADDING, head_dim) * 7
    cos, sin = (None, None) if alibi else (angles.cos().half(), angles.sin().half())
    factors = None if alibi else (1 + torch.rand(tokens + PADDING)).half()
    slopes = alibi_slopes(heads) if alibi else None

    def run(dtype: torch.dtype):
        sizes = heads, kv_heads, head_dim
        wide = [None if x is None else x[:tokens].to(dtype) for x in (qkv, cos, sin, factors)]
        q, k, v = SplitHeads(*sizes).reference(wide[0]) if alibi else Rotate(*sizes).reference(*wide[:3])
        q = q if factors is None else ScaleTokens().reference(q, wide[3])
        held = [c[slots] if scales[0] is not None else c[slots].to(dtype) for c in caches]
        return Attention().reference(q, k, v, positions[:tokens], starts, past, *held, slopes, *scales)

    expected, *_ = run(torch.float64)
    _, *written = run(torch.float16)
    actual = [cache.clone() for cache in caches]
    given = qkv.clone()
    write_cache(qkv, cos, sin, positions, starts, slots, *actual, *scales, heads)
    check_left(qkv, given, actual, positions[:tokens], slots.repeat_interleave(torch.tensor(lengths)), long)
    for cache, wanted, before in zip(actual, written, caches, strict=True):
        assert torch.equal(cache[0].view(torch.uint8), before[0].view(torch.uint8))
        if cache_dtype == FP8:
            torch.testing.assert_close(cache[slots].float(), wanted.float(), rtol=0.5, atol=0.01, equal_nan=True)
        else:
            assert torch.equal(cache[slots].view(torch.uint8), wanted.view(torch.uint8))
    where = qkv, cos, sin, factors, starts, past, slots, *actual, *scales, slopes, heads
    output, _ = context_attention(*where)
    assert (output[:tokens].double() - expected).norm() / expected.norm() < TOLERANCE[cache_dtype]
    narrow, given = context_attention(*where, (torch.int8, torch.full((1,), 0.03)))
    assert torch.equal(narrow[:tokens], quantize(output[:tokens].float(), torch.tensor(0.03), torch.int8))
    assert (given[:tokens] == 0.03).all()


def check_left(qkv, given, caches, positions, slots, long):
    """What is in the place of keys and values: of long sequences what the caches hold, without their scales."""
    kv_width = 2 * caches[0].shape[1] * caches[0].shape[3]
    expected, tokens = given.clone(), len(positions)
    if long:
        new = torch.stack([cache[slots.long(), :, positions.long()] for cache in caches], 1)
        expected[:tokens, -kv_width:] = new.half().view(tokens, kv_width)
    assert torch.equal(qkv[:tokens], expected[:tokens])
    assert qkv[tokens:].isnan().all()


@pytest.mark.parametrize("long", [False, True])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "chunks", "cache_dtype", "page_size", "shared"),
    [
        (1, 1, 128, [(66, 0), (3, 100)], torch.float16, 64, 0),  # a page a tile
        (4, 1, 16, [(1, 129), (0, 0), (6, 0), (5, 64)], torch.int8, 32, 0),  # two pages a tile
        (2, 2, 16, [(70, 64), (2, 70)], FP8, 128, 0),
        (2, 1, 40, [(30, 48), (4, 62)], torch.float16, 48, 1),  # neither divides the other
    ],
)
def test_pages(heads, kv_heads, head_dim, chunks, cache_dtype, page_size, shared, long, monkeypatch):
    """The bits of dense caches, and nothing of other pages, read or written; sequences have rows in another order."""
    monkeypatch.setattr(module, "LONG", 0 if long else 1 << 30)
    tokens, batch = sum(n for n, _ in chunks), len(chunks)
    lengths, past = [n + p for n, p in chunks], [p for _, p in chunks]
    given = torch.randn(tokens + PADDING, (heads + 2 * kv_heads) * head_dim).half()
    cos, sin = torch.randn(2, tokens + PADDING, head_dim).half()
    starts = torch.tensor([0, *(n for n, _ in chunks)]).cumsum(0).int()
    positions = torch.cat([*(torch.arange(p, p + n) for n, p in chunks), torch.full((PADDING,), 9999)]).int()
    slots = torch.arange(batch).flip(0).int()
    caches, scales = [*torch.randn(2, batch, kv_heads, max(lengths), head_dim).half()], (None, None)
    if cache_dtype.itemsize == 1:
        scales = tuple(torch.rand(2, kv_heads) * 0.02 + 0.01)
        caches = [quantize(c.float(), s[:, None, None], cache_dtype) for c, s in zip(caches, scales, strict=True)]
    for cache in caches:
        cache[:, :, : shared * page_size] = cache[0, :, : shared * page_size]
    slopes = alibi_slopes(heads) if page_size == 32 else None
    by_slot = [caches, [lengths[b] for b in slots], [past[b] for b in slots]]
    pools, pages = in_pages(*by_slot, page_size, shared)
    before = [pool.clone() for pool in pools]
    outputs = []
    for held, table in ((caches, None), (pools, pages)):
        qkv = given.clone()
        write_cache(qkv, cos, sin, positions, starts, slots, *held, *scales, heads, table)
        where = starts, torch.tensor(past).int(), slots, *held, *scales, slopes, heads, None, table
        outputs.append(context_attention(qkv, cos, sin, None, *where)[0][:tokens])
    assert torch.equal(*outputs)
    for pool, old, cache in zip(pools, before, caches, strict=True):
        for b, (n, p) in zip(slots.tolist(), chunks, strict=True):
            mine = from_pages(pool, pages, b, p + n)
            assert torch.equal(mine.view(torch.uint8), cache[b, :, : p + n].view(torch.uint8))
            for i in range(p, p + n):
                old[pages[b, i // page_size], :, i % page_size] = mine[:, i]
        assert torch.equal(pool.view(torch.uint8), old.view(torch.uint8))  # nothing else was written
