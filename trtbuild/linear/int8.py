"""Weights in INT8 with a scale per output channel, activations in 16 bits ("W8A16")."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from trtbuild.linear.blockwise import blockwise_linear
from trtbuild.network.network import Op, Tensor

SCALAR_KERNEL_MAX_ROWS = 2  # torch's INT8 kernel for a CPU is vectorized for bfloat16 alone; widening wins beyond

KERNEL_WIDTH = 32  # the vectorized one reads whole vectors: past the end of other widths


@dataclass(frozen=True)
class Int8Linear(Op):
    """`x @ (weight * scale).T + bias`: `x` `[tokens, in]`, `weight` int8 `[out, in]`, `scale` float32 `[out]`."""

    def infer(self, x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None):
        check(self, x, weight, scale, bias, dtype=torch.int8)
        return [(x.dtype, (x.shape[0], weight.shape[0]))]

    def reference(self, x, weight, scale, bias=None):
        return F.linear(x, (weight * scale[:, None]).to(x.dtype), bias)

    def portable(self, step, x, weight, scale, bias=None):
        if x.is_cuda:
            from trtbuild.kernels.weight_only import weight_only_linear

            return weight_only_linear(x, weight, scale, None, bias)
        if x.dtype == torch.bfloat16 and x.shape[1] % KERNEL_WIDTH == 0:
            # The scale comes after: in bfloat16 it would be wrong by the same 0.2% for every token.
            product = torch.ops.aten._weight_int8pack_mm(x, weight, torch.ones_like(scale, dtype=x.dtype)) * scale
        elif x.shape[0] <= SCALAR_KERNEL_MAX_ROWS:
            product = torch.ops.aten._weight_int8pack_mm(x.float(), weight, scale)
        else:
            product = blockwise_linear(x, weight.shape, lambda rows: weight[rows].float()).mul_(scale)
        return (product if bias is None else product.add_(bias)).to(x.dtype)

    def to_tensorrt(self, lowering, x, weight, scale, bias=None):
        product = lowering.matmul(x, lowering.dequantize(weight, scale, like=x, axis=0), transpose_b=True)
        return lowering.add_bias(product, bias)


def check(op: Op, x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype) -> None:
    """Raises `ValueError` unless the shapes and dtypes of a product with one scale an output channel fit together."""
    outputs = weight.shape[:1]
    if (
        (weight.dtype, scale.dtype) != (dtype, torch.float32)
        or x.shape[1] != weight.shape[1]
        or scale.shape != outputs
        or (bias and (bias.dtype, bias.shape) != (x.dtype, outputs))
    ):
        raise ValueError(f"{op} of {x} with {weight}, {scale} {bias}")
