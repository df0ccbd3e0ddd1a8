"""An evaluation stage on an engine of several ranks: a process each, which MPI starts and introduces to the others.

    mpiexec -n 2 python -m trtbuild.launch FOLDER
    srun --mpi=pmi2 --kill-on-bad-exit=1 -n 16 python -m trtbuild.launch FOLDER       # on several hosts

`FOLDER`, which all hosts see, holds the call. Rank 0 makes it, and leaves there what it returned; the others do what
its engine is asked.
"""

import importlib
import importlib.util
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trtbuild.errors import UserError, one_line
from trtbuild.files import read_json, scratch_beside, write_json
from trtbuild.runtime.world import end_with_parent, stay_by

CALL, RESULT = "call.json", "result.json"
PATHS = ("checkpoint_dir", "engine_dir", "output", "hidden_states")


def launch(ranks: int, stage: Callable, *, mpi: str = "", threads: int = 1, **arguments: Any) -> Any:
    """What `stage` returns for its arguments: called in this process, or by the first of as many as there are `ranks`.

    `stage` is a function of a module, and its arguments, `engine_dir` among them, are what JSON holds, or paths. `mpi`
    starts ranks, such as `srun --mpi=pmi2 --cpus-per-task={threads}` (default: `mpiexec`); it gets `-n` and the
    program. `threads` are each rank's. What ends a rank is a `UserError`, with a traceback before it where it lies
    within the program.
    """
    if ranks == 1:
        return stage(**arguments)
    with scratch_beside(Path(arguments["engine_dir"]).with_name("launch")) as folder:
        paths = {name: str(arguments[name]) for name in PATHS if name in arguments}
        call = {
            "module": stage.__module__,
            "name": stage.__name__,
            "arguments": arguments | paths,
            "threads": threads,
        }
        write_json(folder / CALL, call)
        program = [sys.executable, "-P", "-m", "trtbuild.launch", str(folder)]
        code, said = _run([*launcher(mpi, threads), "-n", str(ranks), *program])
        if code:
            raise UserError(said or f"its {ranks} processes ended with exit code {code}")
        return read_json(folder / RESULT)["value"]


def _run(program: list[str]) -> tuple[int, str]:
    """Runs a program with its output copied to standard error, but for the first line that begins with `error: `.

    Returns its exit code and this line, which says why: other ranks' errors follow from it.
    """
    said, rest = "", b""
    with subprocess.Popen(
        program,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        preexec_fn=end_with_parent,
    ) as run:
        assert run.stdout
        try:
            while chunk := os.read(run.stdout.fileno(), 1 << 16):
                *lines, rest = re.split(rb"(?<=[\r\n])", rest + chunk)  # a progress bar's end in a carriage return
                for line in lines:
                    if line.startswith(b"error: ") and not said:
                        said = line.decode(errors="replace").removeprefix("error: ").strip()
                    elif not line.startswith(b"Abort("):  # MPICH's word for it
                        os.write(2, line)
        except BaseException:
            run.terminate()
            raise
    os.write(2, rest)
    return run.returncode, said


def launcher(command: str, threads: int) -> list[str]:
    """A command line's words; `mpiexec` is the one that was installed with this Python, or else the system's."""
    program, *options = shlex.split(command.replace("{threads}", str(threads))) or ["mpiexec"]
    found = shutil.which(program, path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))
    if not found or importlib.util.find_spec("mpi4py") is None:
        raise UserError(
            f"an engine of several ranks needs MPI, and {'mpi4py' if found else program} is not installed; "
            "'pip install trtbuild[mpi]' brings mpi4py and mpiexec"
        )
    return [found, *options]


def main() -> None:
    """A rank's part of a call."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # ends it without a word; mpiexec ends the others
    stay_by()
    import torch

    from trtbuild.runtime.together import led

    folder = Path(sys.argv[1])
    call = read_json(folder / CALL)
    torch.set_num_threads(call["threads"])
    try:
        with led():
            stage = getattr(importlib.import_module(call["module"]), call["name"])
            arguments = {name: Path(value) if name in PATHS else value for name, value in call["arguments"].items()}
            write_json(folder / RESULT, {"value": stage(**arguments)})
    except Exception as error:
        if (line := one_line(error)) is None:
            traceback.print_exc()
            line = f"{type(error).__name__}: {error}"
        print(f"error: {line}", file=sys.stderr, flush=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
