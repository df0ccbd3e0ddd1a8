"""Weights in INT4 with a scale per group of input channels, activations in 16 bits ("W4A16")."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from trtbuild import kernels
from trtbuild.linear.blockwise import blockwise_linear
from trtbuild.linear.format import Granularity, Numbers, WeightFormat
from trtbuild.network.lowering import Lowered, Lowering
from trtbuild.network.network import Spec, Tensor
from trtbuild.network.step import Step
from trtbuild.tensors.lazy import LazyTensor
from trtbuild.tensors.quantized_weight import QuantizedWeight
from trtbuild.tensors.rounding import divided

# That recipes may ask for, and that torch's INT4 kernel for a CPU takes, which is vectorized for bfloat16 alone.
GROUP_SIZES = (32, 64, 128, 256)

# How much longer it takes on a CPU to bring a number of the activations into another order than one of the weights
# (about 1.4 ns and 0.2).
REORDERING = 8


@dataclass(frozen=True)
class Int4Linear(WeightFormat):
    """`x @ ((q - zeros) * scales).T + bias`.

    `x` `[tokens, in]`; `weight` uint8 `[out, in / 2]` holds q, -8 .. 7 in two's complement, two a byte, the even input
    channel in the low nibble; `scales` `[out, groups]` in the dtype of `x`; `zeros` int8 `[out, groups]`, 0 where they
    are absent.
    """

    dtype = "int4"
    activations = "16bit"
    groups = True
    values = torch.int8
    scheme = ("int", 4)
    layout = "pack-quantized"

    def scale_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return dtype

    def grid(self, width: int, dtype: torch.dtype, granularity: Granularity) -> "Int4Grid":
        """Of a weight with `width` input channels: one group where no group size is given."""
        return Int4Grid(granularity.group_size or width, granularity.symmetric, dtype)

    def round(self, weight: torch.Tensor, dtype: torch.dtype, granularity: Granularity) -> Numbers:
        return self.grid(weight.shape[1], dtype, granularity).round(weight)

    def constants(self, weight: QuantizedWeight, dtype: torch.dtype) -> dict[str, LazyTensor]:
        out, width = weight.values.shape
        packed = LazyTensor(torch.uint8, (out, width // 2), lambda: pack(weight.values.load()))
        found = {"weight": packed, "scales": weight.scales.to(dtype), "zeros": weight.zeros}
        return {name: value for name, value in found.items() if value is not None}

    def infer(
        self, x: Tensor, weight: Tensor, scales: Tensor, zeros: Tensor | None = None, bias: Tensor | None = None
    ) -> list[Spec]:
        out, groups = scales.size(0), scales.size(1)
        if (
            weight.dtype != torch.uint8
            or (weight.shape[0], 2 * weight.size(1)) != (out, x.shape[1])
            or groups == 0
            or x.size(1) % groups
            or scales.dtype != x.dtype
            or (zeros and (zeros.dtype, zeros.shape) != (torch.int8, scales.shape))
            or (bias and (bias.dtype, bias.shape) != (x.dtype, (out,)))
        ):
            raise ValueError(f"{self} of {x} with {weight}, {scales}, {zeros}, {bias}")
        return [(x.dtype, (x.shape[0], out))]

    def reference(
        self,
        x: torch.Tensor,
        weight: torch.Tensor,
        scales: torch.Tensor,
        zeros: torch.Tensor | None = None,
        bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        return F.linear(x, dequantize(weight, scales, zeros).to(x.dtype), bias)

    def prepare(
        self, device: torch.device, weight: torch.Tensor, scales: torch.Tensor, **others: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """On CUDA: the order of nibbles that the kernel reads, and scales and zeros transposed.

        On a CPU in bfloat16: torch's kernel wants its own order of nibbles, and scales beside offsets. Its groups have
        at most 256 channels; larger ones are repeated.
        """
        zeros = others.get("zeros")
        if kernels.run_on(device):
            from trtbuild.kernels.widen import interleave_int4

            laid = dict(zip(("weight", "scales", "zeros"), interleave_int4(weight, scales, zeros), strict=True))
            return others | {name: value for name, value in laid.items() if value is not None}
        out, groups = scales.shape
        group_size = 2 * weight.shape[1] // groups
        kernel_size = next((size for size in reversed(GROUP_SIZES) if group_size % size == 0), None)
        if device.type != "cpu" or scales.dtype != torch.bfloat16 or kernel_size is None or out % 16:
            return others | {"weight": weight, "scales": scales}
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(unpack(weight).int() + 8, 1)
        offsets = torch.zeros_like(scales) if zeros is None else -zeros * scales
        both = torch.stack((scales, offsets), -1).repeat_interleave(group_size // kernel_size, 1)
        return others | {"weight": packed, "scales": both.transpose(0, 1).contiguous()}

    def portable(
        self,
        step: Step,
        x: torch.Tensor,
        weight: torch.Tensor,
        scales: torch.Tensor,
        zeros: torch.Tensor | None = None,
        bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if kernels.run_on(x.device):
            from trtbuild.kernels import few_rows
            from trtbuild.kernels.widen import widen

            if few_rows.takes(x, weight, scales, zeros, self.activations):
                return few_rows.product(x, weight, scales, zeros, bias=bias)
            return F.linear(x, widen(weight, scales, zeros, x.dtype), bias)
        if scales.ndim == 3:  # prepared
            product = torch.ops.aten._weight_int4pack_mm_for_cpu(x, weight, x.shape[1] // len(scales), scales)
            return product if bias is None else product.add_(bias)
        wide, widened, groups = x.float(), dequantize, scales.shape[1]
        if x.shape[1] // groups % 2 == 0 and len(x) * REORDERING < len(weight):
            wide, widened = wide.unflatten(1, (groups, -1, 2)).transpose(2, 3).flatten(1), _dequantize_halves
        product = blockwise_linear(
            wide,
            (weight.shape[0], x.shape[1]),
            lambda rows: widened(weight[rows], scales[rows].float(), None if zeros is None else zeros[rows]),
        )
        return (product if bias is None else product.add_(bias)).to(x.dtype)

    def to_tensorrt(
        self,
        lowering: Lowering,
        x: Lowered,
        weight: Lowered,
        scales: Lowered,
        zeros: Lowered | None = None,
        bias: Lowered | None = None,
    ) -> Lowered:
        """Without zero points, which TensorRT lacks: `x @ (q * s).T - (sums of x over the groups) @ (zeros * s).T`.

        To subtract them from the weight would have it widened in memory in every step, and so would one group a row:
        that becomes two.
        """
        if scales.shape[1] == 1:
            ones = lowering.cast_like(lowering.constant(torch.ones(1, 2)), scales)
            scales = lowering.elementwise("PROD", scales, ones)
        product = lowering.matmul(x, lowering.dequantize(weight, scales, like=x), transpose_b=True)
        if zeros is not None:
            sums = lowering.reduce("SUM", lowering.reshape(x, (0, scales.shape[1], -1)), 2, keep=False)
            offsets = lowering.dequantize(zeros, lowering.scalar(1, torch.float32, rank=0), like=scales)
            offsets = lowering.elementwise("PROD", offsets, scales)
            product = lowering.elementwise("SUB", product, lowering.matmul(sums, offsets, transpose_b=True))
        return lowering.add_bias(product, bias)


@dataclass(frozen=True)
class Int4Grid:
    """16 levels for every `group_size` input channels of an output channel; scales are exact in `dtype`.

    Symmetric: levels -8 .. 7 with a scale that maps the largest magnitude to 7.5, and no zero point (as in AutoGPTQ and
    compressed-tensors). Asymmetric: the levels span the smallest to the largest value and 0, which is a level.
    """

    group_size: int
    symmetric: bool
    dtype: torch.dtype

    def fit(self, groups: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Scales and zeros, float32 `[...]`, for weights `[..., group_size]`."""
        if self.symmetric:
            low, span = None, groups.abs().amax(-1) * 2
        else:
            low = groups.amin(-1).clamp_max_(0)
            span = groups.amax(-1).clamp_min_(0) - low
        scales = divided(span, 15).to(self.dtype).float()
        scales = torch.where(scales > 0, scales, torch.ones_like(scales))
        zeros = torch.zeros_like(scales) if low is None else (-8 - (low / scales).round_()).clamp_(-8, 7)
        return scales, zeros

    @staticmethod
    def levels(weight: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor) -> torch.Tensor:
        """Integers -8 .. 7, as float32: `weight / scales` to nearest even, plus `zeros`, clamped."""
        return (weight / scales).round_().add_(zeros).clamp_(-8, 7)

    def round(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """`weight` `[out, in]` to nearest: values `[out, in]`, scales and zeros `[out, groups]`, float32."""
        groups = weight.unflatten(1, (-1, self.group_size))
        scales, zeros = self.fit(groups)
        return self.levels(groups, scales[..., None], zeros[..., None]).flatten(1), scales, zeros

    @staticmethod
    def dequantize(values: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor) -> torch.Tensor:
        """The inverse of `round`."""
        groups = values.unflatten(1, (scales.shape[1], -1))
        return ((groups - zeros[..., None]) * scales[..., None]).flatten(1)


def pack(values: torch.Tensor) -> torch.Tensor:
    """int8 `[..., n]` within -8 .. 7 to uint8 `[..., n / 2]`, the even element in the low nibble."""
    return (values[..., 1::2] << 4).bitwise_or_(values[..., ::2] & 15).view(torch.uint8)


def unpack(packed: torch.Tensor) -> torch.Tensor:
    """The inverse of `pack`."""
    return torch.stack(_nibbles(packed), -1).flatten(-2)


def _nibbles(packed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Even and odd elements of what is packed, int8 each."""
    signed = packed.view(torch.int8)
    return signed << 4 >> 4, signed >> 4


def dequantize(weight: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None = None) -> torch.Tensor:
    """`[out, in / 2]` packed values to `[out, in]` in the scales' dtype."""
    return _scaled(unpack(weight).unflatten(1, (scales.shape[1], -1)), scales, zeros)


def _dequantize_halves(weight: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None = None) -> torch.Tensor:
    """The same of groups of an even size, but a group's even input channels are before its odd ones.

    On a CPU to bring them in order takes a third of the time.
    """
    groups = weight.unflatten(1, (scales.shape[1], -1))
    return _scaled(torch.stack(_nibbles(groups), 2).flatten(2), scales, zeros)


def _scaled(groups: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None) -> torch.Tensor:
    """Values int8 `[out, groups, channels]` to `[out, in]`."""
    values = groups.to(scales.dtype)
    if zeros is not None:
        values -= zeros[..., None]
    values *= scales[..., None]
    return values.flatten(1)
