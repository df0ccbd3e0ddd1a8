"""SwiGLU, arXiv 2002.05202."""

from dataclasses import dataclass

import torch

from trtbuild.network.lowering import Lowered, Lowering
from trtbuild.network.network import Op, Spec, Tensor


@dataclass(frozen=True)
class SwiGlu(Op):
    """`silu(gate) * up` of a fused `[tokens, gate | up]`."""

    def infer(self, gate_up: Tensor) -> list[Spec]:
        return [(gate_up.dtype, (gate_up.shape[0], gate_up.size(1) // 2))]

    def reference(self, gate_up: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return torch.nn.functional.silu(gate).mul_(up)

    def to_tensorrt(self, lowering: Lowering, gate_up: Lowered) -> Lowered:
        width = gate_up.shape[1] // 2
        gate = lowering.columns(gate_up, 0, width)
        up = lowering.columns(gate_up, width, width)
        wide = lowering.cast(gate, torch.float32)
        silu = lowering.cast_like(lowering.elementwise("PROD", wide, lowering.sigmoid(wide)), gate)
        return lowering.elementwise("PROD", silu, up)


def swiglu(gate_up: Tensor) -> Tensor:
    """`[tokens, 2 * intermediate]`, gate first, to `[tokens, intermediate]`."""
    return gate_up.network.add(SwiGlu(), gate_up=gate_up)
