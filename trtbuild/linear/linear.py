"""A linear layer of any weight format."""

from collections.abc import Sequence

import torch

from trtbuild.linear.dense import DenseLinear
from trtbuild.linear.fp8 import Fp8Linear
from trtbuild.linear.int4 import Int4Linear, pack
from trtbuild.linear.int8 import Int8Linear
from trtbuild.linear.w8a8 import W8A8Linear
from trtbuild.network import Tensor, ops
from trtbuild.tensors.lazy import LazyTensor, concatenate
from trtbuild.tensors.quantized_weight import QuantizedWeight, fuse

Weight = LazyTensor | QuantizedWeight


def linear(x: Tensor, name: str, parts: Sequence[Weight], biases: Sequence[LazyTensor] = ()) -> Tensor:
    """`[tokens, in]` to `[tokens, out]` with the parts, `[out_i, in]` each, as one product.

    `name` is that of the product (`model.layers.0.self_attn.qkv_proj`), and of its constants: `{name}.weight`,
    `.order`, `.scales`, `.zeros`, `.input_scale`, `.bias`.
    """
    network = x.network

    def constant(suffix: str, value: LazyTensor) -> Tensor:
        return network.constant(f"{name}.{suffix}", value)

    bias = constant("bias", concatenate(list(biases)).to(x.dtype)) if biases else None
    if isinstance(parts[0], LazyTensor):
        weight = parts[0] if len(parts) == 1 else concatenate(parts)
        return network.add(DenseLinear(), x=x, weight=constant("weight", weight.to(x.dtype)), bias=bias)
    fused = fuse(parts)
    if fused.order is not None:
        x = ops.select_columns(x, constant("order", fused.order))
    if fused.format == "int4":
        out, width = fused.values.shape
        packed = LazyTensor(torch.uint8, (out, width // 2), lambda: pack(fused.values.load()))
        constants = {"weight": constant("weight", packed), "scales": constant("scales", fused.scales.to(x.dtype))}
        if fused.zeros is not None:
            constants["zeros"] = constant("zeros", fused.zeros)
        return network.add(Int4Linear(), x=x, bias=bias, **constants)
    scales = LazyTensor(torch.float32, fused.scales.shape[:1], lambda: fused.scales.load()[:, 0].float())
    constants = {"weight": constant("weight", fused.values), "scale": constant("scales", scales)}
    if fused.input_scale is not None:
        constants["input_scale"] = constant("input_scale", fused.input_scale)
    op = {
        ("int8", "16bit"): Int8Linear(),
        ("int8", "static"): W8A8Linear(per_token=False),
        ("int8", "token"): W8A8Linear(per_token=True),
        ("fp8", "static"): Fp8Linear(),
    }[fused.format, fused.activations]
    return network.add(op, x=x, bias=bias, **constants)
