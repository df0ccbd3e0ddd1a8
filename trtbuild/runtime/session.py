"""A session: one engine, its KV cache, and steps of any mix of sequences."""

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch

from trtbuild.engine.config import PAGES_ON_CPU, BuildLimits
from trtbuild.engine.memory import bytes_per_position, captured_memory, room_for_pages
from trtbuild.engine.portable import NotFinite, PortableEngine
from trtbuild.errors import UserError
from trtbuild.network import Network
from trtbuild.network.ranks import Ranks
from trtbuild.network.step import (
    CAPTURED_ROWS,
    LAUNCHED_ROWS,
    Chunk,
    Step,
    pieces,
    sent,
    step_tensors,
    step_values,
    whole_prompts,
)
from trtbuild.runtime.kv_cache import KVCache
from trtbuild.runtime.paged_steps import PagedSteps, Sizes
from trtbuild.runtime.sampling import Kind, Sampler, SamplingParams

MIN_KV_STEP = 256
MAX_GRAPHS = 64  # captured steps that are kept
PAGED_ROWS, PAGED_CHUNKS = 128, 16  # captured steps over pages have multiples: more lead to products of the same tiles


class Session(ABC):
    """Runs steps: `prefill` starts a batch, `decode` appends one token to each of its sequences, `step` does anything.

    `start_prefill`, `start_decode`, `start_generate` and `start_step` return a call that gives the logits. Until it is
    called, others of a batch's `parts` may be started, which pipelines do at the same time.

    `lengths` are the positions that each slot of the cache holds. Of bytes that a generation step reads one after the
    other `weight_bytes` are weights, and `bytes_per_position` keys and values of one position of one sequence.
    """

    kind: str

    def __init__(self, network: Network, limits: BuildLimits, device: torch.device) -> None:
        self.limits, self.device = limits, device
        self.vocab_size = network.tensors["logits"].size(1) if "logits" in network.outputs else 0
        self.weight_bytes = network.weight_bytes
        self._is_float16 = network.holds(torch.float16)
        self.cache = KVCache(network, limits.max_batch_size, device)
        self.bytes_per_position = bytes_per_position(network)
        self.lengths: list[int] = []
        self.prompt_lengths: list[int] = []

    def parts(self, batch_size: int) -> Sequence["Session"]:
        """Sessions that share the sequences of a batch, in order, each as many as its `max_batch_size`; itself alone
        unless parts are faster. Their caches are its own.
        """
        return [self]

    def step(self, chunks: Sequence[Chunk]) -> torch.Tensor:
        """Runs any mix of prompts, parts of prompts and continuations; float32 logits in the chunks' order, packed.

        A chunk's tokens go to its slot's cache from its `past` on, and what the cache held behind that is forgotten.
        Nothing waits for the device; whether the logits are finite is the caller's to check. The result may be a buffer
        that the next step overwrites. Raises `UserError` for a chunk that the engine cannot take.
        """
        return self.start_step(chunks)()

    @torch.inference_mode()
    def start_step(self, chunks: Sequence[Chunk]) -> Callable[[], torch.Tensor]:
        """As `step`."""
        for chunk in chunks:
            self._check_chunk(chunk)
        slots = [chunk.slot for chunk in chunks]
        if len(set(slots)) < len(slots):
            raise UserError(f"the slots {slots} of one step are not different sequences'")
        new = max(slots) + 1 - len(self.lengths)
        self.lengths, self.prompt_lengths = ([*known, *[0] * new] for known in (self.lengths, self.prompt_lengths))
        # Generation steps know nothing of a prompt that goes on, nor of another prompt's length.
        continued = all(
            len(c.tokens) == 1 and c.prompt_length == self.prompt_lengths[c.slot] <= c.past == self.lengths[c.slot]
            for c in chunks
        )
        if continued and slots == list(range(len(self.lengths))):
            tokens = torch.tensor([chunk.tokens[0] for chunk in chunks], dtype=torch.int32)
            return self.start_decode(tokens.to(self.device))
        for chunk in chunks:
            self.lengths[chunk.slot], self.prompt_lengths[chunk.slot] = chunk.end, chunk.prompt_length
        return self._later(self._step(chunks))

    def prefill(self, prompts: list[list[int]], all_logits: bool = False) -> torch.Tensor:
        """Starts a new batch from token ids; returns float32 logits of each last token, `[batch, vocab]`.

        With `all_logits` the logits of every token, packed: `[tokens, vocab]`, after `check_finite`; without, nothing
        waits for the device, and it is the caller's to check. Raises `UserError` for an empty prompt, one longer than
        `max_input_len`, or more than `max_batch_size` of them.
        """
        logits = self.start_prefill(prompts, all_logits)()
        if all_logits:
            self.check_finite(prompts, logits)
        return logits

    def start_prefill(self, prompts: list[list[int]], all_logits: bool = False) -> Callable[[], torch.Tensor]:
        """As `prefill`, but that nothing is checked."""
        if not 0 < len(prompts) <= self.limits.max_batch_size:
            raise UserError(
                f"{len(prompts)} prompts in one batch; the engine's max_batch_size is {self.limits.max_batch_size}"
            )
        self.lengths, self.prompt_lengths = [], []
        return self.start_step(whole_prompts(prompts, all_logits))

    def check_finite(self, prompts: list[list[int]], logits: torch.Tensor) -> None:
        """`UserError` where `logits`, or the prompts' keys in the cache, are not finite; waits for the device."""
        if not (logits.sum() + self._sum_of_keys(len(prompts), max(map(len, prompts)))).isfinite():
            raise self.not_finite(prompts)

    def _sum_of_keys(self, batch_size: int, length: int) -> torch.Tensor:
        """As the cache's."""
        return self.cache.sum_of_keys(batch_size, length)

    def not_finite(self, prompts: list[list[int]]) -> UserError:
        """What to say of numbers that are NaN or infinite after these prompts. The prompts are run again to find where,
        and the cache is cleared: it holds no sequence any more.
        """
        where = self._where_not_finite(prompts)
        self.cache.clear()
        self.lengths, self.prompt_lengths = [], []
        advice = "float16 ends at 65504, use bfloat16" if self._is_float16 else "the checkpoint's weights are damaged"
        return UserError(f"numbers are not finite {where}; {advice}")

    def _where_not_finite(self, prompts: list[list[int]]) -> str:
        """Where numbers stop being finite, as far as can be known."""
        return "in the logits"

    def check_prompt(self, prompt: Sequence[int], name: str) -> None:
        """Raises `UserError`, which begins with its name, for a prompt that the engine cannot take."""
        if not prompt:
            raise UserError(f"{name} is empty; give at least one token of text")
        if len(prompt) > self.limits.max_input_len:
            raise UserError(
                f"{name} has {len(prompt)} tokens, the engine's max_input_len is {self.limits.max_input_len}; "
                "shorten it or build with a larger --max-input-len"
            )
        if not 0 <= min(prompt) <= max(prompt) < self.vocab_size:
            raise UserError(
                f"{name} has the token {max(prompt)}, the engine's vocabulary has {self.vocab_size}; "
                "use the tokenizer of the engine's own checkpoint"
            )

    def _check_chunk(self, chunk: Chunk) -> None:
        """Raises `UserError` for tokens or places that the engine does not have."""
        if not 0 <= chunk.slot < self.limits.max_batch_size:
            raise UserError(f"slot {chunk.slot} is outside the engine's max_batch_size {self.limits.max_batch_size}")
        self.check_prompt(chunk.tokens, f"prompt {chunk.slot}")
        held = self.lengths[chunk.slot] if chunk.slot < len(self.lengths) else 0
        if not 0 <= chunk.past <= held:
            raise UserError(f"slot {chunk.slot} holds {held} positions; tokens cannot follow {chunk.past}")
        if chunk.prompt_length < 1:
            raise UserError(f"slot {chunk.slot}: a prompt of {chunk.prompt_length} tokens; it has at least one")
        if max(chunk.end, chunk.prompt_length) > self.limits.max_length:
            raise UserError(
                f"the sequence in slot {chunk.slot} would have {max(chunk.end, chunk.prompt_length)} positions; the "
                f"engine's max_length is {self.limits.max_length}; build with a larger max_output_len"
            )

    def decode(self, tokens: torch.Tensor) -> torch.Tensor:
        """Appends one token to every sequence (`[batch]` int32, on the session's device); returns `[batch, vocab]`.

        The result may be a buffer that the next step overwrites. Raises `UserError` when a cache is full.
        """
        return self.start_decode(tokens)()

    @torch.inference_mode()
    def start_decode(self, tokens: torch.Tensor) -> Callable[[], torch.Tensor]:
        """As `decode`."""
        self._lengthen()
        return self._later(self._decode(tokens))

    def sampler(self, params: SamplingParams, prompts: list[list[int]], first: int = 0) -> Sampler:
        """For `generate` after a `prefill` of these prompts, the first of which has the number `first`.

        It serves until the next one is asked for, and draws the first tokens from the prompts' logits itself.
        """
        return Sampler(params.kind, len(prompts), self.vocab_size, self.device).start(params, prompts, first)

    def generate(self, sampler: Sampler) -> torch.Tensor:
        """Appends the sampler's tokens and draws the next ones; as `decode`, which draws none."""
        return self.start_generate(sampler)()

    @torch.inference_mode()
    def start_generate(self, sampler: Sampler) -> Callable[[], torch.Tensor]:
        """As `generate`; the tokens are drawn when the logits are asked for."""
        self._lengthen()
        return self._start_generate(sampler)

    def _lengthen(self) -> None:
        if not self.lengths:
            raise RuntimeError("there is no sequence to go on with; begin with prefill")
        if max(self.lengths) >= self.limits.max_length:
            raise UserError(
                f"a sequence has reached max_length {self.limits.max_length}; build with a larger max_output_len"
            )
        self.lengths = [n + 1 for n in self.lengths]

    def _start_generate(self, sampler: Sampler) -> Callable[[], torch.Tensor]:
        logits_of = self._later(self._decode(sampler.tokens))

        def sampled() -> torch.Tensor:
            sampler(logits := logits_of())
            return logits

        return sampled

    def _later(self, logits: torch.Tensor | None) -> Callable[[], torch.Tensor]:
        """What gives the logits of the step just started."""
        there = _there(logits)
        return lambda: there

    @abstractmethod
    def _step(self, chunks: Sequence[Chunk]) -> torch.Tensor | None:
        """Logits; None on a rank that has none."""

    @abstractmethod
    def _decode(self, tokens: torch.Tensor) -> torch.Tensor | None:
        """The same."""


