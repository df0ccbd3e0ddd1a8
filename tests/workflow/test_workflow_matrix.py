"""`snakemake` alone: every score of the matrix, from nothing."""

import json
import re

import pytest

import trtbuild
from trtbuild.files import sha256

pytestmark = pytest.mark.slow

RUNS = ("tiny/fp32", "tiny/bf16", "tiny/hf", "other/fp32", "other/hf")
DTYPES = {"fp32": "float32", "bf16": "bfloat16", "hf": "float32"}


def results(workspace, run: str) -> list[dict]:
    names = ["rouge", "perplexity"] if run.endswith("hf") else ["rouge", "perplexity", "benchmark"]
    return [json.loads((workspace.results / run / f"{name}.json").read_text()) for name in names]


def test_every_score_of_the_matrix_is_made(made):
    workspace, _ = made
    found = {str(path.relative_to(workspace.results)) for path in workspace.results.glob("*/*/*.json")}
    expected = {f"{run}/{name}" for run in RUNS for name in ("rouge.json", "perplexity.json", "summaries.meta.json")}
    expected |= {f"{run}/{name}.json" for run in RUNS if not run.endswith("hf") for name in ("gate", "benchmark")}
    checkpoint = {"config.json", "tokenizer.json", "tokenizer_config.json"}
    expected |= {f"{model}/checkpoint/{name}" for model in ("tiny", "other") for name in checkpoint}
    assert found == expected


@pytest.mark.parametrize("run", RUNS)
def test_every_result_tells_what_produced_it(made, run):
    workspace, _ = made
    model, recipe = run.split("/")
    is_engine = recipe != "hf"
    weights = workspace.results / (f"{run}/engine/rank0" if is_engine else f"{model}/checkpoint/model")
    for result in results(workspace, run):
        origin = result["provenance"]
        assert origin["engine"] == ("portable" if is_engine else "transformers")
        assert origin["model"] == model
        assert origin["dtype"] == DTYPES[recipe]
        assert origin["device"].startswith("cpu: ")
        assert origin["threads"] == 1
        assert origin["versions"]["trtbuild"] == trtbuild.__version__
        assert {"torch", "transformers"} <= origin["versions"].keys()
        assert origin["engine_sha256"] == sha256(weights.with_suffix(".safetensors"))


@pytest.mark.parametrize("run", RUNS)
def test_scores_tell_their_samples_seeds_and_settings(made, run):
    rouge, perplexity, *_ = results(made[0], run)
    assert rouge["samples"] == rouge["provenance"]["samples"] == perplexity["provenance"]["samples"] == 2
    assert rouge["provenance"]["seed"] == rouge["bootstrap_seed"] == 0
    assert rouge["provenance"]["prompt"] == "{article}"
    assert rouge["provenance"]["max_output_len"] == 8
    for origin in (rouge["provenance"], perplexity["provenance"]):
        assert origin["dataset"] == {"name": "trtbuild-news", "split": "evaluation", "samples": 2}
        assert origin["max_input_len"] == 1024
    assert len((made[0].results / run / "summaries.jsonl").read_text().splitlines()) == 2


def test_float32_engine_agrees_with_hugging_face(made):
    for model in ("tiny", "other"):
        ours, theirs = (results(made[0], f"{model}/{run}")[1] for run in ("fp32", "hf"))
        assert ours["tokens"] == theirs["tokens"]
        assert ours["perplexity"] == pytest.approx(theirs["perplexity"], rel=1e-5)


def test_models_differ(made):
    tiny, other = (results(made[0], f"{model}/fp32") for model in ("tiny", "other"))
    assert tiny[1]["perplexity"] != other[1]["perplexity"]
    assert tiny[0]["provenance"]["engine_sha256"] != other[0]["provenance"]["engine_sha256"]


def test_every_job_leaves_a_log(made):
    workspace, output = made
    found = {str(path.relative_to(workspace.results)) for path in workspace.results.rglob("*.log")}
    stages = {"portable_engine.rank0", "engine", "summarize", "perplexity", "gate", "rouge", "benchmark"}
    engine_logs = {f"{run}/logs/{stage}.log" for run in RUNS if not run.endswith("hf") for stage in stages}
    baseline = {"summarize", "rouge", "perplexity"}
    expected = engine_logs | {f"{run}/logs/{stage}.log" for run in RUNS if run.endswith("hf") for stage in baseline}
    of_a_model = "checkpoint", "recipes", "table", "page"
    expected |= {f"{model}/logs/{stage}.log" for model in ("tiny", "other") for stage in of_a_model}
    assert found == expected
    assert "rouge1" in (workspace.results / "tiny/fp32/logs/rouge.log").read_text()
    assert set(re.findall(r"^ +log: results/(\S+)", output, re.MULTILINE)) == expected


def test_nothing_hidden_is_left(made):
    hidden = {path.name for path in made[0].results.rglob(".*")}
    assert hidden <= {".snakemake_timestamp"}


def test_second_run_has_nothing_to_do(finished):
    before = {path: path.stat().st_mtime_ns for path in finished.results.rglob("*")}
    assert "Nothing to be done" in finished.succeed()
    assert {path: path.stat().st_mtime_ns for path in finished.results.rglob("*")} == before


def test_one_target_makes_only_what_it_needs(empty):
    assert empty.pending("results/tiny/fp32/rouge.json") == {
        "checkpoint tiny",
        "portable_engine tiny/fp32",
        "engine tiny/fp32",
        "summarize tiny/fp32",
        "perplexity tiny/fp32",
        "perplexity_hf tiny",
        "gate tiny/fp32",
        "rouge tiny/fp32",
    }


def test_tensorrt_engine_is_made_and_recorded(finished_with_tensorrt):
    folder = finished_with_tensorrt.results / "other" / "fp32" / "engine"
    config = json.loads((folder / "config.json").read_text())
    assert config["outputs"].keys() == {"rank0.safetensors", "rank0.engine"}
    assert config["outputs"]["rank0.engine"]["sha256"] == sha256(folder / "rank0.engine")
    assert config["outputs"]["rank0.engine"]["bytes"] == (folder / "rank0.engine").stat().st_size
    assert config["builders"].keys() == {"portable", "tensorrt"}
    assert (finished_with_tensorrt.results / "other/fp32/logs/tensorrt_engine.rank0.log").exists()
    assert finished_with_tensorrt.pending() == set()
