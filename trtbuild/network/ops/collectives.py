"""What passes between ranks: operations that only networks of several ranks have.

Each is defined by what all its ranks together make of what they bring; `network/lockstep.py` runs them so. In processes
of their own they meet through their step's `ranks`.
"""

from dataclasses import dataclass

import torch

from trtbuild.network.network import Op, Spec, Tensor

Meeting = tuple[str, tuple[int, ...]]


class Collective(Op):
    """An operation at which ranks meet: none goes on before all are there."""

    def meeting(self, rank: int) -> Meeting:
        """What tells this meeting of `rank` from others: its kind, and who comes, in order."""
        raise NotImplementedError

    def together(self, *brought: dict[str, torch.Tensor]) -> list[torch.Tensor | tuple]:
        """Every rank's result, from every rank's inputs by name, both in the order of `meeting`."""
        raise NotImplementedError

    def reference(self, **inputs: torch.Tensor):
        raise NotImplementedError(f"{self} is no rank's alone; run all ranks in lock-step")

    def portable(self, step, *inputs: torch.Tensor):
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

    def together(self, *brought):
        return [torch.stack([inputs["x"] for inputs in brought]).sum(0)] * self.size

    def portable(self, step, x):
        return step.ranks.all_reduce(x, self.first, self.size)

    def to_tensorrt(self, lowering, x):
        return lowering.all_reduce(x, range(self.first, self.first + self.size))


@dataclass(frozen=True)
class AllGather(Collective):
    """The columns of the ranks `first .. first + size - 1`, side by side in their order."""

    first: int
    size: int

    def infer(self, x: Tensor) -> list[Spec]:
        rows, columns = x.shape
        return [(x.dtype, (rows, self.size * columns))]

    def meeting(self, rank: int) -> Meeting:
        return "all_gather", tuple(range(self.first, self.first + self.size))

    def together(self, *brought):
        return [torch.cat([inputs["x"] for inputs in brought], 1)] * self.size

    def portable(self, step, x):
        return step.ranks.all_gather(x, self.first, self.size)

    def to_tensorrt(self, lowering, x):
        return lowering.all_gather(x, range(self.first, self.first + self.size))


@dataclass(frozen=True)
class Send(Collective):
    """Gives `x` to a rank, which receives it. No output."""

    target: int

    def infer(self, x: Tensor) -> list[Spec]:
        return []

    def meeting(self, rank: int) -> Meeting:
        return "pass", (rank, self.target)

    def together(self, *brought):
        return [(), brought[0]["x"]]

    def portable(self, step, x):
        step.ranks.send(x, self.target)
        return ()

    def to_tensorrt(self, lowering, x):
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

    def portable(self, step, position_ids):
        dtype = getattr(torch, self.dtype)
        return step.ranks.receive(position_ids.new_empty((len(position_ids), self.columns), dtype=dtype), self.source)

    def to_tensorrt(self, lowering, position_ids):
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
