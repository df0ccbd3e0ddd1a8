"""Starting real MPI processes, which never outlive a test."""

import os
import signal
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parent
MPIEXEC = Path(sys.executable).parent / "mpiexec"
SECONDS = 900  # a start takes a second or two, and many times that on busy cores


def mpiexec(ranks: int, *arguments: object, seconds: float = SECONDS, **environment: str):
    """Runs `python ARGUMENTS` in so many processes; raises `TimeoutExpired` where they do not end."""
    command = [str(MPIEXEC), "-n", str(ranks), sys.executable, *map(str, arguments)]
    path = os.pathsep.join(map(str, (TESTS.parent, TESTS, TESTS / "decoder")))
    given = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"} | environment
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=given, start_new_session=True
    ) as process:
        try:
            out, err = process.communicate(timeout=seconds)
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)  # which ends the ranks as well
                try:
                    process.wait(10)
                finally:
                    if process.poll() is None:
                        os.killpg(process.pid, signal.SIGKILL)
    return subprocess.CompletedProcess(command, process.returncode, out, err)
