"""A run that is killed at the worst moment, everything written and nothing renamed yet; two runs in one folder."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from conftest import HANG
from journal import Journal

from trtbuild.files import sha256
from trtbuild.workflow import calibration_name, weights_folder

pytestmark = pytest.mark.slow


def hidden(workspace) -> list[Path]:
    return [path for path in workspace.results.rglob(".*") if path.name != ".snakemake_timestamp"]


def comparable(folder: Path) -> dict:
    """All that has to be equal after a rerun: engine, summaries and scores, but not times and speeds."""
    found = {name: (folder / name).read_text() for name in ("summaries.jsonl", "summaries.meta.json", "rouge.json")}
    found["perplexity"] = json.loads((folder / "perplexity.json").read_text())
    if (folder / "engine").exists():
        found["engine"] = sha256(folder / "engine" / "rank0.safetensors")
        found["config"] = (folder / "engine" / "config.json").read_text()
    return found


SUMMARIES = ("summaries.jsonl", "summaries.meta.json", "rouge.json")
# Rule, the run, the output at whose renaming it is killed, the target, and what else is not there yet.
CASES = {
    "checkpoint": ("fp32", "../checkpoint", "engine/config.json", ("engine/rank0.safetensors",)),
    "portable_engine": ("fp32", "engine/rank0.safetensors", "rouge.json", ("engine/config.json", *SUMMARIES)),
    "engine": ("fp32", "engine/config.json", "perplexity.json", ()),
    "summarize": ("fp32", "summaries.jsonl", "rouge.json", SUMMARIES),
    "summarize_hf": ("hf", "summaries.jsonl", "rouge.json", SUMMARIES),
    "rouge": ("fp32", "rouge.json", "rouge.json", ()),
    "perplexity": ("fp32", "perplexity.json", "perplexity.json", ()),
    "perplexity_hf": ("hf", "perplexity.json", "perplexity.json", ()),
    "benchmark": ("fp32", "benchmark.json", "benchmark.json", ()),
}


def remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@pytest.mark.parametrize("rule", CASES)
def test_run_again_after_a_kill(finished, kill, rule):
    folder, output, target, absent = CASES[rule]
    run = finished.results / "other" / folder
    undisturbed = comparable(run)
    checkpoint = {path.name: sha256(path) for path in (finished.results / "other/checkpoint").glob("*.*")}
    for name in (output, target, *absent):
        remove(run / name)
    output, target = (os.path.normpath(f"results/other/{folder}/{name}") for name in (output, target))

    kill(finished, output, target)
    assert not (finished.folder / output).exists()  # neither whole nor in part
    assert hidden(finished)

    finished.succeed(target)
    assert finished.pending(target) == set()
    assert comparable(run) == undisturbed
    assert {path.name: sha256(path) for path in (finished.results / "other/checkpoint").glob("*.*")} == checkpoint
    assert hidden(finished) == []


def test_killed_tensorrt_engine_is_built_again(finished_with_tensorrt, kill):
    output = "results/other/fp32/engine/rank0.engine"
    engine = finished_with_tensorrt.folder / output
    target = "results/other/fp32/engine/config.json"
    engine.unlink()
    (finished_with_tensorrt.folder / target).unlink()
    kill(finished_with_tensorrt, output, target)
    assert not engine.exists()
    finished_with_tensorrt.succeed(target)
    config = json.loads((finished_with_tensorrt.folder / target).read_text())
    assert config["outputs"]["rank0.engine"]["sha256"] == sha256(engine)  # bytes of two builds may differ
    assert hidden(finished_with_tensorrt) == []


def test_kill_from_nothing(empty, kill, made):
    """The first run ever dies while it makes the checkpoint; the next one needs no unlocking."""
    kill(empty, "results/tiny/checkpoint", "results/tiny/hf/rouge.json")
    assert not (empty.results / "tiny" / "checkpoint").exists()
    empty.succeed("results/tiny/hf/rouge.json")
    for name in ("summaries.jsonl", "rouge.json"):
        assert (empty.results / "tiny/hf" / name).read_text() == (made[0].results / "tiny/hf" / name).read_text()
    assert hidden(empty) == []


def test_killed_calibration_and_quantization_are_made_again(quantized, kill):
    """One after the other, on the way to one recipe's weights."""
    recipe = quantized.recipe("sq")
    calibration = f"results/tiny/calibration/{calibration_name(recipe)}.npz"
    weights = f"results/tiny/{weights_folder(recipe)}"
    made = [quantized.folder / calibration, *sorted((quantized.folder / weights).glob("*.*"))]
    undisturbed = {path: sha256(path) for path in made}
    remove(quantized.folder / calibration)
    remove(quantized.folder / weights)

    for output in (calibration, weights):
        kill(quantized, output, weights)
        assert not (quantized.folder / output).exists()  # neither whole nor in part
        assert hidden(quantized)

    quantized.succeed(weights)
    assert quantized.pending(weights) == set()
    assert {path: sha256(path) for path in made} == undisturbed
    assert hidden(quantized) == []


