"""Tensors that are known by shape and dtype and read only when their values are needed."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from trtbuild.errors import UserError

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)  # of weights as they are, and of scales


@dataclass(frozen=True)
class LazyTensor:
    """A tensor to come. `load()` maps or computes it anew on every call, so nothing is held between calls.

    A `load` may have a method `narrow` with the parameters of `LazyTensor.narrow`: what loads that part alone, or None.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    load: Callable[[], torch.Tensor]

    @property
    def nbytes(self) -> int:
        return self.dtype.itemsize * torch.Size(self.shape).numel()

    def to(self, dtype: torch.dtype) -> "LazyTensor":
        """The same values in `dtype`, rounded to nearest even."""
        return self if dtype == self.dtype else LazyTensor(dtype, self.shape, _Cast(self, dtype))

    def fitting(self, dtype: torch.dtype, name: str) -> "LazyTensor":
        """The same in `dtype`; `load()` raises `UserError` where that does not hold the values (`fitted`)."""
        return LazyTensor(dtype, self.shape, _Cast(self, dtype, name))

    def narrow(self, dim: int, start: int, length: int) -> "LazyTensor":
        """Elements `start .. start + length` along a dimension: of a file only these are read, and only these rounded.

        Raises `ValueError` for what reaches beyond the tensor.
        """
        if not 0 <= start <= start + length <= self.shape[dim]:
            raise ValueError(f"{start} + {length} of dimension {dim} of a tensor {list(self.shape)}")
        if length == self.shape[dim]:
            return self
        narrow = getattr(self.load, "narrow", None)
        load = (narrow and narrow(dim, start, length)) or _Narrow(self, dim, start, length)
        return LazyTensor(self.dtype, (*self.shape[:dim], length, *self.shape[dim + 1 :]), load)


@dataclass(frozen=True)
class _Cast:
    """A `load` that equals another of the same source, so that a tensor that is asked for twice is known again."""

    source: LazyTensor
    dtype: torch.dtype
    fitting: str | None = None  # the name to complain of

    def __call__(self) -> torch.Tensor:
        value = self.source.load()
        return value.to(self.dtype) if self.fitting is None else fitted(value, self.dtype, self.fitting)

    def narrow(self, dim: int, start: int, length: int) -> "_Cast":
        return replace(self, source=self.source.narrow(dim, start, length))


@dataclass(frozen=True)
class _Narrow:
    """A `load` of some elements along a dimension; it equals another of the same ones."""

    source: LazyTensor
    dim: int
    start: int
    length: int

    def __call__(self) -> torch.Tensor:
        return self.source.load().narrow(self.dim, self.start, self.length)


@dataclass(frozen=True)
class Rearranged:
    """A `load` of what a function makes of another tensor, of each part of which it makes a part.

    For each dimension of the result, `places` has the dimension of `source` that it comes from, and how many elements
    along it one of the source's makes; None where a part of the result is of no part of the source.
    """

    source: LazyTensor
    function: Callable[[torch.Tensor], torch.Tensor]
    places: tuple[tuple[int, int] | None, ...]

    def __call__(self) -> torch.Tensor:
        return self.function(self.source.load())

    def narrow(self, dim: int, start: int, length: int) -> "Rearranged | None":
        place = self.places[dim]
        if place is None or start % place[1] or length % place[1]:
            return None
        return replace(self, source=self.source.narrow(place[0], start // place[1], length // place[1]))


def transposed(tensor: LazyTensor) -> LazyTensor:
    """`[a, b]` as `[b, a]`."""
    load = Rearranged(tensor, lambda x: x.T.contiguous(), ((1, 1), (0, 1)))
    return LazyTensor(tensor.dtype, tensor.shape[::-1], load)


def fitted(value: torch.Tensor, dtype: torch.dtype, name: str) -> torch.Tensor:
    """`value` in `dtype`, rounded to nearest even. Raises `UserError` where `name` is not finite there."""
    result = value.to(dtype)
    if not all(bound.isfinite() for bound in torch.aminmax(result)):  # one pass; NaN is both bounds
        kind, wider = str(dtype).removeprefix("torch."), "bfloat16" if dtype == torch.float16 else "float32"
        largest = value.abs().max().item()
        if math.isfinite(largest):
            limit = torch.finfo(dtype).max
            raise UserError(f"{name} holds {largest:g}, and the largest {kind} is {limit:g}; use {wider}")
        raise UserError(f"{name} holds NaN or infinite numbers; they are in the checkpoint, or {kind} was too narrow")
    return result


def from_tensor(tensor: torch.Tensor) -> LazyTensor:
    """Wraps a tensor that is already in memory (tests, small constants)."""
    return LazyTensor(tensor.dtype, tuple(tensor.shape), lambda: tensor)


def concatenate(parts: Sequence[LazyTensor], dim: int = 0) -> LazyTensor:
    """The parts joined along a dimension: along the first, `[out_0 + out_1 + ..., in]` of projection weights."""
    sizes = [part.shape[dim] for part in parts]
    shape = (*parts[0].shape[:dim], sum(sizes), *parts[0].shape[dim + 1 :])

    def load() -> torch.Tensor:
        """Fills the result part by part, so that no more than one part is held beside it."""
        first = parts[0].load()
        result = torch.empty(shape, dtype=first.dtype, device=first.device)
        places = result.split(sizes, dim)
        places[0].copy_(first)
        del first
        for place, part in zip(places[1:], parts[1:], strict=True):
            place.copy_(part.load())
        return result

    return LazyTensor(parts[0].dtype, shape, load)


def split(tensor: LazyTensor, count: int) -> list[LazyTensor]:
    """Equal parts along the first dimension, such as q, k and v of a fused projection; the last takes what is left."""
    if not tensor.shape:  # wrong, and said to be so when shapes are compared
        return [tensor] * count
    rows = tensor.shape[0] // count
    sizes = [rows] * (count - 1) + [tensor.shape[0] - rows * (count - 1)]
    return [tensor.narrow(0, i * rows, size) for i, size in enumerate(sizes)]


def half_rotary(tensor: LazyTensor, heads: int) -> LazyTensor:
    """Rows of each head from interleaved pairs (Meta, GGUF) to two halves (Hugging Face's way to rotate)."""

    def load() -> torch.Tensor:
        value = tensor.load()
        return value.reshape(heads, -1, 2, *value.shape[1:]).transpose(1, 2).reshape(value.shape)

    return LazyTensor(tensor.dtype, tensor.shape, load)
