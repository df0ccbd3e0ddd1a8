"""Triton kernels, each beside the plain torch function that it must equal; imported only where they run."""

import functools

import torch

from trtbuild.tensors.rounding import FP8_CAPABILITY


def run_on(device: torch.device) -> bool:
    """Whether kernels run on a device. (Tests have them run on the CPU, by Triton's interpreter.)"""
    return device.type == "cuda"


def has_type(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether kernels on a device know numbers of this type: FP8 is for newer GPUs, which other kernels need not be."""
    return dtype != torch.float8_e4m3fn or device.type != "cuda" or capability(device) >= FP8_CAPABILITY


@functools.cache
def capability(device: torch.device) -> tuple[int, int]:
    """Of a GPU; asked for with every launch."""
    return torch.cuda.get_device_capability(device)
