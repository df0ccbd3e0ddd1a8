"""8 and 4-bit numbers to 16-bit floats inside kernels, four at a time: an instruction for each would cost too much.

Of integers the bits are placed into the mantissa of a power of two, which is then subtracted, all of it exact (arXiv
2211.10017). An FP8 number's are moved to where a wider one has them, and the product with a power of two puts its
exponent right, that of subnormal numbers too.
"""

import triton
import triton.language as tl

ASSEMBLY = tl.constexpr(not triton.knobs.runtime.interpret)  # the interpreter knows no PTX

# Four int8 in one register to two registers of two floats each: 1024 + 128 + q less 1152 in float16; in bfloat16, whose
# mantissa is a bit too short for that, 128 + the low seven bits of q less 128 or, where q is negative, 256.
INT8_TO_FLOAT16 = tl.constexpr("""{
    .reg .b32 biased, power;
    mov.b32 power, 0x64806480;
    xor.b32 biased, $2, 0x80808080;
    prmt.b32 $0, biased, 0x64646464, 0x4140;
    prmt.b32 $1, biased, 0x64646464, 0x4342;
    sub.f16x2 $0, $0, power;
    sub.f16x2 $1, $1, power;
}""")
INT8_TO_BFLOAT16 = tl.constexpr("""{
    .reg .b32 bits, sign, one, low, high;
    mov.b32 one, 0x3f803f80;
    and.b32 bits, $2, 0x7f7f7f7f;
    and.b32 sign, $2, 0x80808080;
    prmt.b32 low, bits, 0x43434343, 0x4140;
    prmt.b32 high, bits, 0x43434343, 0x4342;
    prmt.b32 $0, sign, 0xc3c3c3c3, 0x4140;
    prmt.b32 $1, sign, 0xc3c3c3c3, 0x4342;
    fma.rn.bf16x2 $0, low, one, $0;
    fma.rn.bf16x2 $1, high, one, $1;
}""")
# Four E4M3 (sign, 4 bits of exponent, 3 of mantissa) to two registers: bias 7 is 15 in float16, 127 in bfloat16.
FP8_TO_16_BITS = """{
    .reg .b32 low, high, sign;
    prmt.b32 low, $2, 0, 0x1404;
    prmt.b32 high, $2, 0, 0x3424;
    and.b32 sign, low, 0x80008000;
    and.b32 low, low, 0x7f007f00;
    shr.u32 low, low, SHIFT;
    or.b32 $0, low, sign;
    and.b32 sign, high, 0x80008000;
    and.b32 high, high, 0x7f007f00;
    shr.u32 high, high, SHIFT;
    or.b32 $1, high, sign;
    MULTIPLY
}"""
FP8_TO_FLOAT16 = tl.constexpr(
    FP8_TO_16_BITS.replace("SHIFT", "1").replace(
        "MULTIPLY", "mov.b32 sign, 0x5c005c00; mul.f16x2 $0, $0, sign; mul.f16x2 $1, $1, sign;"
    )
)
FP8_TO_BFLOAT16 = tl.constexpr(
    FP8_TO_16_BITS.replace("SHIFT", "4").replace(
        "MULTIPLY",
        "mov.b32 sign, 0x7b807b80; mov.b32 low, 0x80008000; "
        "fma.rn.bf16x2 $0, $0, sign, low; fma.rn.bf16x2 $1, $1, sign, low;",
    )
)
# Two words of two numbers each to a register of the low ones and another of the high ones, in float16.
PAIRS_OF_INT8 = tl.constexpr("""{
    .reg .b32 biased, power;
    mov.b32 power, 0x64806480;
    xor.b32 biased, $2, 0x80808080;
    prmt.b32 $0, biased, 0x64646464, 0x4240;
    prmt.b32 $1, biased, 0x64646464, 0x4341;
    sub.f16x2 $0, $0, power;
    sub.f16x2 $1, $1, power;
}""")
PAIRS_OF_FP8 = tl.constexpr("""{
    .reg .b32 sorted;
    .reg .b16 low, high;
    prmt.b32 sorted, $2, 0, 0x3120;
    mov.b32 {low, high}, sorted;
    cvt.rn.f16x2.e4m3x2 $0, low;
    cvt.rn.f16x2.e4m3x2 $1, high;
}""")
# Two 16-bit words to the four pairs of their nibbles. In float16 the first and the third are added to 1024, the others
# times 16, which saves shifts; bfloat16, with fewer bits, has each added to 128.
NIBBLES_TO_FLOAT16 = tl.constexpr("""{
    .reg .b32 bits, power;
    mov.b32 power, 0x64006400;
    shr.u32 bits, $4, 8;
    lop3.b32 $0, $4, 0x000f000f, power, 0xea;
    lop3.b32 $1, $4, 0x00f000f0, power, 0xea;
    lop3.b32 $2, bits, 0x000f000f, power, 0xea;
    lop3.b32 $3, bits, 0x00f000f0, power, 0xea;
}""")
NIBBLES_TO_BFLOAT16 = tl.constexpr("""{
    .reg .b32 bits, power;
    mov.b32 power, 0x43004300;
    lop3.b32 $0, $4, 0x000f000f, power, 0xea;
    shr.u32 bits, $4, 4;
    lop3.b32 $1, bits, 0x000f000f, power, 0xea;
    shr.u32 bits, $4, 8;
    lop3.b32 $2, bits, 0x000f000f, power, 0xea;
    shr.u32 bits, $4, 12;
    lop3.b32 $3, bits, 0x000f000f, power, 0xea;
}""")
# Of four bytes the low nibbles plus 1024, and the high ones times 16 plus 1024.
NIBBLES_TO_FLOAT32 = tl.constexpr("""{
    .reg .b32 bits, pair;
    .reg .b16 first, third;
    lop3.b32 pair, $8, 0x000f000f, 0x64006400, 0xea;
    mov.b32 {first, third}, pair; cvt.f32.f16 $0, first; cvt.f32.f16 $2, third;
    lop3.b32 pair, $8, 0x00f000f0, 0x64006400, 0xea;
    mov.b32 {first, third}, pair; cvt.f32.f16 $4, first; cvt.f32.f16 $6, third;
    shr.u32 bits, $8, 8;
    lop3.b32 pair, bits, 0x000f000f, 0x64006400, 0xea;
    mov.b32 {first, third}, pair; cvt.f32.f16 $1, first; cvt.f32.f16 $3, third;
    lop3.b32 pair, bits, 0x00f000f0, 0x64006400, 0xea;
    mov.b32 {first, third}, pair; cvt.f32.f16 $5, first; cvt.f32.f16 $7, third;
}""")


