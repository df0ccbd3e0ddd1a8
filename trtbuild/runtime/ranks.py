"""How tensors pass between the processes of an engine: through MPI on CPUs, NCCL on GPUs; small sums there directly."""

from contextlib import suppress
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch

from trtbuild.decoder.mapping import Mapping
from trtbuild.network.ranks import Ranks
from trtbuild.runtime.world import World

if TYPE_CHECKING:
    from trtbuild.kernels.one_shot_all_reduce import OneShotAllReduce


class MpiRanks(Ranks):
    """Tensors of the CPU, in place: MPI reads and writes torch's memory. 16-bit numbers are summed in float32."""

    def __init__(self, world: World) -> None:
        self.rank, self._world = world.rank, world
        self._groups: dict[tuple[int, int], object] = {}

    def all_reduce(self, x: torch.Tensor, first: int, size: int) -> torch.Tensor:
        x = x.contiguous()
        total = x.float() if x.dtype.itemsize < 4 else x
        self._group(first, size).Allreduce(self._world.in_place, total.numpy())
        return x if total is x else x.copy_(total)

    def all_gather(self, x: torch.Tensor, first: int, size: int) -> torch.Tensor:
        rows, columns = x.shape
        out = x.new_empty(size, rows, columns)
        self._group(first, size).Allgather(_bytes(x), _bytes(out))
        return out.transpose(0, 1).reshape(rows, size * columns)

    def send(self, x: torch.Tensor, target: int) -> None:
        self._world.comm.Send(_bytes(x), target)

    def receive(self, out: torch.Tensor, source: int) -> torch.Tensor:
        self._world.comm.Recv(_bytes(out), source)
        return out

    def broadcast(self, x: torch.Tensor) -> torch.Tensor:
        x = x.contiguous()
        self._world.comm.Bcast(_bytes(x))
        return x

    def _group(self, first: int, size: int) -> Any:
        if (first, size) not in self._groups:
            self._groups[first, size] = self._world.group(range(first, first + size))
        return self._groups[first, size]


def _bytes(x: torch.Tensor) -> Any:
    """A tensor's memory; of one that is not contiguous a copy's."""
    return x.contiguous().view(torch.uint8).numpy()


class NcclRanks(Ranks):
    """Tensors of the GPU, through torch.distributed; of the CPU through its gloo, which tests use.

    What passes between two ranks alone is a broadcast of that pair's. All ranks make the same groups in the same order.
    """

    def __init__(self, world: World, mapping: Mapping, device: torch.device) -> None:
        import torch.distributed as dist

        self.rank, self._dist, self._world = world.rank, dist, world
        # Its name until torch 2.12, and then.
        self._gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        if not dist.is_initialized():
            backend, own = ("nccl", device) if device.type == "cuda" else ("gloo", None)
            ends = {"store": self._store(), "rank": world.rank, "world_size": world.size}
            dist.init_process_group(backend, device_id=own, **ends)
        everyone = tuple(range(world.size))
        self._groups = {everyone: dist.group.WORLD}
        for ranks in sorted({*_meetings(mapping.tp_size, mapping.pp_size)} - {everyone}):
            self._groups[ranks] = dist.new_group(ranks)
        for group in self._groups.values():  # connects them, which cannot be done while a graph is captured
            if group is not dist.GroupMember.NON_GROUP_MEMBER:
                dist.all_reduce(torch.zeros(1, device=device), group=group)
        self._one_shot: OneShotAllReduce | None = None
        stage = mapping.stage
        if device.type == "cuda" and len(stage) > 1 and world.local_size == world.size:
            self._one_shot = _one_shot(self._group(stage.start, len(stage)), device)

    def _store(self) -> Any:
        """Where the ranks find each other: rank 0's, of which MPI tells the others."""
        here = self._world
        host = "127.0.0.1" if here.local_size == here.size else here.host
        if here.rank == 0:
            store = self._dist.TCPStore(host, 0, here.size, is_master=True, wait_for_workers=False)
            here.share((host, store.port))
            return store
        host, port = here.share(None)
        return self._dist.TCPStore(host, port, here.size, is_master=False)

    def all_reduce(self, x: torch.Tensor, first: int, size: int) -> torch.Tensor:
        x = x.contiguous()
        if self._one_shot and self._one_shot.takes(x):
            return self._one_shot(x)
        self._dist.all_reduce(x, group=self._group(first, size))
        return x

    def all_gather(self, x: torch.Tensor, first: int, size: int) -> torch.Tensor:
        rows, columns = x.shape
        out = x.new_empty(size * rows, columns)
        self._gather(out, x.contiguous(), group=self._group(first, size))
        return out.view(size, rows, columns).transpose(0, 1).reshape(rows, size * columns)

    def send(self, x: torch.Tensor, target: int) -> None:
        self._pass(x.contiguous(), self.rank, target)

    def receive(self, out: torch.Tensor, source: int) -> torch.Tensor:
        self._pass(out, source, self.rank)
        return out

    def broadcast(self, x: torch.Tensor) -> torch.Tensor:
        self._dist.broadcast(x, 0)
        return x

    def _pass(self, x: torch.Tensor, source: int, target: int) -> None:
        self._dist.broadcast(x, source, group=self._groups[tuple(sorted((source, target)))])

    def _group(self, first: int, size: int) -> Any:
        return self._groups[tuple(range(first, first + size))]

    def close(self) -> None:
        """Leaves NCCL; the graphs that hold calls of it must be gone."""
        if self._dist.is_initialized():
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self._dist.destroy_process_group()


def _one_shot(group: Any, device: torch.device) -> "OneShotAllReduce | None":
    """The kernel for small sums, where all ranks of a stage reach each other's memory."""
    import torch.distributed as dist

    from trtbuild.kernels.one_shot_all_reduce import OneShotAllReduce

    made = None
    with suppress(RuntimeError):
        made = OneShotAllReduce(group, device)
    works = torch.tensor([made is not None], dtype=torch.int32, device=device)
    dist.all_reduce(works, dist.ReduceOp.MIN, group=group)
    return made if works.item() else None


def _meetings(tp_size: int, pp_size: int) -> list[tuple[int, ...]]:
    """Which ranks of an engine meet: a stage's, neighbours in the pipeline, and who makes logits and who reads them."""
    size = tp_size * pp_size
    stages = [tuple(range(first, first + tp_size)) for first in range(0, size, tp_size)]
    pairs = [pair for before, after in pairwise(stages) for pair in zip(before, after, strict=True)]
    return [ranks for ranks in (*stages, *pairs, (0, size - tp_size)) if len({*ranks}) > 1]
