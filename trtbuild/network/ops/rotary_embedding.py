"""Rotary position embedding's angles, arXiv 2104.09864: computed once a step, used by every layer."""

from dataclasses import dataclass

import torch

from trtbuild import kernels
from trtbuild.network.lowering import Lowered, Lowering
from trtbuild.network.network import Op, Spec, Tensor
from trtbuild.network.step import Step


@dataclass(frozen=True)
class RotaryEmbedding(Op):
    """`cos` and `sin` of position * frequency, laid out so that `x * cos + swap_halves(x) * sin` rotates `x`.

    The angles are float32 (as in Hugging Face's models), the results are rounded to `dtype`. With `ntk_factor` above
    zero the base grows once a sequence is longer than `max_positions` (dynamic NTK); the length is each sequence's own,
    so that a batch cannot change a sequence's result.
    """

    dtype: str
    ntk_factor: float = 0.0
    max_positions: int = 0

    def infer(
        self, position_ids: Tensor, inverse_frequencies: Tensor, sequence_lengths: Tensor | None = None
    ) -> list[Spec]:
        head_dim = 2 * inverse_frequencies.shape[-1]
        return [(getattr(torch, self.dtype), (*position_ids.shape, head_dim))] * 2

    def reference(
        self,
        position_ids: torch.Tensor,
        inverse_frequencies: torch.Tensor,
        sequence_lengths: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        frequencies = inverse_frequencies
        if sequence_lengths is not None:
            lengths = sequence_lengths.clamp_min(self.max_positions).to(frequencies.dtype)
            growth = self.ntk_factor * lengths / self.max_positions - (self.ntk_factor - 1)
            frequencies = frequencies * growth[:, None] ** self._exponents(frequencies)
        angles = position_ids[:, None].to(frequencies.dtype) * frequencies
        cos, sin = angles.cos(), angles.sin()
        dtype = getattr(torch, self.dtype)
        return torch.cat((cos, cos), -1).to(dtype), torch.cat((-sin, sin), -1).to(dtype)

    def portable(
        self,
        step: Step,
        position_ids: torch.Tensor,
        inverse_frequencies: torch.Tensor,
        sequence_lengths: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not kernels.run_on(position_ids.device):
            return self.reference(position_ids, inverse_frequencies, sequence_lengths)
        from trtbuild.kernels.rotary_embedding import rotary_embedding

        dtype = getattr(torch, self.dtype)
        dynamic = sequence_lengths, self.ntk_factor, self.max_positions
        return rotary_embedding(position_ids, inverse_frequencies, dtype, *dynamic)

    @staticmethod
    def _exponents(frequencies: torch.Tensor) -> torch.Tensor:
        """The growth of the base by g^(d / (d - 2)) scales frequency i by g^(-2i / (d - 2))."""
        half = frequencies.shape[-1]
        return torch.arange(half, device=frequencies.device, dtype=frequencies.dtype) / (1 - half)

    def to_tensorrt(
        self,
        lowering: Lowering,
        position_ids: Lowered,
        inverse_frequencies: Lowered,
        sequence_lengths: Lowered | None = None,
    ) -> tuple[Lowered, Lowered]:
        half = inverse_frequencies.shape[-1]
        frequencies = lowering.reshape(inverse_frequencies, (-1, half))
        if sequence_lengths is not None:
            limit = lowering.scalar(self.max_positions, torch.int32, rank=1)
            lengths = lowering.cast(lowering.elementwise("MAX", sequence_lengths, limit), torch.float32)
            slope = lowering.scalar(self.ntk_factor / self.max_positions, torch.float32, rank=1)
            offset = lowering.scalar(1 - self.ntk_factor, torch.float32, rank=1)
            growth = lowering.elementwise("SUM", lowering.elementwise("PROD", lengths, slope), offset)
            exponents = lowering.constant(self._exponents(torch.ones(half)).reshape(1, half))
            powers = lowering.elementwise("POW", lowering.reshape(growth, (-1, 1)), exponents)
            frequencies = lowering.elementwise("PROD", frequencies, powers)
        positions = lowering.reshape(lowering.cast(position_ids, torch.float32), (-1, 1))
        angles = lowering.elementwise("PROD", positions, frequencies)
        cos, sin = lowering.unary("COS", angles), lowering.unary("SIN", angles)
        dtype = getattr(torch, self.dtype)
        negative = lowering.unary("NEG", sin)
        return (
            lowering.cast(lowering.concatenate([cos, cos], axis=1), dtype),
            lowering.cast(lowering.concatenate([negative, sin], axis=1), dtype),
        )


def rotary_embedding(
    position_ids: Tensor,
    inverse_frequencies: Tensor,
    dtype: torch.dtype,
    sequence_lengths: Tensor | None = None,
    ntk_factor: float = 0.0,
    max_positions: int = 0,
) -> tuple[Tensor, Tensor]:
    """`[tokens]` int32 positions and `[head_dim / 2]` float32 frequencies to cos and sin, `[tokens, head_dim]` each.

    Frequencies of each token's own are `[tokens, head_dim / 2]`.
    Dynamic NTK also takes `sequence_lengths`, `[tokens]` int32: the length of each token's sequence after this step.
    """
    op = RotaryEmbedding(str(dtype).removeprefix("torch."), ntk_factor, max_positions)
    return position_ids.network.add(
        op, position_ids=position_ids, inverse_frequencies=inverse_frequencies, sequence_lengths=sequence_lengths
    )
