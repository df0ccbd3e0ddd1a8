"""Jobs that end badly: Snakemake names the rule, its log and the reason, and a rerun makes what is missing."""

import re
from pathlib import Path

import pytest
from cluster import Cluster, prepare

from trtbuild.workflow import weights_folder

pytestmark = pytest.mark.slow

RUNS = {"cancelled": "float16", "late": "bfloat16"}
MISTAKEN = {"dtype": "float16", "quant_checkpoint": {"local": {"path": "nothing"}}}
INT8 = {"dtype": "float16", "weights": {"dtype": "int8"}}


def engine(run: str) -> str:
    return f"results/tiny/{run}/engine/rank0.safetensors"


@pytest.fixture(scope="module")
def failed(slurm, tmp_path_factory) -> Cluster:
    """A run of which one job failed, one was cancelled and one ran out of time; `said` tells."""
    workspace = prepare(Cluster, tmp_path_factory.mktemp("failures") / "cluster")
    workspace.recipes = {run: {"dtype": dtype} for run, dtype in RUNS.items()} | {"mistaken": MISTAKEN}
    (workspace.folder / "nothing").mkdir()
    (workspace.folder / "nothing" / "config.json").write_text("{}")
    workspace.hang(*map(engine, RUNS))
    with workspace.started(*map(engine, [*RUNS, "mistaken"]), "--keep-going", "--retries", "0") as controller:
        workspace.wait_for_hanging()
        jobs = {run: next(job for job in slurm.jobs() if f"_tiny_{run}_" in job.comment) for run in RUNS}
        slurm.run("scancel", jobs["cancelled"].number)
        slurm.run("scontrol", "update", f"jobid={jobs['late'].number}", "EndTime=now")  # which is looked at every 30 s
        workspace.wait(lambda: controller.poll() is not None, "it goes on")
    return workspace


def reported(workspace: Cluster) -> dict[str, tuple[str, str]]:
    """Of each failed job, by its rule's log: the rule, and its state as Snakemake reports them."""
    pattern = (
        r"^Error in rule (\w+):\n    message: SLURM-job .* SLURM status is: '(\w+)'.*\n(?:    .*\n)*?    log: (\S+),"
    )
    return {log: (rule, state) for rule, state, log in re.findall(pattern, workspace.said, re.MULTILINE)}


def test_the_message_names_rule_log_and_reason(failed):
    states = {"cancelled": "CANCELLED", "late": "TIMEOUT"}
    logs = {f"results/tiny/{run}/logs/portable_engine.rank0.log": state for run, state in states.items()}
    (quantize,) = (failed.results / "tiny" / "logs").glob("quantize.*.log")
    assert reported(failed) == {log: ("portable_engine", state) for log, state in logs.items()} | {
        str(quantize.relative_to(failed.folder)): ("quantize", "FAILED")
    }
    assert f"error: {failed.folder}/nothing/config.json: model_type None is not supported" in failed.said
    (log,) = failed.folder.glob(".snakemake/slurm_logs/rule_portable_engine/tiny_late_*/*.log")
    assert str(log) in failed.said  # what is in it Snakemake shows where the rule's log is not empty
    assert "DUE TO TIME LIMIT" in log.read_text()


def test_a_rerun_makes_what_is_missing(failed, slurm):
    """Memory is short at first, and Snakemake asks for more. Another job's node goes down, and Slurm takes another."""
    targets = [*map(engine, RUNS), engine("mistaken")]
    failed.recipes |= {"mistaken": INT8, "lost": {"dtype": "float32"}}
    before = {job.number for job in slurm.jobs("all")}
    weights = Path(weights_folder(failed.recipe("mistaken"))).name
    missing = {f"quantize tiny/{weights}", *(f"portable_engine tiny/{run}" for run in [*RUNS, "mistaken"])}
    assert failed.pending(*targets) == missing

    targets.append(engine("lost"))
    failed.hang(engine("lost"))
    failed.resources += ("quantize:mem_mb=100 * attempt**4",)  # a sample a second must see more
    with failed.started(*targets) as controller:
        failed.wait_for_hanging()
        (lost,) = (job for job in slurm.jobs() if "_tiny_lost_" in job.comment)
        slurm.run("scontrol", "update", f"nodename={lost.node}", "state=down", "reason=test")
        for job in slurm.jobs("PD"):  # that were on this node, and would wait for two minutes
            slurm.run("scontrol", "update", f"jobid={job.number}", "StartTime=now")
        failed.hang()
        failed.wait(lambda: controller.poll() is not None, "it goes on")
        slurm.run("scontrol", "update", f"nodename={lost.node}", "state=resume")

    assert controller.returncode == 0, failed.said
    assert failed.pending(*targets) == set()
    (log,) = failed.folder.glob(f".snakemake/slurm_logs/rule_quantize/tiny_{weights}/*.log")  # of the job that failed
    assert str(log) in failed.said
    assert "exceeded memory limit" in log.read_text()
    rerun = [job for job in slurm.jobs("all") if job.number not in before]
    assert sorted((job.comment.split("_wildcards_")[0], job.state) for job in rerun) == [
        *[("rule_portable_engine", "COMPLETED")] * 4,
        ("rule_quantize", "COMPLETED"),
        ("rule_quantize", "FAILED"),
    ]
    (again,) = (job for job in rerun if "_tiny_lost_" in job.comment)
    assert again.number == lost.number
    assert again.node != lost.node
