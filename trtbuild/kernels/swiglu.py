"""SwiGLU of a fused gate and up projection, and rounding to 8 bits, in one launch.

`swiglu(gate_up, (dtype, scale))` equals

    gate, up = gate_up.chunk(2, -1)
    values = silu(gate) * up                    in float32; both results are rounded
    quantize_rows(values, scale, dtype)         without a pair `values`

Where each row has a scale of its own a program does a row, otherwise a part of one.
"""

import torch
import triton
import triton.language as tl

from trtbuild.kernels.dependent_launch import dependent_launch, trigger, wait
from trtbuild.kernels.quantize_rows import Quantize, narrow_rows, round_rows, warps

BLOCK = 1024  # columns of a program that does a part


def swiglu(gate_up: torch.Tensor, quantize: Quantize = None) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`[rows, 2 * width]`, gate first, in float16, bfloat16 or float32, to `[rows, width]` and their scales.

    The values are in the same dtype, or as `quantize` has them; the scales are float32 `[rows, 1]`, None without it.
    """
    gate_up = gate_up.contiguous()
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    values, scales, given, limit = narrow_rows(gate_up, width, quantize)
    whole = scales is not None and given is None
    block = triton.next_power_of_2(width) if whole else BLOCK
    _swiglu_kernel[rows, triton.cdiv(width, block)](
        gate_up, values, scales, given, width, LIMIT=limit, BLOCK=block, num_warps=warps(block) if whole else 4,
        **dependent_launch(gate_up.device),
    )  # fmt: skip
    return values, scales


@triton.jit
def _swiglu_kernel(
    gate_up, values, scales, given, width, LIMIT: tl.constexpr, BLOCK: tl.constexpr, DEPENDENT: tl.constexpr
):
    trigger(DEPENDENT)
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    wait(DEPENDENT)
    gate = tl.load(gate_up + row * 2 * width + column, mask=inside, other=0)
    up = tl.load(gate_up + (row * 2 + 1) * width + column, mask=inside, other=0).to(tl.float32)
    wide = gate.to(tl.float32)
    y = ((wide * tl.sigmoid(wide)).to(gate.dtype).to(tl.float32) * up).to(gate.dtype)
    if scales is not None:
        y = round_rows(y, scales + row, given, LIMIT, values.dtype.element_ty)
    tl.store(values + row * width + column, y, mask=inside)
