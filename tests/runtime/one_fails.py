"""`trtbuild`, on one rank of which something goes wrong: started by `test_processes.py`.

mpiexec -n 2 python tests/runtime/one_fails.py RANK HOW ARGUMENTS ...
"""

import os
import signal
import sys

import trtbuild
from trtbuild.__main__ import main
from trtbuild.network.ops.collectives import AllReduce, Receive, Send
from trtbuild.runtime import together
from trtbuild.runtime.world import world

RANK, HOW = int(sys.argv.pop(1)), sys.argv.pop(1)
MEETINGS = 7  # it gets so far: into the middle of a decode step


def fail() -> None:
    if HOW == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if HOW == "memory":
        raise MemoryError("torch wanted 3 GB")
    if HOW == "raises":
        raise ZeroDivisionError("a bug")


def fail_to_load(*_):
    raise {"loads": MemoryError("torch wanted 3 GB"), "broken": ZeroDivisionError("a bug")}[HOW]


def failing(portable):
    def call(self, step, x):
        global MEETINGS
        MEETINGS -= 1
        if MEETINGS == 0:
            fail()
        return portable(self, step, x)

    return call


if world().rank == RANK:
    for op in (AllReduce, Send, Receive):
        op.portable = failing(op.portable)
    if HOW == "version":
        trtbuild.__version__ = "0.0"
    if HOW == "config":
        together._sha256_of_config = lambda folder: "another"
    if HOW == "file":
        together.rank_file = lambda rank, kind: "missing.safetensors"
    if HOW in ("loads", "broken"):
        together.PortableEngine.load = fail_to_load

main()
