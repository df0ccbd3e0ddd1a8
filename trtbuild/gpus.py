"""The GPUs of this machine: how many there are, and which a job takes, so that no two jobs of a user share one.

Only jobs that run side by side on one machine need it; a cluster's scheduler shows each job its own, all of which it
then takes. A GPU is taken by a lock on a file, which ends with the process that holds it, whatever ends that.
"""

import fcntl
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

RETRY = 0.5, 1.5  # seconds, at random: two jobs that each have a part of what both want must not meet again


def visible() -> list[str]:
    """The GPUs that this process may use: UUIDs, or what stands in CUDA_VISIBLE_DEVICES where there is no nvidia-smi.

    Torch would need seconds to say so, and CUDA itself would take some of their memory.
    """
    present = _present()
    shown = os.environ.get("CUDA_VISIBLE_DEVICES")
    if shown is None:
        return list(present.values())
    names = []
    for name in map(str.strip, shown.split(",")):
        if not re.fullmatch(r"\d+|(GPU|MIG)-.+", name):  # CUDA, too, stops at the first that is none, such as -1
            break
        names.append(present.get(name, name))
    return names


@contextmanager
def taken(count: int) -> Iterator[None]:
    """Takes `count` of the visible GPUs, or all where there are fewer, and waits for them if need be.

    This process and its children see no others (CUDA_VISIBLE_DEVICES); CUDA must not have been used before. Who takes
    none is left as it is.
    """
    if not count:
        yield
        return
    names = visible()
    count = min(count, len(names))
    locks = _locks(names, count)
    if count < len(names):
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(locks)
    try:
        yield
    finally:
        for lock in locks.values():
            os.close(lock)


def _locks(names: list[str], count: int) -> dict[str, int]:
    """Locked files of `count` GPUs, by their names."""
    folder = Path(tempfile.gettempdir(), f"trtbuild-gpus-{os.getuid()}")
    folder.mkdir(mode=0o700, exist_ok=True)
    waiting = False
    while True:
        held: dict[str, int] = {}
        for name in names:
            if len(held) < count and (lock := _lock(folder / name)) is not None:
                held[name] = lock
        if len(held) == count:
            return held
        for lock in held.values():
            os.close(lock)
        if not waiting:
            print(f"waiting for {count} of {len(names)} GPUs, which other jobs have", file=sys.stderr, flush=True)
            waiting = True
        time.sleep(random.uniform(*RETRY))


def _lock(file: Path) -> int | None:
    lock = os.open(file, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        return None
    return lock


def _present() -> dict[str, str]:
    """UUIDs by index, as nvidia-smi lists them: those of a job's control group alone, where there is one."""
    query = ["nvidia-smi", "--query-gpu=index,uuid", "--format=csv,noheader"]
    try:
        listed = subprocess.run(query, capture_output=True, text=True)
    except OSError:
        return {}
    if listed.returncode:
        return {}
    return dict(line.split(", ") for line in listed.stdout.splitlines())
