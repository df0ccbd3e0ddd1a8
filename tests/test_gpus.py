"""GPUs are counted without CUDA, and jobs that run side by side never share one."""

import os
import signal
import subprocess
import sys
import time
from itertools import chain

import pytest

from trtbuild import gpus

TAKES = """
import os, sys, time
from trtbuild.gpus import taken

with taken(int(sys.argv[1])):
    print(os.environ["CUDA_VISIBLE_DEVICES"], flush=True)
    time.sleep(float(sys.argv[2]))
"""


@pytest.fixture(autouse=True)
def machine(tmp_path, monkeypatch):
    """Of four GPUs, as far as nvidia-smi tells."""
    program = tmp_path / "nvidia-smi"
    lines = "\\n".join(f"{i}, GPU-{i:04}" for i in range(4))
    program.write_text(
        f"#!/bin/sh\n[ \"$*\" = '--query-gpu=index,uuid --format=csv,noheader' ] && printf '{lines}\\n'\n"
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return program


def job(count: int, seconds: float) -> subprocess.Popen:
    command = [sys.executable, "-c", TAKES, str(count), str(seconds)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize(
    ("shown", "names"),
    [
        (None, ["GPU-0000", "GPU-0001", "GPU-0002", "GPU-0003"]),
        ("2,0", ["GPU-0002", "GPU-0000"]),
        ("GPU-0001, MIG-7", ["GPU-0001", "MIG-7"]),
        ("1,-1,2", ["GPU-0001"]),
        ("", []),
        ("NoDevFiles", []),
    ],
)
def test_visible(monkeypatch, shown, names):
    if shown is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", shown)
    assert gpus.visible() == names


def test_without_nvidia_smi(machine, monkeypatch):
    machine.write_text("#!/bin/sh\necho no driver\nexit 9\n")
    assert gpus.visible() == []
    machine.unlink()
    assert gpus.visible() == []
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5")  # as a cluster's scheduler says
    assert gpus.visible() == ["4", "5"]


def test_a_job_that_takes_all_sees_them_as_before(monkeypatch):
    with gpus.taken(4):
        assert "CUDA_VISIBLE_DEVICES" not in os.environ
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,3")
    with gpus.taken(3):  # its engine says that there are too few
        assert os.environ["CUDA_VISIBLE_DEVICES"] == "0,3"


def test_a_job_that_takes_none_asks_for_none(machine):
    """It still sees them, as TensorRT's builder must."""
    machine.write_text('#!/bin/sh\ntouch "$0.asked"\n')
    with gpus.taken(0):
        assert "CUDA_VISIBLE_DEVICES" not in os.environ
    assert not machine.with_name("nvidia-smi.asked").exists()


def test_no_two_jobs_share_one():
    jobs = [job(count, 600) for count in (2, 1, 1)]
    try:
        seen = [own.stdout.readline().strip().split(",") for own in jobs]
        assert [len(names) for names in seen] == [2, 1, 1]
        assert sorted(chain(*seen)) == ["GPU-0000", "GPU-0001", "GPU-0002", "GPU-0003"]
        late = job(2, 0)
        jobs.append(late)
        assert late.stderr.readline() == "waiting for 2 of 4 GPUs, which other jobs have\n"
        jobs[1].send_signal(signal.SIGKILL)  # which cannot give back what it has
        time.sleep(2)
        assert late.poll() is None
        jobs[2].kill()
        assert sorted(late.stdout.readline().strip().split(",")) == sorted(seen[1] + seen[2])
    finally:
        for own in jobs:
            own.kill()
            own.communicate()
