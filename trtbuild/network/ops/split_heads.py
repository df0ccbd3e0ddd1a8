"""The heads of a fused q | k | v projection."""

from dataclasses import dataclass

import torch

from trtbuild.network.lowering import Lowered, Lowering
from trtbuild.network.network import Op, Spec, Tensor


@dataclass(frozen=True)
class SplitHeads(Op):
    """q, k and v as `[tokens, heads, head_dim]`, views of what they were.

    TensorRT's have the layout in which it attends, `[batch, heads, query_len, head_dim]`, padded.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Heads of q, of k and of v."""
        return self.num_heads, self.num_kv_heads, self.num_kv_heads

    def infer(self, qkv: Tensor) -> list[Spec]:
        tokens, width = qkv.shape
        if width != sum(self.sizes) * self.head_dim:
            raise ValueError(f"{self} of {qkv}")
        return [(qkv.dtype, (tokens, heads, self.head_dim)) for heads in self.sizes]

    def reference(self, qkv: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return qkv.unflatten(1, (-1, self.head_dim)).split(self.sizes, 1)

    def to_tensorrt(self, lowering: Lowering, qkv: Lowered) -> tuple[Lowered, ...]:
        widths = [heads * self.head_dim for heads in self.sizes]
        starts = 0, widths[0], widths[0] + widths[1]
        return tuple(
            lowering.heads(lowering.columns(qkv, start, width), self.head_dim)
            for start, width in zip(starts, widths, strict=True)
        )


def split_heads(qkv: Tensor, num_heads: int, num_kv_heads: int, head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """`[tokens, (heads + 2 kv_heads) * head_dim]` to q `[tokens, heads, head_dim]` and such k and v."""
    return qkv.network.add(SplitHeads(num_heads, num_kv_heads, head_dim), qkv=qkv)
