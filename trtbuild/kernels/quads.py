"""Products of INT4 weights with one row on tensor cores, from the registers into which threads have read both.

A tensor core multiplies `A` `[16, 16]` with `B` `[16, 8]`; of 32 threads number `4 g + t` holds four channels of rows
`g` and `g + 8` of `A`, and the same channels of column `g` of `B`. Let four neighbours ("a quad") hold parts of the
same two rows of a weight, and the part of `x` that meets them: then `C[g, g]` and `C[g + 8, g]` are sums of the quad's
products, whichever part of the rows quad `g` has, and nothing is moved between threads. The rest of `C` is of no use.
That threads hold what they should is the choice of the compiler for tiles read 16 bytes at a time, 64 or more a row.

A nibble needs one instruction for each two weights: placed in float16 by itself it is the number times 2^-24, or 2^-20
where it is the high one (such small floats cost a tensor core nothing); bfloat16 has too few bits for that, and there
128 is added.
"""

import triton
import triton.language as tl

from trtbuild.kernels.conversion import ASSEMBLY

CHANNELS = 128  # that a quad reads of a row; they share a scale

# $16-19 and $20-23 are 16 bytes each of two rows, $24-31 and $32-39 numbers for the low and for the high nibbles,
# those of even bytes first.
PRODUCT = """{
    .reg .b32 a<8>, g, t; .reg .f32 low<4>, high<4>; .reg .pred odd, mine;
    mov.f32 low0, 0f00000000; mov.f32 low1, low0; mov.f32 low2, low0; mov.f32 low3, low0;
    mov.f32 high0, low0; mov.f32 high1, low0; mov.f32 high2, low0; mov.f32 high3, low0;
    STEPS
    fma.rn.f32 low0, high0, POWER, low0; fma.rn.f32 low1, high1, POWER, low1;
    fma.rn.f32 low2, high2, POWER, low2; fma.rn.f32 low3, high3, POWER, low3;
    mov.u32 t, %laneid; shr.u32 g, t, 2; and.b32 t, t, 3;
    and.b32 a0, g, 1; setp.ne.u32 odd, a0, 0; shr.u32 g, g, 1; setp.eq.u32 mine, g, t;
    selp.f32 low0, low1, low0, odd; selp.f32 low2, low3, low2, odd;
    selp.b32 $0, low0, 0f00000000, mine; selp.b32 $1, low2, 0f00000000, mine;
    UNUSED
}"""
FLOAT16_STEP = """
    and.b32 a0, ROW, 0x000f000f; and.b32 a1, OTHER, 0x000f000f;
    and.b32 a4, ROW, 0x00f000f0; and.b32 a5, OTHER, 0x00f000f0;
    shr.u32 g, ROW, 8; shr.u32 t, OTHER, 8;
    and.b32 a2, g, 0x000f000f; and.b32 a3, t, 0x000f000f;
    and.b32 a6, g, 0x00f000f0; and.b32 a7, t, 0x00f000f0;
"""
BFLOAT16_STEP = """
    lop3.b32 a0, ROW, 0x000f000f, 0x43004300, 0xea; lop3.b32 a1, OTHER, 0x000f000f, 0x43004300, 0xea;
    shr.u32 g, ROW, 8; shr.u32 t, OTHER, 8;
    lop3.b32 a2, g, 0x000f000f, 0x43004300, 0xea; lop3.b32 a3, t, 0x000f000f, 0x43004300, 0xea;
    shr.u32 g, ROW, 4; shr.u32 t, OTHER, 4;
    lop3.b32 a4, g, 0x000f000f, 0x43004300, 0xea; lop3.b32 a5, t, 0x000f000f, 0x43004300, 0xea;
    shr.u32 g, ROW, 12; shr.u32 t, OTHER, 12;
    lop3.b32 a6, g, 0x000f000f, 0x43004300, 0xea; lop3.b32 a7, t, 0x000f000f, 0x43004300, 0xea;
"""
MULTIPLY = """
    mma.sync.aligned.m16n8k16.row.col.f32.TYPE.TYPE.f32
        {low0, low1, low2, low3}, {a0, a1, a2, a3}, {X0, X1}, {low0, low1, low2, low3};
    mma.sync.aligned.m16n8k16.row.col.f32.TYPE.TYPE.f32
        {high0, high1, high2, high3}, {a4, a5, a6, a7}, {Y0, Y1}, {high0, high1, high2, high3};
"""


