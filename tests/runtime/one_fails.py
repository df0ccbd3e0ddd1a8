"""`trtbuild`, on one rank of which something goes wrong: started by `test_processes.py` and `failures.py`.

mpiexec -n 2 python tests/runtime/one_fails.py RANK HOW WHEN ARGUMENTS ...

HOW: killed, memory, raises. WHEN: import, start, prompt, generation: before MPI is reached, while the engine is loaded,
in the middle of the first prompts' step, and of a step of generation. Or WHEN is the check that finds a rank unlike
rank 0: version, config, file. With FAILED in the environment it writes there when it was.
"""

import os
import signal
import sys
import time
from pathlib import Path

from trtbuild.runtime.world import RANKS, stay_by

stay_by()
HERE = int(next(os.environ[name] for name in RANKS if name in os.environ))
RANK, HOW, WHEN = int(sys.argv.pop(1)), sys.argv.pop(1), sys.argv.pop(1)
BATCH = 2  # steps of more rows are prompts'
MEETING = {"prompt": 2, "generation": 7}  # in the middle of a step


def fail(*_: object, **__: object) -> None:
    if path := os.environ.get("FAILED"):
        Path(path).write_text(str(time.time()))
    if HOW == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    raise {"memory": MemoryError("torch wanted 3 GB"), "raises": ZeroDivisionError("a bug")}[HOW]


def failing(portable):
    """The method of an operation at which ranks meet, which fails in the middle of a step of the kind that is asked."""

    def call(self, step, x):
        if (len(x) > BATCH) == (WHEN == "prompt"):
            MEETING[WHEN] -= 1
            if MEETING[WHEN] == 0:
                fail()
        return portable(self, step, x)

    return call


if HERE == RANK and WHEN == "import":
    fail()

import trtbuild  # noqa: E402
from trtbuild.cli import main  # noqa: E402
from trtbuild.network.ops.collectives import AllReduce, Receive, Send  # noqa: E402
from trtbuild.runtime import together  # noqa: E402

if HERE == RANK:
    if WHEN in MEETING:
        for op in (AllReduce, Send, Receive):
            op.portable = failing(op.portable)
    if WHEN == "start":
        together.PortableEngine.load = fail
    if WHEN == "version":
        trtbuild.__version__ = "0.0"
    if WHEN == "config":
        together._sha256_of_config = lambda folder: "another"
    if WHEN == "file":
        together.rank_file = lambda rank, kind: "missing.safetensors"

main()
