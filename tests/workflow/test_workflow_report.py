"""What shows results: the table and the page of a model's recipes, and Snakemake's own report."""

import json
import re
import zipfile

import pytest

from trtbuild.evaluation.page import page
from trtbuild.evaluation.table import recipe_table

pytestmark = pytest.mark.slow


def read(workspace, model: str = "tiny") -> tuple[dict, str, str]:
    """A model's recipes.json, recipes.md and report.html."""
    data, table, html = (workspace.results / model / name for name in ("recipes.json", "recipes.md", "report.html"))
    return json.loads(data.read_text()), table.read_text(), html.read_text()


def test_table_and_page_are_made_of_the_same_data(made):
    data, table, html = read(made[0])
    assert [run["run"] for run in data["runs"]] == ["fp32", "bf16"]
    assert (table, html) == (recipe_table(data), page(data))
    for run in data["runs"]:
        measured = json.loads((made[0].results / f"tiny/{run['run']}/perplexity.json").read_text())
        assert run["perplexity"]["value"] == measured["perplexity"]
        assert run["predicted"]["weight_bytes"] == run["engine"]["weight_bytes"]
    assert data["recommended"]["run"] in data["front"]


def test_a_recipe_that_its_gate_stops_is_shown_as_rejected(finished):
    finished.recipes["bf16"]["max_mean_kl"] = 1e-12
    assert "mean KL divergence" in finished.fail("results/tiny/report.html")
    finished.succeed("results/tiny/report.html")
    data, _, html = read(finished)
    _, stopped = data["runs"]
    assert (stopped["run"], stopped["gate"]["verdict"], "rouge" in stopped) == ("bf16", "failed", False)
    assert (data["front"], data["recommended"]["run"]) == (["fp32"], "fp32")
    assert re.search(r'<tr data-run="bf16" class="above">(?s:.{,300})rejected', html)


def test_snakemakes_report_has_every_result(finished, tmp_path):
    """By model and recipe, each with a label and a caption."""
    finished.succeed("--report", str(tmp_path / "report.zip"))
    with zipfile.ZipFile(tmp_path / "report.zip") as report:
        shown = report.read("report/report.html").decode()
        raw = [name.rpartition("/")[2] for name in report.namelist() if "/raw/" in name]
    runs, models = 3, 2  # tiny has another recipe
    assert sorted(raw) == sorted(
        ["recipes.md", "report.html"] * models
        + ["perplexity.json", "rouge.json", "summaries.jsonl"] * (runs + models)
        + ["gate.json", "benchmark.json"] * runs
    )
    results, categories = (
        json.JSONDecoder().raw_decode(shown, shown.index(f"var {name} = {{") + len(f"var {name} = "))[0]
        for name in ("results", "categories")
    )
    assert len(results) == len(raw)
    assert all(result["labels"]["result"] and result["caption"].startswith("<p>") for result in results.values())
    assert {name: set(parts) for name, parts in categories.items()} == {
        "tiny": {"All recipes", "hf", "fp32", "bf16"},
        "other": {"All recipes", "hf", "fp32"},
    }
