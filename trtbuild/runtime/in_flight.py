"""In-flight batching: sequences come and go while others run, and the host is some steps behind the device."""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from trtbuild import kernels
from trtbuild.errors import UserError
from trtbuild.network.step import CAPTURED_ROWS, Chunk, sent
from trtbuild.runtime.paged_steps import PagedSteps, Rows, Sizes
from trtbuild.runtime.pages import Pages, WholePages
from trtbuild.runtime.sampling import SamplingParams
from trtbuild.runtime.scheduler import Scheduler, Sequence
from trtbuild.runtime.session import PortableSession
from trtbuild.runtime.token_ring import steps_ahead

PAGE_SIZE = 64  # positions, on a GPU: of small pages less is left over, large ones are read faster
MOST_SEQUENCES = {"cuda": 1024, "cpu": 32}  # of a step
BUDGET = {"cuda": 8192, "cpu": 512}  # tokens of a step of chunks
LENGTHS = {"prompt_lengths", "sequence_lengths"}  # inputs by which keys depend on how long a prompt is


def schedule(
    session: PortableSession, sequences: list[Sequence], params: SamplingParams, page_size: int = 0, pages: int = 0
) -> Scheduler:
    """With pages for all of these sequences, or as many as there is room for, which are a batch's caches or more.

    On a CPU a page holds the longest of them. Pages that are there already are used again where they do. For tests the
    size of a page and how many are given.
    Raises `UserError` for a sequence that is too long.
    """
    device, limits, kind = session.device.type, session.limits, params.kind
    has = session.paged_steps.sizes if session.paged_steps else Sizes(0, 0, 0, 0, kind)
    rows, budget = min(len(sequences), MOST_SEQUENCES[device]), _budget(session)
    whole = device == "cpu" and not kernels.run_on(session.device) and not page_size
    if whole:
        longest = max(sequence.positions for sequence in sequences)
        enough = has.width == 1 and has.page_size >= longest and (has.pages >= rows or has.page_size < 2 * longest)
        page_size, width = has.page_size if enough else longest, 1
        # With the one for padding a batch's caches.
        least = max(1, -(-limits.max_batch_size * limits.max_length // page_size) - 1)
    else:
        page_size = page_size or PAGE_SIZE
        width = -(-limits.max_length // page_size)
        least = limits.max_batch_size * width
    needs = sorted((-(-sequence.positions // page_size) for sequence in sequences), reverse=True)
    wanted = max(sum(needs[:rows]), least)
    few = has.pages < wanted and not session.pages_are_all
    if (has.page_size, has.width, has.kind) != (page_size, width, kind) or has.rows < rows or few:
        drawing = kind.room * session.vocab_size * 4
        room = session.paged("room", rows, budget, drawing) // (session.bytes_per_position * page_size) - 1
        has = Sizes(min(wanted, max(room, least)), page_size, rows, width, kind)
        session.paged("open", has)
        session.pages_are_all = has.pages < wanted
    session.lengths, session.prompt_lengths = [], []  # of a batch, whose caches have the same memory
    pool = WholePages if whole else Pages
    allotted = pool(pages or has.pages, page_size, LENGTHS.isdisjoint(session.engine.network.inputs))
    return Scheduler(sequences, allotted, rows, budget)


def _budget(session: PortableSession) -> int:
    """Tokens of a step of chunks; of a small model on a GPU as many as can be captured, since to launch a longer step
    would take longer than it runs.
    """
    captured, device = session.engine.captured_rows, session.device.type
    return captured if device == "cuda" and captured == CAPTURED_ROWS[-1] else BUDGET[device]


@dataclass(frozen=True)
class UnderWay:
    """A step that has been launched, whose tokens, in a place for those of so many steps, are its sequences' next."""

    sequences: list[Sequence]
    place: int


class InFlight:
    """Runs sequences to their ends, by `run`. `take(sequence, token)` sees each one's tokens in order, and says whether
    it has ended. `say` is told how many run, when there are more than ever.
    """

    def __init__(
        self,
        session: PortableSession,
        scheduler: Scheduler,
        params: SamplingParams,
        take: Callable[[Sequence, int], bool],
        say: Callable[[str], object] = lambda line: None,
    ) -> None:
        assert session.paged_steps
        self.session, self.scheduler, self.params = session, scheduler, params
        self.take, self.say, self._most = take, say, 0
        self.steps: PagedSteps = session.paged_steps
        self.steps.sample(params)
        self._here: list[Sequence] = []  # in the rows of a generation step; some may have left
        sizes, cuda = self.steps.sizes, session.device.type == "cuda"
        self._rows = Rows.new(sizes)
        self._positions, self._prompt_lengths, self._steps, self._pages = (
            x.numpy() for x in (self._rows.positions, self._rows.prompt_lengths, self._rows.steps, self._rows.pages)
        )
        self._left = np.zeros(sizes.rows, dtype=np.int64)  # tokens that are still to be drawn
        self._ahead = steps_ahead(session.device)
        self._tokens = torch.zeros(self._ahead, sizes.rows, dtype=torch.int32, pin_memory=cuda)
        self._sums = torch.zeros(self._ahead, sizes.rows, pin_memory=cuda)
        self._events = [torch.cuda.Event() for _ in range(self._ahead if cuda else 0)]
        self._launched = 0
        self._recent = deque[list[int]](maxlen=session.limits.max_batch_size)

    @torch.inference_mode()
    def run(self) -> None:
        under_way: deque[UnderWay] = deque()
        while True:
            launched = self._launch()
            if launched:
                under_way.append(launched)
            elif not under_way:
                break
            if len(under_way) == self._ahead or not launched:
                self._receive(under_way.popleft())
        if not self.session.paged("sum_of_keys").isfinite():  # of which logits need not tell
            raise self._not_finite(list(self._recent))

    def _launch(self) -> UnderWay | None:
        """The next step; None where that depends on those under way, or there is nothing left to do."""
        chunks = self.scheduler.next_chunks()
        if chunks:
            return self._enter(chunks)
        return self._generate() if self.scheduler.running else None

    def _enter(self, parts: list[tuple[Sequence, range]]) -> UnderWay:
        pages = np.zeros((len(parts), self.steps.sizes.width), dtype=np.int32)
        chunks, complete = [], []
        for i, (sequence, part) in enumerate(parts):
            tokens = sequence.prompt[part.start : part.stop]
            source = self.scheduler.pages.take_source(sequence.pages)
            pages[i, : len(sequence.pages)] = sequence.pages
            chunks.append(Chunk(tokens, len(sequence.prompt), part.start, slot=i, source=source))
            if part.stop == len(sequence.prompt):
                complete.append(sequence)
        logits = self.session.paged("chunks", chunks, pages)[: len(complete)]
        if not complete:
            return self._sent([], self.steps.tokens, self.steps.sums)
        fresh = self.steps.fresh.part(len(complete))
        fresh.begin(self.params, [sequence.prompt for sequence in complete], complete[0].index)
        fresh(logits)
        self._recent.extend(sequence.prompt for sequence in complete)
        ended = [sequence for sequence in complete if sequence.max_output_len == 1]
        self.scheduler.leave(ended)
        self._regroup([(i, sequence) for i, sequence in enumerate(complete) if sequence.pages])
        return self._sent(complete, fresh.tokens, logits.sum(1))

    def _generate(self) -> UnderWay:
        if not all(sequence.pages for sequence in self._here):
            self._regroup([])
        count, going = len(self._here), self._here
        self.session.paged("generation", count, int(self._positions[:count].max()) + 1)
        self._positions[:count] += 1
        self._left[:count] -= 1
        last = [going[i] for i in np.flatnonzero(self._left[:count] == 0)]
        if last:
            self.scheduler.leave(last)
        return self._sent(going, self.steps.tokens, self.steps.sums)

    def _regroup(self, entering: list[tuple[int, Sequence]]) -> None:
        """Rows without those that have left, and with others, whose numbers in `fresh` are given."""
        stay = [i for i, sequence in enumerate(self._here) if sequence.pages]
        kept, count = len(stay), len(stay) + len(entering)
        for values in (self._positions, self._prompt_lengths, self._pages, self._left):
            values[:kept] = values[stay]
        for row, (_, sequence) in enumerate(entering, kept):
            self._positions[row] = self._prompt_lengths[row] = len(sequence.prompt)
            self._left[row] = sequence.max_output_len - 1
            self._pages[row] = 0
            self._pages[row, : len(sequence.pages)] = sequence.pages
        self._steps[:count] = 1
        for values in (self._positions, self._steps, self._pages):
            values[count:] = 0
        self._here = [*(self._here[i] for i in stay), *(sequence for _, sequence in entering)]
        if count > self._most:
            self._most = count
            self.say(self._size())
        self.session.paged("arrange", self._rows.buffer.numpy())
        rows = torch.tensor([*stay, *(self.steps.sizes.rows + i for i, _ in entering)], dtype=torch.int64)
        assert self.steps.sampler
        self.steps.sampler.regroup(sent(rows, self.session.device), self.steps.fresh)

    def _size(self) -> str:
        pages, sizes = self.scheduler.pages, self.steps.sizes
        there = [*self.scheduler.waiting, *self.scheduler.entering, *self.scheduler.running]
        mean = sum(pages.needed(sequence.positions) for sequence in there) / len(there)
        most = min(sizes.rows, int(pages.count / mean))
        held = pages.count * pages.size * self.session.bytes_per_position
        return f"batch {self._most} of at most {max(most, self._most)}, {held / 1e9:.1f} GB of caches"

    def _sent(self, sequences: list[Sequence], tokens: torch.Tensor, sums: torch.Tensor) -> UnderWay:
        """On their way to the host."""
        place, count = self._launched % self._ahead, len(sequences)
        self._tokens[place, :count].copy_(tokens[:count], non_blocking=True)
        self._sums[place, :count].copy_(sums[:count], non_blocking=True)
        if self._events:
            self._events[place].record()
        self._launched += 1
        return UnderWay(sequences, place)

    def _wait(self, step: UnderWay) -> None:
        """Until its tokens are there."""
        if self._events:
            self._events[step.place].synchronize()

    def _receive(self, step: UnderWay) -> None:
        self._wait(step)
        finite = self._sums[step.place].isfinite().tolist()
        ended = []
        for i, token in enumerate(self._tokens[step.place, : len(step.sequences)].tolist()):
            sequence = step.sequences[i]
            if sequence.over:
                continue
            if not finite[i]:
                raise self._not_finite([sequence.prompt])
            sequence.over = self.take(sequence, token)
            if sequence.over and sequence.pages:
                ended.append(sequence)
        if ended:
            self.scheduler.leave(ended)

    def _not_finite(self, prompts: list[list[int]]) -> UserError:
        self.session.paged("clear")
        return self.session.not_finite(prompts)
