"""A Slurm of one's own on this machine: a controller and several nodes as children of this process, in one folder.

It needs Debian's `slurm-wlm` and `slurm-wlm-basic-plugins`, and neither systemd, cgroups nor munge. Nodes differ by
their port; GPUs are devices that nobody opens, of which Slurm hands out the numbers (`CUDA_VISIBLE_DEVICES`). Memory is
sampled once a second; CPUs and GPUs are counted, not enforced. A cancelled job's processes are killed by their group
(`pgid`), as cgroups would: by their parents (`linuxproc`) one whose parent has ended would be missed.
"""

import getpass
import os
import shutil
import socket
import stat
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

from trtbuild.runtime.world import end_with_parent

DAEMONS, COMMANDS = ("slurmctld", "slurmd"), ("sbatch", "srun", "scancel", "squeue", "sinfo", "scontrol", "sacct")
PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin"  # the latter two are not in every user's
UP = 300  # seconds for the nodes to be idle; mostly one, and more on busy cores
NULL = os.makedev(1, 3)

CONFIGURATION = """\
ClusterName=private
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/none
CredType=cred/none
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
ProctrackType=proctrack/pgid
MpiDefault=pmi2
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=1
JobAcctGatherParams=OverMemoryKill
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
GresTypes=gpu
SlurmdParameters=config_overrides
SchedulerParameters=batch_sched_delay=0,bf_interval=1
ReturnToService=1
DefMemPerCPU=100
KillWait=2
MinJobAge=600
"""


def missing() -> str | None:
    """Why there can be no private Slurm here; None where there can."""
    absent = [name for name in (*DAEMONS, *COMMANDS) if not shutil.which(name, path=PATH)]
    return f"Slurm is not installed: no {', '.join(absent)}" if absent else None


class Job(NamedTuple):
    """What Slurm says of a job; the executor's `comment` is `rule_NAME_wildcards_VALUES`."""

    number: str
    state: str
    node: str
    comment: str


class Slurm:
    """A running Slurm. Who has `programs` first in PATH uses it."""

    def __init__(self, folder: Path) -> None:
        self.programs = folder / "bin"

    def run(self, *command: object) -> str:
        """What one of Slurm's commands prints; raises `CalledProcessError`."""
        program, *arguments = map(str, command)
        words = [str(self.programs / program), *arguments]
        return subprocess.run(words, check=True, text=True, stdout=subprocess.PIPE).stdout

    def jobs(self, states: str = "PD,R,CG,S") -> list[Job]:
        """The jobs that have not ended, or those in given states (`all`), the last first."""
        lines = self.run("squeue", "-h", "-o", "%A|%T|%N|%k", "-t", states).splitlines()
        return [Job(*line.split("|", 3)) for line in lines]


@contextmanager
def private_slurm(folder: Path, nodes: int = 2, cpus: int = 64, memory: int = 500000, gpus: int = 4) -> Iterator[Slurm]:
    """Brings one up in an empty `folder`; `cpus`, `memory` (MB) and `gpus` are a node's, whatever the machine has.

    At the end its jobs are cancelled and its daemons have ended.
    """
    slurm = Slurm(folder)
    with ExitStack() as stack:
        _configure(folder, nodes, cpus, memory, gpus)
        stack.enter_context(_daemon(folder, "slurmctld", "-i"))
        for node in range(1, nodes + 1):
            stack.enter_context(_daemon(folder, "slurmd", "-N", f"node{node}"))
        deadline = time.monotonic() + UP
        while not _is_up(slurm, nodes):
            assert time.monotonic() < deadline, "\n".join(file.read_text() for file in folder.glob("*.log"))
            time.sleep(0.1)
        stack.callback(_cancel, slurm)
        yield slurm


def _configure(folder: Path, nodes: int, cpus: int, memory: int, gpus: int) -> None:
    host, (controller, *ports) = socket.gethostname().split(".")[0], _free_ports(1 + nodes)
    lines = [CONFIGURATION.format(host=host, controller=controller, user=getpass.getuser(), folder=folder)]
    for node, port in enumerate(ports, 1):
        (folder / f"node{node}").mkdir()
        lines.append(
            f"NodeName=node{node} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs={cpus} RealMemory={memory} "
            f"Gres=gpu:{gpus}\n"
        )
    lines.append("PartitionName=gpu Nodes=ALL Default=YES MaxTime=INFINITE DefaultTime=10\n")
    (folder / "state").mkdir()
    (folder / "slurm.conf").write_text("".join(lines))
    (folder / "gres.conf").write_text(f"Name=gpu File={_devices(folder, gpus)}\n")
    # A job's inner Snakemake does not hand SLURM_CONF on to what it runs, so the commands bring it along.
    (folder / "bin").mkdir()
    for name in COMMANDS:
        command = folder / "bin" / name
        command.write_text(f'#!/bin/sh\nSLURM_CONF={folder}/slurm.conf exec {shutil.which(name)} "$@"\n')
        command.chmod(0o755)


def _devices(folder: Path, gpus: int) -> str:
    """Character devices, which only root may make; others take the consoles."""
    device = folder / "gpu"
    try:
        for gpu in range(gpus):
            os.mknod(f"{device}{gpu}", 0o666 | stat.S_IFCHR, NULL)
    except PermissionError:
        device = Path("/dev/tty")
    return f"{device}[0-{gpus - 1}]"


def _free_ports(number: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(number)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


@contextmanager
def _daemon(folder: Path, name: str, *options: str) -> Iterator[None]:
    """In the foreground, and ended with this process, so that none is left whatever happens."""
    with open(folder / f"{name}{options[-1]}.log", "w") as log:
        process = subprocess.Popen(
            [shutil.which(name, path=PATH), "-D", *options],
            env=os.environ | {"SLURM_CONF": f"{folder}/slurm.conf"},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            preexec_fn=end_with_parent,
        )
    try:
        yield
    finally:
        process.terminate()
        try:
            process.wait(10)
        finally:
            process.kill()
            process.wait()


def _is_up(slurm: Slurm, nodes: int) -> bool:
    try:
        return slurm.run("sinfo", "-h", "-N", "-o", "%T").split() == ["idle"] * nodes
    except subprocess.CalledProcessError:
        return False


def _cancel(slurm: Slurm) -> None:
    if jobs := slurm.jobs():
        slurm.run("scancel", "--full", *(job.number for job in jobs))
    deadline = time.monotonic() + 20
    while slurm.jobs() and time.monotonic() < deadline:
        time.sleep(0.1)
