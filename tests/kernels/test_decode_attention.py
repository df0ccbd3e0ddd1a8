"""The kernel of a generation step's attention, interpreted."""

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

from trtbuild.kernels.decode_attention import decode_attention

FP8 = torch.float8_e4m3fn
CASES = [  # heads, kv_heads, head_dim, positions, max_length, cache
    (1, 1, 64, [280], 300, torch.float16),
    (1, 1, 128, [150], 200, torch.int8),
    (2, 2, 16, [0, 530], 540, FP8),  # ragged: one has a part, the other several
    (3, 3, 40, [128, 129], 140, torch.float16),
    (4, 2, 16, [260, 0], 270, torch.int8),
    (8, 1, 96, [63, 64], 70, FP8),  # one part
    (16, 16, 16, [40, 70], 80, torch.int8),  # many programs
    (20, 1, 16, [90], 100, torch.float16),  # more heads in a group than a block of rows
]


def case(
    heads: int,
    kv_heads: int,
    head_dim: int,
    positions: list[int],
    max_length: int,
    cache_dtype: torch.dtype,
    alibi: bool = False,
    log_n: bool = False,
):
    """Arguments of the kernel, what the operations make of them in float64, and the caches that they make of them."""
    torch.manual_seed(heads)
    batch = len(positions)
    qkv = torch.randn(batch, (heads + 2 * kv_heads) * head_dim).half()
    caches, scales = [*torch.randn(2, batch, kv_heads, max_length, head_dim).half()], (None, None)
    if cache_dtype.itemsize == 1:
        scales = tuple(torch.rand(2, kv_heads) * 0.02 + 0.01)
        caches = [quantize(c.float(), s[:, None, None], cache_dtype) for c, s in zip(caches, scales, strict=True)]
    angles = torch.rand(batch, head_dim) * 7
    rotary = () if alibi else (angles.cos().half(), angles.sin().half())
    slopes = alibi_slopes(heads) if alibi else None
    factors = (1 + torch.rand(batch)).half() if log_n else None
    position_ids, starts = torch.tensor(positions, dtype=torch.int32), torch.arange(batch + 1, dtype=torch.int32)

    def run(dtype: torch.dtype):
        sizes = heads, kv_heads, head_dim
        wide = [x.to(dtype) for x in (qkv, *rotary)]
        q, k, v = SplitHeads(*sizes).reference(*wide) if alibi else Rotate(*sizes).reference(*wide)
        q = q if factors is None else ScaleTokens().reference(q, factors.to(dtype))
        held = caches if scales[0] is not None else [cache.to(dtype) for cache in caches]
        return Attention().reference(q, k, v, position_ids, starts, position_ids, *held, slopes, *scales)

    expected, _, _ = run(torch.float64)
    _, *written = run(torch.float16)
    cos, sin = rotary or (None, None)
    arguments = qkv, cos, sin, factors, position_ids, *(c.clone() for c in caches), *scales, slopes, max_length, heads
    return arguments, expected, written


def check(arguments, expected, written) -> None:
    """Of FP8 with large tolerances: the interpreter rounds to it in its own way. Rounding is tested on a GPU."""
    actual, _ = decode_attention(*arguments)
    # Keys are rounded before they are quantized, which may take them to the other side of a tie.
    tolerance = {torch.float16: 2e-3, torch.int8: 2e-2, FP8: 0.2}[arguments[5].dtype]
    assert (actual.double() - expected).norm() / expected.norm() < tolerance
    for cache, wanted in zip(arguments[5:7], written, strict=True):
        if cache.dtype == FP8:
            torch.testing.assert_close(cache.float(), wanted.float(), rtol=0.5, atol=0.01, equal_nan=True)
        else:
            assert torch.equal(cache.view(torch.uint8), wanted.view(torch.uint8))


@pytest.mark.parametrize("position", ["rope", "alibi"])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim", "positions", "max_length", "cache_dtype"), CASES)
def test_decode_attention(heads, kv_heads, head_dim, positions, max_length, cache_dtype, position):
    alibi, log_n = position == "alibi", heads % 2 == 0
    check(*case(heads, kv_heads, head_dim, positions, max_length, cache_dtype, alibi, log_n))


