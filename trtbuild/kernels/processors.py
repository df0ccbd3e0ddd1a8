"""How much work a GPU takes at a time."""

import functools

import torch


@functools.cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; a small number for the CPU, where kernels are interpreted in tests."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
