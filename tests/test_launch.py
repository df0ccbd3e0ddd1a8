"""Stages on several processes: what comes back, and what is said of one that failed."""

import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
from processes import MPIEXEC, SECONDS

from trtbuild.errors import UserError
from trtbuild.launch import launch

STAGES = """
import os, signal, time
from contextlib import suppress
from pathlib import Path
import torch
from trtbuild.errors import UserError
from trtbuild.runtime.world import COMMANDS, world

def pids_of_rank_1(mine):
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has just ended
            if mine in (folder / "cmdline").read_bytes() and b"PMI_RANK=1" in (folder / "environ").read_bytes():
                yield int(folder.name)

def stage(engine_dir, does="nothing", text=None, output=None, dataset=None):
    assert isinstance(engine_dir, Path) and isinstance(output, Path | None)
    print("from rank", world().rank)
    if does == "refuse": raise UserError("no such thing; take another")
    if does == "wait":
        output.touch()
        time.sleep(600)
    if does == "break": raise ValueError("a bug")
    if does == "break rank 1":
        world().comm.send(("step",), 1, COMMANDS)  # of an engine that is not open
        time.sleep(600)
    if does == "kill rank 1":
        os.kill(max(pids_of_rank_1(str(engine_dir.parent).encode())), signal.SIGKILL)  # not the one that stays by
        time.sleep(600)
    threads = torch.get_num_threads(), os.environ.get("THREADS")
    return {"size": world().size, "threads": threads, "text": text, "output": str(output)} | dataset
"""


@pytest.fixture
def stage(tmp_path, monkeypatch):
    """A stage that other processes import too."""
    (tmp_path / "stages_of_a_test.py").write_text(STAGES)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])]))
    monkeypatch.syspath_prepend(tmp_path)
    import stages_of_a_test

    return stages_of_a_test.stage


def running(folder: Path) -> bool:
    """Whether a process of a call for this engine runs."""
    commands = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):  # it has just ended
            commands.append(path.read_bytes())
    return any(str(folder.with_name(".launch")).encode() in command for command in commands)


@pytest.fixture
def engine(tmp_path):
    """An engine's folder; nothing must be left beside it."""
    folder = tmp_path / "run" / "engine"
    folder.mkdir(parents=True)
    yield folder
    deadline = time.monotonic() + 60
    while running(folder) and time.monotonic() < deadline:  # what was killed has some last work
        time.sleep(0.1)
    assert not running(folder)
    assert [path.name for path in folder.parent.iterdir()] == ["engine"]


def test_one_rank_is_this_process():
    def stage(**arguments):
        return os.getpid(), arguments

    assert launch(1, stage, engine_dir=None, x=2) == (os.getpid(), {"engine_dir": None, "x": 2})


def test_ranks_are_processes_of_one_world(stage, engine, tmp_path, capfd):
    text = "é" * 200_000  # more than a command line holds
    arguments = {"text": text, "output": tmp_path / "x.jsonl", "dataset": {"name": "y"}}
    mpi = f"{MPIEXEC} -launcher fork -env THREADS {{threads}}"
    result = launch(2, stage, mpi=mpi, threads=3, engine_dir=engine, **arguments)
    assert result == {"size": 2, "threads": [3, "3"], "text": text, "output": str(tmp_path / "x.jsonl"), "name": "y"}
    assert capfd.readouterr().err == "from rank 0\n"


@pytest.mark.slow
def test_what_a_stage_refuses_is_one_line(stage, engine, capfd):
    with pytest.raises(UserError) as caught:
        launch(2, stage, engine_dir=engine, does="refuse")
    assert str(caught.value) == "no such thing; take another"
    assert capfd.readouterr().err == "from rank 0\n"  # the line is the caller's


@pytest.mark.slow
@pytest.mark.parametrize(
    ("does", "message"),
    [
        ("break", "ValueError: a bug"),
        ("break rank 1", f"rank 1 on {socket.gethostname()}: AttributeError: "),
        ("kill rank 1", f"rank 1 on {socket.gethostname()} was killed (signal 9)"),
    ],
)
def test_a_rank_that_fails_ends_the_others(stage, engine, does, message, capfd):
    start = time.monotonic()
    with pytest.raises(UserError) as caught:
        launch(4, stage, engine_dir=engine, does=does)
    assert str(caught.value).startswith(message)
    assert time.monotonic() - start < 600  # that rank 0 waits; most of it is four starts of Python
    assert ("Traceback" in capfd.readouterr().err) == (does != "kill rank 1")


LAUNCH = """
from pathlib import Path
from stages_of_a_test import stage
from trtbuild.launch import launch

launch(2, stage, engine_dir=Path("run/engine"), does="wait", output=Path("waits"))
"""


@pytest.mark.slow
@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_ranks_end_with_the_process_that_launched_them(stage, tmp_path, sent):
    (tmp_path / "run/engine").mkdir(parents=True)
    process = subprocess.Popen([sys.executable, "-c", LAUNCH], cwd=tmp_path, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + SECONDS
    while not (tmp_path / "waits").exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert running(tmp_path / "run/engine")
    process.send_signal(sent)
    assert process.wait(60)
    deadline = time.monotonic() + 60
    while running(tmp_path / "run/engine"):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_without_mpi(monkeypatch, engine):
    monkeypatch.setattr("shutil.which", lambda *_, **__: None)
    with pytest.raises(UserError) as caught:
        launch(2, print, engine_dir=engine)
    assert str(caught.value) == (
        "an engine of several ranks needs MPI, and mpiexec is not installed; "
        "'pip install trtbuild[mpi]' brings mpi4py and mpiexec"
    )


def test_a_launcher_that_is_not_there(engine):
    with pytest.raises(UserError, match="needs MPI, and no-such-srun is not installed; 'pip install"):
        launch(2, print, mpi="no-such-srun --mpi=pmi2", engine_dir=engine)
