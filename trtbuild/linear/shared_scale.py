"""Activations in 8 bits with a scale a token, in a product whose input channels ranks share: the scale of all of them.

With a scale of its own on every rank a token would be rounded more finely, but to other numbers on every layout, and
results of two layouts would differ by as much as rounding moves them: SmolLM2-135M's perplexity in FP8 by 1%.
"""

from dataclasses import dataclass
from typing import Literal

import torch

from trtbuild import kernels
from trtbuild.linear.format import EightBits
from trtbuild.linear.w8a8 import W8A8Linear, exact_product, lowered_by_token, product_in_blocks
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
        return exact_product(*self._quantized(x, magnitudes), weight, scales, bias, x.dtype)

    def portable(
        self,
        step: Step,
        x: torch.Tensor,
        magnitudes: torch.Tensor,
        weight: torch.Tensor,
        scales: torch.Tensor,
        bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        narrow, s = self._quantized(x, magnitudes)
        if kernels.run_on(x.device) and W8A8Linear(self.dtype, "token").has_kernel(weight):
            from trtbuild.kernels.many_rows import product_8bit

            return product_8bit(narrow, s, weight, scales, bias, x.dtype)
        return product_in_blocks(narrow, s, weight, scales, bias, x.dtype)

    def to_tensorrt(
        self,
        lowering: Lowering,
        x: Lowered,
        magnitudes: Lowered,
        weight: Lowered,
        scales: Lowered,
        bias: Lowered | None = None,
    ) -> Lowered:
        wide, largest = lowering.cast(x, torch.float32), lowering.reduce("MAX", magnitudes, 1)
        product = lowered_by_token(lowering, wide, largest, weight, scales, LIMIT[self.values])
        return lowering.cast_like(lowering.add_bias(product, bias), x)

    def _quantized(self, x: torch.Tensor, magnitudes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        s = scale_for(magnitudes.amax(1, keepdim=True), self.values)
        return quantize(x.float(), s, self.values), s
