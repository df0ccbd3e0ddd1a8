"""Change of dtype."""

from dataclasses import dataclass

import torch

from trtbuild.network.lowering import Lowered, Lowering
from trtbuild.network.network import Op, Spec, Tensor


@dataclass(frozen=True)
class Cast(Op):
    """Rounds to nearest even; `dtype` is torch's name of it."""

    dtype: str

    def infer(self, x: Tensor) -> list[Spec]:
        return [(getattr(torch, self.dtype), x.shape)]

    def reference(self, x: torch.Tensor) -> torch.Tensor:
        return x.to(getattr(torch, self.dtype))

    def to_tensorrt(self, lowering: Lowering, x: Lowered) -> Lowered:
        return lowering.cast(x, getattr(torch, self.dtype))


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """`x` in `dtype`; `x` itself where it already is."""
    return x if x.dtype == dtype else x.network.add(Cast(str(dtype).removeprefix("torch.")), x=x)
