"""Products of many rows of 8-bit numbers whose scales are applied before they are written.

`product_8bit(narrow, row_scale, weight, column_scale, bias, dtype)` equals

    product = narrow @ weight.T                                         int32 or float32
    (product * row_scale * column_scale + bias).to(dtype)               in float32

The product of integers is exact. That of FP8 with more than `TRITON_ROWS` rows, or four tiles a multiprocessor, is
cuBLAS's, with tensor cores that add with about 14 bits of mantissa ("fast accumulation"): an error of 1.5e-3 beside
the 3.6e-2 that rounding to FP8 makes, for a tenth less time to the first token. Others add so within a step alone.

A program multiplies a tile; two or three at a time share a multiprocessor, so that one multiplies while the other
writes. Tiles that are worked on at the same time lie in a square, as far as they can, to read little: `GROUP` of them
are one above the other. The GPU's copies of tiles are slow where these reach beyond a tensor's last row (144 rows took
as long as 256), so they take what memory there is behind it, and results of that are not written.
"""

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from trtbuild.kernels import capability
from trtbuild.kernels.dependent_launch import dependent_launch, trigger, wait
from trtbuild.kernels.processors import processors, side_by_side

TRITON_ROWS = 256  # of FP8: up to these cuBLAS is slower, with a scale a row
MULTIPLE = 16  # of both sizes of a weight: what the GPU's copies of tiles take
HOPPER = (9, 0)  # compute capability of the first GPUs that such copies and large tiles suit


def product_8bit(
    narrow: torch.Tensor,
    row_scale: torch.Tensor,
    weight: torch.Tensor,
    column_scale: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """`[rows, in]` and `weight` `[out, in]`, both int8 or both float8_e4m3fn, to `[rows, out]` in `dtype`.

    `row_scale` float32 `[rows, 1]`, `column_scale` float32 `[out]`; `in` and `out` are multiples of `MULTIPLE`.
    """
    (rows, width), out, device = narrow.shape, len(weight), narrow.device
    hopper = device.type != "cuda" or capability(device) >= HOPPER
    fp8, many = narrow.dtype == torch.float8_e4m3fn, _is_many(rows, out, processors(device))
    if fp8 and many and dtype.itemsize == 2 and narrow.is_cuda and hopper:
        scales = row_scale, column_scale[None]
        return torch._scaled_mm(narrow, weight.T, *scales, bias=bias, out_dtype=dtype, use_fast_accum=True)
    result = torch.empty(rows, out, dtype=dtype, device=device)
    tiles = _tiles(rows, out, processors(device)) if hopper else SMALL_SHARED_MEMORY
    m, n, k = tiles["BLOCK_M"], tiles["BLOCK_N"], tiles["BLOCK_K"]
    exact = hopper and fp8 and rows <= TRITON_ROWS
    height = min(triton.cdiv(rows, m) * m, (narrow.untyped_storage().nbytes() - narrow.storage_offset()) // width)
    _many_rows_product_kernel[(triton.cdiv(rows, m) * triton.cdiv(out, n),)](
        TensorDescriptor(narrow, [height, width], [width, 1], [m, k]),
        TensorDescriptor(weight, [out, width], [width, 1], [n, k]),
        TensorDescriptor(result, [rows, out], [out, 1], [m, n]),
        row_scale, column_scale, bias, rows, out, width,
        EXACT=exact, **tiles, **dependent_launch(device),
    )  # fmt: skip
    return result


SMALL_SHARED_MEMORY = {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64, "num_warps": 8, "num_stages": 3}


def _is_many(rows: int, out: int, processors: int) -> bool:
    """Whether cuBLAS is faster: of many rows, or of more than four tiles of 64 x 128 a multiprocessor."""
    return rows > TRITON_ROWS or triton.cdiv(rows, 64) * triton.cdiv(out, 128) > 4 * processors


def _tiles(rows: int, out: int, processors: int) -> dict[str, int]:
    """Sizes of a program's work: what was fastest for LLaMA-7B on an H100, of 128, 144 to 256, 512 and 2048 rows."""

    def count(block_m: int, block_n: int) -> int:
        return triton.cdiv(rows, block_m) * triton.cdiv(out, block_n)

    if rows <= TRITON_ROWS:
        if count(64, 128) >= processors:
            n, k, stages = 128, 128, 3 if side_by_side(count(64, 128), processors) == 3 else 4
        else:
            n, k, stages = 128 if rows > 128 else 64, 256, 4
        return {"BLOCK_M": 64, "BLOCK_N": n, "BLOCK_K": k, "num_warps": 4, "num_stages": stages}
    stages = 3 if count(128, 128) > processors else 4  # of one alone on a multiprocessor
    return {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 128, "num_warps": 4, "num_stages": stages}


@triton.jit
def _many_rows_product_kernel(
    narrow, weight, result, row_scale, column_scale, bias, rows, out, width,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EXACT: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    trigger(DEPENDENT)
    wait(DEPENDENT)
    GROUP: tl.constexpr = 8
    INTEGERS: tl.constexpr = narrow.dtype == tl.int8
    # Up to TRITON_ROWS rows memory is the limit: there is time to add exactly after every step.
    EXACT_AFTER: tl.constexpr = BLOCK_K if EXACT else None
    blocks_m, blocks_n = tl.cdiv(rows, BLOCK_M), tl.cdiv(out, BLOCK_N)
    tile = tl.program_id(0)
    first_m = tile // (GROUP * blocks_n) * GROUP
    height = tl.minimum(blocks_m - first_m, GROUP)
    place = tile % (GROUP * blocks_n)
    m, n = (first_m + place % height) * BLOCK_M, place // height * BLOCK_N
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.int32 if INTEGERS else tl.float32)
    for k in range(0, width, BLOCK_K):
        a, b = narrow.load([m, k]), weight.load([n, k])
        total = tl.dot(a, b.T, total, out_dtype=total.dtype, max_num_imprecise_acc=EXACT_AFTER)
    row, column = m + tl.arange(0, BLOCK_M), n + tl.arange(0, BLOCK_N)
    values = total.to(tl.float32) * tl.load(row_scale + row, mask=row < rows, other=0)[:, None]
    values *= tl.load(column_scale + column, mask=column < out, other=0)[None, :]
    if bias is not None:
        values += tl.load(bias + column, mask=column < out, other=0).to(tl.float32)[None, :]
    result.store([m, n], values.to(result.dtype))
