"""RoPE frequencies by the length of the prompt: the first Qwen's dynamic NTK (arXiv 2309.16609)."""

from dataclasses import dataclass

import torch

from trtbuild.network.lowering import Lowered, Lowering
from trtbuild.network.network import Op, Spec, Tensor


@dataclass(frozen=True)
class PromptNtk(Op):
    """Row c of a table of frequencies, where `limit` has to be doubled c times to hold the prompt.

    Lengths are compared as integers: a logarithm may go wrong at the very powers of two at which the row changes.
    """

    limit: int

    def infer(self, table: Tensor, prompt_lengths: Tensor) -> list[Spec]:
        if len(table.shape) != 2 or table.size(0) < 2:
            raise ValueError(f"a choice of RoPE frequencies from {table}")
        return [(table.dtype, (*prompt_lengths.shape, table.shape[1]))]

    def reference(self, table: torch.Tensor, prompt_lengths: torch.Tensor) -> torch.Tensor:
        return table[sum((prompt_lengths > self.limit << k).long() for k in range(len(table) - 1))]

    def to_tensorrt(self, lowering: Lowering, table: Lowered, prompt_lengths: Lowered) -> Lowered:
        limits = self.limit << torch.arange(table.shape[0] - 1, dtype=torch.int32)
        over = lowering.elementwise(
            "LESS", lowering.constant(limits.reshape(1, -1)), lowering.reshape(prompt_lengths, (-1, 1))
        )
        return lowering.gather(table, lowering.reduce("SUM", lowering.cast(over, torch.int32), axis=1, keep=False))


def prompt_ntk(table: Tensor, prompt_lengths: Tensor, limit: int) -> Tensor:
    """`[tokens]` int32 lengths of each token's prompt to its frequencies, `[tokens, head_dim / 2]`.

    Row c of `table` `[n, head_dim / 2]` is for prompts of up to `limit * 2**c` tokens; none is longer than the last's.
    """
    return table.network.add(PromptNtk(limit), table=table, prompt_lengths=prompt_lengths)
