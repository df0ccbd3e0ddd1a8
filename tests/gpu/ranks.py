"""Engines of several ranks on the GPUs of one host: what they compute beside one rank, and how fast they are.

    mpiexec -n 2 python tests/gpu/ranks.py
    python tests/gpu/ranks.py [--ranks 2]          (starts the processes itself, where there is no MPI)
    python tests/gpu/ranks.py --layouts tp2 --recipes fp16 int8wo --batch-sizes 1 16 --contexts 128 2048

First small models of every kind, float32 and with quantized weights and caches, prompts and captured steps: logits
within the rounding's bounds of one rank's, and in float32 equal tokens; exits with 1 otherwise. Then the time to the
first token and ms per generated token of LLaMA-7B (dummy weights) on one rank and on several. Needs what `run.py`
needs. A run that takes longer than --seconds is ended, with the places at which ranks were.
"""

import argparse
import faulthandler
import gc
import json
import os
import pickle
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
import torch.distributed as dist
from run import MODELS, NEW_TOKENS, RECIPES, ours, recipe_network

from trtbuild.decoder.mapping import Mapping
from trtbuild.engine.config import BuildLimits
from trtbuild.engine.portable import PortableEngine
from trtbuild.models.config import ModelConfig
from trtbuild.models.families import config_from_hugging_face
from trtbuild.network.step import Chunk
from trtbuild.runtime.ranks_session import RanksSession
from trtbuild.runtime.session import PortableSession, Session
from trtbuild.runtime.together import obey, ranks_between
from trtbuild.runtime.world import World, world

SMALL = BuildLimits(4, 700, 20)
PROMPTS = (7, 1, 300, 600)
CHECKS = {  # name: model, recipe, dtype, how far logits may be from one rank's
    "llama, float32": ("llama-7b", "fp16", torch.float32, 1e-4),
    "yi, float32, 4 KV heads": ("yi-6b", "fp16", torch.float32, 1e-4),
    "qwen, float32": ("qwen7b", "fp16", torch.float32, 1e-4),
    "baichuan 13b, float32": ("baichuan-v2_13b", "fp16", torch.float32, 1e-4),
    "llama, float16": ("llama-7b", "fp16", torch.float16, 5e-3),
    "llama, bfloat16": ("llama-7b", "fp16", torch.bfloat16, 4e-2),
    **{f"llama, {recipe}": ("llama-7b", recipe, torch.float16, 2e-2) for recipe in ("int8wo", "int4")},
    # Where activations or caches are rounded a last bit decides between two neighbours.
    **{f"llama, {recipe}": ("llama-7b", recipe, torch.float16, 1e-1) for recipe in ("int8kv", "fp8", "sq")},
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

    def alone(self, config: ModelConfig, recipe: str, limits: BuildLimits, dtype: torch.dtype) -> PortableSession:
        network = recipe_network(config, recipe, limits, str(self.device), dtype)
        return PortableSession(PortableEngine(network, limits, self.device))

    def ranks(
        self, config: ModelConfig, recipe: str, limits: BuildLimits, dtype: torch.dtype, layout: tuple[int, int]
    ) -> RanksSession:
        """On every rank at once."""
        mapping = Mapping(*layout, rank=self.here.rank)
        network = recipe_network(config, recipe, limits, str(self.device), dtype, mapping)
        engine = PortableEngine(network, limits, self.device)
        return RanksSession(engine, ranks_between(self.here, mapping, self.device), self.here, mapping)


def free() -> None:
    gc.collect()
    torch.cuda.empty_cache()


def outputs(session: Session) -> tuple[torch.Tensor, list[list[int]]]:
    """Logits of ragged prompts, of captured steps on fixed tokens, of a mixed step; then greedy tokens."""
    draw = torch.Generator().manual_seed(0)
    prompts = [torch.randint(1000, (n,), generator=draw).tolist() for n in PROMPTS]
    rows = [session.prefill(prompts).clone()]
    for i in range(6):
        tokens = torch.arange(i, i + len(PROMPTS), dtype=torch.int32, device=session.device)
        rows.append(session.decode(tokens).clone())
    rows.append(session.step([Chunk([5, 6, 7], 9), Chunk([3], 1, past=7, slot=1)]).clone())
    logits, greedy = session.prefill(prompts), []
    for _ in range(12):
        tokens = logits.argmax(-1).int()
        greedy.append(tokens.tolist())
        logits = session.decode(tokens)
    return torch.cat(rows), greedy


@torch.inference_mode()
def check_sums(bench: Bench) -> bool:
    """Of random tensors over all ranks, small ones to the last bit; prints microseconds beside NCCL's."""
    size, rank, good = bench.here.size, bench.here.rank, True
    ranks = ranks_between(bench.here, Mapping(size, 1, rank), bench.device)
    draws = [torch.Generator(bench.device).manual_seed(r) for r in range(size)]

    def captured(reduce: Callable[[torch.Tensor], object], x: torch.Tensor) -> float:
        """Microseconds of one of 64 in a graph."""
        x = x.clone()
        with torch.cuda.stream(torch.cuda.Stream()):
            reduce(x)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(64):
                reduce(x)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        for i in range(13):
            if i == 3:
                start.record()
            graph.replay()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) * 1e3 / 64 / 10

    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        for rows, width in ((1, 5), (1, 4096), (3, 4100), (16, 4096), (64, 4096), (200, 4096)):
            wrong = 0
            for _ in range(100):
                parts = [torch.randn(rows, width, generator=draw, device=bench.device).to(dtype) for draw in draws]
                total = sum(part.float() for part in parts)
                found = ranks.all_reduce(parts[rank].clone(), 0, size)
                exact = size == 2 or found.nbytes <= 1 << 19  # more of NCCL's are added in an order of its own
                wrong += not (found.equal(total.to(dtype)) if exact else found.float().allclose(total, 1e-2, 1e-2))
            good &= not wrong
            zeros = torch.zeros_like(parts[0])
            times = [captured(lambda x: ranks.all_reduce(x, 0, size), zeros), captured(dist.all_reduce, zeros)]
            if rank == 0:
                name, verdict = str(dtype).removeprefix("torch."), f"   WRONG {wrong}" if wrong else ""
                print(f"sum {name:9} {rows:3} x {width}: {times[0]:6.2f} us, NCCL {times[1]:6.2f}{verdict}", flush=True)
    return good


