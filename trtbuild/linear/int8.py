"""Weights in INT8 with a scale per output channel, activations in 16 bits ("W8A16")."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from trtbuild import kernels
from trtbuild.linear.blockwise import blockwise_linear
from trtbuild.linear.format import EightBits
from trtbuild.network.lowering import Lowered, Lowering
from trtbuild.network.network import Spec, Tensor
from trtbuild.network.step import Step
from trtbuild.tensors.cpu import multiplies

# Up to which torch's INT8 kernel for a CPU, vectorized for bfloat16 alone, is faster than widening to these.
KERNEL_MAX_ROWS = {torch.bfloat16: 8, torch.float32: 32}
KERNEL_WIDTH = 32  # it reads whole vectors: past the end of other widths


@dataclass(frozen=True)
class Int8Linear(EightBits):
    """`x @ (weight * scales).T + bias`: `x` `[tokens, in]`, `weight` int8 `[out, in]`, `scales` float32 `[out]`."""

    dtype = "int8"
    activations = "16bit"

    def infer(self, x: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None = None) -> list[Spec]:
        self.check(x, weight, scales, bias)
        return [(x.dtype, (x.shape[0], weight.shape[0]))]

    def reference(
        self, x: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        return F.linear(x, (weight * scales[:, None]).to(x.dtype), bias)

    def portable(
        self, step: Step, x: torch.Tensor, weight: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        if kernels.run_on(x.device):
            return partly_scaled(x, weight, scales, bias, fractions=True)[0]
        # In bfloat16 integers are exact; in float16 sums of them may be too large.
        wide = x.dtype if x.dtype == torch.bfloat16 and multiplies(x.dtype) else torch.float32
        if x.dtype == torch.bfloat16 and len(x) <= KERNEL_MAX_ROWS[wide] and x.shape[1] % KERNEL_WIDTH == 0:
            # The scale comes after: in bfloat16 it would be wrong by the same 0.2% for every token.
            product = torch.ops.aten._weight_int8pack_mm(x, weight, torch.ones_like(scales, dtype=x.dtype))
        else:
            product = blockwise_linear(x.to(wide), weight.shape, lambda rows: weight[rows].to(wide))
        product = product.float().mul_(scales)
        return (product if bias is None else product.add_(bias)).to(x.dtype)

    def to_tensorrt(
        self, lowering: Lowering, x: Lowered, weight: Lowered, scales: Lowered, bias: Lowered | None = None
    ) -> Lowered:
        product = lowering.matmul(x, lowering.dequantize(weight, scales, like=x, axis=0), transpose_b=True)
        return lowering.add_bias(product, bias)


def partly_scaled(
    x: torch.Tensor,
    weight: torch.Tensor,
    scales: torch.Tensor,
    bias: torch.Tensor | None = None,
    fractions: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The product on CUDA, and the scales by whose fractions (`kernels.widen`) what comes next has to multiply, if any:
    with a bias or `fractions` none.
    """
    from trtbuild.kernels import few_rows
    from trtbuild.kernels.widen import widen

    if few_rows.takes(x, weight, scales, None, Int8Linear.activations):
        return few_rows.product(x, weight, scales, bias=bias), None
    whole = fractions or bias is not None
    return F.linear(x, widen(weight, scales, None, x.dtype, whole), bias), None if whole else scales
