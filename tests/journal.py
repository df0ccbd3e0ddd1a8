"""When each job of a workflow began and ended, written down by none of the programs that are tested.

Every rule's output goes through `tee` to its log, and the pipe is open until the last process that a job started has
ended. So a program of that name, first in PATH, writes down both, and holds a lock of the kernel's between them.
"""

import os
from pathlib import Path

TEE = """#!/bin/sh
# A lock by the log's name, which this shell and the real program have until both have ended.
exec 9>>"{folder}/$(echo "$PWD/$1" | tr / :).lock"
flock --nonblock 9 || echo "overlap $1" >>"{folder}/journal"
echo "start $1" >>"{folder}/journal"
PATH="{path}" tee "$@"
echo "end $1" >>"{folder}/journal"
"""


class Journal:
    """A journal in `folder`, of all runs that have its `environment`."""

    def __init__(self, folder: Path) -> None:
        self.file, programs = folder / "journal", folder / "programs"
        programs.mkdir(parents=True)
        self.file.touch()
        program = programs / "tee"
        program.write_text(TEE.format(folder=folder, path=os.environ["PATH"]), encoding="utf-8")
        program.chmod(0o755)
        self.environment = {"PATH": f"{programs}{os.pathsep}{os.environ['PATH']}"}

    def count(self, event: str, log: str = "") -> int:
        """How many jobs (of a log) have begun (`start`) or ended (`end`), or began beside another (`overlap`)."""
        lines = self.file.read_text(encoding="utf-8").splitlines()
        return sum(line.startswith(f"{event} ") and line.endswith(log) for line in lines)
