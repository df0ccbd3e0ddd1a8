"""What the CPU at hand does by itself."""

from functools import cache
from pathlib import Path

import torch


@cache
def multiplies(dtype: torch.dtype) -> bool:
    """Whether oneDNN has products of a dtype that are fast on it; others of 8 and 16 bits are better widened.

    It has some of bfloat16 wherever there is AVX-512, slow ones without AVX512_BF16. Those of int8, with int32 sums,
    are exact with VNNI alone, if oneDNN uses it: it may be told not to.
    """
    if dtype == torch.float32:
        return True
    if not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.int8:
        largest = torch.full((2, 64), 127, dtype=dtype)
        return torch.cpu._is_vnni_supported() and bool((torch._int_mm(largest, largest.T) == 64 * 127**2).all())
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