@triton.jit
def divided(x, divisor):
    """`x / divisor` of float32, to nearest, where few divisors have many `x`: by their inverses (Markstein 1990).

    Of a divisor whose fraction is all ones a last bit may be another.
    """
    if ASSEMBLY:
        inverse = tl.div_rn(tl.zeros_like(divisor) + 1.0, divisor)
        quotient = x * inverse
        nearest = tl.fma(tl.fma(-quotient, divisor, x), inverse, quotient)
        return tl.where(tl.abs(quotient) < float("inf"), nearest, quotient)
    else:  # which has no product and sum that are rounded once
        return tl.div_rn(x, divisor + tl.zeros_like(x))


@triton.jit
def power(scale):
    """The largest power of two that is not above the magnitude of a float32; 0 of 0."""
    return (scale.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)


@triton.jit
def fraction(scale):
    """`scale / power(scale)`, of a magnitude below 2, with its sign."""
    return (scale.to(tl.int32, bitcast=True) & -0x7F800001 | 0x3F800000).to(tl.float32, bitcast=True)


@triton.jit
def from_int8(q, like):
    """int8 in the dtype of `like`: equals `q.to(like.dtype)`."""
    if ASSEMBLY and like.dtype != tl.float32:
        asm: tl.constexpr = INT8_TO_FLOAT16 if like.dtype == tl.float16 else INT8_TO_BFLOAT16
        return tl.inline_asm_elementwise(asm, "=r,=r,r", [q], dtype=like.dtype, is_pure=True, pack=4)
    else:
        return q.to(like.dtype)


