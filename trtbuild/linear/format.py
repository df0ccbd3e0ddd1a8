"""What every weight format says of itself, beside its operation."""

from typing import Literal, Protocol

import torch

from trtbuild.network.network import Op, Tensor
from trtbuild.tensors.lazy import LazyTensor
from trtbuild.tensors.quantized_weight import Activations, QuantizedWeight
from trtbuild.tensors.rounding import DTYPES, FP8_CAPABILITY, quantize, scale_for

Numbers = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]


class Granularity(Protocol):
    """What of a weight shares a scale: a recipe's `Weights`."""

    @property
    def per(self) -> Literal["channel", "tensor"] | None: ...

    @property
    def group_size(self) -> int | None: ...

    @property
    def symmetric(self) -> bool: ...


class WeightFormat(Op):
    """A product with a quantized weight: the operation itself, and how such weights are made, kept and published.

    `dtype`, the name of the weight's type in recipes, and `activations` (see `QuantizedWeight`) tell formats apart;
    `groups` says whether groups of input channels may have scales and zero points.
    """

    dtype: Literal["int8", "int4", "fp8"]
    activations: Activations
    groups = False

    @property
    def values(self) -> torch.dtype:
        """That a weight's numbers have, unpacked."""
        raise NotImplementedError

    @property
    def scheme(self) -> tuple[str, int]:
        """The numbers in compressed-tensors' words: `type` and `num_bits`."""
        raise NotImplementedError

    @property
    def layout(self) -> str:
        """How they lie in a file, in compressed-tensors' words (`format`)."""
        raise NotImplementedError

    @property
    def capability(self) -> tuple[int, int]:
        """Compute capability of the first GPUs that multiply such numbers."""
        return (7, 5)

    def scale_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """That of a weight's scales, in a model of `dtype`."""
        raise NotImplementedError

    def round(self, weight: torch.Tensor, dtype: torch.dtype, granularity: Granularity) -> Numbers:
        """`weight` float32 `[out, in]` to nearest: values `[out, in]`, scales and zeros, if any, `[out, groups]`."""
        raise NotImplementedError

    def constants(self, weight: QuantizedWeight, dtype: torch.dtype) -> dict[str, LazyTensor]:
        """The operation's inputs that a weight makes, for `x` of `dtype`."""
        raise NotImplementedError


class EightBits(WeightFormat):
    """8-bit values with a float32 scale an output channel, all of them equal where rounding had one a tensor."""

    @property
    def values(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def scheme(self) -> tuple[str, int]:
        return "float" if self.values.is_floating_point else "int", 8

    @property
    def layout(self) -> str:
        return f"{self.scheme[0]}-quantized"

    @property
    def capability(self) -> tuple[int, int]:
        return FP8_CAPABILITY if self.values.is_floating_point else super().capability

    def scale_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return torch.float32

    def round(self, weight: torch.Tensor, dtype: torch.dtype, granularity: Granularity) -> Numbers:
        values, scales = round_8bit(weight, self.values, granularity.per == "tensor")
        return values, scales, None

    def constants(self, weight: QuantizedWeight, dtype: torch.dtype) -> dict[str, LazyTensor]:
        out, load = weight.scales.shape[0], weight.scales.load
        scales = LazyTensor(torch.float32, (out,), lambda: load()[:, 0].float())
        found = {"weight": weight.values, "scales": scales, "input_scale": weight.input_scale}
        return {name: value for name, value in found.items() if value is not None}

    def check(self, x: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None) -> None:
        """Raises `ValueError` unless a product's shapes and dtypes fit together."""
        outputs = weight.shape[:1]
        if (
            (weight.dtype, scales.dtype) != (self.values, torch.float32)
            or x.shape[1] != weight.shape[1]
            or scales.shape != outputs
            or (bias and (bias.dtype, bias.shape) != (x.dtype, outputs))
        ):
            raise ValueError(f"{self} of {x} with {weight}, {scales} {bias}")


def round_8bit(weight: torch.Tensor, dtype: torch.dtype, per_tensor: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """`weight` `[out, in]` as int8 or float8_e4m3fn, with float32 scales `[out, 1]` from its largest magnitudes."""
    absmax = weight.abs().amax().expand(len(weight), 1) if per_tensor else weight.abs().amax(1, keepdim=True)
    scales = scale_for(absmax, dtype)
    return quantize(weight.float(), scales, dtype), scales.contiguous()
