"""Rotary position embedding of queries and keys, arXiv 2104.09864."""

from dataclasses import dataclass

import torch

from trtbuild.network.lowering import Lowered, Lowering
from trtbuild.network.network import Op, Spec, Tensor
from trtbuild.network.ops.split_heads import SplitHeads


@dataclass(frozen=True)
class Rotate(Op):
    """What `SplitHeads` gives, q and k rotated: together, as they lie side by side in the projection."""

    num_heads: int
    num_kv_heads: int
    head_dim: int

    @property
    def split(self) -> SplitHeads:
        return SplitHeads(self.num_heads, self.num_kv_heads, self.head_dim)

    def infer(self, qkv: Tensor, cos: Tensor, sin: Tensor) -> list[Spec]:
        if any(x.shape != (qkv.shape[0], self.head_dim) for x in (cos, sin)):
            raise ValueError(f"{self} of {qkv} by {cos}, {sin}")
        return self.split.infer(qkv)

    def reference(
        self, qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        heads = qkv.unflatten(1, (-1, self.head_dim))
        qk, v = heads[:, : -self.num_kv_heads], heads[:, -self.num_kv_heads :]
        first, second = qk.chunk(2, -1)
        qk = torch.addcmul(qk * cos[:, None], torch.cat((second, first), -1), sin[:, None])
        return qk[:, : self.num_heads], qk[:, self.num_heads :], v

    def to_tensorrt(self, lowering: Lowering, qkv: Lowered, cos: Lowered, sin: Lowered) -> tuple[Lowered, ...]:
        q, k, v = self.split.to_tensorrt(lowering, qkv)
        half = self.head_dim // 2
        angles = [lowering.padded_columns(x, start, half) for x, start in ((cos, 0), (sin, half))]
        return lowering.rotate(q, *angles), lowering.rotate(k, *angles), v


def rotate(
    qkv: Tensor, cos: Tensor, sin: Tensor, num_heads: int, num_kv_heads: int, head_dim: int
) -> tuple[Tensor, Tensor, Tensor]:
    """`[tokens, (heads + 2 kv_heads) * head_dim]` to q `[tokens, heads, head_dim]` and such k and v.

    `cos` and `sin` are those of `rotary_embedding`, `[tokens, head_dim]`.
    """
    return qkv.network.add(Rotate(num_heads, num_kv_heads, head_dim), qkv=qkv, cos=cos, sin=sin)
