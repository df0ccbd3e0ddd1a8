"""The fused operations, and two lists of rules by which a loaded engine has them: for steps of few and of many rows.

The kernels of a layer are, for one row and for many,

    norm, qkv | rotation, cache write, attention | o_proj, residual | norm, gate and up, SwiGLU | down_proj, residual
    residual, norm | qkv | keys and values | attention | o_proj | residual, norm | gate, up | SwiGLU | down_proj
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import torch

from trtbuild.engine.fusion import Fused, Result, Rule, maybe, one
from trtbuild.linear.dense import DenseLinear
from trtbuild.linear.int4 import Int4Linear
from trtbuild.linear.int8 import Int8Linear, partly_scaled
from trtbuild.linear.w8a8 import W8A8Linear
from trtbuild.network import Network, Node
from trtbuild.network.ops.add import Add
from trtbuild.network.ops.attention import Attention
from trtbuild.network.ops.cast import Cast
from trtbuild.network.ops.collectives import AllReduce, Collective, Meeting
from trtbuild.network.ops.rms_norm import RmsNorm
from trtbuild.network.ops.rotate import Rotate
from trtbuild.network.ops.scale_tokens import ScaleTokens
from trtbuild.network.ops.select_rows import SelectRows
from trtbuild.network.ops.split_heads import SplitHeads
from trtbuild.network.ops.swiglu import SwiGlu
from trtbuild.network.step import Step

FEW_ROWS = 64  # of a step to which the rules for few apply
PRODUCT = one(DenseLinear, Int8Linear, Int4Linear, W8A8Linear)


@dataclass(frozen=True, eq=False)
class FusedLinear(Fused):
    """A product of few rows, which are some of the tokens or all, with the norm before it and what follows it."""

    names: ClassVar = {(RmsNorm, "weight"): "norm", (Add, "a"): "residual", (Add, "b"): "residual"}

    @cached_property
    def options(self) -> dict[str, Any]:
        options: dict[str, Any] = {"activations": "16bit"}
        for op in (node.op for node in self.nodes):
            match op:
                case Int8Linear() | Int4Linear() | W8A8Linear():
                    options["activations"] = op.activations
                case RmsNorm():
                    options["eps"] = op.eps
                case SwiGlu():
                    options["swiglu"] = True
                case Cast():
                    options["dtype"] = getattr(torch, op.dtype)
        return options

    def kernel(
        self,
        step: Step,
        x: torch.Tensor,
        weight: torch.Tensor,
        scales: torch.Tensor | None = None,
        zeros: torch.Tensor | None = None,
        input_scale: torch.Tensor | None = None,
        bias: torch.Tensor | None = None,
        norm: torch.Tensor | None = None,
        residual: torch.Tensor | None = None,
        indices: torch.Tensor | None = None,
    ) -> torch.Tensor | None:
        from trtbuild.kernels import few_rows, one_row

        if indices is not None and not step.generates:
            x = x.index_select(0, indices)
        for kernel in (one_row, few_rows):
            if kernel.takes(x, weight, scales, zeros, self.options["activations"]):
                constants = scales, zeros, input_scale, bias
                return kernel.product(x, weight, *constants, norm=norm, residual=residual, **self.options)
        return None


@dataclass(frozen=True, eq=False)
class FusedAttention(Fused):
    """Heads of a projection, rotated and scaled where a model does so, into the caches, and attention over these."""

    late: ClassVar = True  # may the next kernel start

    @cached_property
    def split(self) -> Rotate | SplitHeads:
        return next(node.op for node in self.nodes if isinstance(node.op, Rotate | SplitHeads))

    def takes(self, qkv: torch.Tensor, key_cache: torch.Tensor) -> bool:
        """Whether the kernels do."""
        from trtbuild.kernels import cache

        return cache.takes(qkv, self.split.head_dim, key_cache)

    def attend(
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
        quantize: tuple[torch.dtype, torch.Tensor | None] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None] | None:
        """The attended values, rounded to 8 bits if `quantize` says how; None where kernels do not take them."""
        from trtbuild.kernels.context_attention import context_attention, write_cache
        from trtbuild.kernels.decode_attention import decode_attention

        if not self.takes(qkv, key_cache):
            return None
        heads, caches = self.split.num_heads, (key_cache, value_cache, key_scale, value_scale)
        if step.generates:
            rows = qkv, cos, sin, factors, position_ids
            return decode_attention(*rows, *caches, slopes, step.kv_bound, heads, quantize, step.pages, self.late)
        if step.slots is None:
            return None
        write_cache(qkv, cos, sin, position_ids, query_starts, step.slots, *caches, heads, step.pages)
        where = query_starts, past_lengths, step.slots, *caches, slopes, heads
        return context_attention(qkv, cos, sin, factors, *where, quantize, step.pages)

    def kernel(self, step: Step, *args: Any, **inputs: Any) -> Result | None:
        found = self.attend(step, **inputs)
        return None if found is None else (found[0], inputs["key_cache"], inputs["value_cache"])


@dataclass(frozen=True, eq=False)
class EarlyAttention(FusedAttention):
    """Attention before a product of 16-bit weights, whose programs may wait beside it."""

    late: ClassVar = False


def _eps(nodes: Iterable[Node]) -> float:
    """Of the norm among them."""
    return next(node.op.eps for node in nodes if isinstance(node.op, RmsNorm))


@dataclass(frozen=True, eq=False)
class FusedNorm(Fused):
    """A norm, and the residual's sum before it, which the next addition reads."""

    names: ClassVar = {(RmsNorm, "x"): "a"}
    keeps = (Add,)

    def kernel(self, step: Step, a: torch.Tensor, weight: torch.Tensor, b: torch.Tensor | None = None) -> Result:
        from trtbuild.kernels.add_rms_norm import norm_rows

        total, normed, _ = norm_rows(a, weight, _eps(self.nodes), b=b)
        return normed if total is None else (total, normed)


