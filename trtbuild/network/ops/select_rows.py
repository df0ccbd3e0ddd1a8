"""Keeping only the tokens whose logits are wanted."""

from dataclasses import dataclass

import torch

from trtbuild.network.lowering import Lowered, Lowering
from trtbuild.network.network import Op, Spec, Tensor
from trtbuild.network.step import Step


@dataclass(frozen=True)
class SelectRows(Op):
    """`x[indices]`."""

    def infer(self, x: Tensor, indices: Tensor) -> list[Spec]:
        return [(x.dtype, (*indices.shape, *x.shape[1:]))]

    def reference(self, x: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        return x.index_select(0, indices)

    def portable(self, step: Step, x: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        return x if step.generates else self.reference(x, indices)

    def to_tensorrt(self, lowering: Lowering, x: Lowered, indices: Lowered) -> Lowered:
        return lowering.gather(x, indices)


def select_rows(x: Tensor, indices: Tensor) -> Tensor:
    """`[tokens, hidden]` and `[rows]` int32 to `[rows, hidden]`."""
    return x.network.add(SelectRows(), x=x, indices=indices)
