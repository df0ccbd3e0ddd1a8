"""One step of a network: what each sequence brings to it, and what the network reads of it, in one table."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate, pairwise

import torch

from trtbuild.network.network import Network, Tensor
from trtbuild.network.ranks import Ranks

# Rows of captured steps of chunks, up to which they are padded: from 512 on by at most a sixteenth.
CAPTURED_ROWS = (
    16,
    32,
    64,
    *range(128, 512, 64),
    *range(512, 1024, 32),
    *range(1024, 2048, 64),
    *range(2048, 4097, 128),
)
# Multiplications a layer, which an H100 does in FP8 in the time in which a host launches the layer's kernels, or twice.
CAPTURED_WORK = 1 << 39
LAUNCHED_ROWS = 8192  # of any step of chunks: more would be no faster a token, and hold more memory
BLOCK = 1 << 17  # numbers of keys, and of values, that a thread's attention on a CPU reads at a time: half a megabyte
ALIGNMENT = 4  # integers: inputs that are copied together begin at multiples of 16 bytes, as kernels like them


@dataclass(frozen=True)
class Chunk:
    """One sequence's part of a step: its next tokens, a prompt, some of it, or what follows one.

    `past` positions are in its cache already, which is the batch's `slot`. `prompt_length` is that of its whole prompt,
    by which some models choose RoPE's base. `all_logits`: of every token, not of the last alone. `source`, if not 0, is
    the page whose first `past` positions are copied to the sequence's own before that is written.
    """

    tokens: Sequence[int]
    prompt_length: int
    past: int = 0
    slot: int = 0
    all_logits: bool = False
    source: int = 0

    @property
    def end(self) -> int:
        """Positions of the sequence after the step."""
        return self.past + len(self.tokens)


def whole_prompts(prompts: Sequence[Sequence[int]], all_logits: bool = False) -> list[Chunk]:
    """New sequences, a slot each, with all of their prompts in one step."""
    return [Chunk(prompt, len(prompt), slot=slot, all_logits=all_logits) for slot, prompt in enumerate(prompts)]


def pieces(chunks: Sequence[Chunk], size: int) -> list[tuple[list[Chunk], list[int]]]:
    """Steps of `size` tokens that together are one of these chunks, and which rows of their logits are that one's."""
    steps: list[tuple[list[Chunk], list[int]]] = [([], [])]
    room, rows = size, 0
    for chunk in chunks:
        done = 0
        while done < len(chunk.tokens):
            if room == 0:
                steps.append(([], []))
                room, rows = size, 0
            tokens = chunk.tokens[done : done + room]
            done, room = done + len(tokens), room - len(tokens)
            steps[-1][0].append(replace(chunk, tokens=tokens, past=chunk.past + done - len(tokens)))
            own = range(rows, rows + (len(tokens) if chunk.all_logits else 1))
            if chunk.all_logits or done == len(chunk.tokens):
                steps[-1][1].extend(own)
            rows = own.stop
    return steps


@dataclass(frozen=True)
class StepInput:
    """An int32 input: the names of its dimensions, and its values, row by row."""

    shape: tuple[str, ...]
    values: Callable[[Sequence[Chunk]], list[int]]


def _starts(chunks: Sequence[Chunk]) -> list[int]:
    """The packed rows at which sequences start, and the number of rows."""
    return [0, *accumulate(len(chunk.tokens) for chunk in chunks)]


def _rows(chunks: Sequence[Chunk]) -> list[range]:
    """The packed rows of each sequence."""
    return [range(start, end) for start, end in pairwise(_starts(chunks))]


def _longest(chunks: Sequence[Chunk]) -> int:
    return max(len(chunk.tokens) for chunk in chunks)


def _logits_indices(chunks: Sequence[Chunk]) -> list[int]:
    return [
        i for own, chunk in zip(_rows(chunks), chunks, strict=True) for i in (own if chunk.all_logits else own[-1:])
    ]


def _pad_index(chunks: Sequence[Chunk]) -> list[int]:
    """The packed row of every padded place; padding is on the right and repeats the last token."""
    longest = _longest(chunks)
    return [i for own in _rows(chunks) for i in (*own, *[own[-1]] * (longest - len(own)))]


def _unpad_index(chunks: Sequence[Chunk]) -> list[int]:
    """The padded place of every packed row."""
    longest = _longest(chunks)
    return [b * longest + i for b, chunk in enumerate(chunks) for i in range(len(chunk.tokens))]


