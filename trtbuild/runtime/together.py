"""An engine of several ranks over its processes: rank 0 runs a program, the others do what its sessions are asked."""

import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from hashlib import sha256
from os import cpu_count
from pathlib import Path
from typing import NoReturn

import torch

import trtbuild
from trtbuild.decoder.mapping import Mapping
from trtbuild.engine.config import CONFIG_FILE, rank_file, read_config
from trtbuild.engine.portable import PortableEngine
from trtbuild.errors import UserError, one_line
from trtbuild.network.ranks import Ranks
from trtbuild.runtime.ranks import MpiRanks, NcclRanks
from trtbuild.runtime.ranks_session import RanksSession
from trtbuild.runtime.world import World, launched, world


@contextmanager
def led() -> Iterator[None]:
    """Around a program that a launcher may have started several times: only rank 0 comes in, the others `obey` there.

    What rank 0 raises ends all: the others with exit code 2, or all at once where they wait in the middle of a step,
    with one line that names it. Without a launcher it is as if it were not there.
    """
    here = world()
    if here and here.rank:
        obey(here)
    try:
        yield
    except Exception as error:
        if here and here.stuck:
            _fail(here, error)
        if here:
            here.end(2)
        raise


def obey(here: World) -> NoReturn:
    """Does what rank 0's sessions are asked, until rank 0 ends. An error ends all processes."""
    session: RanksSession | None = None
    try:
        while True:
            match here.hear():
                case ("end", code):
                    here.close()
                    raise SystemExit(code)
                case ("open", *arguments):
                    session = None  # its memory, before the next engine's
                    with suppress(UserError):  # which rank 0 has, too
                        session = open_rank(here, *arguments)
                case (name, *arguments):
                    session.obey(name, *arguments)  # type: ignore[union-attr]  # without one it is an error like others
    except Exception as error:
        _fail(here, error)


def _fail(here: World, error: Exception) -> NoReturn:
    line = one_line(error)
    if line is None:
        traceback.print_exception(error)
    here.fail(line or f"{type(error).__name__}: {' '.join(str(error).split())}")


def check_processes(folder: Path, mapping: Mapping) -> None:
    """Raises `UserError` unless there is a process for every rank."""
    here = world()
    ranks, processes = mapping.world_size, here.size if here else 1
    if processes == ranks:
        return
    if processes == 1 < launched():
        raise UserError(
            f"the launcher started {launched()} processes, but each finds itself alone: it does not fit to the MPI "
            "that mpi4py uses; start them with that MPI's mpiexec"
        )
    has = f"{folder} is an engine of {ranks} {'ranks' if ranks > 1 else 'rank'}, {processes} process"
    if processes == 1:
        raise UserError(f"{has} was started; start it with 'mpiexec -n {ranks} trtbuild ...'")
    start = f"with 'mpiexec -n {ranks}'" if ranks > 1 else "without mpiexec"
    raise UserError(f"{has}es were started; start it {start}")


def open_together(folder: Path, device: torch.device) -> RanksSession:
    """Rank 0's session over an engine, which the others open as well.

    Raises `UserError`, naming rank and host, where they do not find the same engine, version or kind of device.
    """
    here = world()
    assert here, "check_processes found it"
    folder = folder.absolute()
    fingerprint = trtbuild.__version__, _sha256_of_config(folder)
    with here.busy():
        here.tell(("open", folder, device.type, fingerprint))
        return open_rank(here, folder, device.type, fingerprint)


def open_rank(here: World, folder: Path, kind: str, fingerprint: tuple[str, str]) -> RanksSession:
    """What every rank does at once; `UserError` on all where one cannot."""
    problem, place, engine = None, None, None
    device = torch.device("cpu")
    try:
        _check_alike(folder, fingerprint)
        mapping = Mapping(**read_config(folder)["mapping"], rank=here.rank)
        if kind == "cuda":
            device, place = _own_gpu(here)
    except Exception as error:
        problem = _told(here, error)
    here.agree(problem)
    here.agree(_shared_gpu(here, here.gather(place)) if kind == "cuda" else None)
    if kind == "cuda":
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(max(1, min(torch.get_num_threads(), (cpu_count() or 1) // here.local_size)))
    try:
        engine = PortableEngine.load(folder / rank_file(here.rank, "portable"), device, show=here.rank == 0)
    except Exception as error:
        problem = _told(here, error)
    here.agree(problem)
    assert engine
    return RanksSession(engine, ranks_between(here, mapping, device), here, mapping)


@cache
def ranks_between(here: World, mapping: Mapping, device: torch.device) -> Ranks:
    """Made once for a layout and device, by all ranks at the same time."""
    if device.type == "cpu":
        own = MpiRanks(here)
        here.closing.append(own.forget_sent)
        return own
    ranks = NcclRanks(here, mapping, device)
    here.closing.insert(0, ranks.close)  # after all sessions
    return ranks


def _told(here: World, error: Exception) -> str:
    """A line for the other ranks. An error within the program is not for them; rank 0's mistakes are the user's."""
    if (line := one_line(error)) is None:
        raise error
    return f"{here}: {line}" if here.rank or not isinstance(error, UserError) else line


def _check_alike(folder: Path, fingerprint: tuple[str, str]) -> None:
    version, config = fingerprint
    if trtbuild.__version__ != version:
        raise UserError(f"it has trtbuild {trtbuild.__version__}, rank 0 has {version}; install the same everywhere")
    if _sha256_of_config(folder) != config:
        raise UserError(f"{folder / CONFIG_FILE} is not rank 0's; all ranks need the same engine folder")


def _sha256_of_config(folder: Path) -> str:
    return sha256((folder / CONFIG_FILE).read_bytes()).hexdigest()


def _own_gpu(here: World) -> tuple[torch.device, str]:
    """A rank's device, and what tells it from all others: the launcher shows a rank its own alone, or all of them."""
    count = torch.cuda.device_count()
    if not count:
        raise UserError("torch finds no GPU; give every rank one, or use --device cpu")
    index = here.local_rank if here.local_rank < count else 0
    return torch.device("cuda", index), f"{here.host} {torch.cuda.get_device_properties(index).uuid}"


def _shared_gpu(here: World, places: list[str] | None) -> str | None:
    """What is wrong, on rank 0, where two ranks have one GPU."""
    owners: dict[str, int] = {}
    for rank, place in enumerate(places or ()):
        if (other := owners.setdefault(place, rank)) != rank:
            return f"ranks {other} and {rank} have one GPU ({place}); every rank needs one of its own"
    return None
