"""Weights and activations in INT8 ("W8A8"), as SmoothQuant (arXiv 2211.10438) makes them."""

from dataclasses import dataclass

import torch

from trtbuild.linear.blockwise import blockwise_linear
from trtbuild.linear.int8 import check
from trtbuild.network.network import Op, Tensor
from trtbuild.tensors.rounding import LIMIT, quantize, scale_for

INT_MM_MULTIPLE = 8  # of both sizes of a weight, for cuBLAS; others are widened
INT_MM_MIN_ROWS = 32  # of torch's product of integers on CUDA: cuBLAS wants more than 16


@dataclass(frozen=True)
class W8A8Linear(Op):
    """`(round(x / s) @ weight.T) * s * scale + bias`, the product of integers being exact.

    `x` `[tokens, in]`, `weight` int8 `[out, in]`, `scale` float32 `[out]`. The activations' scale `s` is `input_scale`
    (float32 `[1]`), or with `per_token` the largest magnitude of each row, over 127.
    """

    per_token: bool

    def infer(
        self,
        x: Tensor,
        weight: Tensor,
        scale: Tensor,
        input_scale: Tensor | None = None,
        bias: Tensor | None = None,
    ):
        check(self, x, weight, scale, bias, dtype=torch.int8)
        wanted = None if self.per_token else ((1,), torch.float32)
        if wanted != (input_scale and (input_scale.shape, input_scale.dtype)):
            raise ValueError(f"{self} with the input scale {input_scale}")
        return [(x.dtype, (x.shape[0], weight.shape[0]))]

    def reference(self, x, weight, scale, input_scale=None, bias=None):
        integers, s = self._quantized(x, input_scale)
        product = integers.double() @ weight.double().T * s * scale
        return (product if bias is None else product + bias).to(x.dtype)

    def portable(self, step, x, weight, scale, input_scale=None, bias=None):
        """Float32 sums of products of integers: exact for up to 1032 terms, within 1e-7 of exact beyond."""
        if x.is_cuda and not any(size % INT_MM_MULTIPLE for size in weight.shape):
            from trtbuild.kernels.quantize_rows import quantize_rows, scale_product

            integers, s = quantize_rows(x, input_scale, torch.int8, INT_MM_MIN_ROWS)
            product = torch._int_mm(integers, weight.T)[: len(x)]
            return scale_product(product, s, scale, bias, x.dtype)
        integers, s = self._quantized(x, input_scale)
        product = blockwise_linear(integers, weight.shape, lambda rows: weight[rows].float())
        product = product.mul_(s).mul_(scale)
        return (product if bias is None else product.add_(bias)).to(x.dtype)

    def to_tensorrt(self, lowering, x, weight, scale, input_scale=None, bias=None):
        """In float32 around the product of integers; a scale a token cannot be TensorRT's, so it is applied outside."""
        wide = lowering.cast(x, torch.float32)
        if self.per_token:
            one, limit, tiny = (
                lowering.scalar(value, torch.float32, rank)
                for value, rank in ((1, 0), (LIMIT[torch.int8], 2), (torch.finfo(torch.float32).tiny, 2))
            )
            s = lowering.elementwise("DIV", lowering.reduce("MAX", lowering.unary("ABS", wide), 1), limit)
            s = lowering.elementwise("MAX", s, tiny)  # a row of zeros stays zero
            wide = lowering.elementwise("DIV", wide, s)
            product = lowering.elementwise("PROD", lowering.quantized_matmul(wide, one, weight, scale), s)
        else:
            product = lowering.quantized_matmul(wide, input_scale, weight, scale)
        return lowering.cast_like(lowering.add_bias(product, bias), x)

    def _quantized(self, x, input_scale=None):
        wide = x.float()
        s = scale_for(wide.abs().amax(-1, keepdim=True), torch.int8) if self.per_token else input_scale
        return quantize(wide, s, torch.int8), s
