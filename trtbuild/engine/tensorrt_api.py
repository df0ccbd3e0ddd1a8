"""The TensorRT distribution that is installed, and the only place that knows the difference between the two.

`tensorrt` runs on data-centre GPUs; `tensorrt_rtx` (TensorRT for RTX) builds without a GPU and runs on compute
capability 8.0, 8.6, 8.9 and 12.x. `TRTBUILD_TENSORRT` chooses one by module name where both are installed.
"""

import importlib
import os
from functools import cache
from types import ModuleType
from typing import Any

from trtbuild.errors import UserError
from trtbuild.tensors.rounding import FP8_CAPABILITY

DISTRIBUTIONS = ("tensorrt", "tensorrt_rtx")
# What one engine of TensorRT-RTX may be compiled for; a `tensorrt` engine is for the GPU it is built on.
DEFAULT_COMPUTE_CAPABILITIES = ("8.0", "8.6", "8.9", "12.0")


@cache
def api() -> ModuleType:
    """The distribution's Python module; raises `UserError` naming the package to install if there is none."""
    if chosen := os.environ.get("TRTBUILD_TENSORRT"):
        try:
            return importlib.import_module(chosen)
        except ImportError as error:
            raise UserError(f"TRTBUILD_TENSORRT names {chosen!r}, which cannot be imported: {error}") from error
    for name in DISTRIBUTIONS:
        try:
            return importlib.import_module(name)
        except ImportError:
            continue
    raise UserError(
        "no TensorRT distribution is installed; 'pip install tensorrt-rtx-cu13' builds engines without a GPU, "
        "'pip install tensorrt-cu13' serves data-centre GPUs. Portable engines need neither."
    )


def describe_builder(compute_capabilities: list[str] | None, fp8: bool = False) -> dict:
    """Distribution, version and targets, for an engine's `config.json`; `fp8`: whether there is FP8 in the engine.

    Raises `UserError` for a compute capability that the distribution does not build for, or not with FP8.
    """
    targets = [*_targets(compute_capabilities, fp8)] if is_rtx() else "the GPU it was built on"
    return {"distribution": api().__name__, "version": api().__version__, "compute_capabilities": targets}


def target_capabilities(compute_capabilities: list[str] | None, fp8: bool) -> list[str]:
    """The given compute capabilities, or the default ones. Raises `UserError` where FP8 needs a newer GPU."""
    able = [c for c in DEFAULT_COMPUTE_CAPABILITIES if not (fp8 and _is_before_fp8(c))]
    if fp8 and (old := [c for c in compute_capabilities or () if _is_before_fp8(c)]):
        raise UserError(f"GPUs of compute capability {', '.join(old)} have no FP8; build for {', '.join(able)}")
    return list(compute_capabilities or able)


def _is_before_fp8(capability: str) -> bool:
    return tuple(map(int, capability.split("."))) < FP8_CAPABILITY


def _targets(compute_capabilities: list[str] | None, fp8: bool) -> dict[str, Any]:
    """`target_capabilities`, and what TensorRT-RTX has for each. Raises `UserError` also for one that it has not."""
    names = api().ComputeCapability.__members__.items()
    known = {f"{name[2:-1]}.{name[-1]}": value for name, value in names if name.startswith("SM")}
    for capability in compute_capabilities or ():
        if capability not in known:
            raise UserError(
                f"compute capability {capability} is not one that {api().__name__} builds for: {', '.join(known)}"
            )
    return {capability: known[capability] for capability in target_capabilities(compute_capabilities, fp8)}


def is_rtx() -> bool:
    return api().__name__ == "tensorrt_rtx"


@cache
def logger() -> Any:
    """TensorRT's logger at warning level; it must outlive every object made with it."""
    return api().Logger(api().Logger.WARNING)


def set_target(config: Any, compute_capabilities: list[str] | None, fp8: bool) -> None:
    """Tells a builder configuration for which GPUs to compile (None: the default); raises as `describe_builder`."""
    if not is_rtx():
        return
    targets = _targets(compute_capabilities, fp8)
    config.num_compute_capabilities = len(targets)
    for i, target in enumerate(targets.values()):
        config.set_compute_capability(target, i)


def runs_here(builder: dict) -> bool:
    """Whether an engine by `builder` (as in its `config.json`) can run on the GPU at hand with what is installed."""
    import torch

    try:
        if api().__name__ != builder["distribution"] or not torch.cuda.is_available():
            return False
    except UserError:
        return False
    major, minor = torch.cuda.get_device_capability()
    return not is_rtx() or f"{major}.{minor}" in builder["compute_capabilities"]
