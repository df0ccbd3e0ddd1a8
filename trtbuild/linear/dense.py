"""Weights in the model's own floating-point dtype."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from trtbuild.linear.blockwise import blockwise_linear
from trtbuild.linear.cpu import cpu_linear
from trtbuild.network.lowering import Lowered, Lowering
from trtbuild.network.network import Op, Spec, Tensor
from trtbuild.network.step import Step
from trtbuild.tensors.cpu import multiplies

# Rows from which 16-bit weights are better widened on a CPU that has no instructions for them: torch's product is fast
# for one or two rows (it reads half the bytes) and there slow for many.
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
        if x.is_cuda:
            return F.linear(x, weight, bias)
        if x.dtype != torch.float32 and x.shape[0] < WIDEN_MIN_ROWS:
            return F.linear(x, weight, bias)
        if multiplies(x.dtype):
            return cpu_linear(x, weight, bias)
        dtype = x.dtype if bias is None else torch.float32
        product = blockwise_linear(x.float(), weight.shape, lambda rows: weight[rows].float(), dtype)
        return product if bias is None else product.add_(bias).to(x.dtype)

    def to_tensorrt(self, lowering: Lowering, x: Lowered, weight: Lowered, bias: Lowered | None = None) -> Lowered:
        return lowering.add_bias(lowering.matmul(x, weight, transpose_b=True), bias)
