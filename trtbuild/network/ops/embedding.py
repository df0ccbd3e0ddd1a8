"""Token embedding."""

from dataclasses import dataclass

import torch

from trtbuild import kernels
from trtbuild.network.lowering import Lowered, Lowering
from trtbuild.network.network import Op, Spec, Tensor
from trtbuild.network.step import Step


@dataclass(frozen=True)
class Embedding(Op):
    """Rows of a table."""

    selects = True

    def infer(self, input_ids: Tensor, weight: Tensor) -> list[Spec]:
        return [(weight.dtype, (*input_ids.shape, weight.shape[1]))]

    def reference(self, input_ids: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.embedding(input_ids, weight)

    def portable(self, step: Step, input_ids: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        if not kernels.run_on(weight.device):
            return self.reference(input_ids, weight)
        from trtbuild.kernels.embedding import embedding

        return embedding(input_ids, weight)

    def to_tensorrt(self, lowering: Lowering, input_ids: Lowered, weight: Lowered) -> Lowered:
        return lowering.gather(weight, input_ids)


@dataclass(frozen=True)
class EmbeddingPart(Op):
    """Rows of a table that holds those of the ids from `first` on; zeros for other ids, which other ranks have."""

    first: int

    selects = True

    def infer(self, input_ids: Tensor, weight: Tensor) -> list[Spec]:
        return [(weight.dtype, (*input_ids.shape, weight.shape[1]))]

    def reference(self, input_ids: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        rows = input_ids - self.first
        there = (rows >= 0) & (rows < len(weight))
        return torch.nn.functional.embedding(rows.where(there, 0), weight) * there[:, None]

    def portable(self, step: Step, input_ids: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        if not kernels.run_on(weight.device):
            return self.reference(input_ids, weight)
        from trtbuild.kernels.embedding import embedding

        return embedding(input_ids, weight, self.first)

    def to_tensorrt(self, lowering: Lowering, input_ids: Lowered, weight: Lowered) -> Lowered:
        first, zero, last = (lowering.scalar(n, torch.int32, rank=1) for n in (self.first, 0, weight.shape[0] - 1))
        rows = lowering.elementwise("SUB", input_ids, first)
        own = lowering.elementwise("MIN", lowering.elementwise("MAX", rows, zero), last)
        there = lowering.reshape(lowering.elementwise("EQUAL", rows, own), (-1, 1))
        zeros = lowering.scalar(0, lowering.torch_dtype(weight), rank=2)
        return lowering.select(there, lowering.gather(weight, own), zeros)


def embedding(input_ids: Tensor, weight: Tensor) -> Tensor:
    """`[tokens]` int32 ids and a `[vocab, hidden]` table to `[tokens, hidden]`."""
    return input_ids.network.add(Embedding(), input_ids=input_ids, weight=weight)


def embedding_part(input_ids: Tensor, weight: Tensor, first: int) -> Tensor:
    """The same of a table `[words, hidden]` that begins at the word `first`: zeros for words that it does not have."""
    return input_ids.network.add(EmbeddingPart(first), input_ids=input_ids, weight=weight)
