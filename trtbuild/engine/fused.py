"""The fused operations, and two lists of rules by which a loaded engine has them: for steps of few and of many rows.

The kernels of a layer are, for one row and for many,

    norm, qkv | rotation, cache write, attention | o_proj, residual | norm, gate and up, SwiGLU | down_proj, residual
    residual, norm | qkv | rotation, cache write | attention | o_proj | residual, norm | gate, up | SwiGLU | down_proj
"""

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch

from trtbuild.engine.fusion import Fused, Result, Rule, maybe, one
from trtbuild.network import Network
from trtbuild.network.ops.add import Add
from trtbuild.network.ops.attention import Attention
from trtbuild.network.ops.collectives import AllReduce
from trtbuild.network.ops.rms_norm import RmsNorm
from trtbuild.network.ops.rotate import Rotate
from trtbuild.network.ops.scale_tokens import ScaleTokens
from trtbuild.network.ops.split_heads import SplitHeads
from trtbuild.network.ops.swiglu import SwiGlu
from trtbuild.network.step import Step

FEW_ROWS = 64  # of a step to which the rules for few apply


@dataclass(frozen=True, eq=False)
class FusedAttention(Fused):
    """Heads of a projection, rotated and scaled where a model does so, into the caches, and attention over these."""

    @cached_property
    def split(self) -> Rotate | SplitHeads:
        return next(node.op for node in self.nodes if isinstance(node.op, Rotate | SplitHeads))

    def takes(self, qkv: torch.Tensor, key_cache: torch.Tensor) -> bool:
        """Whether the kernels do."""
        from trtbuild.kernels import cache

        return cache.takes(qkv, self.split.head_dim, key_cache)

    def kernel(
        self,
        step: Step,
        qkv: torch.Tensor,
        position_ids: torch.Tensor,
        query_starts: torch.Tensor,
        past_lengths: torch.Tensor,
        key_cache: torch.Tensor,
        value_cache: torch.Tensor,
        cos: torch.Tensor | None = None,
        sin: torch.Tensor | None = None,
        factors: torch.Tensor | None = None,
        slopes: torch.Tensor | None = None,
        key_scale: torch.Tensor | None = None,
        value_scale: torch.Tensor | None = None,
    ) -> Result | None:
        from trtbuild.kernels.context_attention import context_attention, write_cache
        from trtbuild.kernels.decode_attention import decode_attention

        if not self.takes(qkv, key_cache):
            return None
        heads, caches = self.split.num_heads, (key_cache, value_cache, key_scale, value_scale)
        rows = qkv, cos, sin, factors, position_ids
        if step.generates:
            attended = decode_attention(*rows, *caches, slopes, step.kv_bound, heads)
        elif step.slots is None:
            return None
        else:
            q = write_cache(*rows, query_starts, step.slots, *caches, heads)
            attended = context_attention(q, *caches, query_starts, past_lengths, step.slots, slopes)
        return attended, key_cache, value_cache


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


ATTENTION = Rule(FusedAttention, (one(Rotate, SplitHeads), maybe(ScaleTokens), one(Attention)))
SUM = Rule(FusedSum, (one(AllReduce), one(Add), one(RmsNorm)))
NORM = Rule(FusedNorm, (maybe(Add), one(RmsNorm)))
SWIGLU = Rule(FusedSwiGlu, (one(SwiGlu),))
MANY = (ATTENTION, SUM, NORM, SWIGLU)
FEW = MANY


def knows_lengths(network: Network, device: torch.device) -> bool:
    """Whether the attention of a fused network is by kernels, which read on the device how long sequences are."""

    def like(name: str) -> torch.Tensor:
        return torch.empty(0, dtype=network.tensors[name].dtype, device=device)

    return not any(isinstance(node.op, Attention) for node in network.nodes) and all(
        node.op.takes(like(node.inputs["qkv"]), like(node.inputs["key_cache"]))
        for node in network.nodes
        if isinstance(node.op, FusedAttention)
    )
