"""Runs programs in forks of one process that has imported everything, with limits on time, memory and files.

`Server` starts this file as a program. It has a single thread, since only then a fork is safe.
"""

import contextlib
import gc
import importlib
import json
import os
import pkgutil
import resource
import runpy
import select
import signal
import subprocess
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
BYTES, FILE_BYTES = 2 << 30, 256 << 20
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "PYTHONPATH": str(REPOSITORY),
}
LAZY = (  # what commands import when they run
    *("gguf", "jinja2.sandbox", "jsonschema", "rouge_score.rouge_scorer", "sentencepiece.sentencepiece_model_pb2"),
    *("transformers.convert_slow_tokenizer", "transformers.integrations.ggml", "transformers.models.auto", "yaml"),
    *("transformers.models.llama.modeling_llama", "torch._dynamo", "snakemake.cli", "snakemake.iocontainers"),
)


@dataclass(frozen=True)
class Outcome:
    """How a program ended: its exit code, or a signal's number, negative; wall time in seconds; what it wrote."""

    code: int
    seconds: float
    stdout: str
    stderr: str


class Server:
    """`run` runs one program at a time in a folder, `seconds` at most."""

    def __init__(self, seconds: float = 10) -> None:
        command = [sys.executable, __file__, str(seconds)]
        environment = os.environ | ENVIRONMENT
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self.seconds = seconds
        self._process = subprocess.Popen(command, env=environment, text=True, **pipes)

    def run(self, folder: Path, program: str, *arguments: str) -> Outcome:
        """`trtbuild` or `snakemake` with words, a rule with the JSON of what its `snakemake` holds, `python` code."""
        print(json.dumps([str(folder), program, *arguments]), file=self._process.stdin, flush=True)
        code, seconds = json.loads(self._process.stdout.readline())
        said = ((folder / name).read_text(encoding="utf-8", errors="replace") for name in ("stdout", "stderr"))
        return Outcome(code, seconds, *said)

    def close(self) -> None:
        self._process.communicate()


def serve(seconds: float) -> None:
    import torch

    import trtbuild

    torch.set_num_threads(1)
    ours = [module.name for module in pkgutil.walk_packages(trtbuild.__path__, "trtbuild.")]
    for name in (*ours, *LAZY):
        if not name.endswith("__main__"):
            importlib.import_module(name)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    gc.collect()
    gc.freeze()
    for line in sys.stdin:
        print(json.dumps(limited(seconds, *json.loads(line))), file=answers, flush=True)


def limited(seconds: float, folder: str, program: str, *arguments: str) -> tuple[int, float]:
    """Exit code and seconds; whatever else the program started is killed with it."""
    start = time.monotonic()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            confine(folder)
            code = exit_code(program, arguments)
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(code)
    descriptor = os.pidfd_open(child)
    select.select([descriptor], [], [], seconds)
    os.close(descriptor)
    took = time.monotonic() - start
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status), took


def confine(folder: str) -> None:
    """A group of its own, limits, and streams that are files."""
    os.setsid()
    os.chdir(folder)
    os.environ["TMPDIR"] = f"{folder}/tmp"
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for i, name in enumerate(("stdout", "stderr"), 1):
        os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), i)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, 2 * (pages * resource.getpagesize() + BYTES,))
    resource.setrlimit(resource.RLIMIT_FSIZE, (FILE_BYTES, FILE_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def exit_code(program: str, arguments: tuple[str, ...]) -> int:
    """Of a program that is run as the interpreter would run it."""
    sys.argv[:] = [program, *arguments]
    try:
        if program in ("trtbuild", "snakemake"):
            importlib.import_module(f"{program}.cli").main()
        elif program == "python":
            exec(*arguments)
        else:
            from snakemake.iocontainers import Namedlist

            parts = {key: Namedlist(fromdict=value) for key, value in json.loads(*arguments).items()}
            given = type("Snakemake", (), parts | {"threads": 1, "log": ["log"], "resources": {}})
            runpy.run_path(f"{REPOSITORY}/workflow_scripts/{program}.py", {"snakemake": given})
    except SystemExit as error:
        if error.code is None or isinstance(error.code, int):
            return error.code or 0
        print(error.code, file=sys.stderr)
        return 1
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


if __name__ == "__main__":
    serve(float(sys.argv[1]))
