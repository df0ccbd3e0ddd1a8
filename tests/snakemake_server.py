"""Runs Snakemake in forks of one process that has imported it, which takes longer than most runs of the tests.

`run` starts this file as a program. It has a single thread, since only then a fork is safe.
"""

import atexit
import json
import os
import signal
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]


def run(arguments: list[str], folder: Path, environment: dict[str, str], seconds: int) -> subprocess.CompletedProcess:
    """`snakemake ARGUMENTS` in a folder; `stdout` holds what it wrote to either stream.

    After so many seconds a signal ends it.
    """
    server = _server()
    with tempfile.NamedTemporaryFile("r", encoding="utf-8") as said:
        request = list(map(str, arguments)), str(folder), environment, seconds, said.name
        print(json.dumps(request), file=server.stdin, flush=True)
        code = int(server.stdout.readline())
        return subprocess.CompletedProcess(["snakemake", *arguments], code, said.read())


@cache
def _server() -> subprocess.Popen:
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    one_thread = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    server = subprocess.Popen([sys.executable, __file__], env=os.environ | one_thread, text=True, **pipes)
    atexit.register(server.communicate)
    return server


def fork(arguments: list[str], folder: str, environment: dict[str, str], seconds: int, said: str) -> int:
    """The exit code; negative, the signal. The child ends as Snakemake does."""
    if child := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(os.open(said, os.O_WRONLY | os.O_APPEND), 1)
    os.dup2(1, 2)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv[1:] = arguments
    signal.alarm(seconds)
    sys.exit(snakemake.cli.main())


if __name__ == "__main__":
    sys.path[0] = str(REPOSITORY)
    import jsonschema  # noqa: F401
    import smart_open  # noqa: F401
    import snakemake.cli

    import trtbuild.evaluation.plan
    import trtbuild.folder_lock
    import trtbuild.rehearsal
    import trtbuild.tokenizer.chat_template
    import trtbuild.workflow  # noqa: F401

    snakemake.cli.get_argument_parser()  # which imports plugins
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        print(fork(*json.loads(line)), file=answers, flush=True)
