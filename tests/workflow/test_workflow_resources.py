"""What jobs ask for, as dry runs say it: on one machine and under the profile for Slurm."""

import os
import re
from pathlib import Path

import pytest
import snakemake_server
from conftest import Workspace
from workflow_config import CONFIG

from trtbuild import planning
from trtbuild.workflow import load_recipes

REPOSITORY = Path(__file__).parents[2]
SHAPES = {"vocab_size": 32000, "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32}
LLAMA_7B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "intermediate_size": 11008,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    **SHAPES,
}
HUB = {"hub": {"repo": "nobody/nothing", "revision": "0" * 40}}
SLURM = ("--workflow-profile", str(REPOSITORY / "profiles/slurm"))


@pytest.fixture
def cluster(tmp_path):
    models = {"known": {"source": HUB, "config": LLAMA_7B}, "unknown": {"source": HUB}}
    config = CONFIG | {"matrix": [], "evaluation": CONFIG["evaluation"] | {"device": "auto"}}
    return Workspace(tmp_path, config, models, {})


def jobs(output: str) -> dict[str, dict[str, str]]:
    """Resources by rule, threads included; of several jobs of a rule those of one."""
    found = {}
    for block in re.split(r"^(?=(?:local)?rule \w+:$)", output, flags=re.MULTILINE)[1:]:
        threads = re.search(r"^    threads: (\d+)$", block, re.MULTILINE)
        listed = re.search(r"^    resources: (.*)$", block, re.MULTILINE)
        found[re.match(r"(?:local)?rule (\w+):", block)[1]] = dict(
            item.partition("=")[::2] for item in listed[1].split(", ")
        ) | {"threads": threads[1] if threads else "1"}
    return found


def dry_run(workspace: Workspace, *targets: str, profile: tuple[str, ...] = SLURM) -> str:
    if not profile:
        return workspace.succeed("--dry-run", *targets)
    workspace.command()  # writes the configuration
    where = ["-s", str(REPOSITORY / "Snakefile"), "--directory", str(workspace.folder)]
    done = snakemake_server.run(
        [*where, *profile, "--dry-run", *targets], REPOSITORY, dict(os.environ), workspace.seconds
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def test_sixteen_recipes_share_what_they_can(cluster):
    names = [name for name in load_recipes(None) if name not in ("fp32", "bf16", "sq-per-tensor")]
    assert len(names) == 16
    output = dry_run(cluster, *(f"results/known/{name}/rouge.json" for name in names))
    counts = dict(re.findall(r"^(\w+) +(\d+)$", output, re.MULTILINE))
    assert (counts["checkpoint"], counts["calibration"], counts["quantize"]) == ("1", "1", "11")
    assert (counts["perplexity_hf"], counts["engine"], counts["rouge"]) == ("1", "16", "16")
    assert "\nGPUs: 45 jobs take 1\n" in output  # calibration, quantize, the baseline, perplexities and summaries


def test_ranks_of_a_job(cluster):
    output = dry_run(cluster, "results/known/fp16@tp2pp2/benchmark.json", "results/known/fp16/benchmark.json")
    assert "GPUs: 1 job takes 1, 1 job takes 4" in output
    (four,) = (line for line in output.splitlines() if "tasks=4" in line)
    assert "gpu=4, cpus_per_task=8, tasks=4, tasks_per_gpu=0, mpi=srun --mpi=pmi2" in four
    assert sorted(re.findall(r"^    threads: (8|32)$", output, re.MULTILINE)) == ["32", "8"]


def test_sizes_of_a_model_that_nothing_describes_yet(cluster):
    """They are known when its checkpoint is made; before, to be determined."""
    known, unknown = (jobs(dry_run(cluster, f"results/{model}/gptq/rouge.json")) for model in cluster.models)
    for rule in ("quantize", "portable_engine", "summarize", "perplexity_hf"):
        assert unknown[rule]["mem_mb"] == unknown[rule]["runtime"] == "<TBD>"
        assert int(known[rule]["mem_mb"]) > 1000
    assert 0 < int(unknown["checkpoint"]["mem_mb"]) < 20_000
    assert int(known["checkpoint"]["disk_mb"]) == pytest.approx(6738415616 * 4 / 1e6, abs=1)
    assert 4 * 6738415616 / 1e6 < int(known["perplexity_hf"]["mem_mb"]) < 8 * 6738415616 / 1e6
    assert int(known["portable_engine"]["mem_mb"]) < 3000  # one weight at a time
    assert int(known["rouge"]["mem_mb"]) < 1200
    cluster.config["evaluation"]["device"] = "cpu"
    assert jobs(dry_run(cluster, "results/known/gptq/rouge.json"))["quantize"]["gpu"] == "0"


def test_one_machine_has_as_many_gpus_as_it_shows(cluster, monkeypatch):
    for shown, gpu in (("0,1", "2"), ("", "1")):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", shown)
        output = dry_run(cluster, "results/known/fp16@tp4/benchmark.json", profile=())
        assert jobs(output)["benchmark"]["gpu"] == gpu


def test_a_plan_counts_jobs_and_asks_for_what_rules_ask(cluster, monkeypatch):
    """Of recipes that share a calibration and quantized weights or do not, with layouts, and TensorRT."""
    cluster.config["build"] |= {"engines": ["portable", "tensorrt"], "max_input_len": 512}
    runs = ["fp16", "int8wo", "int8kv@tp2", "fp8", "fp16-fp8kv", "awq", "awq-int8kv@tp2pp2"]
    cluster.config["matrix"] = [{"model": "known", "recipes": runs}]
    cluster.config["lm_eval"] = {"tasks": ["arc_easy", "hellaswag"], "limit": 100}
    output = dry_run(cluster)
    counts = {rule: int(n) for rule, n in re.findall(r"^(\w+) +(\d+)$", output, re.MULTILINE)}
    total = counts.pop("total") - counts.pop("all")
    monkeypatch.chdir(cluster.folder)
    model, settings, recipes = planning.declared("known", None)
    planned = planning.plan(model, settings, recipes, planning.runs(model, settings, recipes, None, None), ["l4"])
    stages = {stage["rule"]: stage for stage in planned["stages"]}
    assert {rule: stage["jobs"] for rule, stage in stages.items()} == counts
    assert sum(counts.values()) == total
    asked: dict[str, list[dict[str, int]]] = {}
    for rule, listed in re.findall(
        r"^(?:local)?rule (\w+):$.*?^    resources: (.*?)$", output, re.MULTILINE | re.DOTALL
    ):
        if rule not in stages:
            continue
        found = dict(item.partition("=")[::2] for item in listed.split(", "))
        asked.setdefault(rule, []).append({key: int(found.get(key, 0)) for key in ("mem_mb", "disk_mb")})
    for rule, stage in stages.items():
        assert stage["mem_mb"] == max(job["mem_mb"] for job in asked[rule]), rule
        assert stage["disk_mb"] == sum(job["disk_mb"] for job in asked[rule]), rule
