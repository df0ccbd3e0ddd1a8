"""Kills the workflow at random moments, runs it again at once, and compares what it made with an undisturbed run's.

    .venv/bin/python tests/workflow/kill_at_random.py [KILLS=40] [SEED=0] [slurm]

A chain is one folder in which the workflow is run and killed until a run ends by itself. Tiny dummy models are
calibrated, quantized, built, gated and scored. What has outlived a kill is left to itself: no output may be made by two
jobs at once (`journal.py`). With `slurm` jobs go to a private Slurm, and controllers alone are killed. All ways come as
often. Prints each kill and the counts; exits with 1 if anything differs.
"""

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from random import Random

sys.path.append(str(Path(__file__).parents[1]))
sys.path.append(str(Path(__file__).parents[1] / "slurm"))

from cluster import Cluster, prepare
from conftest import QUANTIZED_RECIPES, RECIPES
from journal import Journal
from private_slurm import private_slurm
from workspace import Workspace

TARGETS = ("sq/rouge.json", "gptq/gate.json", "awq-int8kv/engine/config.json", "fp32/rouge.json", "hf/rouge.json")
FEW = ("sq/engine/config.json", "fp32/perplexity.json")  # a job on a cluster takes seconds to begin and to be missed
# As a terminal, a batch system or a power cut does; the kernel out of memory; somebody who looked up a number.
ALL, ONE, CONTROLLER = "all processes", "one process", "the controller"
CONTROLLERS = ((signal.SIGKILL, CONTROLLER), (signal.SIGINT, CONTROLLER), (signal.SIGTERM, CONTROLLER))
WAYS = ((signal.SIGKILL, ALL), (signal.SIGINT, ALL), (signal.SIGTERM, ALL), (signal.SIGKILL, ONE), *CONTROLLERS)


def session(number: int) -> list[int]:
    """The processes that still run of a run that was started as a session of its own."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            state, _, _, owner = (path / "stat").read_text().rpartition(")")[2].split()[:4]
        except OSError:  # it has just ended
            continue
        if int(owner) == number and state != "Z":
            found.append(int(path.name))
    return found


def disturb(
    run: Workspace, targets: list[str], seconds: float, way: tuple[signal.Signals, str], random: Random
) -> int | None:
    """Runs the workflow; the exit code where it ends before `seconds` are over, else None, after killing it."""
    sent, whom = way
    with open(run.folder.with_suffix(".log"), "a") as log:
        process = run.begin(log, *targets)
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        if whom == ALL:
            os.killpg(process.pid, sent)
        else:
            os.kill(random.choice(session(process.pid)) if whom == ONE else process.pid, sent)
    process.wait(300)
    return None


def main(kills: int = 40, seed: int = 0, slurm: bool = False) -> int:
    os.environ["HF_HUB_OFFLINE"] = "1"
    folder = Path(tempfile.mkdtemp(prefix="trtbuild-kills-"))
    with ExitStack() as stack:
        if slurm:
            (folder / "slurm").mkdir()
            Cluster.slurm = stack.enter_context(private_slurm(folder / "slurm"))
        return kill(kills, seed, folder, slurm)


def kill(kills: int, seed: int, folder: Path, slurm: bool) -> int:
    random, counts, wrong, chains = Random(seed), Counter(), 0, 0
    kind, ways = (Cluster, CONTROLLERS) if slurm else (Workspace, WAYS)
    targets = [f"results/tiny/{target}" for target in (FEW if slurm else TARGETS)]
    journal = Journal(folder / "journal")

    def workspace(name: str) -> Workspace:
        run = prepare(kind, folder / name)
        run.recipes, run.journal = RECIPES | QUANTIZED_RECIPES, journal
        return run

    undisturbed = workspace("undisturbed")
    start = time.monotonic()
    subprocess.run(undisturbed.command(*targets), cwd=undisturbed.folder, check=True, capture_output=True)
    whole = time.monotonic() - start
    expected = undisturbed.artifacts()
    print(f"undisturbed: {len(expected)} files in {whole:.0f} s; seed {seed}; {folder}", flush=True)
    while counts.total() < kills:
        chains += 1
        chain = workspace(f"chain{chains}")
        code = None
        while code is None:
            way, seconds = ways[counts.total() % len(ways)], random.uniform(0, whole / 2)
            code = disturb(chain, targets, seconds, way, random)
            made = chain.artifacts()
            differ = sorted(name for name, value in made.items() if expected.get(name) != value)
            if code is None:
                name = f"{way[0].name} to {way[1]}"
                counts[name] += 1
                print(f"  {name} after {seconds:.1f} s: {len(made)} files, {differ or 'all equal'}", flush=True)
            wrong += bool(differ)
        left = [str(path) for path in chain.results.rglob(".*.tmp")]
        ended = code == 0 and made == expected and not left
        wrong += not ended
        print(f"chain {chains}: exit code {code}, {'all files equal' if ended else [*differ, *left]}", flush=True)
    begun, beside = journal.count("start"), journal.count("overlap")
    print(f"{begun} jobs have begun, {beside} of them beside another one of the same output")
    print(f"{counts.total()} kills in {chains} chains: {dict(counts)}; {wrong} times something was wrong")
    return bool(wrong or beside)


if __name__ == "__main__":
    numbers = [int(argument) for argument in sys.argv[1:] if argument.isdecimal()]
    sys.exit(main(*numbers, slurm="slurm" in sys.argv[1:]))
