"""Weights and activations in 8 bits ("W8A8"): INT8 (SmoothQuant, arXiv 2211.10438) or FP8 E4M3 (arXiv 2209.05433)."""

from dataclasses import dataclass
from typing import Literal

import torch

from trtbuild import kernels
from trtbuild.linear.blockwise import blockwise_linear
from trtbuild.linear.format import EightBits
from trtbuild.network.lowering import Lowered, Lowering
from trtbuild.network.network import Spec, Tensor
from trtbuild.network.step import Step
from trtbuild.tensors.cpu import multiplies
from trtbuild.tensors.rounding import LIMIT, quantize, scale_for, widened


@dataclass(frozen=True)
class W8A8Linear(EightBits):
    """`(round(x / s) @ weight.T) * s * scales + bias`; the product of integers is exact.

    `x` `[tokens, in]`, `weight` int8 or float8_e4m3fn `[out, in]`, `scales` float32 `[out]`. The activations' scale `s`
    is `input_scale` (float32 `[1]`) where it is static, or the largest magnitude of each token, over 127 or 448.
    """

    dtype: Literal["int8", "fp8"]
    activations: Literal["static", "token"]

    def infer(
        self, x: Tensor, weight: Tensor, scales: Tensor, input_scale: Tensor | None = None, bias: Tensor | None = None
    ) -> list[Spec]:
        self.check(x, weight, scales, bias)
        wanted = None if self.activations == "token" else ((1,), torch.float32)
        if wanted != (input_scale and (input_scale.shape, input_scale.dtype)):
            raise ValueError(f"{self} with the input scale {input_scale}")
        return [(x.dtype, (x.shape[0], weight.shape[0]))]

    def reference(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        scales: torch.Tensor,
        input_scale: torch.Tensor | None = None,
        bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        return exact_product(*self._quantized(x, input_scale), weight, scales, bias, x.dtype)

    def portable(
        self,
        step: Step,
        x: torch.Tensor,
        weight: torch.Tensor,
        scales: torch.Tensor,
        input_scale: torch.Tensor | None = None,
        bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if kernels.run_on(x.device) and self.has_kernel(weight):
            from trtbuild.kernels.many_rows import product_8bit
            from trtbuild.kernels.quantize_rows import quantize_rows

            return product_8bit(*quantize_rows(x, input_scale, self.values), weight, scales, bias, x.dtype)
        return product_in_blocks(*self._quantized(x, input_scale), weight, scales, bias, x.dtype)

    def to_tensorrt(
        self,
        lowering: Lowering,
        x: Lowered,
        weight: Lowered,
        scales: Lowered,
        input_scale: Lowered | None = None,
        bias: Lowered | None = None,
    ) -> Lowered:
        """In float32 around the product of 8 bits."""
        wide = lowering.cast(x, torch.float32)
        if input_scale is None:
            largest = lowering.reduce("MAX", lowering.unary("ABS", wide), 1)
            product = lowered_by_token(lowering, wide, largest, weight, scales, LIMIT[self.values])
        else:
            product = lowering.quantized_matmul(wide, input_scale, weight, scales)
        return lowering.cast_like(lowering.add_bias(product, bias), x)

    def _quantized(self, x: torch.Tensor, input_scale: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        wide = x.float()
        s = scale_for(wide.abs().amax(-1, keepdim=True), self.values) if input_scale is None else input_scale
        return quantize(wide, s, self.values), s

    def has_kernel(self, weight: torch.Tensor) -> bool:
        """Whether `kernels.many_rows` has a product of this weight on its GPU; others are widened."""
        from trtbuild.kernels.many_rows import MULTIPLE

        if any(size % MULTIPLE for size in weight.shape):
            return False
        return not weight.is_cuda or kernels.capability(weight.device) >= self.capability


def exact_product(
    narrow: torch.Tensor,
    s: torch.Tensor,
    weight: torch.Tensor,
    scales: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """`narrow @ weight.T * s * scales + bias` in float64, for activations `narrow` in 8 bits with the scales `s`."""
    product = narrow.double() @ weight.double().T * s * scales
    return (product if bias is None else product + bias).to(dtype)


def product_in_blocks(
    narrow: torch.Tensor,
    s: torch.Tensor,
    weight: torch.Tensor,
    scales: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """The same within 1e-7: in float32 sums, of integers exact for up to 1032 terms, or, where the CPU multiplies
    integers, in int32 ones, which are rounded once.
    """
    integers = narrow.dtype == torch.int8 and narrow.device.type == "cpu" and multiplies(torch.int8)
    if integers and narrow.shape[1] > 1:
        # torch 2.13 is wrong for a matrix of one row whose stride is not its width; so above, too, of `weight.T`.
        product = torch._int_mm(narrow.flatten().view(narrow.shape), weight.T).float()
    else:
        wide = widened(narrow, torch.float32)
        product = blockwise_linear(wide, weight.shape, lambda rows: widened(weight[rows], torch.float32))
    product = product.mul_(s).mul_(scales)
    return (product if bias is None else product.add_(bias)).to(dtype)


def lowered_by_token(
    lowering: Lowering, wide: Lowered, largest: Lowered, weight: Lowered, scales: Lowered, limit: float
) -> Lowered:
    """A float32 product of activations with a scale a token, `largest / limit`.

    It cannot be TensorRT's, so it is applied outside.
    """
    one, limit_, tiny = (
        lowering.scalar(value, torch.float32, rank)
        for value, rank in ((1, 0), (limit, 2), (torch.finfo(torch.float32).tiny, 2))
    )
    s = lowering.elementwise("DIV", largest, limit_)
    s = lowering.elementwise("MAX", s, tiny)  # a row of zeros stays zero
    product = lowering.quantized_matmul(lowering.elementwise("DIV", wide, s), one, weight, scales)
    return lowering.elementwise("PROD", product, s)