def captured_rows(network: Network) -> int:
    """Rows of the longest step of chunks that gains by being captured: more keep a GPU busy while the host launches.

    Formats of weights do not matter, so that all stages of a pipeline say the same: they capture together.
    """
    layers = {name: x for name, x in network.constants.items() if name.startswith("model.layers.")}
    weights = [x for name, x in layers.items() if name.endswith(".weight") and len(x.shape) == 2]
    numbers = sum(math.prod(x.shape) * (2 if x.dtype == torch.uint8 else 1) for x in weights)
    rows = CAPTURED_WORK * len(network.states) // 2 // max(1, numbers)
    return max((size for size in CAPTURED_ROWS if size <= rows), default=0)


STEP_INPUTS = {
    # What a network reads; which of the lengths depends on the model.
    "input_ids": StepInput(("tokens",), lambda chunks: [token for chunk in chunks for token in chunk.tokens]),
    "position_ids": StepInput(("tokens",), lambda chunks: [i for c in chunks for i in range(c.past, c.end)]),
    # Of a prompt that comes in chunks its own length counts from the first on, so that chunks change nothing.
    "sequence_lengths": StepInput(
        ("tokens",), lambda chunks: [max(c.end, c.prompt_length) for c in chunks for _ in c.tokens]
    ),
    "prompt_lengths": StepInput(("tokens",), lambda chunks: [c.prompt_length for c in chunks for _ in c.tokens]),
    "query_starts": StepInput(("starts",), _starts),
    "past_lengths": StepInput(("batch",), lambda chunks: [chunk.past for chunk in chunks]),
    "logits_indices": StepInput(("rows",), _logits_indices),
    # What a kernel reads of chunks besides.
    "slots": StepInput(("batch",), lambda chunks: [chunk.slot for chunk in chunks]),
    # What its lowering to TensorRT reads in the place of `query_starts`; the indices only where tokens are packed.
    "kv_lengths": StepInput(("batch",), lambda chunks: [chunk.end for chunk in chunks]),
    "pad_index": StepInput(("batch", "query_len"), _pad_index),
    "unpad_index": StepInput(("tokens",), _unpad_index),
}


def step_input(network: Network, name: str) -> Tensor:
    """Declares one of them."""
    return network.input(name, torch.int32, STEP_INPUTS[name].shape)


def step_values(chunks: Sequence[Chunk], names: Iterable[str], rows: int = 0) -> tuple[torch.Tensor, dict[str, slice]]:
    """Those of a step's inputs that are among `names`, int32 on the host, one after the other, and where each is.

    Tokens fewer than `rows` are followed by others, which belong to no sequence; then chunks may be empty, too.
    """
    flat: list[int] = []
    places = {}
    least = {"tokens": rows, "rows": len(chunks) if rows else 0}
    for name in names:
        if name in STEP_INPUTS:
            values = STEP_INPUTS[name].values(chunks)
            values = [*values, *[0] * (least.get(STEP_INPUTS[name].shape[0], 0) - len(values))]
            places[name] = slice(len(flat), len(flat) + len(values))
            flat += [*values, *[0] * (-len(values) % ALIGNMENT)]
    return torch.tensor(flat, dtype=torch.int32), places


