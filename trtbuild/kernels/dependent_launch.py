"""Programmatic dependent launch: a kernel of a step starts while the one before it is still running.

What it does before `wait` runs beside the end of its predecessor: it may read what no step writes (weights, scales) or
only earlier steps wrote, since every step begins with an ordinary launch; nothing else, and it writes nothing. After
`wait` all earlier kernels have ended and their results can be seen. Kernels that take part

    are launched with `**dependent_launch(device)`, which gives them the constant `DEPENDENT`, and
    call `trigger(DEPENDENT)` in every program, and `wait(DEPENDENT)` in all but those that have nothing to do, of which
    no launch has only such: else it could end, and the next one go on, before its predecessor has ended.

A `wait` inside of a loop that the compiler pipelines may let loads pass it, so it stands before.

Where to trigger is a matter of speed. At the start is best where what follows is made of many short programs, as of one
row, or of large ones. Small ones that could all run side by side, as products of few rows with INT4 weights have, take
places wherever some are free while they wait, are then spread unevenly over multiprocessors, and their next ones too:
what stands before them triggers when it ends (`LATE`).
"""

import os
from functools import lru_cache

import torch
import triton
import triton.language as tl

from trtbuild.kernels import capability

SWITCH = "TRTBUILD_DEPENDENT_LAUNCH"  # 0 in the environment switches it off


@lru_cache
def dependent_launch(device: torch.device) -> dict[str, bool]:
    """Options of a launch on `device`: GPUs can do it from compute capability 9.0 on."""
    able = device.type == "cuda" and capability(device) >= (9, 0)
    if not able or os.environ.get(SWITCH) == "0":
        return {"DEPENDENT": False}
    return {"DEPENDENT": True, "launch_pdl": True}


@triton.jit
def trigger(DEPENDENT: tl.constexpr):
    """Lets the next kernel start."""
    if DEPENDENT:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def wait(DEPENDENT: tl.constexpr):
    """Waits for the end of the kernels before."""
    if DEPENDENT:
        tl.extra.cuda.gdc_wait()
