"""How fast an engine is, how close to what the memory allows, and how fast `transformers` is beside it."""

import resource
import statistics
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch

from trtbuild.errors import UserError
from trtbuild.evaluation.floor import bytes_per_step
from trtbuild.evaluation.hugging_face import HuggingFaceModel
from trtbuild.progress import item_bar
from trtbuild.runtime.sampling import Sampler, SamplingParams
from trtbuild.runtime.session import Session

BANDWIDTH_BYTES = 1 << 29


@dataclass(frozen=True)
class Generation:
    """Greedy generation that can be timed: `start` takes the prompts to their first tokens, `step` goes one token on.

    Neither waits for the device. Of `parts` of the batch that a pipeline works on at the same time, a step may leave
    the last one's under way, which `finish` ends.
    """

    device: torch.device
    batch_size: int
    start: Callable[[], object]
    step: Callable[[], object]
    parts: int = 1
    finish: Callable[[], object] = lambda: None

    def wait(self) -> float:
        """Seconds on the host's clock when all is done."""
        self.finish()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def by_engine(session: Session, prompts: list[list[int]]) -> Generation:
    """As `generate` does it: a step of a part of the batch begins before another part's logits are asked for."""
    parts = session.parts(len(prompts))
    ends = list(accumulate(min(part.limits.max_batch_size, len(prompts)) for part in parts))
    batches = [prompts[first:end] for first, end in pairwise([0, *ends])]
    samplers: list[Sampler] = []
    begun: deque[Callable[[], object]] = deque()

    def start() -> None:
        finish()
        logits = [part.start_prefill(batch) for part, batch in zip(parts, batches, strict=True)]
        samplers[:] = [part.sampler(SamplingParams(), batch) for part, batch in zip(parts, batches, strict=True)]
        for sampler, logits_of in zip(samplers, logits, strict=True):
            sampler(logits_of())

    def step() -> None:
        for part, sampler in zip(parts, samplers, strict=True):
            begun.append(part.start_generate(sampler))
            if len(begun) == len(parts):
                begun.popleft()()

    def finish() -> None:
        while begun:
            begun.popleft()()

    return Generation(session.device, len(prompts), start, step, len(parts), finish)


def by_transformers(model: HuggingFaceModel, prompts: list[list[int]]) -> Generation:
    """The model called directly, with a cache that grows, and without `generate`, which would do more on the host."""
    from transformers import DynamicCache

    cache, tokens = DynamicCache(), torch.empty(0)

    @torch.inference_mode()
    def run(ids: torch.Tensor) -> None:
        nonlocal tokens
        tokens = model.model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits.argmax(-1)

    def start() -> None:
        nonlocal cache
        cache = DynamicCache()
        run(torch.tensor(prompts).to(model.device))

    return Generation(model.device, len(prompts), start, lambda: run(tokens))


def random_prompts(batch_size: int, input_len: int, seed: int = 0) -> list[list[int]]:
    """Tokens that every vocabulary has."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, 256, (batch_size, input_len), generator=generator).tolist()


def check_sizes(session: Session, batch_size: int, input_len: int, output_len: int, repeats: int) -> None:
    """Raises `UserError` for sizes beyond the engine's limits."""
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


def timed(generation: Generation, output_len: int, repeats: int, name: str = "benchmark") -> dict:
    """Seconds to the first token, waited for, and of the steps after it, none of which is: median, and p90 over steps.

    On a GPU steps end when its own clock says, and `host_time_per_output_token_s` is what it takes to launch one.
    """
    first, steps, host, totals = [], [], [], []
    with item_bar(repeats + 1, name, "run") as bar:
        for repeat in range(repeats + 1):  # the first one warms up
            start = generation.wait()
            generation.start()
            there = generation.wait()
            ends, launches = [_mark(generation)], []
            for _ in range(output_len - 1):
                before = time.perf_counter()
                generation.step()
                launches.append(time.perf_counter() - before)
                ends.append(_mark(generation))
            total = generation.wait() - start
            if repeat:
                first.append(there - start)
                steps += [_seconds(a, b) for a, b in pairwise(ends)]
                host += launches
                totals.append(total)
            bar.update()
    result = {
        "time_to_first_token_s": statistics.median(first),
        "output_tokens_per_s": generation.batch_size * output_len / statistics.median(totals),
    }
    if steps:
        result["time_per_output_token_s"] = statistics.median(steps)
        result["time_per_output_token_p90_s"] = sorted(steps)[int(0.9 * (len(steps) - 1))]
    if steps and generation.device.type == "cuda":
        result["host_time_per_output_token_s"] = statistics.median(host)
    return result


