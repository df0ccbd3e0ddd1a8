"""`results/rehearsal/MODEL`: the whole chain on two layers of dummy weights, in a place of its own."""

import json
import re
from pathlib import Path

import pytest
import yaml

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).parents[2]
REHEARSE = ("--config", "rehearse=true")
RUN = "results/rehearsal/tiny/int8kv"
FOLDER = "rehearsal/tiny"


def result(workspace, name: str) -> dict:
    return json.loads((workspace.results / FOLDER / name).read_text())


@pytest.mark.parametrize(
    "name",
    [
        *(f"int8kv/{name}.json" for name in ("rouge", "perplexity", "benchmark", "gate", "summaries.meta")),
        "int8kv/engine/config.json",
        "hf/perplexity.json",
    ],
)
def test_every_result_says_that_it_is_a_rehearsal(rehearsed, name):
    content = result(rehearsed, name)
    assert content["rehearsal"] is True
    assert content.get("provenance", {}).get("model", FOLDER) == FOLDER


def test_the_printed_scores_say_it_too(rehearsed):
    assert "portable int8kv (rehearsal) " in (rehearsed.results / FOLDER / "int8kv/logs/rouge.log").read_text()


def test_costs_are_said_before_and_a_verdict_after(rehearsed, tmp_path):
    """What was built, what was checked and what was not; nothing of it where no rehearsal is asked for."""
    workspace = rehearsed.copy(tmp_path / "copy")
    (workspace.results / FOLDER / "int8kv/rouge.json").unlink()
    output = workspace.succeed(f"{RUN}/rouge.json")
    assert "\nRehearsal: about 1 min on two idle cores, up to 0 GB of disk\n" in output
    assert output.count("Rehearsed tiny/int8kv with random weights:\nbuilt        rank0.safetensors (0.0 GB)\n") == 1
    assert "2 layers of real shapes, for 1024 + 16 tokens and batches of 4\n" in output
    assert re.search(
        r"checked      the portable engine, on \w+: .*, beside transformers:\n *KL divergence [\d.e-]+ nats", output
    )
    assert "not checked  real weights, tokenizer and chat template; quality; " in output
    assert "The real one: snakemake results/tiny/int8kv/rouge.json. results/rehearsal/tiny can be removed." in output
    assert "Rehears" not in workspace.run("--dry-run", "results/tiny/fp32/engine/config.json").stdout


def test_nothing_lies_outside_the_place_of_rehearsals(rehearsed):
    assert [path.name for path in rehearsed.results.iterdir()] == ["rehearsal"]
    real = rehearsed.pending("results/tiny/int8kv/engine/config.json")
    assert real >= {"checkpoint tiny", "portable_engine tiny/int8kv", "engine tiny/int8kv"}
    assert len(real) == 5  # and calibration and weights of their own


def test_shapes_and_limits_are_real_but_for_the_layers(rehearsed):
    config = result(rehearsed, "int8kv/engine/config.json")
    assert config["model_config"]["num_hidden_layers"] == 2
    declared = rehearsed.models["tiny"]["config"]
    for key in ("hidden_size", "intermediate_size", "num_key_value_heads", "vocab_size"):
        assert config["model_config"][key] == declared[key]
    assert config["limits"] == {"max_batch_size": 4, "max_input_len": 1024, "max_output_len": 16}


def test_little_is_done(rehearsed):
    assert len((rehearsed.results / FOLDER / "int8kv/summaries.jsonl").read_text().splitlines()) == 2
    assert result(rehearsed, "int8kv/summaries.meta.json")["max_output_len"] == 8
    speed = result(rehearsed, "int8kv/benchmark.json")
    assert (speed["batch_size"], speed["input_len"], speed["output_len"]) == (1, 8, 4)
    (calibration,) = (rehearsed.results / FOLDER / "calibration").iterdir()
    assert calibration.name.startswith("trtbuild-news-2x64-")
    assert result(rehearsed, "int8kv/gate.json")["policy"] == "warn"