@triton.jit
def from_fp8(x, like):
    """float8_e4m3fn in the dtype of `like`: equals `x.to(like.dtype)`, except that NaN, which no cache or weight holds
    that was rounded from finite numbers, is 480."""
    if ASSEMBLY and like.dtype != tl.float32:
        asm: tl.constexpr = FP8_TO_FLOAT16 if like.dtype == tl.float16 else FP8_TO_BFLOAT16
        return tl.inline_asm_elementwise(asm, "=r,=r,r", [x], dtype=like.dtype, is_pure=True, pack=4)
    else:
        return x.to(like.dtype)


@triton.jit
def from_pairs(words, dtype: tl.constexpr, like):
    """The low and the high bytes of int16, each an int8 or a float8_e4m3fn (`dtype`), in the dtype of `like`."""
    if ASSEMBLY:
        asm: tl.constexpr = PAIRS_OF_INT8 if dtype == tl.int8 else PAIRS_OF_FP8
        low, high = tl.inline_asm_elementwise(
            asm, "=r,=r,r", [words], dtype=(tl.float16, tl.float16), is_pure=True, pack=2
        )
        return low.to(like.dtype), high.to(like.dtype)
    else:
        low, high = (words & 255).to(tl.uint8), (words >> 8 & 255).to(tl.uint8)
        return low.to(dtype, bitcast=True).to(like.dtype), high.to(dtype, bitcast=True).to(like.dtype)


@triton.jit
def from_nibbles(q, zero, like):
    """The four nibbles of int16, lowest first, less 8 and `zero` (None, or in the dtype of `like`), in that dtype."""
    if ASSEMBLY:
        asm: tl.constexpr = NIBBLES_TO_FLOAT16 if like.dtype == tl.float16 else NIBBLES_TO_BFLOAT16
        a, b, c, d = tl.inline_asm_elementwise(
            asm, "=r,=r,=r,=r,r", [q], dtype=(like.dtype, like.dtype, like.dtype, like.dtype), is_pure=True, pack=2
        )
        LOW: tl.constexpr = 1032.0 if like.dtype == tl.float16 else 136.0
        HIGH: tl.constexpr = 72.0 if like.dtype == tl.float16 else 136.0
        if like.dtype == tl.float16:
            b, d = b * 0.0625, d * 0.0625
        if zero is None:
            return a - LOW, b - HIGH, c - LOW, d - HIGH
        else:
            return a - (zero + LOW), b - (zero + HIGH), c - (zero + LOW), d - (zero + HIGH)
    else:
        nibbles = tl.zeros_like(q.to(like.dtype)) - 8
        if zero is not None:
            nibbles -= zero
        a, b = nibbles + (q & 15).to(like.dtype), nibbles + (q >> 4 & 15).to(like.dtype)
        return a, b, nibbles + (q >> 8 & 15).to(like.dtype), nibbles + (q >> 12 & 15).to(like.dtype)


@triton.jit
def wide_nibbles(q):
    """1024 + a uint8's low nibble, and 1024 + 16 times its high one, in float32."""
    if ASSEMBLY:
        return tl.inline_asm_elementwise(
            NIBBLES_TO_FLOAT32, "=r,=r,=r,=r,=r,=r,=r,=r,r", [q], dtype=(tl.float32, tl.float32), is_pure=True, pack=4
        )
    else:
        return (q & 15).to(tl.float32) + 1024, (q & 240).to(tl.float32) + 1024
