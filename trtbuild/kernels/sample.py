"""A step's last piece in one launch: every sequence's next token, and all that the step after it reads.

`draw` equals `trtbuild.runtime.sampling.draw`. A program looks at one piece of a sequence's vocabulary; the last one
to finish has the best of all and hands the token on. A logit and its place are compared as one 64-bit integer, so that
of equal ones the first is taken, in whatever order programs finish; NaN is above all, as in `torch.argmax`.
"""

import torch
import triton
import triton.language as tl

from trtbuild.kernels.dependent_launch import dependent_launch, trigger, wait

BLOCK = 1024  # tokens a program looks at
LOWEST = -(1 << 63)


def draw(
    logits: torch.Tensor,
    tokens: torch.Tensor,
    places: torch.Tensor,
    ring: torch.Tensor,
    seeds: torch.Tensor | None,
    seen: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    sequence_lengths: torch.Tensor | None,
    *,
    scratch: torch.Tensor,
) -> None:
    """As the function that it equals. `scratch`: as `new_scratch` makes it, for launches one after the other."""
    batch, vocab = logits.shape
    best, arrived = scratch
    _draw_kernel[(triton.cdiv(vocab, BLOCK), batch)](
        logits.contiguous(),
        tokens,
        places,
        ring,
        seeds,
        seen,
        position_ids,
        sequence_lengths,
        best,
        arrived,
        vocab,
        AHEAD=len(ring),
        BLOCK=BLOCK,
        **dependent_launch(logits.device),
    )


def new_scratch(batch: int, device: torch.device) -> torch.Tensor:
    """int64 `[2, batch]` in which programs meet; a launch leaves it as it found it."""
    scratch = torch.zeros(2, batch, dtype=torch.int64, device=device)
    scratch[0] = LOWEST
    return scratch


@triton.jit
def _draw_kernel(
    logits,
    tokens,
    places,
    ring,
    seeds,
    seen,
    position_ids,
    sequence_lengths,
    best,
    arrived,
    vocab,
    AHEAD: tl.constexpr,
    BLOCK: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    trigger(DEPENDENT)
    row = tl.program_id(1)
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    wait(DEPENDENT)
    x = tl.load(logits + row.to(tl.int64) * vocab + token, mask=token < vocab, other=float("-inf"))
    place = tl.load(places + row)
    if seeds is not None:
        x += _gumbel(tl.load(seeds + row), token, place)
    x = tl.where(x == 0, 0.0, x)  # there are two zeros
    bits = x.to(tl.int32, bitcast=True)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # integers in the order of the numbers
    key = (ordered.to(tl.int64) << 32) | (0x7FFFFFFF - token).to(tl.int64)
    tl.atomic_max(best + row, tl.max(key, 0), sem="acq_rel")
    if tl.atomic_add(arrived + row, 1, sem="acq_rel") == tl.num_programs(0) - 1:
        lowest: tl.constexpr = -9223372036854775808
        found = tl.atomic_xchg(best + row, lowest, sem="acq_rel")
        tl.store(arrived + row, 0)
        drawn = 0x7FFFFFFF - (found & 0x7FFFFFFF).to(tl.int32)
        tl.store(tokens + row, drawn)
        tl.store(ring + (place % AHEAD) * tl.num_programs(1) + row, drawn)
        tl.store(places + row, place + 1)
        if seen is not None:
            count = seen + row.to(tl.int64) * vocab + drawn
            tl.store(count, tl.load(count) + 2)
        if position_ids is not None:
            tl.store(position_ids + row, place)
        if sequence_lengths is not None:
            tl.store(sequence_lengths + row, place + 1)


@triton.jit
def _gumbel(seed, token, place):
    zero = token * 0
    a, b, c, d = tl.philox(seed, token // 4, zero + place, zero, zero)
    word = token % 4
    bits = tl.where(word < 2, tl.where(word == 0, a, b), tl.where(word == 2, c, d))
    uniform = tl.minimum((bits.to(tl.float32) + 0.5) * 2.3283064365386963e-10, 0.99999994)
    # -log(1 - uniform), which for small numbers would keep few digits
    series = uniform * (1.0 + uniform * (0.5 + uniform * 0.33333333))
    return -tl.log(tl.where(uniform < 0.01, series, -tl.log(1.0 - uniform)))
