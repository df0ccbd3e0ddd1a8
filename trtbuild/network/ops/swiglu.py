"""SwiGLU, arXiv 2002.05202."""

from dataclasses import dataclass

import torch

from trtbuild.network.network import Op, Tensor


@dataclass(frozen=True)
class SwiGlu(Op):
    """`silu(gate) * up` of a fused `[tokens, gate | up]`."""

    def infer(self, gate_up: Tensor):
        tokens, width = gate_up.shape
        return [(gate_up.dtype, (tokens, width // 2))]

    def reference(self, gate_up: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return torch.nn.functional.silu(gate).mul_(up)

    def to_tensorrt(self, lowering, gate_up):
        width = gate_up.shape[1] // 2
        gate = lowering.columns(gate_up, 0, width)
        up = lowering.columns(gate_up, width, width)
        wide = lowering.cast(gate, torch.float32)
        silu = lowering.cast_like(lowering.elementwise("PROD", wide, lowering.sigmoid(wide)), gate)
        return lowering.elementwise("PROD", silu, up)


def swiglu(gate_up: Tensor) -> Tensor:
    """`[tokens, 2 * intermediate]`, gate first, to `[tokens, intermediate]`."""
    return gate_up.network.add(SwiGlu(), gate_up=gate_up)
