"""`trtbuild doctor`: each part is tried, and what is missing has its price."""

import http.server
import os
import subprocess
import sys
import threading
from collections import namedtuple

import pytest
from typer.testing import CliRunner

import trtbuild.cli
from trtbuild import gpus

doctor = sys.modules["trtbuild.cli.doctor"]  # the module; the package has the command by this name


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def findings(*names, monkeypatch):
    """What is said of some parts: name -> (whether it works, what was found and what it costs)."""
    monkeypatch.setattr(doctor, "CHECKS", {name: doctor.CHECKS[name] for name in names})
    result = CliRunner().invoke(trtbuild.cli.app, ["doctor"], catch_exceptions=False)
    said = {}
    for line in result.stdout.splitlines():
        if line.startswith(("ok", "--")):
            state, name, found = line.split(maxsplit=2)
            said[name] = [state == "ok", found]
        else:
            said[name].append(line.strip())
    return result.exit_code, said


def test_all_that_this_suite_needs_is_found(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    code, said = findings(*doctor.CHECKS, monkeypatch=monkeypatch)
    assert code == 0
    assert list(said) == [*doctor.CHECKS]
    works = {name for name, (state, *_) in said.items() if state}
    assert works >= {"Python", "torch", "TensorRT", "MPI", "workflow", "Triton"}
    assert "two processes that find each other" in said["MPI"][1]
    assert said["disk"][1].endswith(f"GB free for {tmp_path / 'results'}")
    assert said["hub"] == [False, "HF_HUB_OFFLINE is set", doctor.COSTS["hub"]]
    assert all(len(rest) == (0 if state else 1) for state, _, *rest in said.values())


def test_nothing_runs_without_torch(tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('libcudart.so.13: cannot open\\nshared object file')")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-m", "trtbuild", "doctor"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert (done.returncode, done.stderr) == (1, "")
    lines = done.stdout.splitlines()
    at = lines.index("--  torch      libcudart.so.13: cannot open")
    assert lines[at + 1].strip() == doctor.COSTS["torch"]
    assert any(line.startswith("ok  workflow") for line in lines)


def test_gpus_that_torch_cannot_use(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(gpus, "visible", lambda: ["GPU-1", "GPU-2"])
    for cuda, why in (("13.0", "its driver is older than torch's CUDA"), (None, "install the build with CUDA")):
        monkeypatch.setattr("torch.version.cuda", cuda)
        _, said = findings("GPU", monkeypatch=monkeypatch)
        assert said["GPU"][1].startswith("nvidia-smi lists 2, torch ")
        assert said["GPU"][2] == why
    monkeypatch.setattr(gpus, "visible", list)
    assert findings("GPU", monkeypatch=monkeypatch)[1]["GPU"] == [False, "none", doctor.COSTS["GPU"]]


def test_processes_that_do_not_find_each_other(monkeypatch):
    """As those of an mpiexec of another MPI than mpi4py's: each is alone."""
    alone = ["sh", "-c", 'shift 2; "$@"; "$@"', "mpiexec"]
    monkeypatch.setattr(doctor, "launcher", lambda *_: alone)
    _, said = findings("MPI", monkeypatch=monkeypatch)
    assert said["MPI"] == [False, "two processes of sh do not find each other: 1", doctor.COSTS["MPI"]]


def test_no_tensorrt(monkeypatch):
    monkeypatch.setattr("trtbuild.engine.tensorrt_api.DISTRIBUTIONS", ("nonexistent_module",))
    from trtbuild.engine.tensorrt_api import api

    api.cache_clear()
    _, said = findings("TensorRT", monkeypatch=monkeypatch)
    api.cache_clear()
    assert said["TensorRT"][:2] == [False, "not installed"]
    assert "'pip install tensorrt-rtx-cu13'" in said["TensorRT"][2]


def test_little_of_everything(monkeypatch, tmp_path):
    usage = namedtuple("Usage", "total used free")
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: usage(10**12, 10**12 - 10**9, 10**9))
    monkeypatch.setattr(doctor, "_version", lambda name: None if name == "gguf" else "1")
    monkeypatch.setattr(doctor, "ENOUGH_MEMORY", 1e15)
    _, said = findings("disk", "workflow", "memory", monkeypatch=monkeypatch)
    assert said["disk"] == [False, f"1 GB free for {doctor.Path('results').resolve()}", doctor.COSTS["disk"]]
    assert said["workflow"] == [False, "without gguf", doctor.COSTS["workflow"]]
    assert said["memory"][0] is False


def test_the_hub_is_asked(monkeypatch):
    class Refuses(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            asked.append(self.path)
            self.send_error(404)

        def log_message(self, *_):
            pass

    asked = []
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with http.server.HTTPServer(("127.0.0.1", 0), Refuses) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setenv("HF_ENDPOINT", url)
        _, said = findings("hub", monkeypatch=monkeypatch)
        server.shutdown()
    assert said["hub"][0]
    assert said["hub"][1].startswith(url)
    assert asked == ["/"] or asked == [""]
    _, said = findings("hub", monkeypatch=monkeypatch)
    assert said["hub"][0] is False
    assert "Connection refused" in said["hub"][1]
