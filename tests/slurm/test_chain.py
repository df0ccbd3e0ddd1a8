"""A whole chain on a cluster: what it makes, where its ranks are, and what a change makes again."""

import json

import pytest
from cluster import Cluster, prepare
from workspace import Workspace

pytestmark = pytest.mark.slow
SCORED = "results/tiny/int8kv@tp2/rouge.json"
TARGETS = [SCORED, "results/tiny/fp16/gate.json", "results/tiny/gptq/gate.json"]
# What docs/clusters.md says of ranks on two nodes of two GPUs.
TWO_NODES = {"nodes": 2, "tasks_per_node": 2, "tasks": 0, "gres": "gpu:2", "gpu": 0}


@pytest.fixture(scope="module")
def local(tmp_path_factory) -> Workspace:
    """The chain on this machine."""
    workspace = prepare(Workspace, tmp_path_factory.mktemp("chain") / "local")
    workspace.succeed(*TARGETS)
    return workspace


@pytest.fixture(scope="module")
def made(slurm, tmp_path_factory) -> Cluster:
    """The chain on a cluster."""
    workspace = prepare(Cluster, tmp_path_factory.mktemp("chain") / "cluster")
    workspace.succeed(*TARGETS)
    return workspace


def ranks(workspace: Cluster) -> list[list[tuple[str, str]]]:
    """The node and the GPU of each rank, of each job that had several.

    A rank takes the GPU of its number among its node's ranks (`runtime.ranks`), of those that Slurm shows the job.
    """
    jobs: dict[str, dict[str, tuple[str, str]]] = {}
    for file in (workspace.folder / "ranks").iterdir():
        rank = json.loads(file.read_text())
        gpu = rank["CUDA_VISIBLE_DEVICES"].split(",")[int(rank["SLURM_LOCALID"])]
        jobs.setdefault(rank["SLURM_JOB_ID"], {})[rank["SLURM_PROCID"]] = rank["SLURMD_NODENAME"], gpu
    return [[of[number] for number in sorted(of)] for of in jobs.values()]


def test_files_are_those_of_a_local_run(made, local):
    artifacts = made.artifacts()
    assert {*TARGETS} <= artifacts.keys()
    assert artifacts == local.artifacts()


def test_two_ranks_are_on_one_node_with_a_gpu_each(made):
    jobs = ranks(made)
    assert len(jobs) == 2  # perplexity and summarize
    for (node, gpu), (other_node, other_gpu) in jobs:
        assert node == other_node
        assert gpu != other_gpu


def test_four_ranks_are_on_two_nodes_with_a_gpu_each(made):
    workspace = made.copy(made.folder.with_name("nodes"))
    for file in (workspace.folder / "ranks").iterdir():
        file.unlink()
    workspace.resources += tuple(f"perplexity:{name}={value}" for name, value in TWO_NODES.items())
    workspace.succeed("results/tiny/fp16@tp2pp2/perplexity.json")
    ((first, second, third, fourth),) = ranks(workspace)
    assert first[0] == second[0] != third[0] == fourth[0]
    assert len({first, second, third, fourth}) == 4


@pytest.mark.parametrize(("part", "change"), [("evaluation", {"max_output_len": 4}), ("build", {"max_batch_size": 2})])
def test_a_change_makes_again_what_it_makes_locally(made, local, part, change):
    pending = []
    for workspace in (made, local):
        changed = workspace.copy(workspace.folder.with_name(f"{workspace.folder.name}-{part}"))
        changed.config[part] |= change
        pending.append(changed.pending(*TARGETS))
    assert pending[0] == pending[1] != set()


def test_a_change_that_was_run_is_done(made, slurm):
    workspace = made.copy(made.folder.with_name("changed"))
    workspace.config["evaluation"]["prompt"] = "News: {article}"
    before = slurm.jobs("all")
    workspace.succeed(SCORED)
    assert [job.comment.split("_wildcards_")[0] for job in slurm.jobs("all") if job not in before] == ["rule_summarize"]
    assert workspace.pending(SCORED) == set()
