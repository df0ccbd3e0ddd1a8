"""Progress on standard error: on a terminal bars that move, in a log a line now and then; and what was made."""

import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from tqdm import tqdm

EVERY = 10  # seconds between two lines of a log
SHORT = 2  # seconds of what needs no bar on a terminal, where it may not last


def byte_bar(total: int, what: str, delay: float = 0) -> tqdm:
    """A bar over bytes, on a terminal from `delay` seconds on; call `.update(nbytes)`."""
    return _bar(total=total, desc=what, unit="B", unit_scale=True, unit_divisor=1000, delay=delay)


def item_bar(total: int, what: str, unit: str) -> tqdm:
    """A bar over countable things."""
    return _bar(total=total, desc=what, unit=unit)


class OutputBar:
    """A bar over outputs that are generated: how many have ended, the tokens a second that come, the time left.

    It moves by tokens: an output's, of `longest` at most, and with the first of them its prompt's, of whose `prompts`
    are the numbers.
    """

    def __init__(self, prompts: Sequence[int], longest: int, what: str, unit: str, delay: float = 0) -> None:
        self._left, self._longest = [length + longest for length in prompts], longest
        self._ended, self._of = 0, f"{len(prompts)} {unit}s"
        parts = "{desc}: {percentage:3.0f}%|{bar}| [{elapsed}<{remaining}{postfix}]"
        self._bar = _bar(total=sum(self._left), desc=what, bar_format=parts, miniters=0, smoothing=0, delay=delay)
        self._tokens, self._said, self._start = 0, "", time.monotonic()
        self._show()

    def __enter__(self) -> "OutputBar":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def token(self, index: int) -> None:
        """One of an output."""
        self._tokens += 1
        self._leave(index, min(self._left[index], self._longest) - 1)
        if self._tokens < 64 or self._tokens % 64 == 0:  # looking at the clock takes longer than counting
            self._show()

    def output(self, index: int) -> None:
        """One has ended."""
        self._ended += 1
        self._leave(index, 0)
        self._show()

    def say(self, line: str) -> None:
        """Something to stand beside it."""
        self._said = f", {line}"
        self._show()

    def _leave(self, index: int, tokens: int) -> None:
        self._bar.n += self._left[index] - tokens
        self._left[index] = tokens

    def _show(self) -> None:
        rate = self._tokens / max(time.monotonic() - self._start, 1e-3)
        self._bar.set_postfix_str(f"{self._ended} of {self._of}, {rate:.0f} tokens/s{self._said}", refresh=False)
        self._bar.update(0)


@contextmanager
def made(path: Path | str) -> Iterator[None]:
    """Around what makes a file or a folder: says at the end how large it is, and how long it took."""
    start = time.monotonic()
    yield
    files = [path] if (path := Path(path)).is_file() else [file for file in path.rglob("*") if file.is_file()]
    seconds = time.monotonic() - start
    print(
        f"{path}: {amount(sum(file.stat().st_size for file in files))} in {seconds:.0f} s", file=sys.stderr, flush=True
    )


def amount(nbytes: float) -> str:
    """`269.1 MB`."""
    power = min(3, max(0, (len(str(int(nbytes))) - 1) // 3))
    return f"{nbytes / 1000**power:.{1 if power else 0}f} {('bytes', 'kB', 'MB', 'GB')[power]}"


def _bar(**options: Any) -> tqdm:
    return tqdm(**options, mininterval=0.5) if sys.stderr.isatty() else _Lines(**options)


class _Nowhere:
    def write(self, text: str) -> None: ...
    def flush(self) -> None: ...


class _Lines(tqdm):
    """A bar in a log: a line every `EVERY` seconds, whether it has moved or not, and a last one if there was any."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options, file=_Nowhere())
        self._said = False
        self._closed = threading.Event()
        threading.Thread(target=self._say, daemon=True).start()

    def _say(self) -> None:
        while not self._closed.wait(EVERY):
            self._said = True
            print(self, file=sys.stderr, flush=True)

    def close(self) -> None:
        if not self._closed.is_set():
            self._closed.set()
            if self._said:
                print(self, file=sys.stderr, flush=True)
        super().close()

    def __del__(self) -> None:
        with suppress(AttributeError):  # of one that was interrupted while it was made
            super().__del__()
