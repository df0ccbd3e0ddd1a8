"""Weights in the model's own floating-point dtype."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from trtbuild.network.lowering import Lowered, Lowering
from trtbuild.network.network import Op, Spec, Tensor
from trtbuild.network.step import Step

# Rows up to which oneDNN's float32 product beats MKL's on a CPU, and from which 16-bit weights are better widened:
# torch's 16-bit product there is fast for one or two rows (it reads half the bytes) and slow for many.
ONEDNN_MAX_ROWS = 64
WIDEN_MIN_ROWS = 3


@dataclass(frozen=True)
class DenseLinear(Op):
    """`x @ weight.T + bias`."""

    def infer(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> list[Spec]:
        if x.shape[1] != weight.shape[1] or x.dtype != weight.dtype or (bias and bias.shape != weight.shape[:1]):
            raise ValueError(f"linear of {x} with {weight} {bias}")
        return [(x.dtype, (x.shape[0], weight.shape[0]))]

    def reference(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return F.linear(x, weight, bias)

    def portable(
        self, step: Step, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        if x.is_cuda or not torch.backends.mkldnn.is_available():
            return F.linear(x, weight, bias)
        rows = x.shape[0]
        if x.dtype == torch.float32:
            return _onednn(x, weight, bias) if rows <= ONEDNN_MAX_ROWS else F.linear(x, weight, bias)
        if rows < WIDEN_MIN_ROWS:
            return F.linear(x, weight, bias)
        wide = self.portable(step, x.float(), weight.float(), None if bias is None else bias.float())
        return wide.to(x.dtype)

    def to_tensorrt(self, lowering: Lowering, x: Lowered, weight: Lowered, bias: Lowered | None = None) -> Lowered:
        return lowering.add_bias(lowering.matmul(x, weight, transpose_b=True), bias)


def _onednn(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
