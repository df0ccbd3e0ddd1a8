"""The grids that weights are rounded to: scales, zero points, and the rounding itself."""

from dataclasses import dataclass

import torch

from trtbuild.tensors.rounding import quantize, scale_for


def round_8bit(weight: torch.Tensor, dtype: torch.dtype, per_tensor: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """`weight` `[out, in]` as int8 or float8_e4m3fn, with float32 scales `[out, 1]` from its largest magnitudes."""
    absmax = weight.abs().amax().expand(len(weight), 1) if per_tensor else weight.abs().amax(1, keepdim=True)
    scales = scale_for(absmax, dtype)
    return quantize(weight.float(), scales, dtype), scales.contiguous()


@dataclass(frozen=True)
class Int4Grid:
    """16 levels for every `group_size` input channels of an output channel; scales are exact in `dtype`.

    Symmetric: levels -8 .. 7 with a scale that maps the largest magnitude to 7.5, and no zero point (as in AutoGPTQ and
    compressed-tensors). Asymmetric: the levels span the smallest to the largest value and 0, which is a level.
    """

    group_size: int
    symmetric: bool
    dtype: torch.dtype

    def fit(self, groups: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Scales and zeros, float32 `[...]`, for weights `[..., group_size]`."""
        if self.symmetric:
            low, span = None, groups.abs().amax(-1) * 2
        else:
            low = groups.amin(-1).clamp_max_(0)
            span = groups.amax(-1).clamp_min_(0) - low
        scales = (span / 15).to(self.dtype).float()
        scales = torch.where(scales > 0, scales, torch.ones_like(scales))
        zeros = torch.zeros_like(scales) if low is None else (-8 - (low / scales).round_()).clamp_(-8, 7)
        return scales, zeros

    @staticmethod
    def levels(weight: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor) -> torch.Tensor:
        """Integers -8 .. 7, as float32: `weight / scales` to nearest even, plus `zeros`, clamped."""
        return (weight / scales).round_().add_(zeros).clamp_(-8, 7)

    def round(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """`weight` `[out, in]` to nearest: values `[out, in]`, scales and zeros `[out, groups]`, float32."""
        groups = weight.unflatten(1, (-1, self.group_size))
        scales, zeros = self.fit(groups)
        return self.levels(groups, scales[..., None], zeros[..., None]).flatten(1), scales, zeros


def dequantize(values: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor) -> torch.Tensor:
    """The inverse of rounding: `[out, in]` values with `[out, groups]` scales and zeros."""
    groups = values.unflatten(1, (scales.shape[1], -1))
    return ((groups - zeros[..., None]) * scales[..., None]).flatten(1)
