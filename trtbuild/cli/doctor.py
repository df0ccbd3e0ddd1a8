"""What works on this machine: each part is tried, not only looked for."""

import os
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import NamedTuple

import typer

from trtbuild import __version__, gpus
from trtbuild.errors import UserError
from trtbuild.launch import launcher

TIMEOUT = 10  # seconds for the hub to answer
ENOUGH_DISK, ENOUGH_MEMORY = 60e9, 51e9  # bytes, of Qwen-7B (trtbuild/resources.py)


class Finding(NamedTuple):
    found: str
    cost: str = ""  # of what is missing, and what would be right; empty: it works


def doctor() -> None:
    """Try what works here, and what each missing thing costs. Exit 1 where nothing can run.

    Example: trtbuild doctor
    """
    runs = True
    for name, check in CHECKS.items():
        try:
            finding = check()
        except Exception as error:  # a broken installation can raise anything
            lines = str(error).splitlines() or [type(error).__name__]
            finding = Finding(lines[0][:200], COSTS[name])
        runs = runs and not (finding.cost and name in NEEDED)
        print(f"{'--' if finding.cost else 'ok'}  {name:10} {finding.found}", flush=True)
        if finding.cost:
            print(f"{'':14} {finding.cost}", flush=True)
    if not runs:
        raise typer.Exit(1)


def _python() -> Finding:
    return Finding(f"{sys.version.split()[0]}, trtbuild {__version__}, {os.cpu_count()} CPU cores")


def _torch() -> Finding:
    import torch

    assert torch.ones(3).sum() == 3
    built = f"for CUDA {torch.version.cuda}" if torch.version.cuda else "without CUDA"
    return Finding(f"{torch.__version__}, built {built}, {torch.get_num_threads()} threads")


def _gpu() -> Finding:
    import torch

    listed = gpus.visible()
    if not torch.cuda.is_available():
        if not listed:
            return Finding("none", COSTS["GPU"])
        why = "its driver is older than torch's CUDA" if torch.version.cuda else "install the build with CUDA"
        return Finding(f"nvidia-smi lists {len(listed)}, torch {torch.__version__} cannot use them", why)
    names = []
    for device in range(torch.cuda.device_count()):
        assert torch.ones(3, device=f"cuda:{device}").sum() == 3
        own = torch.cuda.get_device_properties(device)
        free, total = torch.cuda.mem_get_info(device)
        names.append(f"{own.name} ({own.major}.{own.minor}, {free / 1e9:.0f} of {total / 1e9:.0f} GB free)")
    return Finding(", ".join(names))


def _triton() -> Finding:
    import torch

    if not torch.cuda.is_available():
        return Finding(f"{_version('triton') or 'not installed'}; used on a GPU alone")
    from trtbuild.kernels.add_rms_norm import norm_rows

    x = torch.arange(1.0, 65.0, device="cuda").reshape(2, 32)
    _, normed, _ = norm_rows(x, torch.ones(32, device="cuda"), 1e-6)
    torch.testing.assert_close(normed, torch.nn.functional.rms_norm(x, (32,), eps=1e-6))
    return Finding(f"{_version('triton')}; a kernel was compiled and computes what torch does")


def _tensorrt() -> Finding:
    import torch

    from trtbuild.engine.tensorrt_api import DEFAULT_COMPUTE_CAPABILITIES, api, is_rtx, logger

    try:
        found = f"{api().__name__} {api().__version__}"
    except UserError as error:
        return Finding("not installed", str(error))
    if not api().Builder(logger()):
        return Finding(f"{found}, whose builder does not start", COSTS["TensorRT"])
    if not torch.cuda.is_available():
        if is_rtx():
            return Finding(f"{found}; engines are built here, a GPU runs them")
        return Finding(f"{found} builds on a GPU alone", "'pip install tensorrt-rtx-cu13' builds engines without one")
    own = "{}.{}".format(*torch.cuda.get_device_capability())
    if is_rtx() and own not in DEFAULT_COMPUTE_CAPABILITIES:
        known = ", ".join(DEFAULT_COMPUTE_CAPABILITIES)
        return Finding(f"{found} builds engines for {known}", f"this GPU, {own}, runs portable engines alone")
    return Finding(f"{found}; engines are built and run here")