class Captured(NamedTuple):
    """A step as a graph, the logits that it writes, and what it reads, if that is not the session's."""

    graph: torch.cuda.CUDAGraph
    logits: torch.Tensor | None
    inputs: torch.Tensor | None


class PortableSession(Session):
    """Runs a portable engine. On CUDA generation steps, and those of chunks that are not long, are replays of captured
    graphs, of which those used last are kept."""

    kind = "portable"
    pages = True  # more sequences than a batch has may be in pages

    def __init__(self, engine: PortableEngine, ranks: Ranks | None = None) -> None:
        super().__init__(engine.network, engine.limits, engine.device)
        self.engine, self.ranks = engine, ranks
        self._slots = torch.arange(engine.limits.max_batch_size, device=engine.device)
        self._own = range(engine.limits.max_batch_size)  # slots of the whole engine's
        self._seen: set[tuple] = set()  # sizes of steps of chunks
        self.paged_steps: PagedSteps | None = None
        self.pages_are_all = False  # that there is room for
        self._graphs: dict[tuple, Captured] = {}  # all parts', the one used last at the end
        self._memory: list[torch.cuda.CUDAGraph] = []  # all parts', one whose memory is all others'
        self._begin(self.cache)

    def _begin(self, cache: KVCache) -> None:
        """Knows of no sequence yet."""
        self.cache, self.lengths, self.prompt_lengths = cache, [], []
        self._decode_state: dict[str, torch.Tensor] = {}
        self._batches: dict[int, dict[str, torch.Tensor]] = {}
        self._samplers: dict[tuple[int, Kind], Sampler] = {}

    @torch.inference_mode()
    def multiply(self, count: int) -> None:
        """Each sequence is there `count` times, in neighbouring slots."""
        sources = torch.arange(len(self.lengths), device=self.device).repeat_interleave(count)
        self.cache.copy_slots(sources, 0, max(self.lengths))
        self.lengths, self.prompt_lengths = (
            [length for length in lengths for _ in range(count)] for lengths in (self.lengths, self.prompt_lengths)
        )
        self._begin_generation()

    @torch.inference_mode()
    def rearrange(self, sources: torch.Tensor, first: int = 0) -> None:
        """Slot i goes on with the sequence of slot `sources[i]`, int64 `[slots]` on the session's device, which is as
        long as its own and has the same prompt and the same `first` positions.
        """
        self.cache.copy_slots(sources, first, max(self.lengths))

    def _begin_generation(self) -> None:
        """Hands the lengths to the generation steps that follow."""
        self._decode_state = self._state(len(self.lengths))
        ends = sent(torch.tensor([self.lengths, self.prompt_lengths], dtype=torch.int32), self.device)
        for name, values in zip(("position_ids", "prompt_lengths"), ends, strict=True):
            if name in self._decode_state:
                self._decode_state[name].copy_(values)

    def _step(self, chunks: Sequence[Chunk]) -> torch.Tensor | None:
        logits = self._steps(chunks)
        self._begin_generation()  # while the device is at work
        return logits

    def _steps(self, chunks: Sequence[Chunk]) -> torch.Tensor | None:
        parts = pieces(chunks, LAUNCHED_ROWS)
        if len(parts) == 1:
            return self._one_step(chunks)
        whole, first, count = None, 0, sum(len(wanted) for _, wanted in parts)
        for part, wanted in parts:
            logits, end = self._one_step(part), first + len(wanted)
            if logits is not None:
                whole = logits.new_empty(count, self.vocab_size) if whole is None else whole
                whole[first:end] = logits[: len(wanted)]  # behind them at most one, of a prompt that goes on
            first = end
        return whole

    def _one_step(self, chunks: Sequence[Chunk]) -> torch.Tensor | None:
        size = self._captured_size(chunks)
        if size:
            return self._padded_step(chunks, size, self.cache.buffers)
        inputs = step_tensors(chunks, (*self.engine.network.inputs, "slots"), self.device)
        step = Step.of_chunks(chunks, self.ranks, inputs["slots"])
        return self.engine.run(step, inputs | self.cache.views(len(self.lengths)))

    def _captured_size(self, chunks: Sequence[Chunk]) -> int:
        """Rows of the captured step that serves these; 0 where none does."""
        if any(chunk.all_logits for chunk in chunks):
            return 0
        rows = sum(len(chunk.tokens) for chunk in chunks)
        return next((size for size in CAPTURED_ROWS if rows <= size <= self.engine.captured_rows), 0)

    def _padded_step(
        self, chunks: Sequence[Chunk], size: int, caches: dict[str, torch.Tensor], pages: np.ndarray | None = None
    ) -> torch.Tensor | None:
        """Padded up to `size` rows. A size's first step is no graph: there may be no second one."""
        key = self._own if pages is None else "pages", "chunks", size, len(chunks)
        values, places = step_values(chunks, (*self.engine.network.inputs, "slots"), size)
        if pages is not None:
            values = torch.cat((values, torch.from_numpy(pages).view(-1)))
        there = sent(values, self.device)
        captured = self._graphs.get(key)
        if captured and captured.inputs is not None:
            there = captured.inputs.copy_(there)
        inputs = {name: there[place] for name, place in places.items()} | caches
        table = None if pages is None else there[-pages.size :].view(pages.shape)

        def run() -> torch.Tensor | None:
            return self.engine.run(Step.captured(inputs["slots"], self.ranks, table), inputs)

        if key in self._seen:
            return self._replay(key, run, inputs=there)
        self._seen.add(key)
        return run()

    def _where_not_finite(self, prompts: list[list[int]]) -> str:
        found = self._search(whole_prompts(prompts))
        if found is None:
            return super()._where_not_finite(prompts)
        layer = re.match(r"model\.layers\.(\d+)\.", str(found))
        return f"in layer {layer[1]}, from {found} on" if layer else f"from {found} on"

    @torch.inference_mode()
    def _search(self, chunks: Sequence[Chunk]) -> NotFinite | None:
        """Where a step of whole prompts stops being finite."""
        self.lengths, self.prompt_lengths = ([chunk.end for chunk in chunks] for _ in range(2))
        try:
            with self.engine.checked():
                PortableSession._step(self, chunks)
        except NotFinite as found:
            return found
        return None

    def _state(self, batch: int) -> dict[str, torch.Tensor]:
        """The buffers that the generation steps of a batch size read; `position_ids` counts up by itself."""
        if batch not in self._batches:
            chunks = [Chunk([0], 1, slot=slot) for slot in range(batch)]
            state = step_tensors(chunks, self.engine.network.inputs, self.device)
            self._batches[batch] = state | {"past_lengths": state["position_ids"]} | self.cache.views(batch)
        return self._batches[batch]

    @property
    def _samples_in_graph(self) -> bool:
        return self.device.type == "cuda" and not self.ranks

    def sampler(self, params: SamplingParams, prompts: list[list[int]], first: int = 0) -> Sampler:
        if not self._samples_in_graph:
            return super().sampler(params, prompts, first)
        batch, kind = len(prompts), params.kind
        if (batch, kind) not in self._samplers:
            state = self._state(batch)
            moved = state["input_ids"], state["position_ids"], state.get("sequence_lengths")
            self._samplers[batch, kind] = Sampler(kind, batch, self.vocab_size, self.device, *moved)
        return self._samplers[batch, kind].start(params, prompts, first)

    def _start_generate(self, sampler: Sampler) -> Callable[[], torch.Tensor]:
        if not self._samples_in_graph:
            return super()._start_generate(sampler)
        return self._later(self._generation_step(sampler))

    def _decode(self, tokens: torch.Tensor) -> torch.Tensor | None:
        state = self._decode_state
        if "input_ids" in state:
            state["input_ids"].copy_(tokens)
        if "sequence_lengths" in state:
            torch.add(state["position_ids"], 1, out=state["sequence_lengths"])
        logits = self._generation_step()
        state["position_ids"].add_(1)
        return logits

    def _generation_step(self, sampler: Sampler | None = None) -> torch.Tensor | None:
        """Logits of one token a sequence, from which a sampler draws the next ones."""
        state, slots = self._decode_state, self._slots[: len(self.lengths)]
        bound, exact = self._positions_read()

        def run() -> torch.Tensor | None:
            return self.engine.run(Step.generation(slots, bound, exact, self.ranks), state)

        return self._replay((self._own, len(slots), bound, sampler and sampler.kind), run, sampler)

    def forget_graphs(self) -> None:
        """Also before the ways to other ranks close, which captured steps hold open."""
        self._graphs.clear()
        self._memory.clear()

    def paged(self, name: str, *arguments: Any) -> Any:
        """Does something with pages on all ranks: what `PagedSteps` or one of the methods below has this name for."""
        own = getattr(self, f"_paged_{name}", None) or getattr(self.paged_steps, name)
        return own(*arguments)

    def _paged_room(self, sequences: int, tokens: int, drawing: int) -> int:
        """Bytes that pages may take beside steps of so many sequences and tokens, for each of which `drawing` a token
        takes so many; what pages and caches had is free."""
        self.forget_graphs()
        self.paged_steps = None
        self.cache.forget()
        self._begin(self.cache)
        if self.device.type != "cuda":
            return PAGES_ON_CPU
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info(self.device)
        return room_for_pages(self.engine.network, sequences, tokens, drawing, free)

    def _paged_open(self, sizes: Sizes) -> None:
        """Makes them, at least as much as a batch's caches, which have their memory when these are not in use."""
        try:
            self.paged_steps = PagedSteps(self.engine, self.ranks, sizes)
        except Exception:  # no memory, as others took some; batches go on
            self._begin(KVCache(self.engine.network, self.limits.max_batch_size, self.device))
            raise
        self.cache.move_into(self.paged_steps.cache)

    @torch.inference_mode()
    def _paged_chunks(self, chunks: Sequence[Chunk], pages: np.ndarray) -> torch.Tensor | None:
        """As `PagedSteps.chunks`; captured steps are padded to fewer sizes, by chunks, too, which are empty."""
        steps, size, count = self.paged_steps, self._captured_size(chunks), len(chunks)
        assert steps
        if not size:
            return steps.chunks(chunks, pages)
        if size > PAGED_ROWS:
            size = min(-(-size // PAGED_ROWS) * PAGED_ROWS, self.engine.captured_rows)
        more = -count % PAGED_CHUNKS
        chunks = [*chunks, *[Chunk((), 1)] * more]
        logits = self._padded_step(chunks, size, steps.cache.buffers, np.pad(pages, ((0, more), (0, 0))))
        return None if logits is None else logits[:count]

    def _paged_generation(self, count: int, longest: int) -> None:
        """One more token of each of the first `count` sequences, which have at most `longest` positions then."""
        steps = self.paged_steps
        assert steps
        rows = steps.padded(count)
        key, run = ("pages", rows, steps.bound(longest)), partial(steps.generation, rows, longest)
        if self._samples_in_graph:
            self._replay(key, run, steps.next)
        else:
            steps.next(self._replay(key, run))

    def _positions_read(self) -> tuple[int, bool]:
        """How many positions of the cache a generation step reads, and whether all sequences have that many."""
        longest = max(self.lengths)
        if self.device.type == "cuda":
            return kv_bound(longest, self.limits.max_length), False
        return longest, min(self.lengths) == longest

    def _replay(
        self,
        key: tuple,
        run: Callable[[], torch.Tensor | None],
        sampler: Callable[[torch.Tensor], object] | None = None,
        inputs: torch.Tensor | None = None,
    ) -> torch.Tensor | None:
        """Logits by the graph of what `run` does, which is captured on first use, and which may end with sampling."""
        if self.device.type != "cuda":
            return run()
        if key not in self._graphs and len(self._graphs) == MAX_GRAPHS:
            del self._graphs[next(iter(self._graphs))]  # its memory is for the next one
        captured = self._graphs.pop(key, None) or self._capture(run, sampler, inputs)
        self._graphs[key] = captured
        captured.graph.replay()
        return captured.logits

    def _capture(
        self,
        run: Callable[[], torch.Tensor | None],
        sampler: Callable[[torch.Tensor], object] | None,
        inputs: torch.Tensor | None,
    ) -> Captured:
        if inputs is None:  # else it has run already
            run()  # loads kernels; writes the same cache entries as the replay will
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool()):
            logits = run()
            if sampler:
                sampler(_there(logits))
        return Captured(graph, None if logits is None else _borrowed(logits), inputs)

    def _pool(self) -> Any:
        """The memory of captured steps, of which one runs at a time: one piece, large enough for the largest.

        Else each that is larger than those before would have a piece of its own, as pieces are cut and never joined.
        """
        if not self._memory:
            network, limits = self.engine.network, self.engine.limits
            size = captured_memory(network, limits.max_batch_size, limits.max_batch_size * limits.max_input_len)
            if self.paged_steps:
                size = max(size, captured_memory(network, self.paged_steps.sizes.rows))
            torch.cuda.current_blas_handle()  # cannot be made while a graph is captured
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                torch.cuda.current_blas_handle()  # its work space comes before the piece, not in the middle of it
                torch.empty(size, dtype=torch.uint8, device=self.device)[:1].zero_()
            self._memory.append(graph)
        return self._memory[0].pool()


def _there(logits: torch.Tensor | None) -> torch.Tensor:
    if logits is None:
        raise RuntimeError("this rank has no logits; ask rank 0")
    return logits


def _borrowed(x: torch.Tensor) -> torch.Tensor:
    """`x` without a claim to its memory, which is for the next captured step, too."""
    return torch.as_tensor(SimpleNamespace(__cuda_array_interface__=x.__cuda_array_interface__), device=x.device)


def kv_bound(length: int, max_length: int) -> int:
    """Cache positions a captured step reads: `length` rounded up, by 256 or an eighth, so that few graphs do."""
    step = max(MIN_KV_STEP, 1 << max(0, length.bit_length() - 4))
    return min(-(-length // step) * step, max_length)
