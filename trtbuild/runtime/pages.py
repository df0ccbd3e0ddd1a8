"""Who has which pages of the pool, and which beginnings of prompts are in it already."""

from array import array
from collections.abc import Sequence

SCRATCH = 0  # the page that no sequence is given: padded rows write to it


class Pages:
    """`count` pages of `size` positions, given to sequences for as long as they last.

    Full pages of a prompt may be had by several sequences whose prompts begin alike, if it `shares`: by all that are
    admitted while one has them. Only the first writes them, so its step must not come after another's.
    """

    def __init__(self, count: int, size: int, shares: bool = True) -> None:
        self.count, self.size, self.shares = count, size, shares
        self.owners = [0] * (count + 1)
        self._free = list(range(count, SCRATCH, -1))
        self._known: dict[tuple[int, bytes], int] = {}  # by the page before it and its tokens
        self._names: dict[int, tuple[int, bytes]] = {}

    @property
    def free(self) -> int:
        return len(self._free)

    def needed(self, positions: int) -> int:
        """Pages of a sequence."""
        return -(-positions // self.size)

    def take(self, prompt: Sequence[int], positions: int) -> tuple[list[int], int] | None:
        """Pages for so many positions, and how many of the prompt's first tokens they hold; None if they are not there.

        The prompt's last token is never among these: somebody has to compute its logits.
        """
        names = []
        if self.shares:
            tokens = array("i", prompt)
            ends = range(self.size, len(prompt) + 1, self.size)
            names = [tokens[end - self.size : end].tobytes() for end in ends]
        pages: list[int] = []
        for name in names[: (len(prompt) - 1) // self.size]:
            page = self._known.get((pages[-1] if pages else SCRATCH, name))
            if page is None:
                break
            pages.append(page)
        shared = len(pages)
        if self.needed(positions) - shared > self.free:
            return None
        pages += [self._free.pop() for _ in range(self.needed(positions) - shared)]
        for page in pages:
            self.owners[page] += 1
        for i in range(shared, len(names)):
            key = pages[i - 1] if i else SCRATCH, names[i]
            if key in self._known:  # of a prompt that ends with it
                break
            self._known[key] = pages[i]
            self._names[pages[i]] = key
        return pages, shared * self.size

    def take_source(self, pages: list[int]) -> int:
        """For a sequence's next step, the page from which that copies what is before it."""
        return SCRATCH

    def give_back(self, pages: list[int]) -> None:
        """A sequence's, when its last step has been launched: what comes later comes later on the device, too."""
        for page in pages:
            self.owners[page] -= 1
            assert self.owners[page] >= 0, f"page {page} was given back twice"
            if not self.owners[page]:
                self._free.append(page)
                if page in self._names:
                    del self._known[self._names.pop(page)]


class WholePages(Pages):
    """Pages of which each holds a sequence, so that attention reads it where it is.

    Of a prompt that begins like another which has a page, as many positions as are the same are copied from there.
    That page has two owners until the sequence's first step has been launched.
    """

    def __init__(self, count: int, size: int, shares: bool = True) -> None:
        super().__init__(count, size, shares)
        self._prompts: dict[int, Sequence[int]] = {}
        self._sources: dict[int, int] = {}

    def take(self, prompt: Sequence[int], positions: int) -> tuple[list[int], int] | None:
        if not self._free or positions > self.size:
            return None
        page, source, past = self._free.pop(), SCRATCH, 0
        for other, known in self._prompts.items() if self.shares else ():
            alike = next((i for i, (a, b) in enumerate(zip(known, prompt[:-1], strict=False)) if a != b), None)
            alike = min(len(known), len(prompt) - 1) if alike is None else alike
            source, past = (other, alike) if alike > past else (source, past)
        self._prompts[page] = prompt
        self.owners[page] += 1
        if past:
            self._sources[page] = source
            self.owners[source] += 1
        return [page], past

    def take_source(self, pages: list[int]) -> int:
        source = self._sources.pop(pages[0], SCRATCH)
        if source != SCRATCH:
            self.give_back([source])
        return source

    def give_back(self, pages: list[int]) -> None:
        super().give_back(pages)
        for page in pages:
            if not self.owners[page]:
                assert page not in self._sources, f"page {page} is given back before its first step"
                del self._prompts[page]
