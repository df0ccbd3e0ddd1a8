"""What runs next: chunks of new prompts, or a token of each sequence that goes on."""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from trtbuild.errors import UserError
from trtbuild.runtime.pages import Pages

FULL = (64, 128, 192)  # sequences of a step, of which kernels multiply 64 at a time in the time that fewer take
SHARE = 8  # prompts that are one of so many of the sequences that wait for them are worth a step


@dataclass(eq=False)
class Sequence:
    """A prompt on its way, `past` of whose tokens have been sent through the model; `pages` while it is admitted."""

    index: int
    prompt: list[int]
    max_output_len: int
    pages: list[int] = field(default_factory=list)
    past: int = 0
    over: bool = False  # by its tokens

    @property
    def positions(self) -> int:
        """What it may come to."""
        return len(self.prompt) + self.max_output_len


class Scheduler:
    """Sequences in the order in which they came: `waiting`; `entering`, whose prompts are on their way; `running`.

    One is admitted when there are pages for the longest that it may become, so that pages never run out. Its prompt
    goes through the model in chunks, `budget` tokens a step. When its last step has been launched it leaves at once,
    and what it had is for the next.

    Steps of chunks and generation steps are not mixed. Chunks keep a device busy with arithmetic, so that beside them
    the other sequences' tokens would save no more than one reading of the weights, for an attention of both kinds and
    steps that no captured graph serves. They come first: the more sequences run, the less a token costs. But prompts
    that do not fill a step wait for others: steps of all lengths would each have a graph captured.
    """

    def __init__(self, sequences: Iterable[Sequence], pages: Pages, rows: int, budget: int) -> None:
        self.waiting, self.entering, self.running = deque(sequences), deque[Sequence](), list[Sequence]()
        self.pages, self.rows, self.budget = pages, rows, budget
        for sequence in self.waiting:
            if pages.needed(sequence.positions) > pages.count:
                raise UserError(
                    f"prompt {sequence.index} needs {sequence.positions} positions and the caches have "
                    f"{pages.count * pages.size}; shorten it or ask for a shorter output"
                )

    def next_chunks(self) -> list[tuple[Sequence, range]]:
        """Parts of prompts for the next step, those that are complete first; none if it is to be another one.

        Those whose prompts end here are then `running`.
        """
        self._admit()
        if not self._worth_a_step():
            return []
        chunks, room = [], self.budget
        while self.entering and room:
            sequence = self.entering[0]
            end = min(sequence.past + room, len(sequence.prompt))
            chunks.append((sequence, range(sequence.past, end)))
            room -= end - sequence.past
            sequence.past = end
            if end == len(sequence.prompt):
                self.running.append(self.entering.popleft())
        return chunks

    def _admit(self) -> None:
        """As many as fill the next step; others are looked at while that runs."""
        while self.waiting and len(self.running) + len(self.entering) < self.rows and not self._fill_a_step():
            sequence = self.waiting[0]
            if not self._worth_a_tile(sequence):
                return
            taken = self.pages.take(sequence.prompt, sequence.positions)
            if taken is None:
                return
            sequence.pages, sequence.past = taken
            self.entering.append(self.waiting.popleft())

    def _worth_a_tile(self, sequence: Sequence) -> bool:
        """Whether there is room for all that wait, or for a quarter more of those that fill one.

        Fewer cost more than they bring: LLaMA-7B in FP8, 128 tokens in and 2,048 out, gave 7,693 tokens a second with
        128 sequences at a time and 6,624 with 132 (an H100).
        """
        room = self.pages.free // self.pages.needed(sequence.positions)
        return len(self.running) + len(self.entering) not in FULL or room >= min(FULL[0] // 4, len(self.waiting))

    def _worth_a_step(self) -> bool:
        return bool(self.entering) and (
            self._fill_a_step()
            or len(self.entering) * SHARE >= len(self.running)
            or not self.waiting  # no others will come
        )

    def _fill_a_step(self) -> bool:
        """Whether those that enter do."""
        return sum(len(sequence.prompt) - sequence.past for sequence in self.entering) >= self.budget

    def leave(self, gone: Iterable[Sequence]) -> None:
        """Of those that run."""
        gone = {*gone}
        self.running = [sequence for sequence in self.running if sequence not in gone]
        for sequence in gone:
            self.pages.give_back(sequence.pages)
            sequence.pages = []