@pytest.mark.parametrize("kv_heads", [2, 1])
@pytest.mark.parametrize("cache_dtype", [torch.float16, FP8], ids=str)
def test_what_lies_beyond_a_sequence_does_not_matter(cache_dtype, kv_heads):
    arguments, expected, written = case(2, kv_heads, 16, [70, 3], 90, cache_dtype)
    for cache, wanted in zip(arguments[5:7], written, strict=True):
        for memory, first in ((cache, 0), (wanted, 1)):
            for b, position in enumerate((70, 3)):
                memory[b, :, position + first :] = float("nan")
    check(arguments, expected, written)


def test_nan_is_seen():
    """A sequence whose projections are not finite, and no other."""
    for kv_heads in (2, 1):
        arguments, _, _ = case(2, kv_heads, 16, [140, 3], 200, torch.float16)
        arguments[0][0] = float("nan")
        output, _ = decode_attention(*arguments)
        assert output[0].isnan().all()
        assert output[1].isfinite().all()


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "positions", "cache_dtype", "page_size", "shared"),
    [
        (1, 1, 128, [150, 0], torch.float16, 64, 0),  # one page a tile, and one that only begins
        (2, 2, 64, [300, 127, 256], FP8, 32, 3),  # four pages a tile, and parts
        (2, 2, 16, [530, 128], torch.int8, 128, 1),
        (4, 2, 40, [260, 90], torch.float16, 48, 1),  # neither divides the other
        (8, 1, 128, [70, 65, 64], FP8, 64, 1),
        (4, 1, 16, [200, 33], torch.int8, 16, 2),
    ],
)
def test_pages(heads, kv_heads, head_dim, positions, cache_dtype, page_size, shared):
    """The bits of dense caches, wherever pages are and who else reads them, and nothing of other pages."""
    bound = max(positions) + 9
    arguments, *_ = case(
        heads, kv_heads, head_dim, positions, bound, cache_dtype, alibi=kv_heads == 2, log_n=page_size == 64
    )
    for cache in arguments[5:7]:
        cache[:, :, : shared * page_size] = cache[0, :, : shared * page_size]
    pools, pages = in_pages(arguments[5:7], [p + 1 for p in positions], positions, page_size, shared)
    before = [pool.clone() for pool in pools]
    expected, _ = decode_attention(*arguments)
    actual, scales = decode_attention(*arguments[:5], *pools, *arguments[7:], pages=pages)
    assert torch.equal(actual, expected)
    assert scales is None
    for pool, old, cache in zip(pools, before, arguments[5:7], strict=True):
        for b, position in enumerate(positions):
            mine = from_pages(pool, pages, b, position + 1)
            assert torch.equal(mine.view(torch.uint8), cache[b, :, : position + 1].view(torch.uint8))
            old[pages[b, position // page_size], :, position % page_size] = mine[:, -1]
        assert torch.equal(pool.view(torch.uint8), old.view(torch.uint8))  # nothing else was written


def test_the_next_kernel_may_start_early():
    """On a GPU; what is computed is the same."""
    arguments, expected, written = case(4, 4, 40, [70, 3], 90, torch.float16)
    actual, _ = decode_attention(*arguments, late=False)
    assert (actual.double() - expected).norm() / expected.norm() < 2e-3
    assert all(map(torch.equal, arguments[5:7], written))


def test_rows_without_a_sequence_write_page_0_alone():
    arguments, expected, _ = case(2, 2, 64, [70, 0, 0], 140, torch.float16)
    pools, pages = in_pages(arguments[5:7], [71, 0, 0], [70, 0, 0], 64)
    before = [pool.clone() for pool in pools]
    actual, _ = decode_attention(*arguments[:5], *pools, *arguments[7:], pages=pages)
    assert (actual.double() - expected).norm() / expected.norm() < 2e-3
    for pool, old in zip(pools, before, strict=True):
        assert pool[0, :, 0].isfinite().all()
        old[0, :, 0] = pool[0, :, 0]
        old[pages[0, 1], :, 6] = pool[pages[0, 1], :, 6]
        assert torch.equal(pool.view(torch.uint8), old.view(torch.uint8))


@pytest.mark.parametrize(("heads", "kv_heads", "positions"), [(2, 2, [0, 530]), (8, 1, [63])])
def test_rounded_to_8_bits(heads, kv_heads, positions):
    arguments, *_ = case(heads, kv_heads, 16, positions, 540, torch.float16)
    expected, _ = decode_attention(*arguments)
    scale = torch.full((1,), 0.03)
    actual, scales = decode_attention(*arguments, (torch.int8, scale))
    assert torch.equal(actual, quantize(expected.float(), scale, torch.int8))
    assert torch.equal(scales, scale.expand(len(positions), 1))
