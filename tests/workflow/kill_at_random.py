"""Kills the workflow at random moments, runs it again, and compares what it made with an undisturbed run's.

    .venv/bin/python tests/workflow/kill_at_random.py [KILLS=40] [SEED=0]

A chain is one folder in which the workflow is run and killed until a run ends by itself. Tiny dummy models are
calibrated, quantized, built, gated and scored. Prints each kill and the counts; exits with 1 if anything differs.
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

from conftest import CONFIG, QUANTIZED_RECIPES, RECIPES, Workspace
from published_models import TINY

from trtbuild.files import sha256

TARGETS = ("sq/rouge.json", "gptq/gate.json", "awq-int8kv/engine/config.json", "fp32/rouge.json", "hf/rouge.json")
TARGETS = tuple(f"results/tiny/{target}" for target in TARGETS)
SOURCE = {"dummy": {"config": TINY | {"max_position_embeddings": 2048}, "seed": 1}}
MODELS = {"tiny": {"source": SOURCE, "chat_template": "plain"}}
ALL, ONE = (
    "all processes",
    "one process",
)  # as a terminal, a batch system or a power cut does; as the kernel out of memory
WAYS = ((signal.SIGKILL, ALL), (signal.SIGINT, ALL), (signal.SIGTERM, ALL), (signal.SIGKILL, ONE))


def workspace(folder: Path) -> Workspace:
    return Workspace(folder, CONFIG | {"matrix": []}, MODELS, RECIPES | QUANTIZED_RECIPES)


def artifacts(folder: Path) -> dict[str, str]:
    """The sha256 of all that a run makes, but for logs, times and what is being written under a temporary name."""
    files = (path for path in (folder / "results").rglob("*") if path.is_file())
    names = {path: path.relative_to(folder) for path in files}
    return {
        str(name): sha256(path)
        for path, name in names.items()
        if "logs" not in name.parts and not any(part.startswith(".") for part in name.parts)
    }


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


def disturb(run: Workspace, seconds: float, way: tuple[signal.Signals, str], random: Random) -> int | None:
    """Runs the workflow; the exit code where it ends before `seconds` are over, else None, after killing it."""
    sent, whom = way
    with open(run.folder.with_suffix(".log"), "a") as log:
        command = run.command(*TARGETS)
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd=run.folder, start_new_session=True)
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        if whom == ALL:
            os.killpg(process.pid, sent)
        else:
            os.kill(random.choice(session(process.pid)), sent)
    process.wait(120)
    deadline = time.monotonic() + 120
    while session(process.pid):
        assert time.monotonic() < deadline, "processes of a killed run go on"
        time.sleep(0.05)
    return None


def main(kills: int = 40, seed: int = 0) -> int:
    os.environ["HF_HUB_OFFLINE"] = "1"
    random, counts, wrong, chains = Random(seed), Counter(), 0, 0
    folder = Path(tempfile.mkdtemp(prefix="trtbuild-kills-"))
    undisturbed = workspace(folder / "undisturbed")
    start = time.monotonic()
    undisturbed.succeed(*TARGETS)
    whole = time.monotonic() - start
    expected = artifacts(undisturbed.folder)
    print(f"undisturbed: {len(expected)} files in {whole:.0f} s; seed {seed}; {folder}", flush=True)
    while counts.total() < kills:
        chains += 1
        chain = workspace(folder / f"chain{chains}")
        code = None
        while code is None:
            way, seconds = random.choice(WAYS), random.uniform(0, whole / 2)
            code = disturb(chain, seconds, way, random)
            made = artifacts(chain.folder)
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
    print(f"{counts.total()} kills in {chains} chains: {dict(counts)}; {wrong} times something was wrong")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:])))
