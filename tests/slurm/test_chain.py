"""A whole chain on a cluster: what it makes, where its ranks are, and what a change makes again."""

import json

import pytest
from conftest import Cluster, prepare
from workspace import Workspace

pytestmark = pytest.mark.slow
TARGETS = [f"results/tiny/{run}/rouge.json" for run in ("fp16", "int8kv@tp2", "gptq")]


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


def ranks(workspace: Cluster) -> list[dict[str, set[str]]]:
    """Of each job that had several ranks: the GPUs that they saw, by node."""
    jobs: dict[str, list] = {}
    for file in (workspace.folder / "ranks").iterdir():
        rank = json.loads(file.read_text())
        jobs.setdefault(rank["SLURM_JOB_ID"], []).append((rank["SLURMD_NODENAME"], rank["CUDA_VISIBLE_DEVICES"]))
    return [sorted(seen) for _, seen in sorted(jobs.items(), key=lambda job: int(job[0]))]


def test_files_are_those_of_a_local_run(made, local):
    artifacts = made.artifacts()
    assert {*TARGETS} <= artifacts.keys()
    assert artifacts == local.artifacts()
