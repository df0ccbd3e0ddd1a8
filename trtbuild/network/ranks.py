"""What carries tensors between the ranks of an engine."""

from abc import ABC, abstractmethod

import torch


class Ranks(ABC):
    """One rank's ends of the ways to the others. All the ranks that a call names make it, in the same order.

    On a GPU nothing waits for the device, and a captured graph may hold the calls. `runtime/ranks.py` has both kinds.
    """

    rank: int

    @abstractmethod
    def all_reduce(self, x: torch.Tensor, first: int, size: int) -> torch.Tensor:
        """The sum of what the ranks `first .. first + size - 1` have, the same on all of them; written over `x`."""

    @abstractmethod
    def all_gather(self, x: torch.Tensor, first: int, size: int) -> torch.Tensor:
        """`[rows, n]` of each of these ranks, side by side in their order: `[rows, size * n]`."""

    @abstractmethod
    def send(self, x: torch.Tensor, target: int) -> None:
        """Gives `x` to another rank, which calls `receive`."""

    @abstractmethod
    def receive(self, out: torch.Tensor, source: int) -> torch.Tensor:
        """`out`, filled with what another rank sends."""

    @abstractmethod
    def broadcast(self, x: torch.Tensor) -> torch.Tensor:
        """`x`, which becomes rank 0's on all ranks."""
