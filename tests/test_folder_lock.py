"""Who holds a folder: living controllers, killed ones, those of other machines; and the jobs that outlive them."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from trtbuild import folder_lock
from trtbuild.errors import UserError
from trtbuild.folder_lock import RUN, held, local_job, recorded
from trtbuild.processes import start_of

HOLD = """
import sys, time
from pathlib import Path
from trtbuild.folder_lock import held
with held(Path(sys.argv[1]), print):
    print("held", flush=True)
    time.sleep(600)
"""
# As HOLD for a moment; an advisory lock of the kernel's says whether it was alone.
CONTEND = """
import fcntl, sys, time
from pathlib import Path
from trtbuild.errors import UserError
from trtbuild.folder_lock import held
time.sleep(max(0, float(sys.argv[2]) - time.time()))
for _ in range(20):
    try:
        with held(Path(sys.argv[1]), print), open(sys.argv[1] + ".alone", "w") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            print("held", flush=True)
            time.sleep(0.01)
    except UserError:
        time.sleep(0.002)
"""


@pytest.fixture
def start():
    """Starts Python programs, and ends them."""
    started = []

    def run(program: str, *arguments: object, **options) -> subprocess.Popen:
        command = [sys.executable, "-c", program, *map(str, arguments)]
        started.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True, **options))
        return started[-1]

    yield run
    for process in started:
        process.kill()
        process.communicate()


@pytest.fixture
def records(tmp_path, monkeypatch):
    """The folder of records, in a working folder."""
    monkeypatch.chdir(tmp_path)
    return folder_lock.RECORDS


def of_elsewhere(path: Path) -> None:
    """Makes a record one of a process of another machine."""
    record = json.loads(path.read_text())
    record["process"] |= {"host": "node17", "machine": "another boot"}
    path.write_text(json.dumps(record))


def said_by(records, **options) -> list[str]:
    """What is said while the folder is taken and left."""
    said: list[str] = []
    with held(records, said.append, **options):
        pass
    return said


def test_a_second_controller_is_told_who_has_the_folder(records, start):
    first = start(HOLD, records)
    assert first.stdout.readline() == "held\n"
    with pytest.raises(UserError) as caught, held(records, print):
        pass
    assert re.fullmatch(
        rf"another snakemake runs in this folder: pid {first.pid} on \S+, since \d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d; "
        "wait for it, or end it and start again",
        str(caught.value),
    )
    assert [path.name for path in records.iterdir()] == ["controller.1.json"]


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_a_folder_is_free_when_its_controller_has_ended(records, start, sent):
    first = start(HOLD, records, stderr=subprocess.DEVNULL)
    assert first.stdout.readline() == "held\n"
    first.send_signal(sent)
    if sent != signal.SIGKILL:  # killed, it may be a zombie as well
        first.wait()
    deadline = time.monotonic() + 120
    while start_of(first.pid) is not None:
        assert time.monotonic() < deadline
    assert said_by(records) == []
    assert [path.name for path in records.iterdir()] == ["controller.2.json"]


def test_a_number_that_another_process_has_been_given_is_no_holder(records, start):
    first = start(HOLD, records)
    assert first.stdout.readline() == "held\n"
    record = json.loads((records / "controller.1.json").read_text())
    record["process"]["start"] -= 1
    (records / "controller.1.json").write_text(json.dumps(record))
    assert said_by(records) == []


def test_many_at_once_hold_a_folder_one_after_another(records, start):
    """And not all of them are refused: what a killed one left is taken by somebody."""
    left = start(HOLD, records)
    assert left.stdout.readline() == "held\n"
    left.kill()
    left.wait()
    contenders = [start(CONTEND, records, time.time() + 1) for _ in range(6)]
    out = [contender.communicate(timeout=300)[0] for contender in contenders]
    assert [contender.returncode for contender in contenders] == [0] * 6
    assert sum(text.count("held") for text in out) >= 6


@pytest.mark.parametrize("beats", [True, False])
def test_a_holder_on_another_host_lives_while_its_record_is_touched(records, monkeypatch, beats):
    monkeypatch.setattr(folder_lock, "SILENT", 2)
    said_by(records)
    path = records / "controller.1.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"ended": False}))
    of_elsewhere(path)
    stop = threading.Event()

    def beat() -> None:
        while not stop.wait(0.2):
            os.utime(path)

    thread = threading.Thread(target=beat)
    if beats:
        thread.start()
    try:
        if beats:
            with pytest.raises(UserError, match=rf"pid {os.getpid()} on node17, since "), held(records, print):
                pass
        else:
            (line,) = said_by(records)
            assert line.startswith(f"another snakemake has run in this folder, pid {os.getpid()} on node17, since ")
    finally:
        stop.set()
        if beats:
            thread.join()


def test_an_empty_record_is_of_a_controller_that_was_killed_at_once(records, monkeypatch):
    monkeypatch.setattr(folder_lock, "SILENT", 1)
    records.mkdir(parents=True)
    (records / "controller.7.json").touch()
    said_by(records)
    assert [path.name for path in records.iterdir()] == ["controller.8.json"]


def test_jobs_that_outlived_their_controller_are_waited_for(records, monkeypatch):
    monkeypatch.setattr(folder_lock, "PATIENCE", 0.2)
    with held(records, print) as run:
        pass
    begun, end, order = threading.Event(), threading.Event(), []

    def job() -> None:
        with recorded("calibration results/m/c.npz", run, "1234"):
            begun.set()
            end.wait(300)
            order.append("job")

    thread = threading.Thread(target=job)
    thread.start()
    begun.wait()
    said: list[str] = []

    def say(line: str) -> None:
        said.append(line)
        end.set()

    with held(records, say):
        order.append("controller")
    thread.join()
    assert order == ["job", "controller"]
    assert said == [
        "waiting for jobs that outlived their snakemake: calibration results/m/c.npz (Slurm job 1234). "
        "What they make is kept; to begin at once, end them: scancel 1234"
    ]


@pytest.mark.parametrize(("known", "waits"), [("1234", True), ("99", False), (None, True)])
def test_a_job_of_another_host_lives_as_long_as_slurm_says_so(records, tmp_path, monkeypatch, known, waits):
    """Where Slurm says nothing, as long as its record is touched."""
    monkeypatch.setattr(folder_lock, "SILENT", 1.5)
    squeue = tmp_path / "bin" / "squeue"
    squeue.parent.mkdir()
    # It ends two calls later.
    says = f"echo >>calls; [ $(wc -l <calls) -gt 3 ] || echo {known}" if known else "exit 1"
    squeue.write_text(f"#!/bin/sh\n{says}\n")
    squeue.chmod(0o755)
    monkeypatch.setenv("PATH", f"{squeue.parent}:{os.environ['PATH']}")
    with held(records, print) as run, recorded("gate", run, "1234"):
        (kept,) = (path.read_text() for path in records.glob("job.*"))
    path = records / "job.node17.5.json"
    path.write_text(kept)
    of_elsewhere(path)
    begun = time.monotonic()
    said_by(records)
    assert (time.monotonic() - begun > 0.2) == waits
    assert not path.exists()


def test_queued_jobs_of_an_ended_run_are_cancelled(records, tmp_path, monkeypatch):
    with held(records, print, slurm=True) as run:
        pass
    programs = tmp_path / "bin"
    programs.mkdir()
    (programs / "squeue").write_text(f"#!/bin/sh\nprintf '7 {run}_x\\n8 other\\n9 {run}_y\\n'\n")
    (programs / "scancel").write_text('#!/bin/sh\necho "$@" >cancelled\n')
    for program in programs.iterdir():
        program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    assert said_by(records) == ["cancelling queued jobs of the snakemake that ended, to submit them again: 7 9"]
    assert Path("cancelled").read_text() == "--state=PENDING 7 9\n"


def test_a_folder_that_cannot_be_written_to(records):
    records.parent.write_text("")
    with pytest.raises(UserError, match=r"cannot write .snakemake/trtbuild: Not a directory"), held(records, print):
        pass


def test_a_job_that_comes_too_late_does_nothing(records):
    with held(records, print) as run, recorded("gate", run):
        pass
    too_late = pytest.raises(UserError, match="gate: the snakemake that started this job has ended")
    with held(records, print), too_late, recorded("gate", run):
        raise AssertionError
    assert [path.name for path in records.iterdir()] == ["controller.2.json"]


def test_a_local_job_is_interrupted_when_its_controller_is_killed(records, start, monkeypatch):
    """In the middle of what it does; what it was writing is removed, and so is its record."""
    controller = start(HOLD, records)
    assert controller.stdout.readline() == "held\n"
    run = json.loads((records / "controller.1.json").read_text())["run"]
    job = start(
        "import time\nfrom trtbuild.folder_lock import local_job\n"
        "with local_job('gate'):\n  try:\n    print('begun', flush=True); time.sleep(600)\n"
        "  except KeyboardInterrupt:\n    print('interrupted')",
        env=os.environ | {RUN: run},
    )
    assert job.stdout.readline() == "begun\n"
    assert len(list(records.glob("job.*"))) == 1
    controller.kill()
    controller.wait()
    assert job.communicate(timeout=300)[0] == "interrupted\n"
    assert list(records.glob("job.*")) == []


def test_a_controller_that_was_taken_for_dead_ends(records, monkeypatch, request):
    monkeypatch.setattr(folder_lock, "BEAT", 0.05)
    said: list[str] = []
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGTERM, before))
    with pytest.raises(KeyboardInterrupt), held(records, said.append):  # noqa: PT012
        (records / "controller.2.json").write_text("")
        time.sleep(300)
    assert said == ["another snakemake has taken this folder, which has just begun; this one ends"]


def test_a_job_without_a_controller_has_no_record(records, monkeypatch):
    monkeypatch.delenv(RUN, raising=False)
    with local_job("gate"):
        assert not records.exists()
