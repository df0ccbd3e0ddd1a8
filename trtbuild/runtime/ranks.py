"""How tensors pass between an engine's processes: through MPI on CPUs; on GPUs by NCCL, and on one host directly."""

from contextlib import suppress
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch

from trtbuild.decoder.mapping import Mapping
from trtbuild.network.ranks import Ranks
from trtbuild.runtime.world import World

if TYPE_CHECKING:
    from trtbuild.kernels.peer_memory import PeerMemory


class MpiRanks(Ranks):
    """Tensors of the CPU, in place: MPI reads and writes torch's memory. 16-bit numbers are summed in float32."""

    def __init__(self, world: World) -> None:
        self.rank, self._world = world.rank, world
        self._groups: dict[tuple[int, int], object] = {}
        self._sent: list[tuple[Any, torch.Tensor]] = []

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
        self.forget_sent()
        x = x.contiguous()
        self._sent.append((self._world.comm.Isend(_bytes(x), target), x))

    def forget_sent(self) -> None:
        """What has arrived; MPI complains at the end of what it was not asked about."""
        self._sent = [sent for sent in self._sent if not sent[0].Test()]

    def receive(self, out: torch.Tensor, source: int) -> torch.Tensor:
        self._world.comm.Recv(_bytes(out), source)
        return out

    def broadcast(self, x: torch.Tensor, size: int) -> torch.Tensor:
        x = x.contiguous()
        if size > 1:
            self._group(0, size).Bcast(_bytes(x))
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

    Ranks of a stage on one host reach each other's memory, if the GPUs can. What passes between two ranks alone is a
    broadcast of that pair's, in a group of its own for what goes back. All ranks make the same groups in one order.
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
        self._groups = {
            ranks: dist.group.WORLD if ranks == (*range(world.size),) else dist.new_group(sorted(ranks))
            for ranks in _meetings(mapping.tp_size, mapping.pp_size)
        }
        for group in self._groups.values():  # connects them, which cannot be done while a graph is captured
            if group is not dist.GroupMember.NON_GROUP_MEMBER:
                dist.all_reduce(torch.zeros(1, device=device), group=group)
        self._sent: list[tuple[Any, torch.Tensor]] = []
        self._peers: PeerMemory | None = None
        stage = mapping.stage
        if device.type == "cuda" and len(stage) > 1 and world.local_size == world.size:
            self._peers = _peer_memory(self._group(stage.start, len(stage)), device)

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
        if self._peers:
            from trtbuild.kernels.one_shot_all_reduce import all_reduce

            return all_reduce(self._peers, x)
        self._dist.all_reduce(x, group=self._group(first, size))
        return x

    def all_reduce_add_rms_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, first: int, size: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self._peers:
            from trtbuild.kernels.one_shot_all_reduce import all_reduce_add_rms_norm

            return all_reduce_add_rms_norm(self._peers, x.contiguous(), residual, weight, eps)
        return super().all_reduce_add_rms_norm(x, residual, weight, eps, first, size)

    def all_gather(self, x: torch.Tensor, first: int, size: int) -> torch.Tensor:
        x = x.contiguous()
        if self._peers:
            from trtbuild.kernels.one_shot_all_gather import all_gather, takes

            if takes(x):
                return all_gather(self._peers, x)
        rows, columns = x.shape
        out = x.new_empty(size * rows, columns)
        self._gather(out, x, group=self._group(first, size))
        return out.view(size, rows, columns).transpose(0, 1).reshape(rows, size * columns)

    def send(self, x: torch.Tensor, target: int) -> None:
        x = x.contiguous()
        if target > self.rank:
            self._pass(x, self.rank, target)
            return
        self._sent = [sent for sent in self._sent if not sent[0].is_completed()]
        group = self._groups[self.rank, target]
        self._sent.append((self._dist.broadcast(x, self.rank, group, async_op=True), x))

    def receive(self, out: torch.Tensor, source: int) -> torch.Tensor:
        self._pass(out, source, self.rank)
        return out

    def broadcast(self, x: torch.Tensor, size: int) -> torch.Tensor:
        if size > 1 and self._peers:
            return self.all_gather(x[None], 0, size)[0, : len(x)]
        if size > 1:
            self._dist.broadcast(x, 0, self._group(0, size))
        return x

    def _pass(self, x: torch.Tensor, source: int, target: int) -> None:
        self._dist.broadcast(x, source, group=self._groups[source, target])

    def _group(self, first: int, size: int) -> Any:
        return self._groups[tuple(range(first, first + size))]

    def close(self) -> None:
        """Leaves NCCL; the graphs that hold calls of it must be gone."""
        if self._dist.is_initialized():
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self._dist.destroy_process_group()


def _peer_memory(group: Any, device: torch.device) -> "PeerMemory | None":
    """Where all ranks of a stage reach each other's memory."""
    import torch.distributed as dist

    from trtbuild.kernels.peer_memory import PeerMemory

    def all_have(it: object) -> bool:
        have = torch.tensor([it is not None], dtype=torch.int32, device=device)
        dist.all_reduce(have, dist.ReduceOp.MIN, group=group)
        return bool(have.item())

    block = made = None
    with suppress(RuntimeError):
        block = PeerMemory.block(dist.get_world_size(group), device)
    if not all_have(block):  # before any looks for the others' blocks, which waits for all of them
        return None
    assert block is not None
    with suppress(RuntimeError):
        made = PeerMemory.of(group, block)
    return made if all_have(made) else None


def _meetings(tp_size: int, pp_size: int) -> list[tuple[int, ...]]:
    """Which ranks of an engine meet, each once: a stage's, and who sends to whom.

    Those are neighbours in the pipeline, and back to who reads the logits who makes them.
    """
    size = tp_size * pp_size
    stages = [tuple(range(first, first + tp_size)) for first in range(0, size, tp_size)]
    pairs = [pair for before, after in pairwise(stages) for pair in zip(before, after, strict=True)]
    return [ranks for ranks in (*stages, *pairs, (size - tp_size, 0)) if len({*ranks}) > 1]
