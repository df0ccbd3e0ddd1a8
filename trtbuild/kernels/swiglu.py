"""SwiGLU of a fused gate and up projection, and rounding to 8 bits, in one launch.

`swiglu(gate_up, (dtype, scale))` equals

    gate, up = gate_up.chunk(2, -1)
    values = silu(gate) * up                    in float32; both results are rounded
    quantize_rows(values, scale, dtype)         without a pair `values`

With `weight_scales`, float32 `[2 * width]`, each column is first multiplied by the fraction of its own
(`trtbuild.kernels.widen`).

Where each row has a scale of its own a program does a row, in two blocks, since to compute is the limit and one of a
power of two would compute for columns that are not there; otherwise it does a part of a row.
"""

import torch
import triton
import triton.language as tl

from trtbuild.kernels.conversion import fraction
from trtbuild.kernels.dependent_launch import dependent_launch, trigger, wait
from trtbuild.kernels.quantize_rows import Quantize, magnitude, narrow_rows, round_rows, rounded, row_scale, warps

BLOCK = 1024  # columns of a program that does a part


def swiglu(
    gate_up: torch.Tensor, quantize: Quantize = None, weight_scales: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`[rows, 2 * width]`, gate first, in float16, bfloat16 or float32, to `[rows, width]` and their scales.

    The values are in the same dtype, or as `quantize` has them; the scales are float32 `[rows, 1]`, None without it.
    """
    gate_up = gate_up.contiguous()
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    values, scales, given, limit = narrow_rows(gate_up, width, quantize)
    block, rest, num_warps = BLOCK, 0, 4
    if scales is not None and given is None:
        block = triton.next_power_of_2(width + 1) // 2  # the largest that a row has
        rest = triton.next_power_of_2(width - block) if width > block else 0
        num_warps = 2 * warps(block + rest)  # of few registers each, so that many are under way
    _swiglu_kernel[rows, 1 if rest else triton.cdiv(width, block)](
        gate_up, weight_scales, values, scales, given, width, LIMIT=limit, BLOCK=block, REST=rest, num_warps=num_warps,
        **dependent_launch(gate_up.device),
    )  # fmt: skip
    return values, scales


@triton.jit
def _swiglu_kernel(
    gate_up, weight_scales, values, scales, given, width,
    LIMIT: tl.constexpr, BLOCK: tl.constexpr, REST: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    trigger(DEPENDENT)
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    dtype: tl.constexpr = values.dtype.element_ty
    gate_up += row * 2 * width
    values += row * width
    wait(DEPENDENT)
    y = _gated(gate_up, weight_scales, column, width)
    if REST:
        others = BLOCK + tl.arange(0, REST)
        z = _gated(gate_up, weight_scales, others, width)
        scale = row_scale(tl.maximum(magnitude(y), magnitude(z)), LIMIT)
        tl.store(scales + row, scale)
        y = rounded(y, scale, LIMIT, dtype)
        tl.store(values + others, rounded(z, scale, LIMIT, dtype), mask=others < width)
    elif scales is not None:
        y = round_rows(y, scales + row, given, LIMIT, dtype)
    tl.store(values + column, y, mask=column < width)


@triton.jit
def _gated(gate_up, weight_scales, column, width):
    """Columns of a row's `silu(gate) * up`."""
    gate = tl.load(gate_up + column, mask=column < width, other=0)
    up = tl.load(gate_up + width + column, mask=column < width, other=0).to(tl.float32)
    wide = gate.to(tl.float32)
    if weight_scales is not None:
        wide *= fraction(tl.load(weight_scales + column, mask=column < width, other=0))
        up *= fraction(tl.load(weight_scales + width + column, mask=column < width, other=0))
    return ((wide * tl.sigmoid(wide)).to(gate.dtype).to(tl.float32) * up).to(gate.dtype)
