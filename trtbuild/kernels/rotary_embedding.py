"""Cosine and sine of a step's rotary angles in one launch, which the operation `RotaryEmbedding` defines.

A program does one token. Angles are float32; the growth of dynamic NTK is raised to its powers in float64, where the
GPU's function is exact enough for the products with large positions.
"""

import torch
import triton
import triton.language as tl

from trtbuild.kernels.dependent_launch import dependent_launch, trigger, wait


def rotary_embedding(
    position_ids: torch.Tensor,
    inverse_frequencies: torch.Tensor,
    dtype: torch.dtype,
    sequence_lengths: torch.Tensor | None = None,
    ntk_factor: float = 0.0,
    max_positions: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin `[tokens, head_dim]` in `dtype`, the first half of sin negated.

    `position_ids` and, for dynamic NTK, `sequence_lengths` int32 `[tokens]`; `inverse_frequencies` float32
    `[head_dim / 2]` or, of each token's own, `[tokens, head_dim / 2]`.
    """
    tokens, half = len(position_ids), inverse_frequencies.shape[-1]
    cos, sin = (torch.empty(tokens, 2 * half, dtype=dtype, device=position_ids.device) for _ in range(2))
    _rotary_kernel[(tokens,)](
        position_ids, inverse_frequencies, sequence_lengths, cos, sin, ntk_factor, max_positions,
        PER_TOKEN=inverse_frequencies.dim() == 2, HALF=half, BLOCK=triton.next_power_of_2(half), num_warps=1,
        **dependent_launch(position_ids.device),
    )  # fmt: skip
    return cos, sin


@triton.jit
def _rotary_kernel(
    position_ids, inverse_frequencies, sequence_lengths, cos, sin, ntk_factor, max_positions,
    PER_TOKEN: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr, DEPENDENT: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    trigger(DEPENDENT)
    wait(DEPENDENT)
    frequencies = tl.load(inverse_frequencies + (token * HALF if PER_TOKEN else 0) + i, mask=i < HALF, other=0.0)
    if sequence_lengths is not None:
        length = tl.maximum(tl.load(sequence_lengths + token), max_positions).to(tl.float32)
        growth = ntk_factor * length / max_positions - (ntk_factor - 1)
        exponents = i.to(tl.float64) / (1 - HALF)
        frequencies *= tl.exp(tl.log(growth.to(tl.float64)) * exponents).to(tl.float32)
    angles = tl.load(position_ids + token).to(tl.float32) * frequencies
    c, s = tl.cos(angles), tl.sin(angles)
    at = token * 2 * HALF + i
    tl.store(cos + at, c.to(cos.dtype.element_ty), mask=i < HALF)
    tl.store(cos + at + HALF, c.to(cos.dtype.element_ty), mask=i < HALF)
    tl.store(sin + at, (-s).to(sin.dtype.element_ty), mask=i < HALF)
    tl.store(sin + at + HALF, s.to(sin.dtype.element_ty), mask=i < HALF)