def _mpi() -> Finding:
    if not _version("mpi4py"):
        return Finding("mpi4py is not installed", COSTS["MPI"])
    code = "from trtbuild.runtime.world import world; print(world().size if world() else 1)"
    command = [*launcher("", 1), "-n", "2", sys.executable, "-P", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    if "".join(done.stdout.split()) != "22":  # a launcher may put one rank's line into the other's
        said = (done.stderr.strip() or done.stdout.strip()).splitlines()
        return Finding(f"two processes of {command[0]} do not find each other: {(said or ['?'])[-1]}", COSTS["MPI"])
    return Finding(f"mpi4py {_version('mpi4py')}; {command[0]} starts two processes that find each other")


def _workflow() -> Finding:
    wanted = [one for one in requires("trtbuild") or () if one.endswith('extra == "workflow"')]
    missing = [name for one in wanted if not _version(name := one.split(";")[0].split(">")[0].strip())]
    if missing:
        return Finding(f"without {', '.join(missing)}", COSTS["workflow"])
    return Finding(f"snakemake {_version('snakemake')} and all that it needs")


def _memory() -> Finding:
    with open("/proc/meminfo", encoding="ascii") as file:
        sizes = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in file}
    total, free = sizes["MemTotal"], sizes["MemAvailable"]
    found = f"{free / 1e9:.1f} of {total / 1e9:.1f} GB available"
    return Finding(found, COSTS["memory"] if free < ENOUGH_MEMORY else "")


def _disk() -> Finding:
    place = Path("results").resolve()
    there = next(folder for folder in (place, *place.parents) if folder.exists())
    free = shutil.disk_usage(there).free
    if not os.access(there, os.W_OK):
        return Finding(f"{there} cannot be written to", "start in a folder of your own: results go to results/ there")
    return Finding(f"{free / 1e9:.0f} GB free for {place}", COSTS["disk"] if free < ENOUGH_DISK else "")


def _hub() -> Finding:
    url = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return Finding("HF_HUB_OFFLINE is set", COSTS["hub"])
    try:
        with suppress(urllib.error.HTTPError):  # it answers
            urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=TIMEOUT).close()
    except OSError as error:
        return Finding(f"{url} is not reached: {getattr(error, 'reason', error)}", COSTS["hub"])
    from huggingface_hub import get_token

    return Finding(url) if get_token() else Finding(f"{url}, no token (HF_TOKEN); gated models, LLaMA 2 say, need one")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


CHECKS: dict[str, Callable[[], Finding]] = {
    "Python": _python,
    "torch": _torch,
    "GPU": _gpu,
    "Triton": _triton,
    "TensorRT": _tensorrt,
    "MPI": _mpi,
    "workflow": _workflow,
    "memory": _memory,
    "disk": _disk,
    "hub": _hub,
}
NEEDED = ("torch",)
COSTS = {
    "torch": "nothing computes without it; 'pip install trtbuild' brings it",
    "GPU": "engines run on the CPU: right for a small model; GPTQ and AWQ of a 7B model take hours, not minutes",
    "Triton": "portable engines run on the CPU alone (--device cpu); a C compiler may be what it lacks",
    "TensorRT": "no TensorRT engines are built; portable engines need none",
    "MPI": "engines of several ranks do not run; 'pip install trtbuild[mpi]' brings an MPI",
    "workflow": "'pip install trtbuild[workflow]' brings them; without, some commands end with a line that names one",
    "memory": "a 7B model's baseline asks for 51 GB in float32 and 35 in float16, its engines for 16 to 25",
    "disk": "a 7B model's checkpoint, quantized weights and engines of one recipe take up to 60 GB",
    "hub": "no downloads; models from files work (local, gguf), and rehearsals with random weights",
}
