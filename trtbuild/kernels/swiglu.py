"""SwiGLU of a fused gate and up projection in one launch.

`swiglu(gate_up)` equals, computed in float32 and rounded once,

    gate, up = gate_up.chunk(2, -1)
    silu(gate) * up
"""

import torch
import triton
import triton.language as tl

BLOCK = 1024  # columns of a program


def swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    """`[rows, 2 * width]`, gate first, in float16, bfloat16 or float32 to `[rows, width]`."""
    gate_up = gate_up.contiguous()
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    output = gate_up.new_empty(rows, width)
    _kernel[rows, triton.cdiv(width, BLOCK)](gate_up, output, width, BLOCK=BLOCK, num_warps=4)
    return output


@triton.jit
def _kernel(gate_up, output, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    gate = tl.load(gate_up + row * 2 * width + column, mask=inside, other=0).to(tl.float32)
    up = tl.load(gate_up + (row * 2 + 1) * width + column, mask=inside, other=0).to(tl.float32)
    tl.store(output + row * width + column, (gate * tl.sigmoid(gate) * up).to(output.dtype.element_ty), mask=inside)