def check(bench: Bench, layouts: dict[str, tuple[int, int]]) -> bool:
    """Prints how far every layout is from one rank, a line a case; whether all are near enough."""
    good = True
    for name, (model, recipe, dtype, limit) in CHECKS.items():
        config = published(model, num_hidden_layers=3)
        expected = None
        if bench.here.rank == 0:
            expected, tokens = outputs(bench.alone(config, recipe, SMALL, dtype))
            free()
        for layout, sizes in layouts.items():
            if sizes[1] > config.num_hidden_layers:
                continue
            session = bench.ranks(config, recipe, SMALL, dtype, sizes)
            if bench.here.rank:
                serve(bench.here, session)
            else:
                found, same = outputs(session)
                bench.here.tell(("next",))
                error = ((found - expected).norm() / expected.norm()).item()
                equal = int((torch.tensor(tokens) == torch.tensor(same)).sum())
                right = error < limit and (dtype != torch.float32 or same == tokens)
                good &= right
                verdict = "" if right else "   WRONG"
                print(
                    f"{layout:8} {name:28} error {error:.1e}, {equal}/{12 * len(PROMPTS)} tokens{verdict}", flush=True
                )
            session.forget_graphs()
            del session
            free()
    return good


def serve(here: World, session: RanksSession) -> None:
    while (message := here.hear()) != ("next",):
        session.obey(*message)
    torch.cuda.synchronize()


def speed(bench: Bench, layouts: dict[str, tuple[int, int]], args: argparse.Namespace) -> list[list]:
    """Rows of layout, recipe, batch, context, ms to the first token, ms a token; on rank 0."""
    config = published(args.model)
    limits = BuildLimits(max(args.batch_sizes), max(args.contexts), NEW_TOKENS + 16)
    cases = [(b, c) for b in args.batch_sizes for c in args.contexts]
    prompts = {case: torch.randint(0, config.vocab_size, case).tolist() for case in cases}
    rows = []

    def measure(layout: str, recipe: str, session: Session) -> None:
        for case in cases:
            first, (step, synced) = ours(session, prompts[case])
            rows.append([layout, recipe, *case, first * 1e3, step * 1e3])
            print(rows[-1], f"synchronized every step: {synced * 1e3:.2f}", flush=True)

    for recipe in args.recipes:
        if bench.here.rank == 0:
            measure("one rank", recipe, bench.alone(config, recipe, limits, torch.float16))
            free()
        for layout, sizes in layouts.items():
            session = bench.ranks(config, recipe, limits, torch.float16, sizes)
            if bench.here.rank:
                serve(bench.here, session)
            else:
                measure(layout, recipe, session)
                bench.here.tell(("next",))
            session.forget_graphs()
            del session
            free()
    return rows


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2, help="without a launcher: how many processes to start")
    parser.add_argument("--layouts", nargs="+", help="such as tp2 or tp2pp2; default: all of so many ranks")
    parser.add_argument("--model", choices=MODELS, default="llama-7b", metavar="NAME", help="of config/models.yaml")
    parser.add_argument("--recipes", nargs="*", choices=RECIPES, default=["fp16", "int8wo"])
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--contexts", type=int, nargs="+", default=[128, 2048])
    parser.add_argument("--no-check", action="store_true", help="speed alone")
    parser.add_argument("--seconds", type=float, default=230, help="after which a run is ended")
    parser.add_argument("--json", type=Path, help="also write the numbers there")
    args = parser.parse_args()
    here = Spawned(*map(int, os.environ["SPAWNED"].split())) if "SPAWNED" in os.environ else world()
    if here is None:
        sys.exit(spawn(args.ranks, args.seconds))
    faulthandler.dump_traceback_later(args.seconds, exit=True)
    torch.set_grad_enabled(False)
    bench = Bench(here)
    torch.cuda.set_device(bench.device)
    layouts = all_layouts(here.size)
    layouts = {name: layouts[name] for name in args.layouts or layouts}
    start = time.monotonic()
    good = args.no_check or (check_sums(bench) & check(bench, layouts))
    if here.rank == 0:
        print(f"checked in {time.monotonic() - start:.0f} s", flush=True)
    rows = speed(bench, layouts, args) if args.recipes else []
    if here.rank:
        obey(here)
    print(f"\n{args.model} on {here.size} x {torch.cuda.get_device_name()}, torch {torch.__version__}")
    print("| layout   | recipe | batch | context | first token ms | x one rank | ms/token | x one rank |")
    for layout, recipe, batch, context, first, step in rows:
        alone = next(row for row in rows if row[:4] == ["one rank", recipe, batch, context])
        times = f"{first:14.1f} | {alone[4] / first:10.2f} | {step:8.2f} | {alone[5] / step:10.2f}"
        print(f"| {layout:8} | {recipe:6} | {batch:5} | {context:7} | {times} |")
    if args.json:
        args.json.write_text(json.dumps({"device": torch.cuda.get_device_name(), "rows": rows}))
    here.end(0 if good else 1)
    sys.exit(0 if good else "some layouts do not compute what one rank does")


if __name__ == "__main__":
    main()
