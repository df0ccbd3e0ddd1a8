"""What a CPU is said to do, against what the operating system says of it."""

from pathlib import Path

import torch

from trtbuild.tensors.cpu import is_intel, multiplies

CPU = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""


def test_what_it_multiplies():
    assert multiplies(torch.float32)
    assert not multiplies(torch.int8)
    assert multiplies(torch.bfloat16) == ("avx512_bf16" in CPU)
    assert multiplies(torch.float16) == ("avx512_fp16" in CPU or "avx_ne_convert" in CPU)


def test_whose_it_is():
    assert is_intel() == ("model name\t: Intel" in CPU or "GenuineIntel" in CPU)
