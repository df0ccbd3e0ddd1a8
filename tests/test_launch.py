"""Stages that several processes run: what comes back, and what is said of one that failed."""

import os
import socket
import time

import pytest
import torch

from trtbuild.errors import UserError
from trtbuild.launch import launch

STAGES = """
import os, signal, sys
from pathlib import Path
from mpi4py import MPI
import torch
from trtbuild.errors import UserError

def stage(engine_dir, does="nothing", text=None, output=None, dataset=None):
    assert isinstance(engine_dir, Path) and isinstance(output, Path | None)
    world = MPI.COMM_WORLD
    if world.rank == 1:
        if does == "refuse": raise UserError("no such thing; take another")
        if does == "break": raise ValueError("a bug")
        if does == "kill": os.kill(os.getpid(), signal.SIGKILL)
    ranks = world.gather((world.rank, world.size, torch.get_num_threads()))
    if world.rank:
        sys.exit()
    return {"ranks": ranks, "text": text, "output": str(output), "dataset": dataset}
"""


@pytest.fixture
def stage(tmp_path, monkeypatch):
    """A stage that other processes import too."""
    (tmp_path / "stages_of_a_test.py").write_text(STAGES)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])]))
    monkeypatch.syspath_prepend(tmp_path)
    import stages_of_a_test

    return stages_of_a_test.stage


@pytest.fixture
def engine(tmp_path):
    """An engine's folder; nothing must be left beside it."""
    folder = tmp_path / "run" / "engine"
    folder.mkdir(parents=True)
    yield folder
    assert [path.name for path in folder.parent.iterdir()] == ["engine"]


def test_one_rank_is_this_process():
    def stage(**arguments):
        return os.getpid(), arguments

    assert launch(1, stage, engine_dir=None, x=2) == (os.getpid(), {"engine_dir": None, "x": 2})


def test_ranks_are_processes_of_one_world(stage, engine, tmp_path):
    before, text = torch.get_num_threads(), "é" * 200_000  # more than a command line holds
    try:
        torch.set_num_threads(5)
        given = {"text": text, "output": tmp_path / "x.jsonl", "dataset": {"name": "y"}}
        result = launch(2, stage, engine_dir=engine, **given)
    finally:
        torch.set_num_threads(before)
    assert result == given | {"ranks": [[0, 2, 2], [1, 2, 2]], "output": str(tmp_path / "x.jsonl")}


def test_what_a_rank_refuses_is_one_line_while_others_wait(stage, engine):
    with pytest.raises(UserError) as caught:
        launch(2, stage, engine_dir=engine, does="refuse")
    assert str(caught.value) == "no such thing; take another"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("does", "kind", "message"),
    [
        ("break", RuntimeError, f"rank 1 on {socket.gethostname()}: ValueError: a bug"),
        ("kill", UserError, "one of 4 ranks was killed (exit code 9); above, mpiexec says where"),
    ],
)
def test_a_rank_that_fails_ends_the_others(stage, engine, does, kind, message):
    start = time.monotonic()
    with pytest.raises(kind) as caught:
        launch(4, stage, engine_dir=engine, does=does)
    assert str(caught.value) == message
    assert time.monotonic() - start < 60  # most of it is four starts of Python


def test_without_mpi(monkeypatch, engine):
    monkeypatch.setattr("shutil.which", lambda *_, **__: None)
    with pytest.raises(UserError) as caught:
        launch(2, print, engine_dir=engine)
    assert str(caught.value) == (
        "an engine of several ranks needs MPI, and mpiexec is not installed; 'pip install trtbuild[mpi]' brings both"
    )
