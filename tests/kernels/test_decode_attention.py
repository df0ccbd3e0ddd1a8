"""The kernel for attention of one token over the cache, interpreted."""

import pytest
import torch

from trtbuild.models.alibi import alibi_slopes
from trtbuild.network.ops.attention import Attention
from trtbuild.tensors.rounding import quantize

pytest.importorskip("triton", "3.7")  # earlier interpreters fail with numpy 2.4

from trtbuild.kernels.decode_attention import decode_attention


def case(
    heads: int,
    kv_heads: int,
    head_dim: int,
    positions: list[int],
    max_length: int,
    cache_dtype: torch.dtype,
    alibi: bool = False,
):
    """Arguments of the kernel, and what `Attention.reference` makes of them in float64."""
    torch.manual_seed(heads)
    batch = len(positions)
    qkv = torch.randn(batch, heads + 2 * kv_heads, head_dim).half()
    q, k, v = qkv.split((heads, kv_heads, kv_heads), 1)
    caches, scales = torch.randn(2, batch, kv_heads, max_length, head_dim).half(), ()
    if cache_dtype.itemsize == 1:
        scales = tuple(torch.rand(2, kv_heads) * 0.02 + 0.01)
    keys, values = (
        quantize(cache.float(), scale[:, None, None], cache_dtype) if scales else cache
        for cache, scale in zip(caches, scales or (None, None), strict=True)
    )
    position_ids, starts = torch.tensor(positions, dtype=torch.int32), torch.arange(batch + 1, dtype=torch.int32)
    slopes = alibi_slopes(heads) if alibi else None
    wide = [cache if scales else cache.double() for cache in (keys, values)]
    output, *present = Attention().reference(
        *(x.double() for x in (q, k, v)), position_ids, starts, position_ids, *wide, slopes, *scales
    )
    caches = (p.to(cache_dtype) for p in present)
    return (q, *caches, *(scales or (None, None)), position_ids, max_length, slopes), output


@pytest.mark.parametrize("alibi", [False, True], ids=["plain", "alibi"])
@pytest.mark.parametrize("cache_dtype", [torch.float16, torch.int8, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "positions", "max_length"),
    [
        (4, 4, 64, [280], 300),
        (6, 2, 16, [0, 599, 255], 600),  # ragged: some parts are empty
        (8, 1, 128, [63, 64], 70),
        (4, 2, 32, [1, 2, 3, 130, 5, 6, 7, 8], 131),  # one part
        (20, 1, 16, [90], 100),  # more heads in a group than a block of rows
    ],
)
def test_decode_attention(heads, kv_heads, head_dim, positions, max_length, cache_dtype, alibi):
    arguments, expected = case(heads, kv_heads, head_dim, positions, max_length, cache_dtype, alibi)
    actual = decode_attention(*arguments)
    assert (actual.double() - expected).norm() / expected.norm() < 1e-3


@pytest.mark.parametrize("alibi", [False, True], ids=["plain", "alibi"])
def test_what_lies_beyond_a_sequence_does_not_matter(alibi):
    arguments, expected = case(4, 2, 16, [100, 3], 200, torch.float16, alibi)
    for cache in arguments[1:3]:
        cache[0, :, 101:] = cache[1, :, 4:] = float("nan")
    assert (decode_attention(*arguments).double() - expected).norm() / expected.norm() < 1e-3
