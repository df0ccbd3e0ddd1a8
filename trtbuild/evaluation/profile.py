"""Where the time of both phases goes, by kind of kernel: a trace of each for a viewer, and one page."""

from collections import Counter, defaultdict
from collections.abc import Iterable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from trtbuild.evaluation.benchmark import Generation
from trtbuild.files import MARKER, atomic

STEPS = 8  # generation steps in a trace
LISTED = 15  # kernels on the page, of each phase
# Told by what a kernel's name, on a CPU an operation's, has in it; the first that fits.
KINDS = {
    "other ranks": ("all_reduce", "all_gather", "nccl"),
    "attention": ("attention", "flash", "fmha", "softmax_kernel", "cache_write", "rotary"),
    "norms": ("norm",),
    "sampling": ("draw", "argmax", "topk", "sort", "cumsum", "philox"),
    "products": (
        *("product", "gemm", "gemv", "xmma", "cutlass", "nvjet", "splitk", "widen"),  # on a GPU
        *("linear", "::mm", "::addmm", "::_scaled_mm", "::_int_mm", "pack_mm", "::matmul"),  # of torch
    ),
}
OTHER = "other"


def kind_of(name: str) -> str:
    name = name.lower()
    return next((kind for kind, parts in KINDS.items() if any(part in name for part in parts)), OTHER)


def write_profile(generation: Generation, folder: Path, title: str, output_len: int) -> Path:
    """Traces the context phase and some generation steps, of sequences with room for `output_len` tokens.

    Returns the page, `profile.md`, beside their traces, `context.trace.json` and `generation.trace.json`.
    """
    steps = min(STEPS, output_len - 1)
    generation.start()
    for _ in range(steps):  # captures and compiles
        generation.step()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARKER).touch()  # so that the next profile may be written there
    sections = [f"# {title}", "Times are those of kernels, added up; some run side by side.\n"]
    on_gpu = generation.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    for phase, count in (("context", 1), ("generation", steps)):
        if not count:
            continue
        if phase == "generation":
            generation.start()
        generation.wait()
        with profile(activities=activities) as trace:
            began = generation.wait()  # to start the profiler takes longer than a step
            for _ in range(count):
                generation.step() if phase == "generation" else generation.start()
            seconds = generation.wait() - began
        with atomic(folder / f"{phase}.trace.json") as path:
            trace.export_chrome_trace(str(path))
        kind = torch.autograd.DeviceType.CUDA if on_gpu else torch.autograd.DeviceType.CPU
        events = [event for event in trace.events() or () if event.device_type == kind and not event.is_user_annotation]
        spent = [(e.name, e.time_range.elapsed_us() if on_gpu else e.self_cpu_time_total) for e in events]
        heading = f"## {phase.capitalize()} phase" + (f", one of {count} steps" if count > 1 else "")
        sections += [heading, f"{1e3 * seconds / count:.3f} ms with the profiler running.\n", page(spent, count)]
    with atomic(folder / "profile.md") as path:
        path.write_text("\n".join(sections))
    return folder / "profile.md"


def page(spent: Iterable[tuple[str, float]], steps: int) -> str:
    """Tables of kinds and of kernels, largest first, from names and microseconds of `steps` steps: those of one."""
    times: defaultdict[str, float] = defaultdict(float)
    counts: Counter[str] = Counter()
    for name, us in spent:
        times[name] += us
        counts[name] += 1
    kinds = {kind: [name for name in times if kind_of(name) == kind] for kind in (*KINDS, OTHER)}
    total = sum(times.values()) or 1
    rows = sorted(
        (
            (kind, sum(counts[name] for name in names) / steps, sum(times[name] for name in names))
            for kind, names in kinds.items()
        ),
        key=lambda row: -row[2],
    )
    lines = ["| kind | count | us | share % |", "| --- | ---: | ---: | ---: |"]
    lines += [f"| {kind} | {n:.4g} | {us / steps:.1f} | {100 * us / total:.1f} |" for kind, n, us in rows]
    lines += ["", "| kernel | kind | count | us | us each |", "| --- | --- | ---: | ---: | ---: |"]
    for name, us in sorted(times.items(), key=lambda item: -item[1])[:LISTED]:
        short = name.replace("|", "/")[:100]
        count = counts[name]
        lines.append(f"| `{short}` | {kind_of(name)} | {count / steps:.4g} | {us / steps:.1f} | {us / count:.2f} |")
    return "\n".join(lines) + "\n"
