"""`make` makes `.venv`: one line where Python is too old, and a new one where another Python made it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# A Python of some version, which answers as one does, but makes an environment of files that only say they ran.
PYTHON = """#!/bin/sh
case "$1" in
-c) exec {real} -c 'import sys; sys.version_info = (3, {minor}, 1); exec(sys.argv[1])' "$2" ;;
-V) echo Python 3.{minor}.1 ;;
*)  echo "venv by 3.{minor}: $*"
    mkdir -p .venv/bin
    cp "$0" .venv/bin/python
    printf '#!/bin/sh\\necho "$0 $*"\\n' > .venv/bin/pip
    chmod +x .venv/bin/pip
    cp .venv/bin/pip .venv/bin/pytest ;;
esac
"""


@pytest.fixture
def make(tmp_path):
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)

    def run(minor, *arguments):
        python = tmp_path / f"python3.{minor}"
        python.write_text(PYTHON.format(real=sys.executable, minor=minor))
        python.chmod(0o755)
        command = ["make", f"PYTHON=./{python.name}", *arguments]
        outer = {name for name in os.environ if name.startswith(("MAKE", "MFLAGS"))}  # of `make test`
        own = {name: value for name, value in os.environ.items() if name not in outer}
        return subprocess.run(command, cwd=tmp_path, env=own, capture_output=True, text=True, timeout=600)

    return run


def test_a_python_that_is_too_old(make):
    """Said in one line before anything is made; a newer one then goes on."""
    done = make(10, "test-fast")
    assert done.returncode == 2
    said = [line for line in (done.stdout + done.stderr).splitlines() if not line.startswith("make: ***")]
    assert said == ["error: ./python3.10 is Python 3.10, too old; call make with 3.11 or later: make PYTHON=python3.12"]
    done = make(11, "test-fast")
    assert done.returncode == 0, done.stderr
    assert "venv by 3.11" in done.stdout
    assert "pytest -n 2" in done.stdout


def test_an_environment_of_another_python_is_made_anew(make, tmp_path):
    def venvs(*arguments):
        return [line for line in make(*arguments).stdout.splitlines() if line.startswith("venv by")]

    first = ["venv by 3.11: -m venv --clear .venv"]
    assert venvs(11, ".venv/installed") == first
    assert venvs(12, ".venv/installed") == []  # nothing to do
    assert venvs(11, "-B", ".venv/installed") == ["venv by 3.11: -m venv .venv"]  # other versions are installed into it
    (tmp_path / ".venv/installed").unlink()
    assert venvs(12, ".venv/installed") == ["venv by 3.12: -m venv --clear .venv"]
