"""SmolLM2-135M's perplexity under every shipped recipe: one engine, on a GPU and on the CPU.

    python tests/gpu/perplexity.py --gguf SmolLM2-135M-Instruct.Q4_1.gguf --work FOLDER    (also needs the package gguf)
    python tests/gpu/perplexity.py --gguf ... --work FOLDER --recipes int8wo fp8 --device cpu

Weights are quantized on the GPU, once; the engine made of them is evaluated on both, over the 16 articles that trtbuild
ships. On the GPU twice: whole articles, and token after token, in batches of 8, 7 and 1, as generation runs. What FP8
has besides is the first of these without fast accumulation in cuBLAS (trtbuild/kernels/many_rows.py).

Where activations are rounded to 8 bits, a last bit of a sum decides between two neighbours, and layers amplify it. What
this alone does to a perplexity is "last bits": by how many per cent those of engines differ (standard deviation) in
whose embedding last bits are changed at random.

Recipes are worked on side by side, `--processes` at a time. What FOLDER holds is not made again, but for engines. Exits
with 1 where a perplexity on the GPU is further from the CPU's than `LIMIT` per cent and three of these deviations.
"""

import argparse
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch

import trtbuild
from trtbuild.checkpoint.sources import make_checkpoint
from trtbuild.datasets import load_articles
from trtbuild.decoder.mapping import Mapping
from trtbuild.engine.build import build_portable
from trtbuild.engine.config import BuildLimits
from trtbuild.engine.portable import PortableEngine, read_portable
from trtbuild.evaluation.perplexity import perplexity
from trtbuild.quantization.calibration import calibrate
from trtbuild.quantization.kv_cache import cache_of
from trtbuild.quantization.quantize import quantize
from trtbuild.quantization.recipe import Recipe
from trtbuild.runtime.session import PortableSession
from trtbuild.tensors.lazy import from_tensor
from trtbuild.tokenizer.tokenizer import Tokenizer
from trtbuild.yaml_reader import read_yaml

