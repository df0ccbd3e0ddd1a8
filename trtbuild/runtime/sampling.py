"""From logits to the next token, without the host: a step's tokens are where the next one reads them."""

from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass, field
from functools import partial
from math import isfinite
from typing import Literal, NamedTuple

import torch

from trtbuild import kernels
from trtbuild.errors import UserError
from trtbuild.network.step import sent
from trtbuild.runtime.token_ring import TokenRing

MAX_BEAMS = 8
ANY = -1  # no token: before a bad word, one that may be any; before a sequence, one that is none


class Kind(NamedTuple):
    """What of sampling a captured step has in it; numbers that may change between its replays are on the device."""

    penalized: bool
    counted: bool
    delayed: bool
    bad_words: tuple[int, int]  # how many there is room for, and how many tokens each has before its last; (0, 0): none
    drawn: bool
    top_k: int
    nucleus: bool

    @property
    def room(self) -> int:
        """Numbers of 4 bytes that sampling takes for a sequence and a token of the vocabulary.

        What it knows of sequences that run, of those that come in, and of both while they are put together; and what
        filters hold at a time, sorting above all, in launched steps and in captured ones.
        """
        knows = self.penalized or self.counted
        filters = 3 * knows + self.delayed + bool(self.bad_words[0]) + self.drawn + 2 * bool(self.top_k)
        return 5 * knows + 2 * (filters + 10 * self.nucleus)


@dataclass(frozen=True)
class SamplingParams:
    """How to choose tokens and when to stop.

    `temperature` 0 is greedy. `top_k` 0 and `top_p` 1 keep everything; top-p is nucleus sampling (arXiv 1904.09751).
    `repetition_penalty` divides positive and multiplies negative logits of tokens seen in the prompt or the output
    (CTRL, arXiv 1909.05858). `frequency_penalty` is taken off a logit for each time that its token is in the output,
    `presence_penalty` once (OpenAI's API reference). Tokens of `eos_token_ids` do not come before `min_output_len`
    others have, nor does the last token of one of `bad_words`, sequences of token ids, after the others of it, in the
    prompt or the output. The order is that of Hugging Face: penalties, what must not come, temperature, top-k, top-p.

    Each prompt is continued `num_return_sequences` times, in neighbouring outputs. Output i is drawn with `seed` + i,
    and its tokens depend on that, its logits and nothing else. With more than one of `num_beams` they are the best that
    beam search finds; `length_penalty` and `early_stopping` are Hugging Face's (`runtime/beams.py`). Raises `UserError`
    for what cannot be.
    """

    max_output_len: int = 100
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int = 0
    stop_words: tuple[str, ...] = ()
    eos_token_ids: tuple[int, ...] = field(default=())
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    min_output_len: int = 0
    bad_words: tuple[tuple[int, ...], ...] = ()
    num_return_sequences: int = 1
    num_beams: int = 1
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False

    def __post_init__(self) -> None:
        for valid, message in (
            (self.max_output_len >= 1, f"max_output_len is {self.max_output_len}; it must be at least 1"),
            (self.temperature >= 0, f"temperature is {self.temperature}; it must be 0 (greedy) or more"),
            (self.top_k >= 0, f"top_k is {self.top_k}; it must be 0 (all tokens) or more"),
            (0 < self.top_p <= 1, f"top_p is {self.top_p}; it must be above 0 and at most 1"),
            (self.repetition_penalty > 0, f"repetition_penalty is {self.repetition_penalty}; it must be above 0"),
            (all(self.stop_words), "a stop word is empty; leave it out"),
            (isfinite(self.presence_penalty), f"presence_penalty is {self.presence_penalty}; it must be a number"),
            (isfinite(self.frequency_penalty), f"frequency_penalty is {self.frequency_penalty}; it must be a number"),
            (
                0 <= self.min_output_len <= self.max_output_len,
                f"min_output_len is {self.min_output_len}; it must be 0 to max_output_len, {self.max_output_len}",
            ),
            (all(self.bad_words), "a bad word is empty; leave it out"),
            (
                all((end,) not in self.bad_words for end in self.eos_token_ids),
                "a bad word is the end of a sequence; ask for a min_output_len instead",
            ),
            (
                self.num_return_sequences >= 1,
                f"num_return_sequences is {self.num_return_sequences}; it must be at least 1",
            ),
            (1 <= self.num_beams <= MAX_BEAMS, f"num_beams is {self.num_beams}; it must be 1 to {MAX_BEAMS}"),
            (
                self.num_beams == 1 or self.temperature == 0,
                f"temperature {self.temperature} draws tokens and beam search does not; give one of them",
            ),
            (
                self.num_beams == 1 or not self.stop_words,
                "stop words do not end a beam; leave them out, or num_beams",
            ),
            (
                self.num_beams == 1 or self.num_return_sequences <= self.num_beams,
                f"num_return_sequences {self.num_return_sequences} is more than the {self.num_beams} beams",
            ),
            (isfinite(self.length_penalty), f"length_penalty is {self.length_penalty}; it must be a number"),
            (
                self.early_stopping in (False, True, "never"),
                f"early_stopping is {self.early_stopping!r}; it must be True, False or 'never'",
            ),
            (
                self.num_return_sequences == 1 or self.temperature > 0 or self.num_beams > 1,
                f"{self.num_return_sequences} greedy outputs of a prompt would be equal; give a temperature, or beams",
            ),
        ):
            if not valid:
                raise UserError(message)

    @property
    def kind(self) -> Kind:
        drawn, longest = self.temperature > 0, max(map(len, self.bad_words), default=0)
        return Kind(
            penalized=self.repetition_penalty != 1,
            counted=self.presence_penalty != 0 or self.frequency_penalty != 0,
            delayed=self.min_output_len > 0,
            bad_words=(_room(len(self.bad_words)), _room(longest - 1)) if self.bad_words else (0, 0),
            drawn=drawn,
            top_k=self.top_k if drawn else 0,
            nucleus=drawn and self.top_p < 1,
        )


