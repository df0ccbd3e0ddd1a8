"""A linear layer of any weight format."""

from collections.abc import Sequence

from trtbuild.linear.dense import DenseLinear
from trtbuild.linear.format import WeightFormat
from trtbuild.linear.int4 import Int4Linear
from trtbuild.linear.int8 import Int8Linear
from trtbuild.linear.shared_scale import LargestMagnitude, SharedScaleLinear
from trtbuild.linear.w8a8 import W8A8Linear
from trtbuild.network import Tensor, ops
from trtbuild.tensors.lazy import LazyTensor, concatenate
from trtbuild.tensors.quantized_weight import Activations, QuantizedWeight, Weight, fuse

WEIGHT_FORMATS: tuple[WeightFormat, ...] = (
    Int4Linear(),
    Int8Linear(),
    W8A8Linear("int8", "static"),
    W8A8Linear("int8", "token"),
    W8A8Linear("fp8", "static"),
    W8A8Linear("fp8", "token"),
)


def weight_format(dtype: str, activations: Activations) -> WeightFormat:
    """The format of a weight: the name of its type in recipes, and what happens to activations."""
    return next(known for known in WEIGHT_FORMATS if (known.dtype, known.activations) == (dtype, activations))


def linear(
    x: Tensor, name: str, parts: Sequence[Weight], biases: Sequence[LazyTensor] = (), ranks: range = range(1)
) -> Tensor:
    """`[tokens, in]` to `[tokens, out]` with the parts, `[out_i, in]` each, as one product.

    `ranks`, where they are several, share its input channels and round a token with one scale.

    `name` is that of the product (`model.layers.0.self_attn.qkv_proj`), and of its constants: `{name}.weight`,
    `.order`, `.scales`, `.zeros`, `.input_scale`, `.bias`.
    """
    network = x.network

    def constant(suffix: str, value: LazyTensor) -> Tensor:
        return network.constant(f"{name}.{suffix}", value)

    bias = constant("bias", concatenate(list(biases)).to(x.dtype)) if biases else None
    dense = [part for part in parts if isinstance(part, LazyTensor)]
    quantized = [part for part in parts if isinstance(part, QuantizedWeight)]
    if dense and quantized:
        raise ValueError(f"{name}: some of its weights are quantized and some are not")
    if dense:
        weight = dense[0] if len(dense) == 1 else concatenate(dense)
        return network.add(DenseLinear(), x=x, weight=constant("weight", weight.to(x.dtype)), bias=bias)
    fused = fuse(quantized)
    if fused.order is not None:
        x = ops.select_columns(x, constant("order", fused.order))
    op = weight_format(fused.format, fused.activations)
    constants = {suffix: constant(suffix, value) for suffix, value in op.constants(fused, x.dtype).items()}
    if isinstance(op, W8A8Linear) and op.activations == "token" and len(ranks) > 1:
        magnitudes = ops.all_gather(network.add(LargestMagnitude(), x=x), ranks)
        return network.add(SharedScaleLinear(op.dtype), x=x, magnitudes=magnitudes, bias=bias, **constants)
    return network.add(op, x=x, bias=bias, **constants)
