"""Runs the workflow's jobs one by one and prints what each asked for and used: the largest resident set, and seconds.

    .venv/bin/python tests/workflow/resources_of_rules.py FOLDER results/rehearsal/llama-7b/gptq/rouge.json ...

`FOLDER` is where it runs, on this machine's CPUs, with this repository's configuration. What is there is left.
"""

import os
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import yaml

REPOSITORY = Path(__file__).parents[2]
INTERVAL = 0.1  # seconds; the largest resident set is the kernel's, and is read until the process ends
SCRIPT = re.compile(rb"[^\0 ]*python[^\0 ]*\0[^\0]*/scripts/tmp[^/]*\.(\w+)\.py\0")


def prepare(folder: Path) -> None:
    shutil.copytree(REPOSITORY / "config", folder / "config", dirs_exist_ok=True)
    file = folder / "config/config.yaml"
    config = yaml.safe_load(file.read_text())
    config["evaluation"]["device"] = "cpu"
    file.write_text(yaml.safe_dump(config, sort_keys=False))


def processes() -> dict[int, tuple[int, bytes, int]]:
    """Of all of them: the parent, the command line, and bytes of the largest resident set."""
    found = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            status = dict(line.split(":", 1) for line in (path / "status").read_text().splitlines() if ":" in line)
            used = int(status.get("VmHWM", "0 kB").split()[0]) * 1024
            found[int(path.name)] = int(status["PPid"]), (path / "cmdline").read_bytes(), used
        except OSError:  # it has just ended
            continue
    return found


def below(pid: int, now: dict[int, tuple[int, bytes, int]]) -> list[int]:
    """A process and its descendants."""
    children = [other for other, (parent, _, _) in now.items() if parent == pid]
    return [pid, *(other for child in children for other in below(child, now))]


def watch(root: int, jobs: dict[int, dict], ended: threading.Event) -> None:
    """Fills in, by process, what every script below `root` and its ranks used."""
    while not ended.wait(INTERVAL):
        now = processes()
        for pid in below(root, now):
            if match := SCRIPT.match(now.get(pid, (0, b"", 0))[1]):
                job = jobs.setdefault(pid, {"rule": match[1].decode(), "start": time.time(), "used": {}})
                job["end"] = time.time()
                for other in below(pid, now):
                    job["used"][other] = max(now[other][2], job["used"].get(other, 0))


def asked(output: str) -> list[tuple[str, dict[str, str]]]:
    """Name, wildcards included, and resources of every job, in the order in which they ran."""
    found = []
    for block in re.split(r"^(?=(?:local)?rule \w+:$)", output, flags=re.MULTILINE)[1:]:
        rule = re.match(r"(?:local)?rule (\w+):", block)[1]
        if resources := re.search(r"^    resources: (.*)$", block, re.MULTILINE):
            log = re.search(r"^    log: (\S+)", block, re.MULTILINE)
            values = dict(re.findall(r"(\w+)=([^,]*)", resources[1]))
            found.append((f"{rule} {Path(log[1]).parent.parent.relative_to('results')}" if log else rule, values))
    return found


def main(folder: str, *targets: str) -> None:
    prepare(Path(folder))
    command = [sys.executable, "-m", "snakemake", "-s", str(REPOSITORY / "Snakefile"), "--directory", folder]
    command += ["--profile", str(REPOSITORY / "profiles/default"), "--cores", "1", "--keep-going", *targets]
    jobs: dict[int, dict] = {}
    ended = threading.Event()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ) as run:
        watcher = threading.Thread(target=watch, args=(run.pid, jobs, ended))
        watcher.start()
        output = run.stdout.read()
    ended.set()
    watcher.join()
    if run.returncode:
        print(output[-3000:])
    print(f"{'job':60} {'asked MB':>9} {'used MB':>9} {'factor':>7} {'minutes':>8} {'seconds':>8}")
    for (name, resources), job in zip(asked(output), sorted(jobs.values(), key=lambda x: x["start"]), strict=False):
        used = sum(job["used"].values()) / 1e6
        seconds, megabytes = job["end"] - job["start"], float(resources["mem_mb"])
        row = f"{name:60} {megabytes:9.0f} {used:9.0f} {megabytes / used:7.2f} {resources['runtime']:>8} {seconds:8.1f}"
        print(row + ("" if name.startswith(job["rule"].removesuffix("_hf")) else f" {job['rule']}?"))


if __name__ == "__main__":
    main(*sys.argv[1:])
