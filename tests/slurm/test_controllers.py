"""A controller that ends while its jobs run, in each of the ways in which controllers end; and the next one."""

import os
import signal
from pathlib import Path

import pytest
from cluster import Cluster, prepare
from journal import Journal
from workspace import Workspace

pytestmark = pytest.mark.slow

TARGETS = [f"results/tiny/{run}/engine/rank0.safetensors" for run in ("fp16", "gptq")]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> dict[str, str]:
    """What a run on this machine makes."""
    workspace = prepare(Workspace, tmp_path_factory.mktemp("controllers") / "local")
    workspace.succeed(*TARGETS)
    return workspace.artifacts()


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT], ids=lambda sent: sent.name)
def test_a_run_goes_on_after_its_controllers_end(slurm, undisturbed, tmp_path, sent):
    """Jobs go on when it is killed, and the next one waits for them; told to end, it waits itself; Ctrl-C cancels them.

    Nothing is done twice, but for what was cancelled.
    """
    workspace = prepare(Cluster, tmp_path / "cluster")
    workspace.journal = Journal(tmp_path / "journal")
    gptq = next(name for name in undisturbed if "quantized/" in name).rsplit("/", 1)[0]
    workspace.hang(gptq, TARGETS[0])
    with workspace.started(*TARGETS) as first:
        workspace.wait_for_hanging()
        os.kill(first.pid, sent)
        if sent == signal.SIGTERM:
            workspace.hang()
        workspace.wait(lambda: first.poll() is not None, "the first controller goes on")
    assert len(slurm.jobs("R")) == (2 if sent == signal.SIGKILL else 0)
    if sent == signal.SIGINT:
        workspace.wait(lambda: not slurm.jobs(), "cancelled jobs go on")
        workspace.hang()
    with workspace.started(*TARGETS) as second:
        workspace.wait(lambda: "waiting for" in workspace.said or second.poll() is not None, "no second controller")
        workspace.hang()
        workspace.wait(lambda: second.poll() is not None, "the second controller goes on")
    assert second.returncode == 0, workspace.said
    assert workspace.pending(*TARGETS) == set()
    assert workspace.artifacts() == undisturbed
    assert workspace.journal.count("overlap") == 0
    assert workspace.journal.count("start", f"quantize.{Path(gptq).name}.log") == (2 if sent == signal.SIGINT else 1)
