"""The fused operations, and two lists of rules by which a loaded engine has them: for steps of few and of many rows."""

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch

from trtbuild.engine.fusion import Fused, Result, Rule, maybe, one
from trtbuild.network.ops.add import Add
from trtbuild.network.ops.collectives import AllReduce
from trtbuild.network.ops.rms_norm import RmsNorm
from trtbuild.network.ops.swiglu import SwiGlu
from trtbuild.network.step import Step

FEW_ROWS = 64  # of a step to which the rules for few apply


@dataclass(frozen=True, eq=False)
class FusedNorm(Fused):
    """A norm, and the residual's sum before it, which the next addition reads."""

    names: ClassVar = {(RmsNorm, "x"): "a"}
    keeps = (Add,)

    @cached_property
    def eps(self) -> float:
        return next(node.op.eps for node in self.nodes if isinstance(node.op, RmsNorm))

    def kernel(self, step: Step, a: torch.Tensor, weight: torch.Tensor, b: torch.Tensor | None = None) -> Result:
        from trtbuild.kernels.add_rms_norm import norm_rows

        total, normed, _ = norm_rows(a, weight, self.eps, b=b)
        return normed if total is None else (total, normed)


@dataclass(frozen=True, eq=False)
class FusedSum(Fused):
    """The sum over ranks with the residual's addition and the norm that follow it."""

    names: ClassVar = {(Add, "a"): "residual", (Add, "b"): "residual"}
    keeps = (Add,)

    def kernel(self, step: Step, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> Result:
        total, _, norm = (node.op for node in self.nodes)
        assert isinstance(total, AllReduce)
        assert isinstance(norm, RmsNorm)
        return total.ranks(step).all_reduce_add_rms_norm(x, residual, weight, norm.eps, total.first, total.size)


@dataclass(frozen=True, eq=False)
class FusedSwiGlu(Fused):
    """SwiGLU in one launch."""

    def kernel(self, step: Step, gate_up: torch.Tensor) -> torch.Tensor:
        from trtbuild.kernels.swiglu import swiglu

        return swiglu(gate_up)[0]


MANY = (
    Rule(FusedSum, (one(AllReduce), one(Add), one(RmsNorm))),
    Rule(FusedNorm, (maybe(Add), one(RmsNorm))),
    Rule(FusedSwiGlu, (one(SwiGlu),)),
)
FEW = MANY
