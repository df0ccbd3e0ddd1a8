"""What passes between ranks: operations that only networks of several ranks have.

Each is defined by what all its ranks together make of what they bring; `network/lockstep.py` runs them so. In processes
of their own they meet through their step's `ranks`.
"""

from dataclasses import dataclass
from typing import Any

import torch

from trtbuild.network.lowering import Lowered, Lowering
from trtbuild.network.network import Op, Spec, Tensor
from trtbuild.network.ranks import Ranks
from trtbuild.network.step import Step

Meeting = tuple[str, tuple[int, ...]]


class Collective(Op):
    """An operation at which ranks meet: none goes on before all are there."""

    def meeting(self, rank: int) -> Meeting:
        """What tells this meeting of `rank` from others: its kind, and who comes, in order."""
        raise NotImplementedError

    def together(self, *brought: dict[str, torch.Tensor]) -> list[torch.Tensor | tuple]:
        """Every rank's result, from every rank's inputs by name, both in the order of `meeting`."""
        raise NotImplementedError

    @staticmethod
    def ranks(step: Step) -> Ranks:
        """The ways to the others."""
        if step.ranks is None:
            raise ValueError("a network of several ranks needs a step that leads to the others")
        return step.ranks

    def reference(self, *args: Any, **inputs: Any) -> torch.Tensor | tuple[torch.Tensor, ...]:
        raise NotImplementedError(f"{self} is no rank's alone; run all ranks in lock-step")

    def portable(self, step: Step, *args: Any, **inputs: Any) -> torch.Tensor | tuple[torch.Tensor, ...]:
        raise NotImplementedError


@dataclass(frozen=True)
class AllReduce(Collective):
    """The sum over the ranks `first .. first + size - 1` of what each of them has, in its dtype.

    The portable engine writes it over `x`, which nothing else may read.
    """

    first: int
    size: int

    def infer(self, x: Tensor) -> list[Spec]:
        return [(x.dtype, x.shape)]

    def meeting(self, rank: int) -> Meeting:
        return "all_reduce", tuple(range(self.first, self.first + self.size))

    def together(self, *brought: dict[str, torch.Tensor]) -> list[torch.Tensor | tuple]:
        return [torch.stack([inputs["x"] for inputs in brought]).sum(0)] * self.size

    def portable(self, step: Step, x: torch.Tensor) -> torch.Tensor:
        return self.ranks(step).all_reduce(x, self.first, self.size)

    def to_tensorrt(self, lowering: Lowering, x: Lowered) -> Lowered:
        return lowering.all_reduce(x, range(self.first, self.first + self.size))


@dataclass(frozen=True)
class AllGather(Collective):
    """The columns of the ranks `first .. first + size - 1`, side by side in their order."""

    first: int
    size: int

    def infer(self, x: Tensor) -> list[Spec]:
        return [(x.dtype, (x.shape[0], self.size * x.size(1)))]

    def meeting(self, rank: int) -> Meeting:
        return "all_gather", tuple(range(self.first, self.first + self.size))

    def together(self, *brought: dict[str, torch.Tensor]) -> list[torch.Tensor | tuple]:
        return [torch.cat([inputs["x"] for inputs in brought], 1)] * self.size

    def portable(self, step: Step, x: torch.Tensor) -> torch.Tensor:
        return self.ranks(step).all_gather(x, self.first, self.size)

    def to_tensorrt(self, lowering: Lowering, x: Lowered) -> Lowered:
        return lowering.all_gather(x, range(self.first, self.first + self.size))


@dataclass(frozen=True)
class Send(Collective):
    """Gives `x` to a rank, which receives it. No output."""

    target: int

    def infer(self, x: Tensor) -> list[Spec]:
        return []

    def meeting(self, rank: int) -> Meeting:
        return "pass", (rank, self.target)

    def together(self, *brought: dict[str, torch.Tensor]) -> list[torch.Tensor | tuple]:
        return [(), brought[0]["x"]]

    def portable(self, step: Step, x: torch.Tensor) -> tuple[()]:
        self.ranks(step).send(x, self.target)
        return ()

    def to_tensorrt(self, lowering: Lowering, x: Lowered) -> tuple[()]:
        lowering.send(x)
        return ()


@dataclass(frozen=True)
class Receive(Collective):
    """What a rank sends: as many rows as there are `position_ids`, `columns` wide; `dtype` is torch's name of it."""

    source: int
    dtype: str
    columns: int

    def infer(self, position_ids: Tensor) -> list[Spec]:
        return [(getattr(torch, self.dtype), (*position_ids.shape, self.columns))]

    def meeting(self, rank: int) -> Meeting:
        return "pass", (self.source, rank)

    together = Send.together

    def portable(self, step: Step, position_ids: torch.Tensor) -> torch.Tensor:
        out = position_ids.new_empty((len(position_ids), self.columns), dtype=getattr(torch, self.dtype))
        return self.ranks(step).receive(out, self.source)

    def to_tensorrt(self, lowering: Lowering, position_ids: Lowered) -> Lowered:
        return lowering.received(getattr(torch, self.dtype), self.columns)


def all_reduce(x: Tensor, ranks: range) -> Tensor:
    """The sum of what all `ranks` have; `x` itself where there is one."""
    return x if len(ranks) == 1 else x.network.add(AllReduce(ranks.start, len(ranks)), x=x)


def all_gather(x: Tensor, ranks: range) -> Tensor:
    """`[rows, n]` of each of `ranks` to `[rows, n * ranks]` of all; `x` itself where there is one."""
    return x if len(ranks) == 1 else x.network.add(AllGather(ranks.start, len(ranks)), x=x)


def send(x: Tensor, target: int) -> None:
    """`[tokens, hidden]` to the rank `target`."""
    x.network.add(Send(target), x=x)


def receive(position_ids: Tensor, source: int, dtype: torch.dtype, columns: int) -> Tensor:
    """`[tokens, columns]` that the rank `source` sends, for `[tokens]` positions."""
    op = Receive(source, str(dtype).removeprefix("torch."), columns)
    return position_ids.network.add(op, position_ids=position_ids)
