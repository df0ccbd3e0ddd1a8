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

    def all_reduce_add_rms_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, first: int, size: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`residual` plus the sum of `x` over these ranks, and its RMSNorm; `x` may be written over."""
        total = residual + self.all_reduce(x, first, size)
        return total, torch.nn.functional.rms_norm(total, weight.shape, weight, eps)

    @abstractmethod
    def all_gather(self, x: torch.Tensor, first: int, size: int) -> torch.Tensor:
        """`[rows, n]` of each of these ranks, side by side in their order: `[rows, size * n]`."""

    @abstractmethod
    def send(self, x: torch.Tensor, target: int) -> None:
        """Gives `x` to another rank, which calls `receive`.

        What goes back, to a lower rank, waits for nobody, and stays as it is until it has arrived: that rank may first
        send what comes next.
        """

    @abstractmethod
    def receive(self, out: torch.Tensor, source: int) -> torch.Tensor:
        """`out`, filled with what another rank sends."""

    @abstractmethod
    def broadcast(self, x: torch.Tensor, size: int) -> torch.Tensor:
        """Rank 0's `x` on the first `size` ranks; it may be written over."""
