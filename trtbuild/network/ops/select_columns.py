"""Input channels in the order in which a weight stores them."""

from dataclasses import dataclass

import torch

from trtbuild.network.lowering import Lowered, Lowering
from trtbuild.network.network import Op, Spec, Tensor


@dataclass(frozen=True)
class SelectColumns(Op):
    """`x[:, indices]`."""

    def infer(self, x: Tensor, indices: Tensor) -> list[Spec]:
        return [(x.dtype, (x.shape[0], *indices.shape))]

    def reference(self, x: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        return x.index_select(1, indices)

    def to_tensorrt(self, lowering: Lowering, x: Lowered, indices: Lowered) -> Lowered:
        return lowering.gather(x, indices, axis=1)


def select_columns(x: Tensor, indices: Tensor) -> Tensor:
    """`[tokens, in]` and `[n]` int32 to `[tokens, n]`."""
    return x.network.add(SelectColumns(), x=x, indices=indices)
