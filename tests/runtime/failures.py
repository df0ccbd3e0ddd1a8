"""Ranks of which one fails: whether all end soon, with one line that names it, and leave nothing half-written.

    .venv/bin/python tests/runtime/failures.py --repeat 20

Every rank of 2 (tensor parallel) and of 4 processes (two stages of two) is killed, raises, or runs out of memory; while
it is imported, while engines are loaded, in the middle of the prompts' step and of a step of generation. Prints a
table; exits with 1 where a promise was broken.
"""

import argparse
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

sys.path[:0] = map(str, (Path(__file__).parents[2], Path(__file__).parents[1]))
from processes import mpiexec  # noqa: E402
from published_models import TINY  # noqa: E402

LAYOUTS = {2: (2, 1), 4: (2, 2)}
HOW, WHEN = ("killed", "raises", "memory"), ("import", "start", "prompt", "generation")
SAID = {
    "killed": "was killed (signal 9)",
    "raises": "ZeroDivisionError: a bug",
    "memory": "out of memory (torch wanted 3 GB); use a smaller model or batch, or a larger machine",
}
SECONDS = 10  # in which all must have ended, where cores are idle


@dataclass(frozen=True)
class Case:
    ranks: int
    when: str
    how: str
    rank: int

    def line(self) -> str:
        """What is said of it."""
        if self.when == "import" and self.how == "raises":
            return f"error: rank {self.rank} on {socket.gethostname()} ended with exit code 1 before it reached MPI"
        return f"error: rank {self.rank} on {socket.gethostname()}{':' * (self.how != 'killed')} {SAID[self.how]}"


def cases(ranks: int) -> Iterator[Case]:
    for when in WHEN:
        for how in HOW:
            for rank in range(ranks):
                if when != "import" or (rank == 1 and how != "memory"):
                    yield Case(ranks, when, how, rank)


def make(folder: Path) -> Path:
    """A tiny checkpoint, and its engines of 2 and 4 ranks beside it."""
    from trtbuild.checkpoint.sources import make_checkpoint
    from trtbuild.decoder.mapping import Mapping
    from trtbuild.engine.build import build_engine_dir
    from trtbuild.engine.config import BuildLimits

    make_checkpoint({"dummy": {"config": TINY, "seed": 1}}, folder / "checkpoint")
    limits = BuildLimits(max_batch_size=2, max_input_len=512, max_output_len=16)
    for ranks, layout in LAYOUTS.items():
        given = {"model": "tiny", "recipe": {"dtype": "float32"}, "limits": limits, "engines": ["portable"]}
        engine = folder / f"engine{ranks}"
        build_engine_dir(folder / "checkpoint", engine, mapping=Mapping(*layout), extrapolate_positions=True, **given)
    return folder


def alive(folder: Path) -> list[str]:
    """The processes whose command line names a folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):  # it has just ended
            if str(folder).encode() in path.read_bytes() and int(path.parent.name) != os.getpid():
                found.append(path.parent.name)
    return found


def run(case: Case, folder: Path, limit: float = SECONDS) -> tuple[float, str]:
    """After how many seconds all had ended, and what is wrong with that."""
    work = folder / "work"
    work.mkdir()
    failed = folder / "failed"
    failed.unlink(missing_ok=True)
    command = ["summarize", "--engine-dir", folder / f"engine{case.ranks}", "--checkpoint-dir", folder / "checkpoint"]
    options = ["--samples", 2, "--max-output-len", 8, "--output", work / "summaries.jsonl"]
    program = Path(__file__).with_name("one_fails.py")
    try:
        done = mpiexec(case.ranks, program, case.rank, case.how, case.when, *command, *options, FAILED=str(failed))
    except subprocess.TimeoutExpired:
        return float("inf"), "hangs"
    while alive(folder):
        time.sleep(0.02)
    took = time.time() - float(failed.read_text())
    errors = re.findall(r"^error: .*", done.stderr, re.MULTILINE)
    wrong = [
        f"took {took:.1f} s" if took > limit else "",
        f"said {errors}" if errors != [case.line()] else "",
        "exit code 0" if done.returncode == 0 else "",
        f"left {left}" if (left := [path.name for path in work.iterdir()]) else "",
    ]
    work.rmdir() if not left else work.rename(folder / f"left{time.time()}")
    return took, "; ".join(filter(None, wrong))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeat", type=int, default=1, help="of every case")
    parser.add_argument("--ranks", type=int, nargs="*", default=[*LAYOUTS], choices=[*LAYOUTS])
    options = parser.parse_args()
    took: dict[tuple, list[float]] = {}
    wrong: Counter[str] = Counter()
    try:
        with tempfile.TemporaryDirectory() as name:
            folder = make(Path(name))
            for i in range(options.repeat):
                for case in (case for ranks in options.ranks for case in cases(ranks)):
                    seconds, problem = run(case, folder)
                    took.setdefault((case.ranks, case.when, case.how), []).append(seconds)
                    if problem:
                        wrong[f"{case}: {problem}"] += 1
                        print(f"{case}: {problem}", flush=True)
                print(f"repetition {i + 1} of {options.repeat} ({time.strftime('%H:%M')})", flush=True)
    except KeyboardInterrupt:
        print("interrupted")
    print_table(took)
    print("\n" + ("\n".join(f"{n} x {problem}" for problem, n in wrong.items()) or "no promise was broken"))
    return bool(wrong)


def print_table(took: dict[tuple, list[float]]) -> None:
    print("\n| processes | while | a rank | runs | all ended after, s: median | longest |\n" + "| --- " * 6 + "|")
    for (ranks, when, how), seconds in took.items():
        middle = sorted(seconds)[len(seconds) // 2]
        print(f"| {ranks} | {when} | {how} | {len(seconds)} | {middle:.2f} | {max(seconds):.2f} |")


if __name__ == "__main__":
    sys.exit(main())
