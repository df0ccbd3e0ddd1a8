"""RMSNorm, arXiv 1910.07467."""

from dataclasses import dataclass

import torch

from trtbuild.network.lowering import Lowered, Lowering
from trtbuild.network.network import Op, Spec, Tensor
from trtbuild.network.step import Step


@dataclass(frozen=True)
class RmsNorm(Op):
    """`x / sqrt(mean(x^2) + eps) * weight` over the last dimension, statistics in float32."""

    eps: float

    def infer(self, x: Tensor, weight: Tensor) -> list[Spec]:
        if x.shape[-1:] != weight.shape or x.dtype != weight.dtype:
            raise ValueError(f"rms_norm of {x} with {weight}")
        return [(x.dtype, x.shape)]

    def reference(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        wide = x.float() if x.dtype.itemsize < 4 else x
        normalized = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return weight * normalized.to(x.dtype)

    def portable(self, step: Step, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        # torch's own is one kernel on CUDA and faster for one row on a CPU; for many rows there, the formula is faster.
        if x.is_cuda or x.shape[0] < 16:
            return torch.nn.functional.rms_norm(x, weight.shape, weight, self.eps)
        return self.reference(x, weight)

    def to_tensorrt(self, lowering: Lowering, x: Lowered, weight: Lowered) -> Lowered:
        wide = lowering.cast(x, torch.float32)
        mean = lowering.mean(lowering.elementwise("PROD", wide, wide), axis=1)
        variance = lowering.elementwise("SUM", mean, lowering.scalar(self.eps, torch.float32, rank=2))
        inverse = lowering.unary("RECIP", lowering.unary("SQRT", variance))
        normalized = lowering.cast_like(lowering.elementwise("PROD", wide, inverse), x)
        return lowering.elementwise("PROD", normalized, lowering.reshape(weight, (1, -1)))


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`[tokens, hidden]` normalized over `hidden` and scaled by `weight` `[hidden]`."""
    return x.network.add(RmsNorm(eps), x=x, weight=weight)
