"""Engines of several ranks on the GPUs of one host: what they compute beside one rank, and how fast they are.

    mpiexec -n 2 python tests/gpu/ranks.py sums check speed pipeline large
    python tests/gpu/ranks.py sums [--ranks 2]          (starts the processes itself, where there is no MPI)
    python tests/gpu/ranks.py speed --layouts tp2 --recipes fp16 int8wo --batch-sizes 1 16 --contexts 128 2048

sums      of tensors over ranks, to the last bit, and microseconds beside NCCL's
check     small models of every kind, float32 and with quantized weights and caches, prompts and captured steps: logits
          within the rounding's bounds of one rank's, and in float32 equal tokens
speed     time to the first token and ms a generated token of LLaMA-7B (dummy weights) on one rank and on several
pipeline  tokens a second of many sequences, of which stages have parts under way at the same time
large     LLaMA-2 70B shapes, of which one GPU does not hold all formats
flight    many sequences in flight: in float32 the tokens of one rank, and tokens a second of LLaMA-2 70B's shapes
gpt-fast  a checkout's speed, with --gpt-fast DIR

Exits with 1 where ranks do not compute what one does. Needs what `run.py` needs. A run that takes longer than --seconds
is ended, with the places at which ranks were.
"""

import argparse
import faulthandler
import gc
import os
import pickle
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
import torch.distributed as dist
from run import MODELS, NEW_TOKENS, RECIPES, copy_bandwidth, ours, recipe_network, timed
from throughput import HEADINGS
from throughput import measure as measure_flight

from trtbuild.decoder.mapping import Mapping
from trtbuild.engine.config import BuildLimits
from trtbuild.engine.portable import PortableEngine
from trtbuild.kernels.add_rms_norm import norm_rows
from trtbuild.models.config import ModelConfig
from trtbuild.models.families import config_from_hugging_face
from trtbuild.network.step import Chunk
from trtbuild.runtime.generation import generate
from trtbuild.runtime.ranks_session import RanksSession
from trtbuild.runtime.sampling import SamplingParams
from trtbuild.runtime.session import PortableSession, Session
from trtbuild.runtime.together import obey, ranks_between
from trtbuild.runtime.world import World, world

T = TypeVar("T")
SMALL = BuildLimits(4, 700, 20)
PROMPTS = (7, 1, 300, 600)
CHECKS: dict[str, tuple[str, str, torch.dtype, float | None]] = {
    # Name: model, recipe, dtype, how far logits may be from one rank's.
    "llama, float32": ("llama-7b", "fp16", torch.float32, 1e-4),
    "yi, float32, 4 KV heads": ("yi-6b", "fp16", torch.float32, 1e-4),
    "qwen, float32": ("qwen7b", "fp16", torch.float32, 1e-4),
    "baichuan 13b, float32": ("baichuan-v2_13b", "fp16", torch.float32, 1e-4),
    "llama, float16": ("llama-7b", "fp16", torch.float16, 5e-3),
    "llama, bfloat16": ("llama-7b", "fp16", torch.bfloat16, 4e-2),
    **{f"llama, {recipe}": ("llama-7b", recipe, torch.float16, 2e-2) for recipe in ("int8wo", "int4")},
    # Where activations or caches are rounded a last bit decides between two neighbours, which grows to the noise of the
    # rounding itself: less than one rank's distance from what is not rounded.
    **{f"llama, {recipe}": ("llama-7b", recipe, torch.float16, None) for recipe in ("int8kv", "fp8", "sq")},
}


