"""Activations in 8 bits with a scale a token, in a product whose input channels ranks share: the scale of all of them.

With a scale of its own on every rank a token would be rounded more finely, but to other numbers on every layout, and
results of two layouts would differ by as much as rounding moves them: SmolLM2-135M's perplexity in FP8 by 1%.
"""

from dataclasses import dataclass
from typing import Literal

import torch

from trtbuild import kernels
from trtbuild.linear.blockwise import blockwise_linear
from trtbuild.linear.format import EightBits
from trtbuild.linear.w8a8 import W8A8Linear
from trtbuild.network import Tensor
from trtbuild.network.lowering import Lowered, Lowering
from trtbuild.network.network import Op, Spec
from trtbuild.network.step import Step
from trtbuild.tensors.rounding import LIMIT, quantize, scale_for


@dataclass(frozen=True)
class LargestMagnitude(Op):
    """A row's: `x` `[tokens, n]` to float32 `[tokens, 1]`."""

    def infer(self, x: Tensor) -> list[Spec]:
        return [(torch.float32, (x.shape[0], 1))]

    def reference(self, x: torch.Tensor) -> torch.Tensor:
        return x.abs().amax(1, keepdim=True).float()

    def to_tensorrt(self, lowering: Lowering, x: Lowered) -> Lowered:
        return lowering.reduce("MAX", lowering.unary("ABS", lowering.cast(x, torch.float32)), 1)


@dataclass(frozen=True)
class SharedScaleLinear(EightBits):
    """`W8A8Linear` with a scale a token from its largest magnitudes, float32 `[tokens, ranks]`, a rank's share each."""

    dtype: Literal["int8", "fp8"]
    activations: Literal["token"] = "token"

    def infer(
        self, x: Tensor, magnitudes: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None = None
    ) -> list[Spec]:
        self.check(x, weight, scales, bias)
        if magnitudes.dtype != torch.float32 or magnitudes.shape[0] != x.shape[0]:
            raise ValueError(f"{self} of {x} with {magnitudes}")
        return [(x.dtype, (x.shape[0], weight.shape[0]))]

    def reference(
        self,
        x: torch.Tensor,
        magnitudes: torch.Tensor,
        weight: torch.Tensor,
        scales: torch.Tensor,
        bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        s = self._scale(magnitudes)
        product = quantize(x.float(), s, self.values).double() @ weight.double().T * s * scales
        return (product if bias is None else product + bias).to(x.dtype)

    def portable(
        self,
        step: Step,
        x: torch.Tensor,
        magnitudes: torch.Tensor,
        weight: torch.Tensor,
        scales: torch.Tensor,
        bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        s = self._scale(magnitudes)
        narrow = quantize(x.float(), s, self.values)
        if kernels.run_on(x.device) and W8A8Linear(self.dtype, "token").has_kernel(weight):
            from trtbuild.kernels.many_rows import product_8bit

            return product_8bit(narrow, s, weight, scales, bias, x.dtype)
        product = blockwise_linear(narrow, weight.shape, lambda rows: weight[rows].float())
        product = product.mul_(s).mul_(scales)
        return (product if bias is None else product.add_(bias)).to(x.dtype)

    def to_tensorrt(
        self,
        lowering: Lowering,
        x: Lowered,
        magnitudes: Lowered,
        weight: Lowered,
        scales: Lowered,
        bias: Lowered | None = None,
    ) -> Lowered:
        one, limit, tiny = (
            lowering.scalar(value, torch.float32, rank)
            for value, rank in ((1, 0), (LIMIT[self.values], 2), (torch.finfo(torch.float32).tiny, 2))
        )
        s = lowering.elementwise("DIV", lowering.reduce("MAX", magnitudes, 1), limit)
        s = lowering.elementwise("MAX", s, tiny)  # a row of zeros stays zero
        wide = lowering.elementwise("DIV", lowering.cast(x, torch.float32), s)
        product = lowering.elementwise("PROD", lowering.quantized_matmul(wide, one, weight, scales), s)
        return lowering.cast_like(lowering.add_bias(product, bias), x)

    def _scale(self, magnitudes: torch.Tensor) -> torch.Tensor:
        return scale_for(magnitudes.amax(1, keepdim=True), self.values)
