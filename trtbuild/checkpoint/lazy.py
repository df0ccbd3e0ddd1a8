"""Tensors that are known by shape and dtype and read only when their values are needed."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class LazyTensor:
    """A tensor to come. `load()` maps or computes it anew on every call, so nothing is held between calls."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    load: Callable[[], torch.Tensor]

    @property
    def nbytes(self) -> int:
        return self.dtype.itemsize * torch.Size(self.shape).numel()

    def to(self, dtype: torch.dtype) -> "LazyTensor":
        """The same values in `dtype`, rounded to nearest even."""
        return self if dtype == self.dtype else LazyTensor(dtype, self.shape, lambda: self.load().to(dtype))


def from_tensor(tensor: torch.Tensor) -> LazyTensor:
    """Wraps a tensor that is already in memory (tests, small constants)."""
    return LazyTensor(tensor.dtype, tuple(tensor.shape), lambda: tensor)


def concatenate(parts: Sequence[LazyTensor]) -> LazyTensor:
    """The parts joined along the first dimension: `[out_0 + out_1 + ..., in]` for projection weights."""
    shape = (sum(part.shape[0] for part in parts), *parts[0].shape[1:])

    def load() -> torch.Tensor:
        """Fills the result part by part, so that no more than one part is held beside it."""
        result, row = None, 0
        for part in parts:
            value = part.load()
            if result is None:
                result = torch.empty(shape, dtype=value.dtype, device=value.device)
            result[row : row + part.shape[0]] = value
            row += part.shape[0]
        return result

    return LazyTensor(parts[0].dtype, shape, load)
