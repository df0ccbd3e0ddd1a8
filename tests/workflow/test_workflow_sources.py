"""Files that change under a workflow, runs that fail or are interrupted, and what is made again: no more, no less."""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest
from conftest import targets_from_files

from trtbuild.checkpoint.sources import make_checkpoint
from trtbuild.files import sha256
from trtbuild.workflow import calibration_name, weights_folder

pytestmark = pytest.mark.slow

CHECKPOINT = "results/tiny/checkpoint"


def names(workspace) -> dict[str, str]:
    """Jobs as `pending` names them."""
    calibration = calibration_name(workspace.recipe("sq"))
    sq, published = (Path(weights_folder(workspace.recipe(name))).name for name in ("sq", "published"))
    return {
        "checkpoint": "checkpoint tiny",
        "calibration": f"calibration tiny/{calibration}",
        "sq": f"quantize tiny/{sq}",
        "published": f"quantize tiny/{published}",
        "portable_engine": "portable_engine tiny/fp32",
        "engine": "engine tiny/fp32",
    }


def pending(workspace) -> set[str]:
    """The keys of `names` that a run would do now."""
    jobs = workspace.pending(*targets_from_files(workspace))
    known = {job: key for key, job in names(workspace).items()}
    return {known[job] for job in jobs}


def contents(folder: Path) -> dict[Path, str]:
    return {path: sha256(path) for path in folder.rglob("*") if path.is_file() and "logs" not in path.parts}


def retouch(path: Path) -> None:
    os.utime(path, (path.stat().st_mtime + 100,) * 2)


def other_weights(workspace) -> None:
    """As a training run would, into the folder that the model comes from."""
    config = json.loads((workspace.folder / "model/config.json").read_text())
    make_checkpoint({"dummy": {"config": config, "seed": 9}}, workspace.folder / "new")
    shutil.copy(workspace.folder / "new/model.safetensors", workspace.folder / "model/model.safetensors")


ALL = {"checkpoint", "calibration", "sq", "published", "portable_engine", "engine"}
CHANGES = {
    "nothing": (lambda workspace: None, set()),
    "a note beside the weights": (lambda workspace: (workspace.folder / "model/README.md").write_text("x"), set()),
    "times of small files": (lambda workspace: retouch(workspace.folder / "model/config.json"), set()),
    "weights": (other_weights, ALL),
    "a tokenizer": (lambda workspace: (workspace.folder / "model/tokenizer_config.json").write_text("{}"), ALL),
    "published weights": (lambda workspace: (workspace.folder / "published/config.json").unlink(), {"published"}),
    "articles": (
        lambda workspace: (workspace.folder / "articles/more.jsonl").write_text("{}"),
        {"calibration", "sq"},
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_of_files(from_files, name):
    change, expected = CHANGES[name]
    change(from_files)
    assert pending(from_files) == expected


def test_changed_weights_are_what_is_built(from_files):
    """The published weights are of the old ones, which only their rule says."""
    other_weights(from_files)
    engine = targets_from_files(from_files)[0]
    from_files.succeed(engine)
    assert pending(from_files) == {"calibration", "sq", "published"}
    new = sha256(from_files.folder / "new/model.safetensors")
    assert sha256(from_files.folder / CHECKPOINT / "model.safetensors") == new
    assert new in (from_files.folder / engine).read_text()
    assert "error: published was quantized from other weights" in from_files.fail(*targets_from_files(from_files))


# What takes long to make is kept until it is made anew.


def test_a_source_that_is_gone_costs_nothing(from_files):
    made, model = contents(from_files.results), from_files.folder / "model"
    model.rename(from_files.folder / "away")
    for _ in range(2):
        assert pending(from_files) == ALL
        assert " does not exist" in from_files.fail(*targets_from_files(from_files))
    (from_files.folder / "away").rename(model)
    assert pending(from_files) == set()
    assert contents(from_files.results) == made


def test_a_mended_mistake_costs_nothing(from_files):
    """One that the rule finds out; the other rule of the run is done with the old checkpoint."""
    made = contents(from_files.results)
    from_files.models["tiny"]["source"]["local"]["model_version"] = "v9"
    assert pending(from_files) == ALL
    assert "error: " in from_files.fail("--keep-going", *targets_from_files(from_files))
    del from_files.models["tiny"]["source"]["local"]["model_version"]
    assert pending(from_files) == set()
    assert contents(from_files.results) == made


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda sent: sent.name)
def test_an_interrupted_mistake_costs_nothing(from_files, kill, sent):
    """The old checkpoint is there when everything of the new one is written but its name."""
    made, right = contents(from_files.results), from_files.models["tiny"]["source"]
    from_files.models["tiny"]["source"] = {"dummy": {"config": "model/config.json"}}
    kill(from_files, CHECKPOINT, *targets_from_files(from_files), sent=sent)
    from_files.models["tiny"]["source"] = right
    assert pending(from_files) == set()
    assert contents(from_files.results).items() >= made.items()


def test_what_was_replaced_but_not_recorded_is_made_again(from_files, kill):
    """Also when another run fails in between: Snakemake's record is still of what was there before."""
    made, right = contents(from_files.folder / CHECKPOINT), from_files.models["tiny"]["source"]
    from_files.models["tiny"]["source"] = {"dummy": {"config": "model/config.json"}}
    kill(from_files, CHECKPOINT, CHECKPOINT, when="after")
    assert contents(from_files.folder / CHECKPOINT) != made
    from_files.models["tiny"]["source"] = {"local": {"path": "nowhere"}}
    from_files.fail(CHECKPOINT)
    from_files.models["tiny"]["source"] = right
    assert from_files.pending(CHECKPOINT) == {"checkpoint tiny"}
    from_files.succeed(CHECKPOINT)
    assert contents(from_files.folder / CHECKPOINT) == made


def test_calibrations_and_quantized_weights_are_kept(from_files, kill):
    recipe = from_files.recipe("sq")
    weights = f"results/tiny/{weights_folder(recipe)}"
    made = contents(from_files.results)
    for output, rule in (
        (f"results/tiny/calibration/{calibration_name(recipe)}.npz", "calibration"),
        (weights, "quantize"),
    ):
        kill(from_files, output, weights, "--forcerun", rule)
        assert pending(from_files) == set()
    assert contents(from_files.results).items() >= made.items()