def test_a_second_rehearsal_has_nothing_to_do(rehearsed, tmp_path):
    """However its targets are spelled."""
    workspace = rehearsed.copy(tmp_path / "copy")
    before = {path: path.stat().st_mtime_ns for path in workspace.results.rglob("*")}
    spellings = (f"./{RUN}/rouge.json", f"{RUN}/benchmark.json", "results/rehearsal/tiny/hf//perplexity.json")
    assert "Nothing to be done" in workspace.succeed("--rerun-incomplete", *spellings)
    assert {path: path.stat().st_mtime_ns for path in workspace.results.rglob("*")} == before


def test_without_a_target_the_matrix_is_rehearsed(rehearsed):
    left = {"summarize_hf rehearsal/tiny", "rouge rehearsal/tiny/hf"}
    assert rehearsed.pending("--config", "rehearse=True") == left


def test_forced_jobs(rehearsed):
    """A rule, and a file."""
    jobs = rehearsed.pending(f"{RUN}/rouge.json", "--forcerun", "summarize", f"./{RUN}/perplexity.json")
    assert jobs == {f"{rule} {FOLDER}/int8kv" for rule in ("summarize", "perplexity", "gate", "rouge")}


def test_rehearse_in_the_configuration_file(fresh):
    """What cannot be rehearsed of the matrix is no matter where something else is asked for."""
    fresh.config |= {"rehearse": True, "matrix": [{"model": "bare", "recipes": ["published"]}]}
    assert fresh.pending("results/rehearsal/tiny/fp32/rouge.json") == {
        f"checkpoint {FOLDER}",
        f"perplexity_hf {FOLDER}",
        *(
            f"{rule} {FOLDER}/fp32"
            for rule in ("portable_engine", "engine", "summarize", "perplexity", "gate", "rouge")
        ),
    }


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (
            ("results/tiny/fp32/rouge.json", *REHEARSE),
            "results/tiny/fp32/rouge.json: this is no rehearsal; with rehearse=true ask for "
            "results/rehearsal/tiny/fp32/rouge.json",
        ),
        (
            ("results/rehearsal/bare/fp32/rouge.json",),
            "the model bare cannot be rehearsed; add its published config.json to config/models.yaml as 'config'",
        ),
    ],
)
def test_what_cannot_be_rehearsed(fresh, arguments, line):
    assert line in fresh.fail(*arguments)
    assert not fresh.results.exists()


def test_what_of_the_matrix_cannot_be_rehearsed(fresh):
    fresh.config["matrix"] = [{"model": "bare", "recipes": ["fp32"]}]
    result = fresh.run("--dry-run", *REHEARSE)
    assert result.returncode != 0
    assert "the model bare cannot be rehearsed; add its published config.json" in result.stdout


def test_a_rehearsal_beside_the_real_model(rehearsed):
    """One run makes both; how much is done of each follows from its name."""
    jobs = rehearsed.pending("results/tiny/int8kv/gate.json", f"{RUN}/gate.json", "--forcerun", "gate")
    assert {job for job in jobs if job.startswith("gate ")} == {"gate tiny/int8kv", f"gate {FOLDER}/int8kv"}
    (real,) = (job for job in jobs if job.startswith("calibration "))
    assert real.startswith("calibration tiny/trtbuild-news-64x512-")


def test_every_declared_model_can_be_rehearsed(fresh):
    """The shipped models, each with one recipe, and one with every recipe: from dummy weights to scores."""
    models, recipes = (
        yaml.safe_load((REPOSITORY / name).read_text()) for name in ("config/models.yaml", "trtbuild/recipes.yaml")
    )
    fresh.models, fresh.recipes = models, recipes
    fresh.config["matrix"] = []
    pairs = {(model, "int8kv") for model in models} | {("qwen7b", recipe) for recipe in recipes}
    jobs = fresh.pending(*(f"results/rehearsal/{model}/{recipe}/rouge.json" for model, recipe in pairs))
    assert {job for job in jobs if job.startswith("checkpoint ")} == {f"checkpoint rehearsal/{m}" for m in models}
    for rule in ("portable_engine", "engine", "summarize", "rouge"):
        assert {f"{rule} rehearsal/{model}/{recipe}" for model, recipe in pairs} <= jobs