LIMIT = 0.3  # per cent
DRAWS = 8  # of last bits
LIMITS = BuildLimits(8, 1024, 128)
BATCHES = (8, 7, 1)  # of articles whose tokens are given one after the other
COLUMNS = ("GPU", "by tokens", "exact sums")
RECIPES = {
    name: Recipe.parse(settings)
    for name, settings in read_yaml(Path(trtbuild.__file__).parent / "recipes.yaml").items()
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gguf", type=Path, required=True, metavar="FILE", help="SmolLM2-135M's")
    parser.add_argument("--work", type=Path, required=True, metavar="FOLDER", help="for checkpoints and engines")
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=list(RECIPES))
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="what is compared with the CPU")
    parser.add_argument("--processes", type=int, default=8)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    prepare(args.gguf, args.work, args.device)
    print(f"checkpoint and calibration: {time.perf_counter() - start:.1f} s", flush=True)

    shared: dict[str, list[str]] = {}  # recipes by their quantized weights
    for name in args.recipes:
        quantization = RECIPES[name].quantization
        shared.setdefault(quantization.id if quantization else name, []).append(name)
    tasks = sorted(shared.values(), key=lambda names: -cost(names))
    rows: dict[str, dict[str, float]] = {}
    processes = min(args.processes, len(tasks))
    threads = max(1, len(os.sched_getaffinity(0)) // processes)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, context, torch.set_num_threads, (threads,)) as pool:
        started = [pool.submit(measure, names, args.work, args.device) for names in tasks]
        for future in as_completed(started):
            rows |= future.result()
    print(f"all: {time.perf_counter() - start:.1f} s")

    titles = "".join(f" {column:>10} | % off |" for column in COLUMNS)
    print(f"\n| {'recipe':24} | {'CPU':>9} |{titles} last bits |")
    apart = []
    for name in args.recipes:
        row = rows[name]
        cells, noise = "", row.get("last bits", 0.0)
        for column in COLUMNS:
            if column in row:
                off = 100 * (row[column] / row["CPU"] - 1)
                apart += [] if abs(off) <= max(LIMIT, 3 * noise) else [name]
                cells += f" {row[column]:10.4f} | {off:+5.2f} |"
            else:
                cells += f" {'':10} | {'':5} |"
        print(f"| {name:24} | {row['CPU']:9.4f} |{cells} {f'{noise:.2f}' if noise else '':9} |")
    device = torch.cuda.get_device_name() if args.device == "cuda" else "the CPU"
    print(f"{device}, torch {torch.__version__}: {', '.join(dict.fromkeys(apart)) or 'none'} further from the CPU's")
    if apart:
        sys.exit(1)


def prepare(gguf: Path, work: Path, device: str) -> None:
    """The checkpoint, and the ranges of its activations, which every shipped recipe measures with the same text."""
    text = RECIPES["fp16"].text
    if any(recipe.text != text for recipe in RECIPES.values()):
        raise ValueError("a recipe has a text of its own to calibrate with")
    if not (work / "checkpoint").exists():
        make_checkpoint({"gguf": {"path": str(gguf)}}, work / "checkpoint")
    if not (work / "calibration.npz").exists():
        calibrate(work / "checkpoint", work / "calibration.npz", **text.settings, device=device)


def cost(names: list[str]) -> int:
    """What takes longest comes first."""
    quantization = RECIPES[names[0]].quantization
    return len(names) + 2 * (quantization is not None and quantization.weights.method != "round")


def measure(names: list[str], work: Path, device: str) -> dict[str, dict[str, float]]:
    """Perplexities of recipes whose quantized weights are the same."""
    checkpoint, calibration = work / "checkpoint", work / "calibration.npz"
    quantization, weights = RECIPES[names[0]].quantization, checkpoint
    if quantization:
        weights = work / quantization.id
        if not weights.exists():
            quantize(checkpoint, weights, quantization, calibration, device)
    rows = {}
    for name in names:
        recipe, engine = RECIPES[name], work / f"{name}.safetensors"
        cache = cache_of(recipe, weights, calibration)
        build_portable(weights, engine, getattr(torch, recipe.dtype), LIMITS, Mapping(), cache)
        rows[name] = evaluate(engine, checkpoint, device, recipe)
        engine.unlink()
    return rows


def evaluate(engine: Path, checkpoint: Path, device: str, recipe: Recipe) -> dict[str, float]:
    """Perplexities of an engine."""
    tokenizer = Tokenizer(checkpoint)
    articles = load_articles("trtbuild-news", "evaluation", sum(BATCHES))
    texts = [tokenizer.encode(article.article) for article in articles]
    row: dict[str, float] = {}

    def note(column: str, logits: Callable[[list[int]], torch.Tensor]) -> None:
        start = time.perf_counter()
        with torch.inference_mode():
            row[column] = perplexity(texts, logits, LIMITS.max_input_len)["perplexity"]
        print(f"{engine.stem}, {column}: {row[column]:.4f} in {time.perf_counter() - start:.1f} s", flush=True)

    def whole(text: list[int]) -> torch.Tensor:
        return session.prefill([text], all_logits=True)

    session = PortableSession(PortableEngine.load(engine, device))
    note("GPU", whole)
    if recipe.quantization and recipe.quantization.weights.dtype == "fp8":
        with mock.patch("torch._scaled_mm", partial(exact_sums, torch._scaled_mm)):
            note("exact sums", whole)
    steps = by_tokens(session, texts)
    note("by tokens", lambda text: next(steps))
    session = PortableSession(PortableEngine.load(engine, "cpu"))
    note("CPU", whole)
    if recipe.quantization and recipe.quantization.activations:
        found = []
        for draw in range(DRAWS):
            session = PortableSession(other_last_bits(engine, device, draw))
            note("draw", whole)
            found.append(row.pop("draw"))
        row["last bits"] = 100 * statistics.stdev(found) / statistics.mean(found)
    return row


def other_last_bits(engine: Path, device: str, seed: int) -> PortableEngine:
    """The engine with an embedding of which every number is moved by less than 2^-10 of it, float16's last bit."""
    network, limits = read_portable(engine)
    embedding = network.constants["model.embed_tokens.weight"].load()
    noise = torch.rand(embedding.shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    moved = (embedding.float() * (1 + noise * 2**-10)).to(embedding.dtype)
    network.constants["model.embed_tokens.weight"] = from_tensor(moved)
    return PortableEngine(network, limits, torch.device(device))


def exact_sums(product: Callable[..., torch.Tensor], *args: torch.Tensor, **options: object) -> torch.Tensor:
    """`torch._scaled_mm` without fast accumulation."""
    return product(*args, **options | {"use_fast_accum": False})


def by_tokens(session: PortableSession, texts: list[list[int]]) -> Iterator[torch.Tensor]:
    """Logits of each text, `[tokens, vocab]`, from steps that append a token to every text of a batch."""
    remaining = iter(texts)
    for size in BATCHES:
        batch = [next(remaining) for _ in range(size)]
        logits = [session.prefill([text[:1] for text in batch]).clone()]
        for i in range(1, max(map(len, batch))):
            tokens = [text[i] if i < len(text) else 0 for text in batch]
            logits.append(session.decode(torch.tensor(tokens, dtype=torch.int32, device=session.device)).clone())
        for i, text in enumerate(batch):
            yield torch.stack([step[i] for step in logits[: len(text)]])


if __name__ == "__main__":
    main()