@pytest.fixture
def journal(tmp_path) -> Journal:
    return Journal(tmp_path / "journal")


@pytest.fixture
def start(tmp_path, journal):
    """Starts `snakemake`, if need be until a job is about to rename `output`; removing `mark` lets it go on."""
    started = []

    def run(workspace, *targets: str, output: str | None = None) -> subprocess.Popen:
        environment = dict(journal.environment)
        if output:
            site = tmp_path / "site"
            site.mkdir()
            (site / "sitecustomize.py").write_text(HANG, encoding="utf-8")
            path = os.pathsep.join(filter(None, [str(site), os.environ.get("PYTHONPATH")]))
            environment |= {"PYTHONPATH": path, "HANG_BEFORE": str(workspace.folder / output)}
            environment |= {"HANG_MARK": str(tmp_path / "mark")}
        log = open(tmp_path / f"{len(started)}.txt", "w+", encoding="utf-8")  # noqa: SIM115
        process = workspace.begin(log, *targets, **environment)
        started.append((process, log))
        deadline = time.monotonic() + workspace.seconds
        while output and not (tmp_path / "mark").exists():
            assert process.poll() is None, said(process)
            assert time.monotonic() < deadline, said(process)
            time.sleep(0.05)
        return process

    def said(process: subprocess.Popen) -> str:
        (log,) = (log for other, log in started if other is process)
        log.seek(0)
        return log.read()

    run.said, run.mark = said, tmp_path / "mark"
    yield run
    for process, log in started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        log.close()


HELD = (
    r"(?m)^Error: another snakemake runs in this folder: pid {pid} on \S+, since \d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d; "
    "wait for it, or end it and start again$"
)


def test_second_controller_is_refused(finished, start, journal):
    """With one line and Snakemake's exit code for a locked folder; to look at the folder is allowed."""
    output = "results/other/fp32/perplexity.json"
    (finished.folder / output).unlink()
    first = start(finished, output, output=output)
    second = finished.run(output)
    assert second.returncode == 1
    assert re.search(HELD.format(pid=first.pid), second.stdout)
    assert "folder_lock.py" not in second.stdout
    assert finished.pending(output) == {"perplexity other/fp32"}
    assert "perplexity" in finished.succeed("--summary", output)
    start.mark.unlink()
    assert first.wait(finished.seconds) == 0, start.said(first)
    assert finished.pending(output) == set()
    assert journal.count("overlap") == 0


def test_of_two_controllers_at_once_one_is_refused(finished, start, journal):
    output = "results/other/fp32/rouge.json"
    (finished.folder / output).unlink()
    both = [start(finished, output) for _ in range(2)]
    codes = sorted(process.wait(finished.seconds) for process in both)
    assert codes == [0, 1], [start.said(process) for process in both]
    (first, second) = sorted(both, key=lambda process: process.returncode)
    assert re.search(HELD.format(pid=first.pid), start.said(second))
    assert (journal.count("start"), journal.count("overlap")) == (1, 0)


def test_run_again_at_once_after_the_controller_alone_was_killed(finished, start, journal):
    """Its job is interrupted, and has ended before it begins anew."""
    run = finished.results / "other" / "fp32"
    undisturbed = comparable(run)
    output = "results/other/fp32/summaries.jsonl"
    for name in SUMMARIES:
        (run / name).unlink()
    killed = start(finished, "results/other/fp32/rouge.json", output=output)
    killed.kill()
    again = start(finished, "results/other/fp32/rouge.json")
    assert again.wait(finished.seconds) == 0, start.said(again)
    assert killed.wait(finished.seconds) == -signal.SIGKILL
    assert finished.pending("results/other/fp32/rouge.json") == set()
    assert comparable(run) == undisturbed
    assert hidden(finished) == []
    log = "results/other/fp32/logs/summarize.log"
    assert [journal.count(event, log) for event in ("start", "end", "overlap")] == [2, 2, 0]
    assert journal.count("overlap") == 0
