"""Accuracy tasks in the workflow: the files, and what makes them again."""

import json
import re
import shutil
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

RUNS = ("tiny/fp32", "tiny/hf")


def files(task: str) -> list[str]:
    return [f"results/{run}/lm_eval/{task}.json" for run in RUNS]


def rules(output: str) -> set[str]:
    return set(re.findall(r"^(?:local)?rule (\w+):$", output, re.MULTILINE)) - {"all"}


def test_tasks(finished, monkeypatch):
    """An engine's beside the baseline's; a limit, or an answer in the data, makes both again and nothing else."""
    monkeypatch.setenv("HF_HOME", str(finished.folder / "cache"))
    shutil.copytree(Path(__file__).parents[1] / "data" / "lm_eval", finished.folder / "tasks")
    finished.config["lm_eval"] = {"include": "tasks", "limit": 3}
    both = files("opposites")
    assert rules(finished.succeed(*both)) == {"lm_eval", "lm_eval_hf"}
    ours, theirs = (json.loads((finished.folder / file).read_text()) for file in both)
    assert ours["results"] == theirs["results"]
    assert (ours["provenance"]["recipe"], theirs["provenance"]["model"]) == ("fp32", "tiny")
    assert ours["provenance"]["prompts_sha256"] == theirs["provenance"]["prompts_sha256"]

    def would_run() -> set[str]:
        return rules(finished.succeed("--dry-run", *both))

    assert would_run() == set()
    finished.config["lm_eval"]["limit"] = 2
    assert would_run() == {"lm_eval", "lm_eval_hf"}
    finished.config["lm_eval"]["limit"] = 3
    data = finished.folder / "tasks" / "opposites.jsonl"
    data.write_text(data.read_text().replace("warm", "mild"))
    assert would_run() == {"lm_eval", "lm_eval_hf"}
    data.write_text(data.read_text().replace("mild", "warm"))
    # The table is made again of what is there, and of what the matrix has: a task of every run of it.
    finished.succeed("results/tiny/report.html")
    runs = {run["run"]: run for run in json.loads((finished.results / "tiny/recipes.json").read_text())["runs"]}
    assert {run: "lm_eval" in found for run, found in runs.items()} == {"fp32": True, "bf16": False}
    finished.config["lm_eval"] = {"include": "tasks", "limit": 3, "tasks": ["countries"]}
    output = finished.succeed("--dry-run")
    assert rules(output) == {"lm_eval", "lm_eval_hf", "recipes", "table", "page"}
    assert dict(re.findall(r"^(lm_eval\w*) +(\d+)$", output, re.MULTILINE)) == {"lm_eval": "3", "lm_eval_hf": "2"}
    assert "error: " in (output := finished.fail(*files("countries")))
    assert "a task generates 12 tokens, and the engine's max_output_len is 8; build with max_output_len 12" in output


def test_a_task_waits_for_the_gate(finished):
    finished.recipes["fp32"]["max_mean_kl"] = 1e-12
    assert "mean KL divergence" in finished.fail("results/tiny/fp32/lm_eval/countries.json")
