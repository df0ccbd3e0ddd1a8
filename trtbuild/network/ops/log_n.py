"""Log-n scaling of attention's queries, as in the first Qwen (arXiv 2309.16609): once a step, for every layer."""

import math
from dataclasses import dataclass

import torch

from trtbuild.network.lowering import Lowered, Lowering
from trtbuild.network.network import Op, Spec, Tensor


@dataclass(frozen=True)
class LogN(Op):
    """`max(1, log(p + 1) / log(length))` at position p: past the training length the softmax stays as sharp.

    Computed in float32, rounded to `dtype`.
    """

    dtype: str
    length: int

    def infer(self, position_ids: Tensor) -> list[Spec]:
        return [(getattr(torch, self.dtype), position_ids.shape)]

    def reference(self, position_ids: torch.Tensor) -> torch.Tensor:
        scale = (position_ids + 1).float().log() / math.log(self.length)
        return scale.clamp_min(1).to(getattr(torch, self.dtype))

    def to_tensorrt(self, lowering: Lowering, position_ids: Lowered) -> Lowered:
        one, base = (lowering.scalar(x, torch.float32, rank=1) for x in (1, math.log(self.length)))
        seen = lowering.elementwise("SUM", lowering.cast(position_ids, torch.float32), one)
        scale = lowering.elementwise("DIV", lowering.unary("LOG", seen), base)
        return lowering.cast(lowering.elementwise("MAX", scale, one), getattr(torch, self.dtype))


def log_n(position_ids: Tensor, length: int, dtype: torch.dtype) -> Tensor:
    """`[tokens]` int32 positions to the factors of their queries, `[tokens]`; `length` is above 1."""
    return position_ids.network.add(LogN(str(dtype).removeprefix("torch."), length), position_ids=position_ids)