class Spawned(World):
    """The world of processes that this script starts itself, which talk through a store of torch.distributed."""

    def __init__(self, rank: int, size: int, port: int) -> None:
        self.rank, self.size, self.local_rank, self.local_size = rank, size, rank, size
        self.host, self.stuck, self.closing = socket.gethostname(), False, []
        self._store = dist.TCPStore("127.0.0.1", port, size, rank == 0, timedelta(seconds=600))
        self._words, self._meetings = 0, 0

    def share(self, value):
        self._meetings += 1
        key = f"shared {self._meetings}"
        if self.rank == 0:
            self._store.set(key, pickle.dumps(value))
        return pickle.loads(self._store.get(key))

    def gather(self, value):
        self._meetings += 1
        self._store.set(f"gathered {self._meetings} {self.rank}", pickle.dumps(value))
        keys = [f"gathered {self._meetings} {rank}" for rank in range(self.size)]
        return [pickle.loads(self._store.get(key)) for key in keys] if self.rank == 0 else None

    def tell(self, message):
        self._words += 1
        self._store.set(f"word {self._words}", pickle.dumps(message))

    def hear(self):
        self._words += 1
        return pickle.loads(self._store.get(f"word {self._words}"))

    def close(self):
        super().close()
        self.gather(None)  # the store is rank 0's: it stays until all have left

    def fail(self, line):
        print(f"error: {self}: {line}", file=sys.stderr, flush=True)
        os._exit(2)


def published(name: str, **changes) -> ModelConfig:
    return replace(config_from_hugging_face(MODELS[name]["config"], name), **changes)


class Bench:
    """Makes sessions: on rank 0 those that lead, and those of one rank; the other ranks obey."""

    def __init__(self, here: World) -> None:
        self.here = here
        self.device = torch.device("cuda", here.local_rank)
        torch.cuda.set_device(self.device)
        self.start, self.bandwidth = time.monotonic(), copy_bandwidth()
        free()

    def alone(self, config: ModelConfig, recipe: str, limits: BuildLimits, dtype: torch.dtype) -> PortableSession:
        network = recipe_network(config, recipe, limits, str(self.device), dtype)
        return PortableSession(PortableEngine(network, limits, self.device))

    def on_ranks(
        self,
        config: ModelConfig,
        recipe: str,
        limits: BuildLimits,
        dtype: torch.dtype,
        layout: tuple[int, int],
        lead: Callable[[RanksSession], T],
    ) -> T | None:
        """On every rank at once: what rank 0's `lead` makes of its session; the others obey."""
        mapping = Mapping(*layout, rank=self.here.rank)
        network = recipe_network(config, recipe, limits, str(self.device), dtype, mapping)
        engine = PortableEngine(network, limits, self.device)
        session = RanksSession(engine, ranks_between(self.here, mapping, self.device), self.here, mapping)
        result = None
        if self.here.rank == 0:
            result = lead(session)
            self.here.tell(("next",))
        else:
            while (message := self.here.hear()) != ("next",):
                session.obey(*message)
        torch.cuda.synchronize()
        session.forget_graphs()
        del session, engine, network
        free()
        return result

    def measured(
        self,
        name: str,
        model: str,
        config: ModelConfig,
        recipe: str,
        limits: BuildLimits,
        layout: tuple[int, int],
        cases: list[tuple[int, int]],
    ) -> list["Row"]:
        """A layout's times for every batch size and context, and the floor that a rank's bytes set; on rank 0."""
        rows: list[Row] = []
        draw = torch.Generator().manual_seed(0)

        def measure(session: Session) -> None:
            for batch, context in cases:
                prompts = torch.randint(0, config.vocab_size, (batch, context), generator=draw).tolist()
                first, _, step, _ = ours(session, prompts)
                cached = batch * (context + NEW_TOKENS / 2) * session.bytes_per_position
                floor = (session.weight_bytes + cached) / self.bandwidth
                rows.append(Row(name, model, recipe, batch, context, first, step, floor))
                self.say(f"{rows[-1]}")

        if layout != (1, 1):
            self.on_ranks(config, recipe, limits, torch.float16, layout, measure)
        elif self.here.rank == 0:
            measure(self.alone(config, recipe, limits, torch.float16))
            free()
        return rows

    def layouts(self, args: argparse.Namespace) -> dict[str, tuple[int, int]]:
        every = all_layouts(self.here.size)
        return {name: every[name] for name in args.layouts or every}

    def say(self, line: str) -> None:
        if self.here.rank == 0:
            print(f"{time.monotonic() - self.start:4.0f} s  {line}", flush=True)


def free() -> None:
    gc.collect()
    torch.cuda.empty_cache()


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


