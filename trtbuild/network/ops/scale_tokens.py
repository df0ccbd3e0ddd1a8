"""A factor a token, such as Qwen's log-n of the queries."""

from dataclasses import dataclass

import torch

from trtbuild.network.lowering import Lowered, Lowering
from trtbuild.network.network import Op, Spec, Tensor


@dataclass(frozen=True)
class ScaleTokens(Op):
    """`x * factors`; TensorRT has the heads in the layout that `SplitHeads` gives it."""

    def infer(self, x: Tensor, factors: Tensor) -> list[Spec]:
        if len(x.shape) != 3 or (factors.dtype, factors.shape) != (x.dtype, x.shape[:1]):
            raise ValueError(f"factors {factors} of the tokens of {x}")
        return [(x.dtype, x.shape)]

    def reference(self, x: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
        return x * factors[:, None, None]

    def to_tensorrt(self, lowering: Lowering, x: Lowered, factors: Lowered) -> Lowered:
        return lowering.scale_tokens(x, factors)


def scale_tokens(x: Tensor, factors: Tensor) -> Tensor:
    """`[tokens, heads, head_dim]` times `[tokens]`."""
    return x.network.add(ScaleTokens(), x=x, factors=factors)
