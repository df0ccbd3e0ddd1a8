"""Kernels on the CPU through Triton's interpreter (float16 alone: it rounds to other types in its own ways)."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read where a kernel is defined
