"""Ends controllers at random moments while their jobs are on a Slurm, starts others, and compares with a local run.

    .venv/bin/python tests/slurm/kill_controllers.py [TIMES=10] [SEED=0]

Controllers are killed (SIGKILL), told to end (SIGTERM) and interrupted as by Ctrl-C, so many times each. A chain is one
folder in which controllers are started and ended until one comes to its end by itself. Prints each end and the counts;
exits with 1 where a file differs, a job ran twice at the same time, or a temporary one is left.
"""

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from random import Random

sys.path.append(str(Path(__file__).parents[1]))

from conftest import Cluster, prepare
from journal import Journal
from private_slurm import missing, private_slurm
from workspace import Workspace

TARGETS = [f"results/tiny/{run}" for run in ("fp16/rouge.json", "int8kv@tp2/perplexity.json", "gptq/gate.json")]
WAYS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)


def main(times: int = 10, seed: int = 0) -> int:
    if reason := missing():
        sys.exit(reason)
    os.environ["HF_HUB_OFFLINE"] = "1"
    folder = Path(tempfile.mkdtemp(prefix="trtbuild-controllers-"))
    local = prepare(Workspace, folder / "local")
    local.succeed(*TARGETS)
    expected = local.artifacts()
    random, counts, wrong, chains, whole = Random(seed), Counter(), 0, 0, 60.0
    print(f"a local run: {len(expected)} files; seed {seed}; {folder}", flush=True)
    (folder / "slurm").mkdir()
    with private_slurm(folder / "slurm") as Cluster.slurm:
        while left := [way for way in WAYS if counts[way.name] < times]:
            chains += 1
            chain, journal = prepare(Cluster, folder / f"chain{chains}"), Journal(folder / f"journal{chains}")
            chain.journal = journal
            code, began = None, time.monotonic()
            while code is None:
                way, seconds = random.choice(left), random.uniform(0, whole / 2)
                with chain.started(*TARGETS) as controller:
                    try:
                        code = controller.wait(seconds)
                    except subprocess.TimeoutExpired:
                        running = len(Cluster.slurm.jobs("R"))
                        os.kill(controller.pid, way)
                        controller.wait()
                        counts[way.name] += 1
                        print(f"  {way.name} after {seconds:.0f} s, {running} jobs run", flush=True)
                differ = sorted(name for name, value in chain.artifacts().items() if expected.get(name) != value)
                wrong += bool(differ)
            whole = max(whole, (time.monotonic() - began) / 2)
            files = [str(path) for path in chain.results.rglob(".*.tmp")]
            overlaps = journal.count("overlap")
            equal = code == 0 and chain.artifacts() == expected and not files and not overlaps
            wrong += not equal
            print(
                f"chain {chains}: exit code {code}, {journal.count('start')} jobs, {overlaps} beside another, "
                f"{'all files equal' if equal else [*differ, *files, chain.said]}",
                flush=True,
            )
    print(f"{counts.total()} ends in {chains} chains: {dict(counts)}; {wrong} times something was wrong")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:])))