@dataclass(frozen=True, eq=False)
class FusedSum(Fused, Collective):
    """The sum over ranks with the residual's addition and the norm that follow it."""

    names: ClassVar = {(Add, "a"): "residual", (Add, "b"): "residual"}
    keeps = (Add,)

    @property
    def sum(self) -> AllReduce:
        return next(node.op for node in self.nodes if isinstance(node.op, AllReduce))

    def kernel(self, step: Step, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> Result:
        place = self.sum.first, self.sum.size
        return self.sum.ranks(step).all_reduce_add_rms_norm(x, residual, weight, _eps(self.nodes), *place)

    def meeting(self, rank: int) -> Meeting:
        return self.sum.meeting(rank)

    def together(self, *brought: dict[str, torch.Tensor]) -> list[torch.Tensor | tuple]:
        def after(inputs: dict[str, torch.Tensor], total: torch.Tensor | tuple) -> Result:
            return self.chain(inputs, lambda op, given: total if op is self.sum else op.reference(**given))

        return list(map(after, brought, self.sum.together(*brought)))


@dataclass(frozen=True, eq=False)
class FusedSwiGlu(Fused):
    """SwiGLU in one launch."""

    def kernel(self, step: Step, gate_up: torch.Tensor) -> torch.Tensor:
        from trtbuild.kernels.swiglu import swiglu

        return swiglu(gate_up)[0]


@dataclass(frozen=True, eq=False)
class FusedInt8Norm(Fused):
    """A product with INT8 weights, the residual's sum and a norm, which apply a part of the weights' scales."""

    names: ClassVar = {(RmsNorm, "weight"): "norm", (Add, "a"): "residual", (Add, "b"): "residual"}
    keeps = (Add,)

    def kernel(
        self,
        step: Step,
        x: torch.Tensor,
        weight: torch.Tensor,
        scales: torch.Tensor,
        residual: torch.Tensor,
        norm: torch.Tensor,
        bias: torch.Tensor | None = None,
    ) -> Result:
        from trtbuild.kernels.add_rms_norm import norm_rows

        y, left = partly_scaled(x, weight, scales, bias)
        total, normed, _ = norm_rows(residual, norm, _eps(self.nodes), b=y, b_scales=left)
        assert total is not None
        return total, normed


@dataclass(frozen=True, eq=False)
class FusedInt8SwiGlu(Fused):
    """A product with INT8 weights and SwiGLU, which applies a part of their scales."""

    def kernel(
        self,
        step: Step,
        x: torch.Tensor,
        weight: torch.Tensor,
        scales: torch.Tensor,
        bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        from trtbuild.kernels.swiglu import swiglu

        y, left = partly_scaled(x, weight, scales, bias)
        return swiglu(y, weight_scales=left)[0]


@dataclass(frozen=True, eq=False)
class FusedW8A8(Fused):
    """A product of many rows that are rounded to 8 bits by what comes before it."""

    @property
    def linear(self) -> W8A8Linear:
        return next(node.op for node in self.nodes if isinstance(node.op, W8A8Linear))


@dataclass(frozen=True, eq=False)
class FusedNormW8A8(FusedW8A8):
    """By the norm, with the residual's sum before that."""

    names: ClassVar = {(RmsNorm, "x"): "a", (RmsNorm, "weight"): "norm"}
    keeps = (Add,)

    def kernel(
        self,
        step: Step,
        a: torch.Tensor,
        norm: torch.Tensor,
        weight: torch.Tensor,
        scales: torch.Tensor,
        b: torch.Tensor | None = None,
        input_scale: torch.Tensor | None = None,
        bias: torch.Tensor | None = None,
    ) -> Result | None:
        from trtbuild.kernels.add_rms_norm import norm_rows
        from trtbuild.kernels.many_rows import product_8bit

        if not self.linear.has_kernel(weight):
            return None
        total, x, s = norm_rows(a, norm, _eps(self.nodes), b=b, quantize=(self.linear.values, input_scale))
        assert s is not None
        y = product_8bit(x, s, weight, scales, bias, a.dtype)
        return y if total is None else (total, y)


@dataclass(frozen=True, eq=False)
class FusedSwiGluW8A8(FusedW8A8):
    """By SwiGLU."""

    def kernel(
        self,
        step: Step,
        gate_up: torch.Tensor,
        weight: torch.Tensor,
        scales: torch.Tensor,
        input_scale: torch.Tensor | None = None,
        bias: torch.Tensor | None = None,
    ) -> torch.Tensor | None:
        from trtbuild.kernels.many_rows import product_8bit
        from trtbuild.kernels.swiglu import swiglu

        if not self.linear.has_kernel(weight):
            return None
        x, s = swiglu(gate_up, (self.linear.values, input_scale))
        assert s is not None
        return product_8bit(x, s, weight, scales, bias, gate_up.dtype)


@dataclass(frozen=True, eq=False)
class FusedAttentionW8A8(FusedAttention, FusedW8A8):
    """By attention, where one scale is given."""

    @classmethod
    def kept(cls, node: Node) -> Sequence[str]:
        return node.outputs[1:] if isinstance(node.op, Attention) else ()

    def kernel(
        self,
        step: Step,
        *,
        weight: torch.Tensor,
        scales: torch.Tensor,
        input_scale: torch.Tensor | None = None,
        bias: torch.Tensor | None = None,
        **inputs: Any,
    ) -> Result | None:
        from trtbuild.kernels.many_rows import product_8bit

        static = input_scale is not None and self.linear.has_kernel(weight)
        found = self.attend(step, **inputs, quantize=(self.linear.values, input_scale) if static else None)
        if found is None:
            return None
        x, s = found
        if s is None:
            y = self.linear.portable(step, x, weight, scales, input_scale, bias)
        else:
            y = product_8bit(x, s, weight, scales, bias, inputs["qkv"].dtype)
        return inputs["key_cache"], inputs["value_cache"], y


HEADS = one(Rotate, SplitHeads), maybe(ScaleTokens), one(Attention)
ATTENTION = Rule(FusedAttention, HEADS)
SUM = Rule(FusedSum, (one(AllReduce), one(Add), one(RmsNorm)))
NORM = Rule(FusedNorm, (maybe(Add), one(RmsNorm)))
SWIGLU = Rule(FusedSwiGlu, (one(SwiGlu),))
LINEAR = maybe(SelectRows), maybe(RmsNorm), PRODUCT, maybe(SwiGlu), maybe(Add), maybe(Cast)
FEW = (
    Rule(EarlyAttention, HEADS, before=DenseLinear),
    ATTENTION,
    SUM,
    Rule(FusedLinear, LINEAR),
    NORM,
    SWIGLU,
)
MANY = (
    Rule(FusedAttentionW8A8, (*HEADS, one(W8A8Linear))),
    ATTENTION,
    SUM,
    Rule(FusedLinear, LINEAR, rows="rows"),  # what is left of the last layer: a row a sequence
    Rule(FusedInt8Norm, (one(Int8Linear), one(Add), one(RmsNorm))),
    Rule(FusedInt8SwiGlu, (one(Int8Linear), one(SwiGlu))),
    Rule(FusedNormW8A8, (maybe(Add), one(RmsNorm), one(W8A8Linear))),
    Rule(FusedSwiGluW8A8, (one(SwiGlu), one(W8A8Linear))),
    NORM,
    SWIGLU,
)


def knows_lengths(network: Network, device: torch.device) -> bool:
    """Whether the attention of a fused network is by kernels, which read on the device how long sequences are."""

    def like(name: str) -> torch.Tensor:
        return torch.empty(0, dtype=network.tensors[name].dtype, device=device)

    return not any(isinstance(node.op, Attention) for node in network.nodes) and all(
        node.op.takes(like(node.inputs["qkv"]), like(node.inputs["key_cache"]))
        for node in network.nodes
        if isinstance(node.op, FusedAttention)
    )
