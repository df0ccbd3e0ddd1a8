"""Steps of sequences whose keys and values are in pages: the device's side of in-flight batching, on every rank."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from trtbuild.engine.portable import PortableEngine
from trtbuild.network.ranks import Ranks
from trtbuild.network.step import Chunk, Step, sent, step_tensors
from trtbuild.runtime.kv_cache import KVCache
from trtbuild.runtime.sampling import Kind, Sampler, SamplingParams

# Sequences of captured steps, up to which others are padded: products take as long for fewer of 64, later of 128.
CAPTURED = (1, 2, 4, *range(8, 64, 8), *range(64, 512, 64), *range(512, 1025, 128))
SHORT = 512  # positions; steps of sequences that have no more are captured apart, as kernels have other tiles for them


class Sizes(NamedTuple):
    """Pages besides the one for padding, positions of each, sequences of a step, pages of each, and their sampling."""

    pages: int
    page_size: int
    rows: int
    width: int
    kind: Kind


class Rows:
    """What generation steps read of each sequence, in one int32 buffer: `positions`, `prompt_lengths`, `steps` (by how
    many its position grows in a step: 1, of padding 0), all `[rows]`, and `pages` `[rows, width]`.
    """

    def __init__(self, sizes: Sizes, buffer: torch.Tensor) -> None:
        rows = sizes.rows
        self.buffer = buffer
        self.positions, self.prompt_lengths, self.steps = (buffer[i * rows : (i + 1) * rows] for i in range(3))
        self.pages = buffer[3 * rows :].view(rows, sizes.width)

    @classmethod
    def new(cls, sizes: Sizes, device: torch.device | str = "cpu") -> "Rows":
        return cls(sizes, torch.zeros(sizes.rows * (3 + sizes.width), dtype=torch.int32, device=device))


class PagedSteps:
    """The pages of one rank and what runs over them. `tokens`, int32 `[rows]`, are what a generation step reads, and
    where the next are drawn; `sums`, float32 `[rows]`, are their logits'.
    """

    def __init__(self, engine: PortableEngine, ranks: Ranks | None, sizes: Sizes) -> None:
        self.engine, self.ranks, self.sizes, self.device = engine, ranks, sizes, engine.device
        self.cache = KVCache(engine.network, sizes.pages + 1, self.device, sizes.page_size)
        self.rows = Rows.new(sizes, self.device)
        self.tokens = torch.zeros(sizes.rows, dtype=torch.int32, device=self.device)
        self.sums = torch.zeros(sizes.rows, device=self.device)
        self.sampler: Sampler | None = None
        self._index = torch.arange(sizes.rows + 1, dtype=torch.int32, device=self.device)

    def chunks(self, chunks: Sequence[Chunk], pages: np.ndarray) -> torch.Tensor | None:
        """Logits, a row a chunk; sequence i has the pages in row i of int32 `[chunks, width]`."""
        inputs = step_tensors(chunks, (*self.engine.network.inputs, "slots"), self.device)
        table = sent(torch.from_numpy(pages), self.device)
        step = Step.of_chunks(chunks, self.ranks, inputs["slots"], table)
        return self.engine.run(step, inputs | self.cache.buffers)

    def arrange(self, rows: np.ndarray) -> None:
        """The sequences of the next generation steps: a `Rows` buffer."""
        self.rows.buffer.copy_(sent(torch.from_numpy(rows), self.device), non_blocking=True)

    def padded(self, count: int) -> int:
        """Rows of a generation step of so many sequences."""
        if self.device.type != "cuda":
            return count
        return min(self.sizes.rows, next((size for size in CAPTURED if size >= count), count))

    def bound(self, longest: int) -> int:
        """Positions of a generation step's sequences at most, of which none has more than `longest`."""
        if self.device.type != "cuda":
            return longest
        most = self.sizes.width * self.sizes.page_size
        return min(most, SHORT) if longest <= SHORT else most

    def generation(self, count: int, longest: int) -> torch.Tensor | None:
        """Logits of one more token of the first `count` rows, none of which has more than `longest` positions."""
        rows, network = self.rows, self.engine.network
        inputs = {
            "input_ids": self.tokens[:count],
            "position_ids": rows.positions[:count],
            "prompt_lengths": rows.prompt_lengths[:count],
            "past_lengths": rows.positions[:count],
            "query_starts": self._index[: count + 1],
            "logits_indices": self._index[:count],
        }
        if "sequence_lengths" in network.inputs:
            inputs["sequence_lengths"] = rows.positions[:count] + 1
        step = Step.generation(self._index[:count], self.bound(longest), ranks=self.ranks, pages=rows.pages[:count])
        return self.engine.run(step, inputs | self.cache.buffers)

    def sample(self, params: SamplingParams) -> None:
        """Has generation steps end with sampling, on the rank that does it. `fresh` is for sequences that come in."""
        assert params.kind == self.sizes.kind
        if self.sampler is None:
            sizes = params.kind, self.sizes.rows, self.engine.network.tensors["logits"].size(1), self.device
            self.sampler, self.fresh = Sampler(*sizes, self.tokens), Sampler(*sizes)
        self.sampler.set(params)
        self.fresh.set(params)

    def next(self, logits: torch.Tensor | None) -> None:
        """What follows a generation step: the next tokens, sums of their logits, which are finite if these are, and the
        next position.
        """
        if self.sampler and logits is not None:
            self.sampler.part(len(logits))(logits)
            torch.sum(logits, 1, out=self.sums[: len(logits)])
        self.rows.positions.add_(self.rows.steps)

    def sum_of_keys(self) -> torch.Tensor:
        """As the cache's, of what all pages hold now."""
        return self.cache.sum_of_keys(self.sizes.pages + 1, self.sizes.page_size)

    def clear(self) -> None:
        self.cache.clear()
