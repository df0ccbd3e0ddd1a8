"""How much work a GPU takes at a time."""

import functools

import torch
import triton


@functools.cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; a small number for the CPU, where kernels are interpreted in tests."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def side_by_side(programs: int, processors: int) -> int:
    """Three or two programs on a multiprocessor: what leaves fewer places empty."""
    three, two = (number * triton.cdiv(programs, number * processors) for number in (3, 2))
    return 3 if three <= two else 2


@functools.cache
def shared_memory(device: torch.device) -> int:
    """Bytes of a multiprocessor's that one program may have; for the CPU those of an H100."""
    if device.type != "cuda":
        return 227 << 10
    return triton.runtime.driver.active.utils.get_device_properties(device.index)["max_shared_mem"]
