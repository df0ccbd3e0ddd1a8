"""Rounding to the 8-bit types: the one definition that quantizers, operations and KV caches share."""

import torch

DTYPES = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}  # by the names that recipes use
FP8_CAPABILITY = (8, 9)  # compute capability of the first GPUs that have FP8
LIMIT = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}  # what a scale maps the largest magnitude to


def quantize(x: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`x / scale`, rounded to nearest even and saturated, as `dtype` (int8 or float8_e4m3fn); `scale` broadcasts."""
    scaled = x / scale
    if dtype == torch.int8:
        return scaled.round_().clamp_(-128, 127).to(dtype)
    return scaled.clamp_(-448, 448).to(dtype)


def scale_for(absmax: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Float32 scale that maps `absmax` to the type's limit; 1 where all values are zero, so that zero stays zero."""
    scale = divided(absmax.float(), LIMIT[dtype])
    return torch.where(scale == 0, torch.ones_like(scale), scale)  # NaN stays NaN


def widened(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """8 bits as `x.to(dtype)`, a floating-point one that is wider.

    What torch converts one by one on a CPU takes another way: int8 to float16 by float32, in half of the time, and FP8
    by its bits, which are those of a float16 that is 2**8 times smaller, in a sixth.
    """
    if x.device.type != "cpu" or not x.numel():
        return x.to(dtype)
    if x.dtype == torch.int8:
        return x.float().to(dtype) if dtype == torch.float16 else x.to(dtype)
    if x.view(torch.uint8).bitwise_and(0x7F).max() == 0x7F:  # NaN
        return x.to(dtype)
    bits = x.view(torch.int8).to(torch.int16).bitwise_left_shift_(7).bitwise_and_(~0x4000)  # where the sign went, too
    return bits.view(torch.float16).to(dtype).mul_(2**8)


def divided(x: torch.Tensor, number: float) -> torch.Tensor:
    """`x / number`, the same bits on every device: on a GPU torch multiplies by the rounded `1 / number`."""
    return x / x.new_full((), number)