def outputs(session: Session) -> tuple[torch.Tensor, list[list[int]]]:
    """Logits of ragged prompts, of captured steps on fixed tokens, of a mixed step; then what is generated."""
    draw = torch.Generator().manual_seed(0)
    prompts = [torch.randint(1000, (n,), generator=draw).tolist() for n in PROMPTS]
    rows = [session.prefill(prompts).clone()]
    for i in range(6):
        tokens = torch.arange(i, i + len(PROMPTS), dtype=torch.int32, device=session.device)
        rows.append(session.decode(tokens).clone())
    rows.append(session.step([Chunk([5, 6, 7], 9), Chunk([3], 1, past=7, slot=1)]).clone())
    greedy = [output.output_ids for output in generate(session, prompts, SamplingParams(12))]
    return torch.cat(rows), greedy


@torch.inference_mode()
def sums(bench: Bench, args: argparse.Namespace) -> bool:
    """Of random tensors over all ranks, to the last bit, alone and with residual and norm; and what is gathered.

    Prints microseconds beside NCCL's.
    """
    size, rank, good = bench.here.size, bench.here.rank, True
    ranks = ranks_between(bench.here, Mapping(size, 1, rank), bench.device)
    draws = [torch.Generator(bench.device).manual_seed(r) for r in range(size)]

    def captured(call: Callable, *arguments: object, count: int = 32) -> float:
        """Microseconds of one of `count` in a graph."""
        with torch.cuda.stream(torch.cuda.Stream()):
            call(*arguments)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(count):
                call(*arguments)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        for i in range(13):
            if i == 3:
                start.record()
            graph.replay()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) * 1e3 / count / 10

    def drawn(*shape: int, dtype: torch.dtype) -> list[torch.Tensor]:
        return [torch.randn(*shape, generator=draw, device=bench.device).to(dtype) for draw in draws]

    def by_nccl(x, residual, weight):
        dist.all_reduce(x)
        return norm_rows(x, weight, 1e-5, b=residual)

    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        for rows, width in ((1, 5), (1, 4096), (1, 8192), (4, 4096), (16, 4096), (32, 8192), (64, 4096), (512, 4096),
                            (2048, 4096), (5000, 4096)):  # fmt: skip
            if dtype != torch.float16 and rows not in (1, 64):
                continue
            wrong = 0
            residual, weight = (drawn(*shape, dtype=dtype)[0] for shape in ((rows, width), (width,)))
            for _ in range(30):
                parts = drawn(rows, width, dtype=dtype)
                exact = sum(part.float() for part in parts)
                total = (exact + residual.float()).to(dtype)
                normed = torch.nn.functional.rms_norm(total.float(), (width,), weight.float(), 1e-5)
                wrong += not ranks.all_reduce(parts[rank].clone(), 0, size).equal(exact.to(dtype))
                found = ranks.all_reduce_add_rms_norm(parts[rank].clone(), residual, weight, 1e-5, 0, size)
                wrong += not found[0].equal(total)
                wrong += not found[1].float().allclose(normed, 1e-2, 1e-2)
            good &= not wrong
            x = parts[rank]
            times = [
                captured(ranks.all_reduce, x, 0, size),
                captured(dist.all_reduce, x),
                captured(ranks.all_reduce_add_rms_norm, x, residual, weight, 1e-5, 0, size),
                captured(by_nccl, x, residual, weight),
            ]
            name, verdict = str(dtype).removeprefix("torch."), f"   WRONG {wrong}" if wrong else ""
            told = "sum {:6.2f} us, NCCL {:6.2f}; with norm {:6.2f}, NCCL and norm {:6.2f}".format(*times)
            bench.say(f"{name:9} {rows:4} x {width}: {told}{verdict}")
    for rows, width in ((1, 32000 // size), (16, 32000 // size), (1, 1)):
        parts = drawn(rows, width, dtype=torch.float32)
        good &= (right := ranks.all_gather(parts[rank], 0, size).equal(torch.cat(parts, 1)))
        out = torch.empty(size * rows, width, device=bench.device)
        times = [
            captured(ranks.all_gather, parts[rank], 0, size),
            captured(dist.all_gather_into_tensor, out, parts[rank]),
        ]
        bench.say(f"gather {rows:4} x {width}: {times[0]:6.2f} us, NCCL {times[1]:6.2f}{'' if right else '   WRONG'}")
    return good


def check(bench: Bench, args: argparse.Namespace) -> bool:
    """Prints how far every layout is from one rank, a line a case; whether all are near enough."""
    good, layouts = True, bench.layouts(args)
    for name, (model, recipe, dtype, limit) in CHECKS.items():
        if args.cases and name not in args.cases:
            continue
        config = published(model, num_hidden_layers=3)
        expected, tokens = torch.empty(0), []
        if bench.here.rank == 0:
            expected, tokens = outputs(bench.alone(config, recipe, SMALL, dtype))
            free()
            if limit is None:
                limit = distance(outputs(bench.alone(config, "fp16", SMALL, dtype))[0], expected)
                free()
        for layout, sizes in layouts.items():
            if sizes[1] > config.num_hidden_layers:
                continue

            found = bench.on_ranks(config, recipe, SMALL, dtype, sizes, outputs)
            if found:
                error = distance(found[0], expected)
                equal = int((torch.tensor(tokens) == torch.tensor(found[1])).sum())
                right = error < limit and (dtype != torch.float32 or found[1] == tokens)
                good &= right
                verdict = f"{equal}/{12 * len(PROMPTS)} tokens{'' if right else '   WRONG'}"
                bench.say(f"{layout:8} {name:28} error {error:.1e}, at most {limit:.0e}; {verdict}")
    return good


@dataclass
class Row:
    """What was measured: times in seconds."""

    layout: str
    model: str
    recipe: str
    batch: int
    context: int
    first: float
    step: float
    floor: float


def speed(bench: Bench, args: argparse.Namespace) -> list[Row]:
    """On one rank and on all, every recipe, batch size and context; on rank 0."""
    config, layouts = published(args.model), bench.layouts(args)
    limits = BuildLimits(max(args.batch_sizes), max(args.contexts), NEW_TOKENS + 16)
    cases = [(b, c) for b in args.batch_sizes for c in args.contexts]
    rows = []
    for recipe in args.recipes:
        rows += bench.measured("one rank", args.model, config, recipe, limits, (1, 1), cases)
        for layout, sizes in layouts.items():
            rows += bench.measured(layout, args.model, config, recipe, limits, sizes, cases)
    return rows


def large(bench: Bench, args: argparse.Namespace) -> list[Row]:
    """LLaMA-2 70B, whose ranks share each layer, in formats of which two GPUs hold it."""
    config, size = published("llama2-70b"), bench.here.size
    limits = BuildLimits(1, 2048, NEW_TOKENS + 16)
    rows = []
    for recipe in args.large:
        rows += bench.measured(f"tp{size}", "llama2-70b", config, recipe, limits, (size, 1), [(1, 128), (1, 2048)])
        bench.say(f"70B {recipe}: {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB at most on rank 0's GPU")
    return rows


def pipeline(bench: Bench, args: argparse.Namespace) -> bool:
    """Tokens a second of many sequences, on one rank in batches of 16 and in one batch, and on stages."""
    config, size, count = published(args.model), bench.here.size, args.sequences
    for context in args.contexts:
        prompts = torch.randint(0, config.vocab_size, (count, context), generator=torch.Generator().manual_seed(0))

        def measure(session: Session, prompts=prompts.tolist()) -> tuple[float, list]:
            generate(session, prompts, SamplingParams(24))  # captures the graphs
            short, _ = timed(lambda: generate(session, prompts, SamplingParams(8)))
            long, outputs = timed(lambda: generate(session, prompts, SamplingParams(8 + NEW_TOKENS)))
            rate = count * NEW_TOKENS / (long - short)
            bench.say(f"{count} sequences of {len(prompts[0])}: {short:.2f} s for 8 tokens, then {rate:.0f} tokens/s")
            return rate, [output.output_ids for output in outputs]

        found = {}
        for batch in (16, count):
            if bench.here.rank == 0:
                bench.say(f"one rank, batches of {batch}")
                limits = BuildLimits(batch, context, NEW_TOKENS + 16)
                found[batch] = measure(bench.alone(config, "fp16", limits, torch.float16))
                free()
        limits = BuildLimits(count, context, NEW_TOKENS + 16)
        bench.say(f"pp{size}")
        stages = bench.on_ranks(config, "fp16", limits, torch.float16, (1, size), measure)
        if stages:
            same = sum(a == b for a, b in zip(found[16][1], stages[1], strict=True))
            ratios = {batch: f"{stages[0] / rate:.2f}" for batch, (rate, _) in found.items()}
            bench.say(f"pp{size} over one rank, by its batches: {ratios}; {same} of {count} sequences are the same")
    return True


def flight(bench: Bench, args: argparse.Namespace) -> bool:
    """Whether sequences in flight over ranks have the tokens of one rank; how fast 70B's are, of a mixed load."""
    size, good = bench.here.size, True
    draw = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 600, (24,), generator=draw).tolist()
    prompts = [torch.randint(1000, (n,), generator=draw).tolist() for n in lengths]

    def generated(session: Session) -> list[list[int]]:
        return [output.output_ids for output in generate(session, prompts, SamplingParams(16))]

    for name in ("llama, float32", "yi, float32, 4 KV heads", "baichuan 13b, float32"):
        model, recipe, dtype, _ = CHECKS[name]
        config = published(model, num_hidden_layers=3)
        alone = generated(bench.alone(config, recipe, SMALL, dtype)) if bench.here.rank == 0 else []
        free()
        found = bench.on_ranks(config, recipe, SMALL, dtype, (size, 1), generated)
        if found:
            same = sum(a == b for a, b in zip(alone, found, strict=True))
            good &= same == len(prompts)
            bench.say(f"tp{size} in flight, {name}: {same} of {len(prompts)} outputs are one rank's")
    config = published("llama2-70b")
    bench.say(HEADINGS)
    options = argparse.Namespace(requests=args.requests, pools=1, budget=0, seconds=args.flight_seconds)
    for recipe in args.large:

        def lead(session: RanksSession, recipe: str = recipe) -> None:
            bench.say(f"70B {recipe}: made")
            measure_flight(session, config, recipe, "mixed", options, bench.bandwidth)

        bench.on_ranks(config, recipe, BuildLimits(1, 2048, 2048), torch.float16, (size, 1), lead)
    return good


def gpt_fast(bench: Bench, args: argparse.Namespace) -> list[Row]:
    """That of a checkout, with its own tensor parallelism, at batch 1."""
    import run

    sys.path.insert(0, str(args.gpt_fast))
    os.environ |= {"LOCAL_RANK": str(bench.here.rank), "LOCAL_WORLD_SIZE": str(bench.here.size)}
    import tp

    ranks_between(bench.here, Mapping(bench.here.size, 1, bench.here.rank), bench.device)
    rows = []
    for format in args.gpt_fast_formats:
        found = run.gpt_fast(args.gpt_fast, published(args.model), format, args.contexts, tp.apply_tp)
        rows += [
            Row(f"tp{bench.here.size}", args.model, f"gpt-fast {format}", 1, context, *times, float("nan"))
            for context, times in zip(args.contexts, found, strict=True)
        ]
        bench.say(f"{rows[-len(found) :]}")
        free()
    return rows


PARTS = {
    "sums": sums,
    "check": check,
    "speed": speed,
    "pipeline": pipeline,
    "large": large,
    "flight": flight,
    "gpt-fast": gpt_fast,
}


def all_layouts(ranks: int) -> dict[str, tuple[int, int]]:
    sizes = [(ranks // pp, pp) for pp in range(1, ranks + 1) if ranks % pp == 0]
    return {"".join(f"{k}{n}" for k, n in (("tp", tp), ("pp", pp)) if n > 1): (tp, pp) for tp, pp in sizes}


def spawn(ranks: int, seconds: float) -> int:
    """Starts this script once a rank; ends all when one fails or time is up."""
    with socket.socket() as free_port:
        free_port.bind(("127.0.0.1", 0))
        port = free_port.getsockname()[1]
    processes = [
        subprocess.Popen([sys.executable, *sys.argv], env=os.environ | {"SPAWNED": f"{rank} {ranks} {port}"})
        for rank in range(ranks)
    ]
    end = time.monotonic() + seconds + 20
    try:
        while any(process.poll() is None for process in processes):
            if time.monotonic() > end or any(process.poll() for process in processes):
                break
            time.sleep(0.1)
        time.sleep(1)  # for the others' last words
    finally:
        for process in processes:
            process.kill()
    return max(abs(process.wait()) for process in processes)


def table(rows: list[Row]) -> None:
    print("| model | layout | recipe | batch | context | first ms | x one rank | ms/token | x one rank | x floor |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    alone = {(row.model, row.recipe, row.batch, row.context): row for row in rows if row.layout == "one rank"}
    for row in rows:
        one = alone.get((row.model, row.recipe, row.batch, row.context))
        ratios = [f"{one.first / row.first:.2f}", f"{one.step / row.step:.2f}"] if one else ["", ""]
        names = f"{row.model} | {row.layout} | {row.recipe} | {row.batch} | {row.context}"
        steps = f"{row.step * 1e3:.2f} | {ratios[1]} | {row.step / row.floor:.2f}"
        print(f"| {names} | {row.first * 1e3:.1f} | {ratios[0]} | {steps} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", choices=PARTS, help="what to do, in this order")
    parser.add_argument("--ranks", type=int, default=2, help="without a launcher: how many processes to start")
    parser.add_argument("--layouts", nargs="+", help="such as tp2 or tp2pp2; default: all of so many ranks")
    parser.add_argument("--cases", nargs="+", choices=CHECKS, help="to check; default: all")
    parser.add_argument("--model", choices=MODELS, default="llama-7b", metavar="NAME", help="of config/models.yaml")
    parser.add_argument("--recipes", nargs="*", choices=RECIPES, default=["fp16", "int8wo"])
    parser.add_argument("--large", nargs="*", choices=RECIPES, default=["int4", "fp8"], help="recipes of the 70B model")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--contexts", type=int, nargs="+", default=[128, 2048])
    parser.add_argument("--sequences", type=int, default=32, help="in a pipeline")
    parser.add_argument("--requests", type=int, default=1000, help="in flight")
    parser.add_argument("--flight-seconds", type=float, default=120, help="of a recipe in flight at most")
    parser.add_argument("--gpt-fast", type=Path, metavar="DIR", help="its checkout")
    parser.add_argument("--gpt-fast-formats", nargs="+", default=["fp16"], choices=["fp16", "int8"])
    parser.add_argument("--seconds", type=float, default=230, help="after which a run is ended")
    args = parser.parse_args()
    here = Spawned(*map(int, os.environ["SPAWNED"].split())) if "SPAWNED" in os.environ else world()
    if here is None:
        sys.exit(spawn(args.ranks, args.seconds))
    faulthandler.dump_traceback_later(args.seconds, exit=True)
    torch.set_grad_enabled(False)
    bench = Bench(here)
    bench.say(
        f"{here.size} x {torch.cuda.get_device_name()}, torch {torch.__version__}, {bench.bandwidth / 1e12:.2f} TB/s"
    )
    good, rows = True, []
    for part in args.parts:
        result = PARTS[part](bench, args)
        if isinstance(result, bool):
            good &= result
        else:
            rows += result
        bench.say(f"{part} has ended")
    if here.rank == 0:
        table(rows)
    if "gpt-fast" in args.parts:  # torch.compile keeps graphs that hold NCCL's calls, for whose end NCCL's would wait
        sys.stdout.flush()
        here.gather(None)
        os._exit(0 if good else 1)
    if here.rank:
        obey(here)
    here.end(0 if good else 1)
    sys.exit(0 if good else "some layouts do not compute what one rank does")


if __name__ == "__main__":
    main()
