"""A session over an engine of several ranks: what rank 0's is asked to do it tells the others', and all do it."""

import weakref
from collections.abc import Sequence
from typing import Any

import torch

from trtbuild.decoder.mapping import Mapping
from trtbuild.engine.portable import NotFinite, PortableEngine
from trtbuild.network.ranks import Ranks
from trtbuild.network.step import Chunk
from trtbuild.runtime.session import PortableSession
from trtbuild.runtime.world import World


class RanksSession(PortableSession):
    """One rank's. Rank 0's checks what it is asked, samples and has the logits; the others' only `obey`.

    Every rank makes its own at the same time. A step's chunks are told over the host; a generation step's tokens go
    from device to device.
    """

    ranks: Ranks

    def __init__(self, engine: PortableEngine, ranks: Ranks, world: World, mapping: Mapping) -> None:
        super().__init__(engine, ranks)
        self.world, self.mapping = world, mapping
        own = torch.tensor([self.weight_bytes, self.bytes_per_position, self.vocab_size])
        known = world.gather(own)
        # Ranks of a stage read at the same time, stages one after the other; the last knows the vocabulary.
        read, per_position, _ = world.share(known and sum(known) // mapping.tp_size).tolist()
        self.weight_bytes, self.bytes_per_position = read, per_position
        self.vocab_size = world.share(known and known[-1][2].item())
        graphs = weakref.WeakMethod(self.forget_graphs)
        world.closing.append(lambda: (forget := graphs()) and forget())

    def forget_graphs(self) -> None:
        """Before the ways to other ranks close, which captured steps hold open."""
        self._graphs.clear()

    def obey(self, name: str, *arguments: object) -> None:
        """What rank 0 told."""
        getattr(self, f"_all_{name}")(*arguments)

    def _step(self, chunks: Sequence[Chunk]) -> torch.Tensor:
        return self._all("step", chunks, self.lengths, self.prompt_lengths)

    def _decode(self, tokens: torch.Tensor) -> torch.Tensor:
        self._tokens = tokens
        return self._all("decode", self.lengths)

    def _sum_of_keys(self, batch_size: int, length: int) -> torch.Tensor:
        return self._all("sum_of_keys", batch_size, length)

    def _search(self, chunks: Sequence[Chunk]) -> NotFinite | None:
        return self._all("search", chunks)

    def _all(self, name: str, *arguments: object) -> Any:
        """Does something on all ranks; rank 0's result."""
        with self.world.busy():
            self.world.tell((name, *arguments))
            return getattr(self, f"_all_{name}")(*arguments)

    # What all do

    @torch.inference_mode()
    def _all_step(self, chunks: Sequence[Chunk], lengths: list[int], prompt_lengths: list[int]) -> torch.Tensor | None:
        self.lengths, self.prompt_lengths = lengths, prompt_lengths
        rows = sum(len(chunk.tokens) if chunk.all_logits else 1 for chunk in chunks)
        return self._at_first(super()._step(chunks), rows)

    @torch.inference_mode()
    def _all_decode(self, lengths: list[int]) -> torch.Tensor | None:
        self.lengths, batch = lengths, len(lengths)
        tokens = self._tokens.int() if self.mapping.rank == 0 else self._slots.new_empty(batch, dtype=torch.int32)
        return self._at_first(super()._decode(self.ranks.broadcast(tokens)), batch)

    def _all_sum_of_keys(self, batch_size: int, length: int) -> torch.Tensor | None:
        sums = self.world.gather(self.cache.sum_of_keys(batch_size, length).item())
        return None if sums is None else torch.tensor(sum(sums), device=self.device)

    def _all_search(self, chunks: Sequence[Chunk]) -> NotFinite | None:
        found = super()._search(chunks)
        place = None if found is None else (self.mapping.pp_rank, found.node, str(found))
        places = [place for place in self.world.gather(place) or () if place]
        self.cache.clear()
        return NotFinite(min(places)[2], min(places)[1]) if places else None

    def _at_first(self, logits: torch.Tensor | None, rows: int) -> torch.Tensor | None:
        """The logits, which all ranks of the last stage have, on rank 0."""
        source = self.mapping.world_size - self.mapping.tp_size
        if logits is not None and self.mapping.rank == source != 0:
            self.ranks.send(logits, 0)
        if self.mapping.rank == 0 != source:
            out = torch.empty((rows, self.vocab_size), dtype=torch.float32, device=self.device)
            return self.ranks.receive(out, source)
        return logits
