"""How fast an engine is, and how close to what the memory allows."""

import resource
import statistics
import time
from itertools import pairwise

import torch

from trtbuild.errors import UserError
from trtbuild.progress import item_bar
from trtbuild.runtime.session import Session

BANDWIDTH_BYTES = 1 << 29


def benchmark(
    session: Session, batch_size: int, input_len: int, output_len: int, repeats: int = 3, seed: int = 0
) -> dict:
    """Times random prompts: seconds to the first token, seconds a token (median and p90 over steps), tokens a second.

    Every step is waited for, as a streaming server would. `bytes_per_step` counts what a generation step must read:
    each weight once and the caches' filled part, of ranks that share a layer what one reads; `bandwidth_share` is that
    over the step's time and the bandwidth measured on the spot. Raises `UserError` for sizes beyond the engine's
    limits.
    """
    limits = session.limits
    for name, value, limit in (
        ("batch size", batch_size, limits.max_batch_size),
        ("input length", input_len, limits.max_input_len),
        ("output length", output_len, limits.max_output_len),
    ):
        if not 1 <= value <= limit:
            raise UserError(f"{name} {value} is outside the engine's limits; it must be 1 to {limit}")
    if repeats < 1:
        raise UserError(f"repeats is {repeats}; it must be at least 1")
    generator = torch.Generator().manual_seed(seed)
    prompts = torch.randint(1, 256, (batch_size, input_len), generator=generator).tolist()
    first, steps, totals = [], [], []
    with item_bar(repeats + 1, "benchmark", "run") as bar:
        for repeat in range(repeats + 1):  # the first one warms up
            start = time.perf_counter()
            tokens = session.prefill(prompts).argmax(-1).int()
            times = [_wait(session)]
            for _ in range(output_len - 1):
                tokens = session.decode(tokens).argmax(-1).int()
                times.append(_wait(session))
            if repeat:
                first.append(times[0] - start)
                steps += [b - a for a, b in pairwise(times)]
                totals.append(times[-1] - start)
            bar.update()
    result = {
        "batch_size": batch_size,
        "input_len": input_len,
        "output_len": output_len,
        "time_to_first_token_s": statistics.median(first),
        "output_tokens_per_s": batch_size * output_len / statistics.median(totals),
        "peak_memory_bytes": _peak_memory(session.device),
    }
    if steps:
        result["time_per_output_token_s"] = statistics.median(steps)
        result["time_per_output_token_p90_s"] = sorted(steps)[int(0.9 * (len(steps) - 1))]
    if steps:
        filled = input_len + output_len / 2
        read = session.weight_bytes + batch_size * filled * session.bytes_per_position
        bandwidth = measure_bandwidth(session.device)
        result["bytes_per_step"] = int(read)
        result["bytes_per_token"] = int(read / batch_size)
        result["bandwidth_bytes_per_s"] = bandwidth
        result["bandwidth_share"] = read / result["time_per_output_token_s"] / bandwidth
    return result


def measure_bandwidth(device: torch.device) -> float:
    """Bytes a second: on a GPU of a copy (reads plus writes), on a CPU of a sum (reads), the best of ten."""
    source = torch.ones(BANDWIDTH_BYTES // 4, dtype=torch.float32, device=device)
    target = torch.empty_like(source) if device.type == "cuda" else None
    best = float("inf")
    for _ in range(10):
        start = time.perf_counter()
        if target is None:
            source.sum()
        else:
            target.copy_(source)
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return source.nbytes * (1 if target is None else 2) / best


def _wait(session: Session) -> float:
    if session.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def _peak_memory(device: torch.device) -> int:
    """Bytes: allocated on a GPU, resident (mapped weights included) on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
