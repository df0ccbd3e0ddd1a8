"""An evaluation stage on an engine of several ranks: a process each, which MPI starts and introduces to the others.

    mpiexec -n 2 python -m mpi4py -m trtbuild.launch FOLDER

`FOLDER` holds the call; there rank 0 leaves what the stage returned, or the first rank that failed says why. The other
ranks do not return from the stage (`runtime.open.open_engine`).
"""

import importlib
import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from trtbuild.errors import UserError, one_line
from trtbuild.files import read_json, scratch_beside, write_json

CALL, RESULT, FAILURE = "call.json", "result.json", "failure.json"
PATHS = ("checkpoint_dir", "engine_dir", "output")


def launch(ranks: int, stage: Callable, **arguments: object) -> object:
    """What `stage` returns for its arguments: called in this process, or in as many as there are `ranks`.

    `stage` is a function of a module, and its arguments, `engine_dir` among them, are what JSON holds, or paths. This
    process's threads are shared out. A `UserError` of the stage is raised here; `RuntimeError` says which rank failed
    in another way.
    """
    if ranks == 1:
        return stage(**arguments)
    import torch

    with scratch_beside(arguments["engine_dir"]) as folder:
        paths = {name: str(value) for name in PATHS if (value := arguments.get(name))}
        call = {
            "module": stage.__module__,
            "name": stage.__name__,
            "arguments": arguments | paths,
            "threads": max(1, torch.get_num_threads() // ranks),
        }
        write_json(folder / CALL, call)
        program = [sys.executable, "-m", "mpi4py", "-m", "trtbuild.launch", str(folder)]
        code = subprocess.run([_mpiexec(), "-n", str(ranks), *program], check=False).returncode
        if (folder / FAILURE).exists():
            failure = read_json(folder / FAILURE)
            raise UserError(failure["line"]) if failure["outside"] else RuntimeError(failure["line"])
        if code:
            raise UserError(f"one of {ranks} ranks was killed (exit code {code}); above, mpiexec says where")
        return read_json(folder / RESULT)["value"]


def _mpiexec() -> str:
    """The launcher that was installed with this Python, or else the system's."""
    places = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    found = shutil.which("mpiexec", path=places)
    if not found or importlib.util.find_spec("mpi4py") is None:
        raise UserError(
            f"an engine of several ranks needs MPI, and {'mpi4py' if found else 'mpiexec'} is not installed; "
            "'pip install trtbuild[mpi]' brings both"
        )
    return found


def main() -> None:
    """One rank of a call."""
    from mpi4py import MPI

    signal.signal(signal.SIGINT, signal.SIG_DFL)  # ends it without a word; mpiexec ends the others
    folder = Path(sys.argv[1])
    try:
        _call(folder)
    except Exception as error:
        _report(error, MPI.COMM_WORLD.rank, folder / FAILURE)
        MPI.COMM_WORLD.Abort(2)


def _call(folder: Path) -> None:
    import torch

    call = read_json(folder / CALL)
    torch.set_num_threads(call["threads"])
    stage = getattr(importlib.import_module(call["module"]), call["name"])
    arguments = {name: Path(x) if name in PATHS and x else x for name, x in call["arguments"].items()}
    write_json(folder / RESULT, {"value": stage(**arguments)})


def _report(error: Exception, rank: int, path: Path) -> None:
    """Writes to `path` why a rank failed, unless another one was first: it is the cause."""
    line = outside = one_line(error)
    if outside is None:
        traceback.print_exc()
        line = f"{type(error).__name__}: {error}"
    if not isinstance(error, UserError):
        line = f"rank {rank} on {socket.gethostname()}: {line}"
    own = path.with_suffix(f".{rank}")
    write_json(own, {"line": line, "outside": outside is not None})
    with suppress(FileExistsError):
        path.hardlink_to(own)


if __name__ == "__main__":
    main()
