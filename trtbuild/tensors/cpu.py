"""What the CPU at hand does by itself."""

from functools import cache
from pathlib import Path

import torch


@cache
def multiplies(dtype: torch.dtype) -> bool:
    """Whether it has instructions for products of a floating-point dtype; other 16-bit numbers are better widened."""
    if dtype == torch.float32:
        return True
    if not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.float16:
        return torch.ops.mkldnn._is_mkldnn_fp16_supported()
    return dtype == torch.bfloat16 and torch.cpu._is_avx512_bf16_supported()


@cache
def is_intel() -> bool:
    """Whether it is Intel's, on which alone MKL takes its fast kernels."""
    try:
        return "GenuineIntel" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
