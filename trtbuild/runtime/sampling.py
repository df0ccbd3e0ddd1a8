"""From logits to the next token."""

from dataclasses import dataclass, field

import torch

from trtbuild.errors import UserError


@dataclass(frozen=True)
class SamplingParams:
    """How to choose tokens and when to stop.

    `temperature` 0 is greedy. `top_k` 0 and `top_p` 1 keep everything; top-p is nucleus sampling (arXiv 1904.09751).
    `repetition_penalty` divides positive and multiplies negative logits of tokens seen in the prompt or the output
    (CTRL, arXiv 1909.05858). The order is that of Hugging Face: penalty, temperature, top-k, top-p.
    """

    max_output_len: int = 100
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int = 0
    stop_words: tuple[str, ...] = ()
    eos_token_ids: tuple[int, ...] = field(default=())

    def __post_init__(self) -> None:
        for valid, message in (
            (self.max_output_len >= 1, f"max_output_len is {self.max_output_len}; it must be at least 1"),
            (self.temperature >= 0, f"temperature is {self.temperature}; it must be 0 (greedy) or more"),
            (self.top_k >= 0, f"top_k is {self.top_k}; it must be 0 (all tokens) or more"),
            (0 < self.top_p <= 1, f"top_p is {self.top_p}; it must be above 0 and at most 1"),
            (self.repetition_penalty > 0, f"repetition_penalty is {self.repetition_penalty}; it must be above 0"),
            (all(self.stop_words), "a stop word is empty; leave it out"),
        ):
            if not valid:
                raise UserError(message)


class Sampler:
    """The sampling state of one batch. A sequence's random numbers depend on the seed and its own number alone."""

    def __init__(self, params: SamplingParams, prompts: list[list[int]], first: int, device: torch.device) -> None:
        self.params = params
        self.prompts = prompts
        self.device = device
        self.seen: torch.Tensor | None = None
        self.generators = [
            torch.Generator(device).manual_seed(params.seed + first + i)
            for i in range(len(prompts) if params.temperature > 0 else 0)
        ]

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        """`[batch, vocab]` float32 logits to `[batch]` int32 tokens, without waiting for the device."""
        if self.params.repetition_penalty != 1:
            logits = self._penalized(logits)
        if self.params.temperature == 0:
            tokens = logits.argmax(-1)
        else:
            probabilities = filter_logits(logits / self.params.temperature, self.params).softmax(-1)
            # The argmax of p / Exp(1) is a draw from p: one pass, no host synchronization.
            noise = torch.stack(
                [
                    torch.empty_like(row).exponential_(generator=g)
                    for row, g in zip(logits, self.generators, strict=True)
                ]
            )
            tokens = (probabilities / noise).argmax(-1)
        if self.seen is not None:
            self.seen.scatter_(1, tokens[:, None], True)
        return tokens.int()

    def _penalized(self, logits: torch.Tensor) -> torch.Tensor:
        if self.seen is None:
            self.seen = torch.zeros(logits.shape, dtype=torch.bool, device=self.device)
            for row, prompt in zip(self.seen, self.prompts, strict=True):
                row[torch.tensor(prompt, device=self.device)] = True
        penalty = self.params.repetition_penalty
        return torch.where(self.seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def filter_logits(logits: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """`[batch, vocab]` logits with everything outside top-k and top-p at minus infinity."""
    if params.top_k:
        kth = logits.topk(min(params.top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < kth, float("-inf"))
    if params.top_p < 1:
        ordered, order = logits.sort(descending=True)
        probabilities = ordered.softmax(-1)
        outside = probabilities.cumsum(-1) - probabilities >= params.top_p  # the mass before a token reaches top_p
        logits = logits.masked_fill(outside.scatter(1, order, outside), float("-inf"))
    return logits
