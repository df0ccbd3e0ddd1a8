"""Residual addition."""

from dataclasses import dataclass

import torch

from trtbuild.network.lowering import Lowered, Lowering
from trtbuild.network.network import Op, Spec, Tensor


@dataclass(frozen=True)
class Add(Op):
    """`a + b`, same shape and dtype."""

    def infer(self, a: Tensor, b: Tensor) -> list[Spec]:
        if (a.dtype, a.shape) != (b.dtype, b.shape):
            raise ValueError(f"cannot add {a} and {b}")
        return [(a.dtype, a.shape)]

    def reference(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return a + b

    def to_tensorrt(self, lowering: Lowering, a: Lowered, b: Lowered) -> Lowered:
        return lowering.elementwise("SUM", a, b)


def add(a: Tensor, b: Tensor) -> Tensor:
    """`[tokens, hidden]` + `[tokens, hidden]`."""
    return a.network.add(Add(), a=a, b=b)
