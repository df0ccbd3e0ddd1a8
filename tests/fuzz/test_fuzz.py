"""300 damaged inputs of all kinds, always the same ones; `make fuzz` runs others."""

import time
from pathlib import Path

import pytest
from fuzzer import Fuzzer, how_it_ended, search
from server import Outcome, Server

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def fuzzer(tmp_path_factory):
    fuzzer = Fuzzer(tmp_path_factory.mktemp("fuzz"))
    yield fuzzer
    fuzzer.close()


def test_damaged_inputs(fuzzer):
    failures = {}
    search(fuzzer, 300, 0, lambda case, failure: failure and failures.setdefault(failure.kind, str(case)))
    assert failures == {}


@pytest.mark.parametrize(
    ("code", "stderr", "verdict"),
    [
        (0, "", None),
        (2, "error: x is not valid JSON\n", None),
        (2, "a: 10%|# | 1/9 [00:00]\r\nerror: x\n", None),
        (2, "a warning\nerror: x\n", "not one line: a warning (2)"),
        (2, "", "not one line: nothing (0)"),
        (2, "error: out of memory\n", "needs gigabytes"),
        (1, "x\n", "exit code 1"),
        (-11, "", "dies of signal 11"),
        (
            1,
            'Traceback ...\n  File "/x/trtbuild/files.py", line 3, in read\nKeyError: 1\n',
            "KeyError at files.py read",
        ),
        (0, "Exception ignored in: <x>\n", "Exception ignored"),
    ],
)
def test_how_it_ended(code, stderr, verdict):
    assert how_it_ended(Outcome(code, 0.1, "", stderr), "trtbuild") == verdict


def test_limits(tmp_path):
    """On time, memory and files; and what a program leaves running ends with it."""
    (tmp_path / "tmp").mkdir()
    server = Server(seconds=1)
    endless = server.run(tmp_path, "python", "while True: pass")
    assert endless.code == -9
    assert endless.seconds > 1
    assert "MemoryError" in server.run(tmp_path, "python", "bytearray(3 << 30)").stderr
    assert "File too large" in server.run(tmp_path, "python", "open('x', 'wb').truncate(1 << 30)").stderr
    started = server.run(tmp_path, "python", "import subprocess; print(subprocess.Popen(['sleep', '600']).pid)")
    status = Path("/proc", started.stdout.strip(), "status")
    deadline = time.monotonic() + 120
    while status.exists() and "Z (zombie)" not in status.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    server.close()
