"""Memory of GPUs that reach each other's, and how the kernels of all ranks find each other in it.

Every rank has one block of it, made of three parts:

    words   two halves, each with a place for every other rank: 8 bytes that hold 4 of data and the number of the call.
            They are written and read as one, so that data tells by itself that it has arrived
    rows    two halves, each with a place for every other rank: tensors as they are
    flags   one a row and rank: the number of the last call in which that rank has sent that row

A call is one launch of a kernel, the same on all ranks, in which every rank hears, if not directly, of every other. Its
number is counted in memory of the device, so that captured graphs replay it. Calls alternate between the two halves: a
rank that writes into a half again has been heard of by all in the call between, so they have all left the call before.

A kernel that waits for other ranks may take part in dependent launch: the next one starts when all of its programs run,
so it cannot keep any of them from starting, and itself waits until they have ended. The programs of a call are no more
than run at once, or need of other ranks what those with the same number send, which start in the same order.
"""

import torch
import torch.distributed as dist
import triton
import triton.language as tl

WORDS = 1 << 19  # of a rank's place
CAPACITY = 1 << 24  # bytes of a rank's place for rows
PROGRAMS = 2048  # at most in a call, and rows


class PeerMemory:
    """One rank's block: `table` is the device's address of the addresses of all ranks' blocks, in order.

    A block has `nbytes(size)` bytes, zeros at first.
    """

    def __init__(self, rank: int, size: int, table: int, device: torch.device, *owned: object) -> None:
        self.rank, self.size, self.table = rank, size, table
        self._owned = owned  # what has the memory
        self.calls = torch.zeros(PROGRAMS, dtype=torch.int32, device=device)  # so far, for every program alike
        self.layout = {"RANK": rank, "RANKS": size, "WORDS": WORDS, "CAPACITY": CAPACITY, "PROGRAMS": PROGRAMS}

    @classmethod
    def block(cls, size: int, device: torch.device) -> torch.Tensor:
        """A rank's memory; raises `RuntimeError` where none is left, or a GPU has none that others could reach."""
        import torch.distributed._symmetric_memory as symmetric

        return symmetric.empty(cls.nbytes(size), dtype=torch.uint8, device=device).zero_()

    @classmethod
    def of(cls, group: dist.ProcessGroup, block: torch.Tensor) -> "PeerMemory":
        """Made by all ranks of a group at the same time, each of its own block.

        Raises `RuntimeError` where they do not reach each other's.
        """
        import torch.distributed._symmetric_memory as symmetric

        handle = symmetric.rendezvous(block, group)
        rank, size = dist.get_rank(group), dist.get_world_size(group)
        memory = cls(rank, size, handle.buffer_ptrs_dev, block.device, block, handle)
        torch.cuda.synchronize(block.device)
        dist.barrier(group)  # all are zeros
        return memory

    @staticmethod
    def nbytes(size: int) -> int:
        return 2 * (size - 1) * (8 * WORDS + CAPACITY) + 4 * size * PROGRAMS


@triton.jit
def next_call(calls, program):
    """Its number; after `wait`."""
    return tl.load(calls + program) + 1


@triton.jit
def end_call(calls, call, program, programs, PROGRAMS: tl.constexpr):
    """Counts it for the programs of the next, whose number may be another: none but this one writes what this reads."""
    i = program + programs * tl.arange(0, PROGRAMS)
    tl.store(calls + i, call, mask=i < PROGRAMS)


@triton.jit
def _place(call, owner, sender, RANKS: tl.constexpr):
    """Of `sender` in the memory of `owner`."""
    return ((call & 1) * (RANKS - 1) + (sender - owner + RANKS) % RANKS - 1).to(tl.int64)


@triton.jit
def _block(table, rank):
    return tl.load(table.to(tl.pointer_type(tl.int64)) + rank)


@triton.jit
def _words(table, call, owner, sender, RANKS: tl.constexpr, WORDS: tl.constexpr):
    words = _block(table, owner).to(tl.pointer_type(tl.int64)) + _place(call, owner, sender, RANKS) * WORDS
    return tl.multiple_of(words, 16)  # of an address out of memory the compiler knows nothing; it is for wide accesses


@triton.jit
def send_words(values, at, inside, call, table, target, RANK: tl.constexpr, RANKS: tl.constexpr, WORDS: tl.constexpr):
    """Puts int32 `values` at the places `at` of this rank in the memory of `target`."""
    words = _words(table, call, target, RANK, RANKS, WORDS)
    tl.store(words + at, (call.to(tl.int64) << 32) | (values.to(tl.int64) & 0xFFFFFFFF), mask=inside)


@triton.jit
def receive_words(at, inside, call, table, source, RANK: tl.constexpr, RANKS: tl.constexpr, WORDS: tl.constexpr):
    """The int32 values that `source` sends in this call; waits for them."""
    words = _words(table, call, RANK, source, RANKS, WORDS)
    found = tl.load(words + at, mask=inside, other=0, volatile=True)
    while tl.sum((inside & ((found >> 32).to(tl.int32) != call)).to(tl.int32), 0) > 0:
        found = tl.load(words + at, mask=inside, other=0, volatile=True)
    return found.to(tl.int32)


@triton.jit
def _flag(table, owner, sender, row, RANKS: tl.constexpr, WORDS: tl.constexpr, CAPACITY: tl.constexpr):
    flags = _block(table, owner) + 2 * (RANKS - 1) * (8 * WORDS + CAPACITY)
    return flags.to(tl.pointer_type(tl.int32)) + row * RANKS + sender


@triton.jit
def _row(
    table, call, owner, sender, RANKS: tl.constexpr, WORDS: tl.constexpr, CAPACITY: tl.constexpr, DTYPE: tl.constexpr
):
    rows = _block(table, owner) + 16 * (RANKS - 1) * WORDS + _place(call, owner, sender, RANKS) * CAPACITY
    return tl.multiple_of(rows.to(tl.pointer_type(DTYPE)), 16)


@triton.jit
def send_row(
    values,
    at,
    inside,
    row,
    call,
    table,
    target,
    RANK: tl.constexpr,
    RANKS: tl.constexpr,
    WORDS: tl.constexpr,
    CAPACITY: tl.constexpr,
):
    """Puts `values` at the places `at` of this rank in the memory of `target`, and says so."""
    tl.store(_row(table, call, target, RANK, RANKS, WORDS, CAPACITY, values.dtype) + at, values, mask=inside)
    tl.debug_barrier()  # all threads have written
    tl.atomic_xchg(_flag(table, target, RANK, row, RANKS, WORDS, CAPACITY), call, sem="release", scope="sys")


@triton.jit
def receive_row(
    at,
    inside,
    row,
    call,
    table,
    source,
    DTYPE: tl.constexpr,
    RANK: tl.constexpr,
    RANKS: tl.constexpr,
    WORDS: tl.constexpr,
    CAPACITY: tl.constexpr,
):
    """What `source` sends of this row; waits for it."""
    flag = _flag(table, RANK, source, row, RANKS, WORDS, CAPACITY)
    while tl.atomic_add(flag, 0, sem="acquire", scope="sys") - call < 0:
        pass
    tl.debug_barrier()
    rows = _row(table, call, RANK, source, RANKS, WORDS, CAPACITY, DTYPE)
    return tl.load(rows + at, mask=inside, other=0, cache_modifier=".cg")
