"""What the CPU at hand does by itself."""

from functools import cache
from pathlib import Path

import torch


@cache
def multiplies(dtype: torch.dtype) -> bool:
    """Whether oneDNN has products of a floating-point dtype that are fast on it; others of 16 bits are better widened.

    It has some of bfloat16 wherever there is AVX-512, slow ones without AVX512_BF16.
    """
    if dtype == torch.float32:
        return True
    if not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.float16:
        return torch.ops.mkldnn._is_mkldnn_fp16_supported()
    fast = dtype == torch.bfloat16 and torch.cpu._is_avx512_bf16_supported()
    return fast and torch.ops.mkldnn._is_mkldnn_bf16_supported()


@cache
def has_fast_mkl() -> bool:
    """Whether torch has MKL and the CPU is Intel's, on which alone MKL takes its fast kernels."""
    try:
        return torch.backends.mkl.is_available() and "GenuineIntel" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
