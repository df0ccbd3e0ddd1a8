"""Whether an engine computes what the baseline does: Hugging Face's model, where there is one."""

from dataclasses import dataclass

import torch

from trtbuild.evaluation.baseline import Baseline
from trtbuild.runtime.session import Session

# Relative error (norm of the difference over norm) of all logits against the float32 Hugging Face model. 16-bit values:
# twice what `transformers` itself shows in that dtype on SmolLM2-135M (BENCHMARKS.md), for two different roundings.
TOLERANCE = {"float32": 2e-4, "float16": 5e-3, "bfloat16": 7.5e-2}
# Where activations or the KV cache are rounded to 8 bits, a last bit decides between two neighbours, and the difference
# grows from layer to layer: of a deep model, two right computations may differ as two independent roundings would, by
# sqrt(2) of what each differs from not rounding.
ROUNDED_SHARE = 1.5


@dataclass(frozen=True)
class Agreement:
    """How one engine compares with a baseline.

    `worst_gap`: how much less than its best logit the baseline gave a chosen token.
    """

    name: str
    baseline: str
    relative_error: float
    tolerance: float
    tokens: int
    equal_tokens: int
    worst_gap: float
    allowed_gap: float

    @property
    def agrees(self) -> bool:
        return self.relative_error <= self.tolerance and self.worst_gap <= self.allowed_gap


@torch.inference_mode()
def verify(
    name: str, session: Session, tolerance: float, baseline: Baseline, prompts: list[list[int]], output_len: int
) -> Agreement:
    """Runs the prompts in ragged batches, greedily, and compares every logit with the baseline's on the same tokens.

    A token that differs from the baseline's choice is accepted only if the baseline's own logits for the two lie within
    the tolerance of each other. Where the baseline rounds activations or its cache, the tolerance is at least
    `ROUNDED_SHARE` of what that rounding changes.
    """
    difference = scale = noise = 0.0
    equal, worst_gap, largest = 0, 0.0, 0.0
    rounded = []  # sequences, prompts' lengths, logits
    for first in range(0, len(prompts), session.limits.max_batch_size):
        batch = prompts[first : first + session.limits.max_batch_size]
        for prompt, (sequence, actual) in zip(batch, _greedy(session, batch, output_len), strict=True):
            expected = baseline.logits(sequence[:-1], prompt_len=len(prompt))
            difference += (actual - expected).double().square().sum().item()
            scale += expected.double().square().sum().item()
            if baseline.rounds:
                rounded.append((sequence[:-1], len(prompt), expected))
            largest = max(largest, expected.abs().max().item())
            choices = expected[len(prompt) - 1 :]
            chosen = torch.tensor(sequence[len(prompt) :])
            equal += int((choices.argmax(-1) == chosen).sum())
            worst_gap = max(worst_gap, (choices.amax(-1) - choices.gather(1, chosen[:, None])[:, 0]).max().item())
    for ids, prompt_len, expected in rounded:  # afterwards: the baseline may hold only one of its two ways to compute
        unrounded = baseline.logits(ids, rounded=False, prompt_len=prompt_len)
        noise += (unrounded - expected).double().square().sum().item()
    tolerance = max(tolerance, ROUNDED_SHARE * (noise / scale) ** 0.5)
    return Agreement(
        name,
        baseline.name,
        (difference / scale) ** 0.5,
        tolerance,
        output_len * len(prompts),
        equal,
        worst_gap,
        2 * tolerance * largest,
    )


def _greedy(session: Session, prompts: list[list[int]], output_len: int) -> list[tuple[list[int], torch.Tensor]]:
    """Each prompt with its greedy continuation, and the float32 logits of every position but the last."""
    packed = session.prefill(prompts, all_logits=True).float().cpu()
    logits = [[rows] for rows in packed.split([len(prompt) for prompt in prompts])]
    sequences = [list(prompt) for prompt in prompts]
    for step in range(output_len):
        tokens = torch.stack([rows[-1][-1] for rows in logits]).argmax(-1).int()
        for sequence, token in zip(sequences, tokens.tolist(), strict=True):
            sequence.append(token)
        if step + 1 < output_len:
            for rows, row in zip(logits, session.decode(tokens.to(session.device)).float().cpu(), strict=True):
                rows.append(row[None].clone())
    return [(sequence, torch.cat(rows)) for sequence, rows in zip(sequences, logits, strict=True)]
