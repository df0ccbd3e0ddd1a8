"""Weights and activations in FP8 E4M3 (arXiv 2209.05433), scaled per tensor."""

from dataclasses import dataclass

import torch

from trtbuild.linear.blockwise import blockwise_linear
from trtbuild.linear.int8 import check
from trtbuild.network.network import Op, Tensor
from trtbuild.tensors.rounding import quantize


@dataclass(frozen=True)
class Fp8Linear(Op):
    """`(fp8(x / input_scale) @ weight.T) * input_scale * scale + bias`.

    `x` `[tokens, in]`, `weight` float8_e4m3fn `[out, in]`, `scale` float32 `[out]` (equal within each tensor that was
    fused), `input_scale` float32 `[1]`.
    """

    def infer(self, x: Tensor, weight: Tensor, scale: Tensor, input_scale: Tensor, bias: Tensor | None = None):
        check(self, x, weight, scale, bias, dtype=torch.float8_e4m3fn)
        if (input_scale.shape, input_scale.dtype) != ((1,), torch.float32):
            raise ValueError(f"{self} with the input scale {input_scale}")
        return [(x.dtype, (x.shape[0], weight.shape[0]))]

    def reference(self, x, weight, scale, input_scale, bias=None):
        narrow = quantize(x.float(), input_scale, torch.float8_e4m3fn)
        product = narrow.double() @ weight.double().T * input_scale * scale
        return (product if bias is None else product + bias).to(x.dtype)

    def portable(self, step, x, weight, scale, input_scale, bias=None):
        if x.is_cuda and _has_kernel(weight):
            from trtbuild.kernels.quantize_rows import quantize_rows, scale_product

            narrow, _ = quantize_rows(x, input_scale, torch.float8_e4m3fn)
            one = torch.ones_like(input_scale)  # the scales come after, so that the product stays in float32
            product = torch._scaled_mm(narrow, weight.T, one, one, out_dtype=torch.float32)
            return scale_product(product, input_scale, scale, bias, x.dtype)
        narrow = quantize(x.float(), input_scale, torch.float8_e4m3fn)
        product = blockwise_linear(narrow, weight.shape, lambda rows: weight[rows].float())
        product = product.mul_(input_scale * scale)
        return (product if bias is None else product.add_(bias)).to(x.dtype)

    def to_tensorrt(self, lowering, x, weight, scale, input_scale, bias=None):
        wide = lowering.cast(x, torch.float32)
        product = lowering.quantized_matmul(wide, input_scale, weight, scale)
        return lowering.cast_like(lowering.add_bias(product, bias), x)


def _has_kernel(weight: torch.Tensor) -> bool:
    """Whether cuBLAS has a product of this FP8 weight: sizes in sixteens, on a GPU with FP8."""
    sixteens = not any(size % 16 for size in weight.shape)
    return sixteens and torch.cuda.get_device_capability(weight.device) >= (8, 9)
