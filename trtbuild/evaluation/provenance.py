"""What produced a result: engine, versions, device."""

from importlib.metadata import PackageNotFoundError, version

import torch

import trtbuild
from trtbuild.runtime.open import OpenedEngine


def provenance(opened: OpenedEngine) -> dict:
    """Engine kind, dtype, sha256 of the engine file, device and versions."""
    return {
        "engine": opened.session.kind,
        "model": opened.config["model"],
        "dtype": opened.dtype,
        "engine_sha256": opened.sha256,
        **environment(opened.session.device),
    }


def environment(device: torch.device) -> dict:
    """Device, threads and versions of what computes."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name()
    return {"device": f"{device.type}: {name}", "threads": torch.get_num_threads(), "versions": _versions()}


def _versions() -> dict[str, str]:
    found = {"trtbuild": trtbuild.__version__}
    for package in ("torch", "transformers", "tensorrt_rtx_cu13", "tensorrt", "triton"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        import platform

        return platform.processor() or platform.machine()
