"""Work shared out so that its results do not depend on how many threads there are.

A sum's last bits depend on how it is split, so each piece of work runs in one thread, and pieces are combined in order.
"""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

from trtbuild.errors import UserError

T = TypeVar("T")
R = TypeVar("R")


@contextmanager
def workers(device: torch.device) -> Iterator[Callable[[Callable[[T], R], Iterable[T]], Iterable[R]]]:
    """Yields a `map` that works in as many threads as torch had, each computing alone; on a GPU, plain `map`."""
    if device.type != "cpu":
        try:
            yield map
        except torch.OutOfMemoryError as error:
            raise UserError(
                "the GPU's memory is too small for the calibration samples; take fewer or shorter ones, or a larger GPU"
            ) from error
        return
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield pool.map
    finally:
        torch.set_num_threads(threads)