def sent(values: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """The host's `values` on a device, without waiting for it: a GPU copies them from memory that is kept for it."""
    if torch.device(device).type == "cuda":
        values = values.pin_memory()
    return values.to(device, non_blocking=True)


def step_tensors(
    chunks: Sequence[Chunk], names: Iterable[str], device: torch.device | str = "cpu"
) -> dict[str, torch.Tensor]:
    """Those of a step's inputs that are among `names`, int32, copied to the device together."""
    values, places = step_values(chunks, names)
    there, longest = sent(values, device), _longest(chunks)
    tensors = {name: there[place] for name, place in places.items()}
    return {
        name: tensor.view(-1, longest) if len(STEP_INPUTS[name].shape) == 2 else tensor
        for name, tensor in tensors.items()
    }


class Step:
    """What the host knows of a step, for operations that need more than their tensors, and what is made once in one.

    Either `chunks`, in any mix of lengths and slots; `slots`, int32 `[batch]`, has theirs on the device. Where `chunks`
    is None the device alone knows them, and a captured graph serves any of as many sequences and rows.

    Or a generation step: every sequence has one token, its slot is its place in the batch, and its position is known to
    the device alone. Then `kv_bound` is the number of cache positions to read, and `exact` says that every sequence has
    that many. `ranks` lead to the other ranks of a network that has several.

    With `pages`, int32 `[slots, pages of a sequence]` on the device, caches are `[pages, kv_heads, page_size,
    head_dim]`: position `p` of slot `s` is in page `pages[s, p // page_size]`. Without, a slot is one page.
    """

    def __init__(
        self,
        chunks: Sequence[Chunk] | None,
        batch_index: torch.Tensor | None,
        kv_bound: int = 0,
        exact: bool = False,
        ranks: Ranks | None = None,
        slots: torch.Tensor | None = None,
        pages: torch.Tensor | None = None,
    ) -> None:
        self.chunks = chunks
        self.ranks = ranks
        self.batch_index = batch_index
        self.kv_bound = kv_bound
        self.exact = exact
        self.slots = slots
        self.pages = pages
        self._entries: tuple[torch.Tensor, torch.Tensor] | None = None
        self._mask: torch.Tensor | None = None
        self._alibi: torch.Tensor | None = None
        self._causal: dict[tuple[int, int], torch.Tensor] = {}
        self._read: dict[tuple, torch.Tensor] = {}
        self._blocks: list[tuple[slice, int]] | None = None

    @classmethod
    def of_chunks(
        cls,
        chunks: Sequence[Chunk],
        ranks: Ranks | None = None,
        slots: torch.Tensor | None = None,
        pages: torch.Tensor | None = None,
    ) -> "Step":
        end = max(chunk.end for chunk in chunks)
        return cls(chunks, None, end, ranks=ranks, slots=slots, pages=pages)

    @classmethod
    def captured(cls, slots: torch.Tensor, ranks: Ranks | None = None, pages: torch.Tensor | None = None) -> "Step":
        """Of chunks that the device alone knows."""
        return cls(None, None, ranks=ranks, slots=slots, pages=pages)

    @classmethod
    def generation(
        cls,
        batch_index: torch.Tensor,
        kv_bound: int,
        exact: bool = False,
        ranks: Ranks | None = None,
        pages: torch.Tensor | None = None,
    ) -> "Step":
        """`batch_index`: 0, 1, ... int64 `[batch]`."""
        return cls(None, batch_index, kv_bound, exact, ranks, pages=pages)

    @property
    def generates(self) -> bool:
        """Whether it is a generation step."""
        return self.batch_index is not None

    @cached_property
    def first(self) -> int:
        """The first position of a token of any chunk."""
        return min(chunk.past for chunk in self.chunks or ())

    @cached_property
    def alike(self) -> list[Sequence[Chunk]]:
        """The chunks, in order, in groups that one attention serves: all where they are prompts of one length."""
        chunks = self.chunks or ()
        places = [(0, chunks[0].end, chunks[0].slot + i) for i in range(len(chunks))]
        if self.pages is None and [(chunk.past, chunk.end, chunk.slot) for chunk in chunks] == places:
            return [chunks]
        return [[chunk] for chunk in chunks]

    def entries(self, position_ids: torch.Tensor, page_size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Page, without pages the slot, and offset, int64, of the cache entry that each sequence's new token takes in
        the generation phase.
        """
        if self._entries is None:
            if self.batch_index is None:
                raise ValueError("a step of chunks writes more than one entry a sequence")
            positions = position_ids.long()
            if self.pages is None:
                self._entries = self.batch_index, positions
            else:
                pages = self.pages.gather(1, positions[:, None] // page_size)[:, 0]
                self._entries = pages.long(), positions % page_size
        return self._entries

    def write(self, cache: torch.Tensor, chunks: Sequence[Chunk], new: torch.Tensor) -> None:
        """Puts `[chunks, kv_heads, tokens, head_dim]` where chunks that are `alike` have them."""
        slot, past, end = chunks[0].slot, chunks[0].past, chunks[0].end
        if self.pages is None:
            cache[slot : slot + len(chunks), :, past:end] = new
            return
        if self._in_one_page(cache, end):
            page = self._first_pages[slot]
            if chunks[0].source:
                cache[page, :, :past] = cache[chunks[0].source, :, :past]
            cache[page, :, past:end] = new[0]
            return
        key = "entries", past, end, slot, cache.shape[2]
        if key not in self._read:
            positions = torch.arange(past, end, device=cache.device)
            self._read[key] = torch.stack((self.pages[slot][positions // cache.shape[2]], positions % cache.shape[2]))
        pages, offsets = self._read[key]
        cache[pages, :, offsets] = new[0].transpose(0, 1)

    def read(self, cache: torch.Tensor, slots: slice, end: int) -> torch.Tensor:
        """The first `end` positions of some slots, `[slots, kv_heads, end, head_dim]`; of pages a copy, but on a CPU
        where they are in one page a slot and these are neighbours.
        """
        if self.pages is None:
            return cache[slots, :, :end]
        if self._in_one_page(cache, end):
            pages = self._first_pages[slots]
            if pages == [*range(pages[0], pages[0] + len(pages))]:
                return cache[pages[0] : pages[0] + len(pages), :, :end]
            held = cache.view(torch.int8) if cache.dtype.itemsize == 1 else cache
            return torch.stack([held[page, :, :end] for page in pages]).view(cache.dtype)
        _, kv_heads, size, head_dim = cache.shape
        key = "read", slots.start, slots.stop, end, cache.shape[1:]
        if key not in self._read:
            heads = torch.arange(kv_heads, device=cache.device, dtype=torch.int32)[:, None]
            self._read[key] = (self.pages[slots, None, : -(-end // size)] * kv_heads + heads).flatten()
        heads_of_pages = cache.view(-1, size * head_dim)
        if cache.dtype.itemsize == 1:  # torch does not index float8 everywhere
            heads_of_pages = heads_of_pages.view(torch.int8)
        found = heads_of_pages.index_select(0, self._read[key]).view(cache.dtype)
        return found.view(slots.stop - (slots.start or 0), kv_heads, -1, head_dim)[:, :, :end]

    def _in_one_page(self, cache: torch.Tensor, end: int) -> bool:
        """Whether slots' first pages hold so many positions, and the host may look which they are."""
        return not cache.is_cuda and end <= cache.shape[2]

    @cached_property
    def _first_pages(self) -> list[int]:
        return [] if self.pages is None else self.pages[:, 0].tolist()

    def blocks(self, position_ids: torch.Tensor, width: int) -> list[tuple[slice, int]]:
        """Generation phase: sequences that one attention serves, and how many positions it reads; on a GPU all, and
        `kv_bound`. On a CPU what is gathered or widened for it, `width` numbers a position, is to stay in the cache.
        """
        if self._blocks is None:
            count = position_ids.shape[0]
            if position_ids.is_cuda:
                self._blocks = [(slice(0, count), self.kv_bound)]
            else:
                numbers = BLOCK * torch.get_num_threads()
                ends, size = (position_ids + 1).tolist(), max(1, numbers // (self.kv_bound * width))
                self._blocks = [
                    (slice(i, min(i + size, count)), max(ends[i : i + size])) for i in range(0, count, size)
                ]
        return self._blocks

    def mask(self, position_ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor | None:
        """Generation phase: `[batch, 1, 1, kv_bound]` to add to scores, minus infinity beyond a sequence's end.

        None where every sequence may look everywhere.
        """
        if self._mask is None and not self.exact:
            device = position_ids.device
            beyond = torch.arange(self.kv_bound, device=device, dtype=torch.int32) > position_ids[:, None]
            mask = torch.zeros(beyond.shape, device=device, dtype=dtype).masked_fill_(beyond, float("-inf"))
            self._mask = mask[:, None, None]
        return self._mask

    def causal(self, chunk: Chunk, device: torch.device) -> torch.Tensor:
        """`[tokens, end]`: which positions each of a chunk's tokens may look at."""
        key = chunk.past, chunk.end
        if key not in self._causal:
            positions = torch.arange(chunk.end, device=device)
            self._causal[key] = positions <= positions[chunk.past :, None]
        return self._causal[key]

    def alibi(
        self, position_ids: torch.Tensor, slopes: torch.Tensor, kv_heads: int, dtype: torch.dtype
    ) -> torch.Tensor:
        """ALiBi's biases to add to scores, minus infinity where a query may not look.

        Of chunks: `[1, heads, n - first, n]`, n the longest sequence, and `first` the first position that any chunk
        has; another takes the rows and columns of its positions.
        Generation phase: `[batch, kv_heads, group, kv_bound]`. In `dtype`; float32 on a CPU, where that is free.
        """
        if self._alibi is None:
            device = slopes.device
            keys = torch.arange(self.kv_bound, device=device, dtype=torch.int32)
            if self.generates:
                queries, slopes = position_ids[:, None, None, None], slopes.view(kv_heads, -1, 1)
            else:
                queries, slopes = keys[self.first :, None], slopes[None, :, None, None]
            distances = (keys - queries).float()
            distances.masked_fill_(distances > 0, float("-inf"))
            *rows, width = torch.broadcast_shapes(slopes.shape, distances.shape)
            # Rows start at multiples of 8: of others, fused attention on CUDA would make such a copy in every layer.
            dtype = dtype if slopes.is_cuda else torch.float32
            biases = torch.empty(*rows, -(-width // 8) * 8, device=device, dtype=dtype)[..., :width]
            self._alibi = torch.mul(slopes, distances, out=biases)
        return self._alibi
