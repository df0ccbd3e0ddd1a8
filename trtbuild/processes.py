"""Processes that wrote something down, and whether they still run: a number alone is soon another process's."""

import os
import socket
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path


@dataclass(frozen=True)
class Process:
    """A process, wherever it runs: `machine` tells boots and containers of a host apart, `start` users of a number."""

    host: str
    machine: str
    pid: int
    start: int

    @staticmethod
    def current() -> "Process":
        return Process(socket.gethostname(), machine(), os.getpid(), start_of(os.getpid()) or 0)

    def runs(self) -> bool | None:
        """Whether it does; None where that cannot be seen from here."""
        return start_of(self.pid) == self.start if self.machine == machine() else None

    def __str__(self) -> str:
        return f"pid {self.pid} on {self.host}"


@cache
def machine() -> str:
    """What has numbers of processes of its own: a boot of a host, or a container on it."""
    if sys.platform != "linux":
        return socket.gethostname()
    boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return f"{boot} {Path('/proc/self/ns/pid').readlink()}"


def start_of(pid: int) -> int | None:
    """When a process began, in clock ticks since the boot (0 where there is no /proc); None if none runs."""
    if sys.platform != "linux":
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return None
        except PermissionError:  # another user's
            return 0
        return 0
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return int(fields[18]) if state not in "ZX" else None  # proc(5): field 3 is the state, field 22 the start
