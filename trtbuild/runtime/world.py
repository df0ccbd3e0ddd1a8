"""The processes that MPI started together: rank 0 leads, the others obey."""

import os
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache

from trtbuild.errors import UserError

SIZES = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS")  # launchers say how many
COMMANDS = 71  # tag of the messages that rank 0 leads with
SPIN, LONGEST_NAP = 2e-3, 1e-3  # seconds


class World:
    """All processes of a run, this one among them. There is one of it, `world()`."""

    def __init__(self) -> None:
        os.environ.setdefault("MPIR_CVAR_SUPPRESS_ABORT_MESSAGE", "1")  # of MPICH; `fail` says what there is to say
        from mpi4py import MPI

        self._mpi, self.comm = MPI, MPI.COMM_WORLD
        self.in_place = MPI.IN_PLACE
        self.rank, self.size = self.comm.rank, self.comm.size
        self.host = socket.gethostname()
        self.stuck = False  # whether rank 0 left off in the middle of what all do

    def group(self, ranks: Sequence[int]):
        """A communicator of some ranks, all of which call this."""
        return self.comm.Create_group(self.comm.group.Incl(list(ranks)))

    def share(self, value: object) -> object:
        """Rank 0's value, on every rank."""
        return self.comm.bcast(value)

    def gather(self, value: object) -> list | None:
        """Every rank's value, in order, on rank 0; None elsewhere."""
        return self.comm.gather(value)

    @property
    def local_rank(self) -> int:
        """Which of its host's processes it is."""
        return self.comm.Split_type(self._mpi.COMM_TYPE_SHARED, self.rank).rank

    def tell(self, message: object) -> None:
        """Rank 0's next word to all others, each of which must `hear` it."""
        for rank in range(1, self.size):
            self.comm.send(message, rank, COMMANDS)

    @contextmanager
    def busy(self) -> Iterator[None]:
        """Around what all ranks do together: an error in it leaves the others waiting."""
        self.stuck = True
        yield
        self.stuck = False

    def hear(self) -> object:
        """Rank 0's next word. A rank that waits long leaves its core to others."""
        start, nap = time.monotonic(), 0.0
        while not self.comm.iprobe(0, COMMANDS):
            if time.monotonic() - start > SPIN:
                nap = min(LONGEST_NAP, nap + 2e-5)
            time.sleep(nap)
        return self.comm.recv(source=0, tag=COMMANDS)

    def fail(self, line: str) -> None:
        """Ends all processes, whatever they wait for, with one line that names this one."""
        print(f"error: rank {self.rank} on {self.host}: {line}", file=sys.stderr, flush=True)
        self.comm.Abort(2)


@cache
def world() -> World | None:
    """The world, if an MPI launcher started this process together with others.

    MPI itself is asked only where the environment names a launcher, since without one it may not even start. Raises
    `UserError` where mpi4py is missing.
    """
    sizes = [os.environ[name] for name in SIZES if name in os.environ]
    if not (any(size != "1" for size in sizes) if sizes else "PMIX_RANK" in os.environ):
        return None
    try:
        return World()
    except ImportError as error:
        raise UserError(
            f"several processes were started, which need mpi4py ({error}); 'pip install trtbuild[mpi]' brings it"
        ) from error
