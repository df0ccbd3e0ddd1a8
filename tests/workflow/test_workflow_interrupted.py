"""A run that is killed at the worst moment: everything written, nothing renamed yet."""

import json
import os
import shutil
from pathlib import Path

import pytest

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