def _assembly(step: str, dtype: str, power: str) -> str:
    """Of four steps, a register of each row in each."""
    steps = ""
    for i in range(4):
        registers = {"ROW": 16 + i, "OTHER": 20 + i, "X0": 24 + i, "X1": 28 + i, "Y0": 32 + i, "Y1": 36 + i}
        one = step + MULTIPLY.replace("TYPE", dtype)
        for name, number in registers.items():
            one = one.replace(name, f"${number}")
        steps += one
    unused = " ".join(f"mov.b32 ${i}, 0;" for i in range(2, 16))
    return PRODUCT.replace("STEPS", steps).replace("POWER", power).replace("UNUSED", unused)


OF_FLOAT16 = tl.constexpr(_assembly(FLOAT16_STEP, "f16", "0f3D800000"))  # the high nibbles are 16 times as large
OF_BFLOAT16 = tl.constexpr(_assembly(BFLOAT16_STEP, "bf16", "0f3F800000"))
REGISTERS = tl.constexpr(",".join(["=r"] * 16 + ["r"] * 24))


@triton.jit
def quad_sums(tile, low, high, scales, zeros):
    """Scaled products of a tile of INT4, to be added along a row: float32 `[rows, bytes / 16]`.

    `tile` uint8 `[rows, bytes]`, each thread with 16 bytes of a row and its quad with the 48 beside, in the layout of
    `interleave_int4`; `low` and `high` float16 or bfloat16 `[bytes]`: of each 16, what the nibbles of the 8 even bytes
    meet, then those of the odd ones; `scales` and `zeros` (or None) float32 `[rows, bytes / 16]`.
    """
    N: tl.constexpr = tile.shape[0]
    K: tl.constexpr = tile.shape[1]
    row, other = tl.split(tl.permute(tl.reshape(tile, (2, N // 2, K)), (1, 2, 0)))
    sums = tl.join(*_products(row, other, low, high))
    sums = tl.reshape(tl.permute(sums, (2, 0, 1)), (N, K // 16))
    of_x = tl.sum(tl.reshape(low.to(tl.float32) + high.to(tl.float32), (K // 16, 16)), 1)[None, :]
    ADDED: tl.constexpr = 8 if low.dtype == tl.float16 else 136
    if zeros is None:
        return (sums - ADDED * of_x) * scales
    else:
        return (sums - (ADDED + zeros) * of_x) * scales


@triton.jit
def _products(row, other, low, high):
    """Of two tiles `[rows, bytes]`, unscaled and, in bfloat16, with 128 added to each number."""
    if ASSEMBLY:
        products = tl.inline_asm_elementwise(
            OF_FLOAT16 if low.dtype == tl.float16 else OF_BFLOAT16, REGISTERS,
            [row, other, low[None, :], high[None, :]], dtype=tl.float32, is_pure=True, pack=16,
        )  # fmt: skip
        row, other = tl.split(tl.reshape(products, (row.shape[0], row.shape[1] // 16, 2, 2, 2, 2)))
        row, other = _first(_first(_first(row))), _first(_first(_first(other)))
        POWER: tl.constexpr = 1 << 24 if low.dtype == tl.float16 else 1
        return row * POWER, other * POWER
    else:
        return _slow_product(row, low, high), _slow_product(other, low, high)


@triton.jit
def _slow_product(tile, low, high):
    N: tl.constexpr = tile.shape[0]
    K: tl.constexpr = tile.shape[1]
    ADDED: tl.constexpr = 0 if low.dtype == tl.float16 else 128
    tile = tl.reshape(tl.permute(tl.reshape(tile, (N, K // 16, 8, 2)), (0, 1, 3, 2)), (N, K))
    products = ((tile & 15).to(tl.float32) + ADDED) * low.to(tl.float32)[None, :]
    products += ((tile >> 4).to(tl.float32) + ADDED) * high.to(tl.float32)[None, :]
    return tl.sum(tl.reshape(products, (N, K // 16, 16)), 2)


@triton.jit
def _first(x):
    first, _ = tl.split(x)
    return first
