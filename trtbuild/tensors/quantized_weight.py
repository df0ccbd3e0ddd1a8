"""A quantized weight as every format on disk is read to, and every engine is built from."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch

from trtbuild.errors import UserError
from trtbuild.tensors.lazy import LazyTensor, concatenate, fitted, from_tensor

Activations = Literal["16bit", "static", "token"]


@dataclass(frozen=True)
class QuantizedWeight:
    """`weight[o, i] = (values[o, j] - zeros[o, g]) * scales[o, g]` with `i = order[j]` and `g = j // group_size`.

    `format` int8 and int4: `values` int8 `[out, in]` (int4 within -8 .. 7); fp8: float8_e4m3fn. `scales`
    `[out, groups]`, float32 where there is one group and the values are 8 bits wide, else in the checkpoint's dtype.
    `zeros` int8 `[out, groups]`, or None where they are all zero. `activations`: left in 16 bits, or rounded to the
    same format, with `input_scale` (float32 `[1]`) or with a scale a token. `order` int32 `[in]`, or None where input
    channels are stored in their own order: the one that brings each group's together (GPTQ's act-order).
    """

    format: Literal["int8", "int4", "fp8"]
    values: LazyTensor
    scales: LazyTensor
    zeros: LazyTensor | None = None
    activations: Activations = "16bit"
    input_scale: LazyTensor | None = None
    order: LazyTensor | None = None

    @property
    def group_size(self) -> int:
        return self.values.shape[1] // self.scales.shape[1]

    @property
    def kind(self) -> tuple:
        """What weights that are fused into one product must have in common."""
        return self.format, self.group_size, self.zeros is None, self.activations

    def same_order(self, other: "QuantizedWeight") -> bool:
        """Whether both want the input channels in one order, as they must to be fused."""
        if self.order is None or other.order is None:
            return self.order is other.order
        return self.order.load().equal(other.order.load())

    def fitting(self, dtype: torch.dtype, name: str) -> "QuantizedWeight":
        """The same for a product in `dtype`, in which int4 has its scales; those of 8 bits stay in float32.

        Loading the scales raises `UserError` where one is not finite there, or becomes 0.
        """
        if self.format != "int4":
            dtype = torch.float32

        def load() -> torch.Tensor:
            scales = self.scales.load()
            result = fitted(scales, dtype, f"a scale of {name}")
            if (lost := (result == 0) & (scales != 0)).any():
                kind = str(dtype).removeprefix("torch.")
                raise UserError(
                    f"a scale of {name} is {scales[lost][0].item():g}, which {kind} rounds to 0; use bfloat16"
                )
            return result

        return replace(self, scales=LazyTensor(dtype, self.scales.shape, load))

    def narrow(self, dim: int, start: int, length: int) -> "QuantizedWeight":
        """Rows (`dim` 0) or input channels (1) `start .. start + length`, in the same numbers.

        Input channels must be whole groups, stored in their own order; `ValueError` where they are not.
        """
        if length == self.values.shape[dim]:
            return self
        groups = start, length
        if dim == 1:
            if self.order is not None:
                raise ValueError("input channels that are stored in another order cannot be cut")
            if self.scales.shape[1] == 1:
                groups = 0, 1
            elif start % self.group_size or length % self.group_size:
                raise ValueError(f"{start} + {length} input channels are not whole groups of {self.group_size}")
            else:
                groups = start // self.group_size, length // self.group_size
        return replace(
            self,
            values=self.values.narrow(dim, start, length),
            scales=self.scales.narrow(dim, *groups),
            zeros=self.zeros and self.zeros.narrow(dim, *groups),
        )

    def dequantize(self) -> LazyTensor:
        """The float32 matrix that the numbers mean."""

        def load() -> torch.Tensor:
            out, groups = self.scales.shape
            values = self.values.load().float().view(out, groups, -1)
            if self.zeros is not None:
                values -= self.zeros.load().float()[..., None]
            values = (values * self.scales.load().float()[..., None]).view(out, -1)
            return values if self.order is None else values[:, self.order.load().argsort()]

        return LazyTensor(torch.float32, self.values.shape, load)


def fuse(parts: Sequence[QuantizedWeight]) -> QuantizedWeight:
    """One weight of the parts' outputs; they must be of one `kind` and order.

    They read the same activations, so one static scale serves all of them: the largest.
    """
    first = parts[0]
    if len(parts) == 1:
        return first
    if any(part.kind != first.kind or not part.same_order(first) for part in parts):
        raise ValueError(f"weights of {[part.kind for part in parts]} cannot be fused")
    input_scales = [part.input_scale.load().reshape(1) for part in parts if part.input_scale]
    zeros = [part.zeros for part in parts if part.zeros]
    return QuantizedWeight(
        first.format,
        concatenate([part.values for part in parts]),
        concatenate([part.scales for part in parts]),
        concatenate(zeros) if zeros else None,
        first.activations,
        from_tensor(torch.stack(input_scales).amax(0)) if input_scales else None,
        first.order,
    )


Weight = LazyTensor | QuantizedWeight


def plain(weight: Weight) -> LazyTensor:
    """What is never quantized, such as an embedding, a norm or a bias. Raises `TypeError` where it is."""
    if isinstance(weight, QuantizedWeight):
        raise TypeError(f"{weight.format} in the place of plain numbers")
    return weight
