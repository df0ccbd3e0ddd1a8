"""Token embedding."""

from dataclasses import dataclass

import torch

from trtbuild.network.network import Op, Tensor


@dataclass(frozen=True)
class Embedding(Op):
    """Rows of a table."""

    def infer(self, input_ids: Tensor, weight: Tensor):
        return [(weight.dtype, (*input_ids.shape, weight.shape[1]))]

    def reference(self, input_ids: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.embedding(input_ids, weight)

    def to_tensorrt(self, lowering, input_ids, weight):
        return lowering.gather(weight, input_ids)


def embedding(input_ids: Tensor, weight: Tensor) -> Tensor:
    """`[tokens]` int32 ids and a `[vocab, hidden]` table to `[tokens, hidden]`."""
    return input_ids.network.add(Embedding(), input_ids=input_ids, weight=weight)
