"""The processes that MPI started together: rank 0 leads, the others obey."""

import atexit
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from typing import Any, NoReturn

from trtbuild.errors import UserError

SIZES = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS")  # launchers say how many
COMMANDS = 71  # tag of the messages that rank 0 leads with
SPIN, LONGEST_NAP = 1e-2, 1e-3  # seconds; a step of most models is shorter than the first
LAST_WORDS = 1  # seconds for the launcher to pass on what was printed, which it may forget when a rank aborts


class World:
    """All processes of a run, this one among them. There is one of it, `world()`."""

    def __init__(self) -> None:
        from mpi4py import MPI

        self._mpi, self.comm = MPI, MPI.COMM_WORLD
        self.in_place = MPI.IN_PLACE
        self.rank, self.size = self.comm.rank, self.comm.size
        self.host = socket.gethostname()
        local = self.comm.Split_type(MPI.COMM_TYPE_SHARED, self.rank)
        self.local_rank, self.local_size = local.rank, local.size  # among the processes of its host
        self.stuck = False  # whether rank 0 left off in the middle of what all do
        self.closing: list[Callable[[], object]] = []  # what to do before a process ends
        if self.rank == 0 < self.size - 1:
            atexit.register(self.end)

    def group(self, ranks: Sequence[int]) -> Any:
        """A communicator of some ranks, all of which call this."""
        return self.comm.Create_group(self.comm.group.Incl(list(ranks)))

    def share(self, value: Any) -> Any:
        """Rank 0's value, on every rank."""
        return self.comm.bcast(value)

    def gather(self, value: object) -> list | None:
        """Every rank's value, in order, on rank 0; None elsewhere."""
        return self.comm.gather(value)

    def agree(self, problem: str | None) -> None:
        """Raises `UserError` on all ranks where one has a problem: a line that names the first such rank."""
        problems = self.gather(problem and (problem if self.rank == 0 else f"{self}: {problem}"))
        if (line := self.share(problems and next(filter(None, problems), None))) is not None:
            self.stuck = False  # nobody waits for anybody
            raise UserError(line)

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

    def hear(self) -> Any:
        """Rank 0's next word. A rank that waits long leaves its core to others."""
        start, nap = time.monotonic(), 0.0
        while not self.comm.iprobe(0, COMMANDS):
            if time.monotonic() - start > SPIN:
                nap = min(LONGEST_NAP, nap + 2e-5)
            time.sleep(nap)
        return self.comm.recv(source=0, tag=COMMANDS)

    def end(self, code: int = 0) -> None:
        """Rank 0's last word: the others close what they have and exit with `code`."""
        if self.stuck:
            self.fail("ended in the middle of a step")
        atexit.unregister(self.end)
        self.tell(("end", code))
        self.close()

    def close(self) -> None:
        while self.closing:
            self.closing.pop()()

    def fail(self, line: str) -> NoReturn:
        """Ends all processes, whatever they wait for, with one line that names this one."""
        with suppress(OSError):
            sys.stdout.flush()
            print(f"error: {self}: {line}", file=sys.stderr, flush=True)
        time.sleep(LAST_WORDS)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # MPI has a line of its own
        self.comm.Abort(2)
        os._exit(2)  # Abort may return before the launcher has ended this process

    def __str__(self) -> str:
        return f"rank {self.rank} on {self.host}"


def launched() -> int:
    """How many processes the launcher started, if it says so; 1 without one."""
    sizes = [int(os.environ[name]) for name in SIZES if os.environ.get(name, "").isdecimal()]
    return max(sizes, default=2 if "PMIX_RANK" in os.environ else 1)


@cache
def world() -> World | None:
    """The world, if a launcher started this process together with others.

    MPI itself is asked only then, since without a launcher it may not even start. Raises `UserError` without mpi4py.
    """
    if launched() == 1:
        return None
    try:
        return World()
    except (ImportError, RuntimeError) as error:
        raise UserError(
            f"several processes were started, which need mpi4py and MPI ({error}); 'pip install trtbuild[mpi]' brings "
            "them, or start one process"
        ) from error
