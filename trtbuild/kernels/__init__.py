"""Triton kernels, each beside the plain torch function that it must equal; imported only where they run."""

import torch


def run_on(device: torch.device) -> bool:
    """Whether kernels run on a device. (Tests have them run on the CPU, by Triton's interpreter.)"""
    return device.type == "cuda"
