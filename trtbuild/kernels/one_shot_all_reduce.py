"""The sum of small tensors over GPUs that reach each other's memory, in one kernel a GPU.

`OneShotAllReduce(group, device)(x)` equals, on every rank of the group and with equal bits,

    x.copy_(sum(of(rank, x).float() for rank in group))       in the order of the ranks

A program writes its piece of `x` into every rank's memory, raises its flag there, waits for the others' flags in its
own, and adds up what arrived. Flags count a program's calls, in memory of the device, so that captured graphs replay
them; and calls alternate between two halves of the memory, so that nobody overwrites what a slower rank still reads: it
is at most one call behind. Memory: torch's symmetric memory.
"""

import torch
import torch.distributed as dist
import triton
import triton.language as tl

PIECE = 2048  # bytes of a program, the same for all dtypes: a program's halves are its own
CAPACITY = 1 << 19  # bytes of the largest tensor; of larger ones NCCL is as fast


class OneShotAllReduce:
    """Made by all ranks of a group at the same time; raises `RuntimeError` where they do not reach each other."""

    def __init__(self, group: dist.ProcessGroup, device: torch.device) -> None:
        import torch.distributed._symmetric_memory as symmetric

        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self._data = 2 * self.size * CAPACITY
        self._memory = symmetric.empty(
            self._data + 4 * self.size * (CAPACITY // PIECE), dtype=torch.uint8, device=device
        ).zero_()
        self._peers = symmetric.rendezvous(self._memory, group)
        self._calls = torch.zeros(CAPACITY // PIECE, dtype=torch.int32, device=device)
        torch.cuda.synchronize(device)
        dist.barrier(group)  # all flags are down

    @staticmethod
    def takes(x: torch.Tensor) -> bool:
        """Whether it is small enough."""
        return x.nbytes <= CAPACITY

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """`x`, contiguous, float16, bfloat16 or float32, is written over."""
        piece = PIECE // x.dtype.itemsize
        _kernel[(triton.cdiv(x.numel(), piece),)](
            x,
            self._calls,
            self._peers.buffer_ptrs_dev,
            x.numel(),
            RANK=self.rank,
            RANKS=self.size,
            CAPACITY=CAPACITY // x.dtype.itemsize,
            FLAGS=self._data // 4,
            PIECE=piece,
            num_warps=4,
        )
        return x


@triton.jit
def _kernel(
    x,
    calls,
    peers,
    length,
    RANK: tl.constexpr,
    RANKS: tl.constexpr,
    CAPACITY: tl.constexpr,
    FLAGS: tl.constexpr,
    PIECE: tl.constexpr,
):
    program = tl.program_id(0)
    call = tl.load(calls + program) + 1
    at = program * PIECE + tl.arange(0, PIECE)
    inside = at < length
    half = (call & 1) * RANKS * CAPACITY
    peers = peers.to(tl.pointer_type(tl.uint64))
    value = tl.load(x + at, mask=inside, other=0)
    for rank in tl.static_range(RANKS):
        memory = tl.load(peers + rank).to(tl.pointer_type(x.dtype.element_ty))
        tl.store(memory + half + RANK * CAPACITY + at, value, mask=inside)
    tl.debug_barrier()  # all threads have written before one raises the flag
    for rank in tl.static_range(RANKS):
        flags = tl.load(peers + rank).to(tl.pointer_type(tl.int32)) + FLAGS
        tl.atomic_xchg(flags + program * RANKS + RANK, call, sem="release", scope="sys")
    flags = tl.load(peers + RANK).to(tl.pointer_type(tl.int32)) + FLAGS + program * RANKS
    for rank in tl.static_range(RANKS):
        while tl.atomic_add(flags + rank, 0, sem="acquire", scope="sys") - call < 0:
            pass
    tl.debug_barrier()
    memory = tl.load(peers + RANK).to(tl.pointer_type(x.dtype.element_ty)) + half
    total = tl.zeros([PIECE], tl.float32)
    for rank in tl.static_range(RANKS):
        total += tl.load(memory + rank * CAPACITY + at, mask=inside, other=0, cache_modifier=".cg").to(tl.float32)
    tl.store(x + at, total.to(x.dtype.element_ty), mask=inside)
    tl.store(calls + program, call)
