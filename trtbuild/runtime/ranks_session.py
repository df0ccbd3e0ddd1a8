"""A session over an engine of several ranks: what rank 0's is asked to do it tells the others', and all do it."""

import weakref
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch

from trtbuild.decoder.mapping import Mapping
from trtbuild.engine.portable import NotFinite, PortableEngine
from trtbuild.network.ranks import Ranks
from trtbuild.network.step import LAUNCHED_ROWS, Chunk, pieces
from trtbuild.runtime.session import PortableSession
from trtbuild.runtime.world import World

PIECE = 128  # tokens of a step that are worth one of their own


class RanksSession(PortableSession):
    """One rank's. Rank 0's checks what it is asked, samples and has the logits; the others' only `obey`.

    Every rank makes its own at the same time. A step's chunks are told over the host; a generation step's tokens go
    from device to device, to the first stage alone. Where a pipeline's last stage has the logits, they come to rank 0
    when they are asked for, in the order in which steps were started. Until then the first stage can go on with others
    of the `parts` of a batch, which are sessions over some of its slots. Long steps go through stages in pieces.
    """

    ranks: Ranks

    @property
    def pages(self) -> bool:  # type: ignore[override]
        """A pipeline's parts are batches."""
        return self.mapping.pp_size == 1

    def paged(self, name: str, *arguments: Any) -> Any:
        return self._all("paged", name, *arguments)

    def __init__(self, engine: PortableEngine, ranks: Ranks, world: World, mapping: Mapping) -> None:
        super().__init__(engine, ranks)
        self.world, self.mapping = world, mapping
        self._source = mapping.world_size - mapping.tp_size  # of the logits, which all ranks of its stage have
        self._parts: dict[range, RanksSession] = {}
        self._asked: list[torch.Tensor] = []  # logits of all parts that are still to come
        own = torch.tensor([self.weight_bytes, self.bytes_per_position, self.vocab_size])
        known = world.gather(own)
        # Ranks of a stage read at the same time, stages one after the other; the last knows the vocabulary.
        read, per_position, _ = world.share(known and sum(known) // mapping.tp_size).tolist()
        self.weight_bytes, self.bytes_per_position = read, per_position
        self.vocab_size = world.share(known and known[-1][2].item())
        forget = weakref.WeakMethod(self.forget_graphs)
        world.closing.append(lambda: (call := forget()) and call())

    def parts(self, batch_size: int) -> Sequence["RanksSession"]:
        count = min(self.mapping.pp_size, batch_size)
        bounds = [batch_size * i // count for i in range(count + 1)]
        return [self._part(range(*pair)) for pair in pairwise(bounds)] if count > 1 else [self]

    def _part(self, slots: range) -> "RanksSession":
        """The session over some slots; steps of it and of sessions over others may be under way at the same time."""
        if slots == self._own:
            return self
        if slots not in self._parts:
            part = self._parts[slots] = copy(self)
            part.limits, part._own, part._parts = replace(self.limits, max_batch_size=len(slots)), slots, {}
            part._begin(self.cache.part(slots))
        return self._parts[slots]

    def obey(self, name: str, slots: range, *arguments: object) -> None:
        """What rank 0 told."""
        getattr(self._part(slots), f"_all_{name}")(*arguments)

    def _step(self, chunks: Sequence[Chunk]) -> torch.Tensor | None:
        if self._source == 0:
            return self._all("step", chunks, self.lengths, self.prompt_lengths)
        tokens = sum(len(chunk.tokens) for chunk in chunks)
        size = min(LAUNCHED_ROWS, max(PIECE, -(-tokens // (2 * self.mapping.pp_size))))
        self._started = [
            self._start("step", len(wanted), piece, self.lengths, self.prompt_lengths, wanted)
            for piece, wanted in pieces(chunks, size)
        ]
        return None

    def _decode(self, tokens: torch.Tensor) -> torch.Tensor | None:
        self._tokens = tokens
        if self._source == 0:
            return self._all("decode", self.lengths)
        self._started = [self._start("decode", len(tokens), self.lengths)]
        return None

    def multiply(self, count: int) -> None:
        self._all("multiply", count)

    def rearrange(self, sources: torch.Tensor, first: int = 0) -> None:
        self._all("rearrange", sources.tolist(), first)

    def _sum_of_keys(self, batch_size: int, length: int) -> torch.Tensor:
        self._receive()
        return self._all("sum_of_keys", batch_size, length)

    def _search(self, chunks: Sequence[Chunk]) -> NotFinite | None:
        self._receive()
        return self._all("search", chunks)

    def _all(self, name: str, *arguments: object) -> Any:
        """Does something on all ranks; rank 0's result."""
        with self.world.busy():
            self.world.tell((name, self._own, *arguments))
            result = getattr(self, f"_all_{name}")(*arguments)
        self.world.stuck = bool(self._asked)
        return result

    def _start(self, name: str, rows: int, *arguments: object) -> torch.Tensor:
        """What so many rows of logits will be received in."""
        self._all(name, *arguments)
        out = torch.empty((rows, self.vocab_size), dtype=torch.float32, device=self.device)
        if rows:
            self._asked.append(out)
        self.world.stuck = bool(self._asked)
        return out

    def _later(self, logits: torch.Tensor | None) -> Callable[[], torch.Tensor]:
        if self._source == 0:
            return super()._later(logits)
        started = self._started

        def receive() -> torch.Tensor:
            self._receive(started[-1])
            return torch.cat(started) if len(started) > 1 else started[0]

        return receive

    @torch.inference_mode()
    def _receive(self, last: torch.Tensor | None = None) -> None:
        """Logits that are still to come, in order, up to `last` where it is one of them, or all of them."""
        if last is not None and all(out is not last for out in self._asked):
            return
        while self._asked:
            out = self._asked.pop(0)
            self.ranks.receive(out, self._source)
            if out is last:
                break
        self.world.stuck = bool(self._asked)

    # What all do

    @torch.inference_mode()
    def _all_step(
        self,
        chunks: Sequence[Chunk],
        lengths: list[int],
        prompt_lengths: list[int],
        wanted: list[int] | None = None,
    ) -> torch.Tensor | None:
        self.lengths, self.prompt_lengths = lengths, prompt_lengths
        return self._back(super()._step(chunks), wanted)

    @torch.inference_mode()
    def _all_decode(self, lengths: list[int]) -> torch.Tensor | None:
        self.lengths = lengths
        tokens = (
            self._tokens.int() if self.mapping.rank == 0 else self._slots.new_empty(len(lengths), dtype=torch.int32)
        )
        if self.mapping.is_first:
            tokens = self.ranks.broadcast(tokens, self.mapping.tp_size)
        return self._back(super()._decode(tokens))

    def _all_multiply(self, count: int) -> None:
        super().multiply(count)

    def _all_rearrange(self, sources: list[int], first: int) -> None:
        super().rearrange(torch.tensor(sources, device=self.device), first)

    def _all_paged(self, name: str, *arguments: Any) -> Any:
        return super().paged(name, *arguments)

    def _paged_room(self, sequences: int, tokens: int, drawing: int) -> int:
        return min(self.world.gather(super()._paged_room(sequences, tokens, drawing)) or (0,))

    def _paged_generation(self, count: int, longest: int) -> None:
        assert self.paged_steps
        tokens = self.paged_steps.tokens[:count]
        tokens.copy_(self.ranks.broadcast(tokens.clone(), self.mapping.tp_size))
        super()._paged_generation(count, longest)

    def _paged_sum_of_keys(self) -> torch.Tensor:
        assert self.paged_steps
        sums = self.world.gather(self.paged_steps.sum_of_keys().item())
        return torch.tensor(sum(sums or ()), device=self.device)

    def _all_sum_of_keys(self, batch_size: int, length: int) -> torch.Tensor | None:
        sums = self.world.gather(self.cache.sum_of_keys(batch_size, length).item())
        return None if sums is None else torch.tensor(sum(sums), device=self.device)

    def _all_search(self, chunks: Sequence[Chunk]) -> NotFinite | None:
        found = super()._search(chunks)
        place = None if found is None else (self.mapping.pp_rank, found.node, str(found))
        places = [place for place in self.world.gather(place) or () if place]
        self.cache.clear()
        return NotFinite(min(places)[2], min(places)[1]) if places else None

    def _back(self, logits: torch.Tensor | None, wanted: list[int] | None = None) -> torch.Tensor | None:
        """Sends the rows that are wanted, or all, to rank 0 from where they are."""
        if logits is not None and self.mapping.rank == self._source != 0 and wanted != []:
            # Of its own: the next captured step writes where these are.
            self.ranks.send(logits.clone() if wanted is None else logits[wanted], 0)
        return logits