PER_SEQUENCE = "tokens", "_places", "_seeds", "_seen", "_earliest", "_recent"  # of a `Sampler`


class Sampler:
    """The sampling state of a batch, on its device: `tokens`, int32 `[batch]`, are those drawn last.

    `ring` takes them to the host. Where a captured step reads `tokens`, and its `position_ids` and `sequence_lengths`
    (int32 `[batch]`), they are given, and drawing a token moves them on. `start` makes it ready for other prompts of a
    batch as large, and for parameters of the same kind.
    """

    def __init__(
        self,
        kind: Kind,
        batch: int,
        vocab: int,
        device: torch.device,
        tokens: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        sequence_lengths: torch.Tensor | None = None,
    ) -> None:
        self.kind, self.device = kind, device
        self.tokens = torch.zeros(batch, dtype=torch.int32, device=device) if tokens is None else tokens
        self.ring = TokenRing(batch, device)
        self._places = torch.zeros_like(self.tokens)  # in its sequence, of the token that is drawn next
        self._seeds = torch.zeros(batch, dtype=torch.int64, device=device)
        self._numbers = torch.ones(5, device=device)  # temperature, top-p; penalties: repetition, presence, frequency
        # 2 for each time that a token is in the output, and 1 if it is in the prompt
        self._seen = self._seeds.new_zeros(batch, vocab, dtype=torch.int32) if kind.penalized or kind.counted else None
        self._ends = torch.zeros(vocab, dtype=torch.bool, device=device)
        self._earliest = torch.zeros_like(self.tokens)  # places at which they may come
        words, width = kind.bad_words
        self._words = torch.zeros(words, width + 1, dtype=torch.int32, device=device)
        self._recent = torch.zeros(batch, width, dtype=torch.int32, device=device)  # last tokens of each sequence
        self._step = position_ids, sequence_lengths
        self._draw: Callable[..., None] = draw
        if kernels.run_on(device):
            from trtbuild.kernels import sample

            self._draw = partial(sample.draw, scratch=sample.new_scratch(batch, device))

    @torch.inference_mode()
    def start(self, params: SamplingParams, prompts: list[list[int]], first: int = 0) -> "Sampler":
        """For new prompts, the first of which has the number `first`."""
        self.set(params)
        self.ring.start([len(prompt) for prompt in prompts])
        return self.begin(params, prompts, first)

    @torch.inference_mode()
    def set(self, params: SamplingParams) -> "Sampler":
        """What all sequences have in common."""
        penalties = [params.repetition_penalty, params.presence_penalty, params.frequency_penalty]
        numbers = torch.tensor([params.temperature or 1, params.top_p, *penalties])
        self._numbers.copy_(sent(numbers, self.device))
        if self.kind.delayed:
            ends = torch.tensor([end for end in params.eos_token_ids if end < len(self._ends)], dtype=torch.int64)
            self._ends.zero_().index_fill_(0, sent(ends, self.device), True)
        if params.bad_words:
            room, width = self._words.shape
            words = (params.bad_words * room)[:room]  # where there is more room, again
            self._words.copy_(sent(torch.tensor([_last(word, width) for word in words]), self.device))
        return self

    @torch.inference_mode()
    def begin(self, params: SamplingParams, prompts: list[list[int]], first: int = 0) -> "Sampler":
        """What they do not: for new prompts. Nothing waits for the device."""
        seeds = [_signed(params.seed + first + i) for i in range(len(prompts))]
        self._seeds.copy_(sent(torch.tensor(seeds), self.device))
        self._places.copy_(sent(torch.tensor([len(prompt) for prompt in prompts]), self.device))
        if self.kind.delayed:
            self._earliest.copy_(self._places + params.min_output_len)
        if params.bad_words:
            recent = [_last(prompt, self._recent.shape[1]) for prompt in prompts]
            self._recent.copy_(sent(torch.tensor(recent), self.device))
        if self._seen is not None:
            self._seen.zero_()
            for row, prompt in zip(self._seen, prompts, strict=True):
                row.index_fill_(0, sent(torch.tensor(prompt), self.device), 1)
        return self

    def part(self, rows: int) -> "Sampler":
        """The first sequences', in the same memory. `ring` does not have their tokens."""
        part = copy(self)
        for name in PER_SEQUENCE:
            if (state := getattr(self, name)) is not None:
                setattr(part, name, state[:rows])
        return part

    @torch.inference_mode()
    def regroup(self, rows: torch.Tensor, others: "Sampler") -> None:
        """Sequence i goes on as that of row `rows[i]` (int64) of its own rows with those of `others` behind them."""
        for name in PER_SEQUENCE:
            if (state := getattr(self, name)) is not None:
                state[: len(rows)] = torch.cat((state, getattr(others, name)))[rows]

    @torch.inference_mode()
    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        """`[batch, vocab]` float32 logits to `tokens`, without waiting for the device."""
        seeds = self._seeds if self.kind.drawn else None
        self._draw(self.processed(logits), self.tokens, self._places, self.ring.buffer, seeds, self._seen, *self._step)
        if self.kind.bad_words[0]:
            self._recent.copy_(torch.cat((self._recent[:, 1:], self.tokens[:, None]), 1))
        return self.tokens

    @torch.inference_mode()
    def follow(self, rows: torch.Tensor, tokens: torch.Tensor) -> None:
        """Row i goes on as row `rows[i]` (int64 `[batch]`) with a token that something else chose (int32 `[batch]`)."""
        self._places += 1
        if self._seen is not None:
            self._seen.copy_(self._seen[rows])
            self._seen[torch.arange(len(rows), device=self.device), tokens] += 2
        if self.kind.bad_words[0]:
            self._recent.copy_(torch.cat((self._recent[rows, 1:], tokens[:, None]), 1))

    def processed(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits after penalties, what must not come, temperature and filters; greedy sampling has the first two."""
        temperature, top_p, repetition, presence, frequency = self._numbers
        if self._seen is not None and self.kind.penalized:
            scaled = torch.where(logits > 0, logits / repetition, logits * repetition)
            logits = torch.where(self._seen > 0, scaled, logits)
        if self._seen is not None and self.kind.counted:
            counts = self._seen >> 1
            logits = logits - (frequency * counts + presence * (counts > 0))
        if self.kind.delayed:
            early = self._places < self._earliest
            logits = logits.masked_fill(early[:, None] & self._ends, float("-inf"))
        if self.kind.bad_words[0]:
            before, last = self._words[:, :-1], self._words[:, -1].long()
            complete = ((before == ANY) | (before == self._recent[:, None])).all(-1)
            logits = logits.scatter_add(1, last.expand(len(logits), -1), torch.where(complete, float("-inf"), 0.0))
        if self.kind.drawn:
            logits = filter_logits(logits / temperature, self.kind.top_k, top_p if self.kind.nucleus else None)
        return logits


def draw(
    logits: torch.Tensor,
    tokens: torch.Tensor,
    places: torch.Tensor,
    ring: torch.Tensor,
    seeds: torch.Tensor | None,
    seen: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    sequence_lengths: torch.Tensor | None,
) -> None:
    """The tokens with the highest logits `[batch, vocab]`, or with `seeds`, int64 `[batch]`, a draw from their softmax.

    They go to `tokens`, int32 `[batch]`, to the row of `ring`, int32 `[ahead, batch]`, that a token's place in its
    sequence, int32 `places`, has modulo `ahead`, and count 2 in `seen`, int32 `[batch, vocab]`. The place becomes the
    token's position, with a length of one more, and counts on.
    """
    if seeds is not None:  # the argmax of logits + Gumbel noise is a draw from their softmax
        logits = logits + gumbel(seeds, places, logits.shape[1])
    tokens.copy_(logits.argmax(-1))
    ring[places % len(ring), torch.arange(len(tokens))] = tokens.to(ring.device)
    if seen is not None:
        seen[torch.arange(len(tokens)), tokens] += 2
    if position_ids is not None:
        position_ids.copy_(places)
    places += 1
    if sequence_lengths is not None:
        sequence_lengths.copy_(places)


def gumbel(seeds: torch.Tensor, places: torch.Tensor, vocab: int) -> torch.Tensor:
    """`[batch, vocab]` float32 noise: -log(-log(1 - u)), u the random number of a seed, a place and a token alone."""
    words = philox(seeds[:, None], torch.arange(-(-vocab // 4)), places[:, None].long())
    bits = torch.stack(words, -1).flatten(1)[:, :vocab]  # four tokens have one counter
    uniform = ((bits.float() + 0.5) * 2**-32).clamp_max_(1 - 2**-24)
    return uniform.neg_().log1p_().neg_().log_().neg_()


def philox(key: torch.Tensor, first: torch.Tensor, second: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Four times 32 random bits, as int64, for a 64-bit key and two counters: Philox4x32-10.

    "Parallel random numbers: as easy as 1, 2, 3", Salmon et al., 2011. It is what `triton.language.philox` computes.
    """
    mask, rounds = 0xFFFFFFFF, 10
    keys, (a, b, c, d) = [key & mask, key >> 32 & mask], (first, second, *[torch.zeros_like(first)] * 2)
    for _ in range(rounds):
        left, right = a * 0xD2511F53, c * 0xCD9E8D57  # the last bits of the product are right even where it wraps
        a, c = (right >> 32 & mask) ^ b ^ keys[0], (left >> 32 & mask) ^ d ^ keys[1]
        b, d = right & mask, left & mask
        keys = [keys[0] + 0x9E3779B9 & mask, keys[1] + 0xBB67AE85 & mask]
    return a, b, c, d


def filter_logits(logits: torch.Tensor, top_k: int = 0, top_p: torch.Tensor | float | None = None) -> torch.Tensor:
    """`[batch, vocab]` logits with everything outside top-k (0: all) and top-p (None: all) at minus infinity."""
    if top_k:
        kth = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < kth, float("-inf"))
    if top_p is not None:
        ordered, order = logits.sort(descending=True)
        probabilities = ordered.softmax(-1)
        outside = probabilities.cumsum(-1) - probabilities >= top_p  # the mass before a token reaches top_p
        logits = logits.masked_fill(outside.scatter(1, order, outside), float("-inf"))
    return logits


def _signed(seed: int) -> int:
    """A seed's last 64 bits, as a signed integer."""
    return (seed + (1 << 63)) % (1 << 64) - (1 << 63)


def _room(count: int) -> int:
    """The next power of two, so that few kinds are."""
    return 1 << max(0, count - 1).bit_length()


def _last(ids: Sequence[int], count: int) -> list[int]:
    """The last ones, behind as many `ANY` as are missing."""
    return [*[ANY] * (count - len(ids)), *ids[-count:]]
