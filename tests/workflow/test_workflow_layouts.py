"""Engines of several ranks: which jobs make them, beside the one of a single rank or in its place."""

import json

import pytest

pytestmark = pytest.mark.slow

SCORED = ("engine", "summarize", "perplexity", "gate", "rouge")


def jobs(run: str, ranks: int, rules: tuple[str, ...] = SCORED) -> set[str]:
    """What makes a run's scores, where its weights and the baseline are there."""
    engines = {f"portable_engine {run}" + (f" rank{rank}" if rank else "") for rank in range(ranks)}
    return engines | {f"{rule} {run}" for rule in rules}


def test_another_layout_of_a_recipe_takes_what_all_layouts_share(finished):
    targets = [f"results/tiny/fp32@{layout}/rouge.json" for layout in ("tp2", "pp2", "tp2pp2", "tp1")]
    expected = jobs("tiny/fp32@tp2", 2) | jobs("tiny/fp32@pp2", 2) | jobs("tiny/fp32@tp2pp2", 4)
    assert finished.pending(*targets) == expected | jobs("tiny/fp32@tp1", 1)


def test_change_of_a_models_layout_makes_its_engines_and_what_follows(finished):
    every = (*SCORED, "benchmark")
    finished.models["tiny"]["layout"] = {"tp_size": 2}
    assert finished.pending() == jobs("tiny/fp32", 2, every) | jobs("tiny/bf16", 2, every)
    finished.models["tiny"]["layout"] = {"tp_size": 1, "pp_size": 1}
    assert finished.pending() == set()


def test_layouts_in_the_matrix(finished):
    finished.config["matrix"][0]["recipes"].append("fp32@tp2")
    assert finished.pending() == jobs("tiny/fp32@tp2", 2, (*SCORED, "benchmark"))
    output = finished.succeed("--dry-run", "results/tiny/recipes.md")
    assert "results/tiny/fp32@tp2/rouge.json" in output
    assert output.count("tasks=2, tasks_per_gpu=0, mpi=mpiexec") == 3  # summaries, perplexity and speed
    finished.config["mpi"] = "srun --mpi=pmi2"
    assert "mpi=srun --mpi=pmi2" in finished.succeed("--dry-run", "results/tiny/fp32@tp2/perplexity.json")


def test_calibrated_and_quantized_weights_are_shared(quantized):
    assert quantized.pending("results/tiny/int8kv@tp2/rouge.json") == jobs("tiny/int8kv@tp2", 2)


def test_two_ranks_give_the_results_of_one(finished):
    finished.config["matrix"] = [{"model": "tiny", "recipes": ["fp32", "fp32@tp2"]}]
    left = finished.results / "tiny/fp32@tp2/engine"  # by a layout that the folder was for before
    left.mkdir(parents=True)
    for name in ("rank2.safetensors", "rank10.engine"):
        (left / name).touch()
    finished.succeed()
    assert sorted(path.name for path in left.iterdir()) == ["config.json", "rank0.safetensors", "rank1.safetensors"]
    assert finished.pending() == set()
    one, two = (finished.results / "tiny" / run for run in ("fp32", "fp32@tp2"))
    for name in ("summaries.jsonl", "logs/rouge.log"):
        line = "portable fp32"
        assert (two / name).read_text() == (one / name).read_text().replace(f"{line}    ", f"{line}@tp2")
    ours, theirs = (json.loads((run / "perplexity.json").read_text()) for run in (two, one))
    assert ours["tokens"] == theirs["tokens"]
    assert ours["perplexity"] == pytest.approx(theirs["perplexity"], rel=1e-5)
    assert (ours["provenance"]["layout"], "layout" in theirs["provenance"]) == ("tp2", False)
    assert json.loads((two / "benchmark.json").read_text())["provenance"]["threads"] == 1
    sizes = [(two / f"engine/rank{rank}.safetensors").stat().st_size for rank in (0, 1)]
    assert sizes[0] + sizes[1] == pytest.approx((one / "engine/rank0.safetensors").stat().st_size, rel=0.1)
    rows = (finished.results / "tiny/recipes.md").read_text().splitlines()[-3:]
    rows = [row.split(" | ") for row in rows]
    assert [row[0] for row in rows] == ["| fp32", "| fp32@tp2", "| bf16"]  # which is no longer in the matrix
    verdict_perplexity_and_rouge = [[row[i] for i in (1, 2, 7, 9)] for row in rows[:2]]
    assert verdict_perplexity_and_rouge[0] == verdict_perplexity_and_rouge[1]
    assert not [path for path in two.rglob(".*") if path.name != ".snakemake_timestamp"]

    finished.config["evaluation"]["runtime"] = "interpreted"
    finished.fail("results/tiny/fp32@tp2/benchmark.json")
    log = (two / "logs/benchmark.log").read_text().splitlines()
    assert log == [
        "error: runtime interpreted runs one rank, results/tiny/fp32@tp2/engine has 2; use --runtime portable"
    ]


@pytest.mark.parametrize(
    ("target", "line"),
    [
        ("results/tiny/fp32@tp3/rouge.json", "tp_size 3 does not divide 4 heads, 2 KV heads and an intermediate_size"),
        ("results/tiny/fp32@2/rouge.json", "'fp32@2' ends in no layout; write fp32@tpN"),
        ("results/tiny/fp12@tp2/rouge.json", "unknown recipe 'fp12'"),
    ],
)
def test_layouts_that_cannot_be_end_before_the_work(empty, target, line):
    assert f"{target}: {line}" in empty.fail("--dry-run", target)