def _mark(generation: Generation) -> "float | torch.cuda.Event":
    if generation.device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _seconds(a: "float | torch.cuda.Event", b: "float | torch.cuda.Event") -> float:
    if isinstance(a, float) or isinstance(b, float):
        return b - a  # type: ignore[operator]  # both are
    return a.elapsed_time(b) / 1e3


def benchmark(
    session: Session, batch_size: int, input_len: int, output_len: int, repeats: int = 3, seed: int = 0
) -> dict:
    """Times random prompts (`timed`), and compares a step with its floor, the time that its bytes take to read.

    The bytes are `bytes_per_step`, the bandwidth is measured on the spot. Raises `UserError` for sizes beyond the
    engine's limits.
    """
    check_sizes(session, batch_size, input_len, output_len, repeats)
    generation = by_engine(session, random_prompts(batch_size, input_len, seed))
    result: dict = {"batch_size": batch_size, "input_len": input_len, "output_len": output_len}
    result["parts"] = generation.parts
    result |= timed(generation, output_len, repeats)
    result["peak_memory_bytes"] = _peak_memory(session.device)
    if output_len > 1:
        sizes = batch_size, input_len, output_len
        read = bytes_per_step(session.weight_bytes, session.bytes_per_position, *sizes, generation.parts)
        bandwidth = measure_bandwidth(session.device)
        result["bytes_per_step"] = int(read)
        result["bytes_per_token"] = int(read / batch_size)
        result["bandwidth_bytes_per_s"] = bandwidth
        result["floor_per_output_token_s"] = read / bandwidth
        result["times_floor"] = result["time_per_output_token_s"] * bandwidth / read
        result["bandwidth_share"] = 1 / result["times_floor"]
    return result


def compare(result: dict, model: HuggingFaceModel, repeats: int, seed: int = 0) -> dict:
    """The same prompts and steps by `transformers`, under that name, and how many times as long it takes."""
    prompts = random_prompts(result["batch_size"], result["input_len"], seed)
    theirs = timed(by_transformers(model, prompts), result["output_len"], repeats, "transformers")
    times = [name for name in ("time_to_first_token_s", "time_per_output_token_s") if name in theirs]
    ratios = {name.removesuffix("_s"): theirs[name] / result[name] for name in times}
    return result | {"transformers": {"dtype": model.dtype} | theirs, "times_as_fast": ratios}


def heading(result: dict) -> str:
    """What was measured, on what."""
    origin = result["provenance"]
    parts = f" in {result['parts']} parts" if result["parts"] > 1 else ""
    sizes = f"batch {result['batch_size']}{parts}, {result['input_len']} tokens in, {result['output_len']} out"
    name = origin.get("recipe", origin["dtype"])
    return f"{origin['model']}, {origin['engine']} engine, {name}, {origin['device']}; {sizes}"


def table(result: dict) -> str:
    """A benchmark's result to read."""
    lines = [heading(result)]

    def row(name: str, value: float, unit: str, note: str = "") -> None:
        lines.append(f"{name:24}{value:12.4g} {unit:10}{note}".rstrip())

    row("time to first token", 1e3 * result["time_to_first_token_s"], "ms")
    if "time_per_output_token_s" in result:
        note = f"9 of 10 steps within {1e3 * result['time_per_output_token_p90_s']:.4g} ms"
        if "host_time_per_output_token_s" in result:
            note += f"; the host takes {1e6 * result['host_time_per_output_token_s']:.0f} us to launch one"
        row("time a token", 1e3 * result["time_per_output_token_s"], "ms", note)
        read, bandwidth = result["bytes_per_step"] / 1e9, result["bandwidth_bytes_per_s"] / 1e9
        row("floor", 1e3 * result["floor_per_output_token_s"], "ms", f"{read:.4g} GB at {bandwidth:.4g} GB/s")
        row("times its floor", result["times_floor"], "")
    row("tokens a second", result["output_tokens_per_s"], "", "of all sequences, first tokens included")
    row("peak memory", result["peak_memory_bytes"] / 1e9, "GB")
    if theirs := result.get("transformers"):
        for name, label in (("time_to_first_token", "time to first token"), ("time_per_output_token", "time a token")):
            if name in result["times_as_fast"]:
                note = f"transformers, {theirs['dtype']}; {result['times_as_fast'][name]:.2f} times ours"
                row(label, 1e3 * theirs[f"{name}_s"], "ms", note)
    return "\n".join(lines)


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


def _peak_memory(device: torch.device) -> int:
    """Bytes: allocated on a GPU, resident (mapped weights included) on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
