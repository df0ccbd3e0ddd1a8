"""The processes that MPI started together: rank 0 leads, the others obey."""

import atexit
import ctypes
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from typing import Any, NoReturn

from trtbuild.errors import UserError

# Where launchers say how many processes they started, and which one this is.
SIZES = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS")
RANKS = ("PMI_RANK", "PMIX_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK", "SLURM_PROCID")
COMMANDS = 71  # tag of the messages that rank 0 leads with
SPIN, LONGEST_NAP = 0.1, 1e-3  # seconds; most steps, long prompts' too, are shorter than the first
_in_mpi = -1  # where `stay_by` is told that this process has reached MPI
LAST_WORDS = 1  # seconds for the launcher to pass on what was printed, which it may forget when a rank aborts


class World:
    """All processes of a run, this one among them. There is one of it, `world()`."""

    def __init__(self) -> None:
        from mpi4py import MPI

        if _in_mpi >= 0:
            os.write(_in_mpi, b"!")
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
        """Raises `UserError` on all ranks where one has a problem: the first such rank's line."""
        problems = self.gather(problem)
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
            print(f"\nerror: {self}: {line}", file=sys.stderr, flush=True)  # below rank 0's progress bar
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


def stay_by() -> None:
    """Where a launcher started several processes: this one stays and waits, and a child of it goes on.

    One that is killed, as the kernel does when memory is short, cannot say so; and launchers let others wait for one
    that ends before it has reached MPI, unless a signal ends it. To be called before anything with threads is imported.
    """
    global _in_mpi
    if launched() == 1:
        return
    reached, _in_mpi = os.pipe()
    child = os.fork()
    if child == 0:
        end_with_parent(signal.SIGKILL)
        return
    os.close(_in_mpi)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # as others: the launcher sends it to both
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    waited_for = code > 0 and not os.read(reached, 1)
    if code < 0 or waited_for:
        rank = next((os.environ[name] for name in RANKS if name in os.environ), "?")
        how = f"was killed (signal {-code})" if code < 0 else f"ended with exit code {code} before it reached MPI"
        print(f"\nerror: rank {rank} on {socket.gethostname()} {how}", file=sys.stderr, flush=True)  # below a bar
        os.kill(os.getpid(), -code if code < 0 else signal.SIGTERM)
    os._exit(code)


def end_with_parent(sent: signal.Signals = signal.SIGTERM) -> None:
    """Has Linux end this process when its parent is killed, which cannot do it then."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, sent)  # PR_SET_PDEATHSIG
