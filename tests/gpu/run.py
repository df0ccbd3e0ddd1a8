"""The portable engine on one GPU: SmolLM2's tokens against the CPU's, and a model's speed beside transformers'.

    python tests/gpu/run.py --smollm2 SmolLM2-135M-Instruct.Q4_1.gguf     (also needs the package gguf)
    python tests/gpu/run.py --batch-sizes 1 16 --contexts 128 2048 --peers eager compiled
    python tests/gpu/run.py --batch-sizes 1 16 --contexts 128 2048 --recipes fp16 int8wo int4 int8kv fp8 sq --peers
    python tests/gpu/run.py --model baichuan-v2_13b --recipes fp16 int8kv
    python tests/gpu/run.py --batch-sizes 1 --contexts 128 --recipes fp16 int8wo int4 --peers --gpt-fast ../gpt-fast

Needs torch, triton, transformers, safetensors, numpy and yaml alone; a model of config/models.yaml (LLaMA-7B) has dummy
weights that are made on the GPU, and there rounded to nearest; scales of activations and caches are constants. For
ALiBi, which transformers has no such model with, the peer is its LLaMA of the same sizes.

`--gpt-fast` takes a checkout of https://github.com/pytorch-labs/gpt-fast, the one of dense models, which is for LLaMA
and, here, batch 1 alone. Its decode step is compiled as its README says, its first token is not (`--compile_prefill` is
off there). It quantizes the output product too, which we do not: of LLaMA-7B 0.13 GB less to read in INT8, 0.2 in INT4.

The table: time to first token of a GPU that has rested for 0.3 s, ms per generated token (sampling included, no step
waits for the host), the floor that the measured memory bandwidth sets for the bytes a token reads, and the ratios to
that floor and to the first engine. Beside our rows as they come is the first token of one prompt after the other: long
ones take a GPU to its power limit, where it lowers its clock.
"""

import argparse
import gc
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
import yaml

import trtbuild
from trtbuild.checkpoint.dummy import dummy_tensors
from trtbuild.checkpoint.sources import make_checkpoint
from trtbuild.decoder.decoder import CacheScales, decoder
from trtbuild.decoder.mapping import Mapping
from trtbuild.decoder.sharding import shard
from trtbuild.engine.build import build_portable
from trtbuild.engine.config import BuildLimits
from trtbuild.engine.portable import PortableEngine
from trtbuild.linear.format import round_8bit
from trtbuild.linear.int4 import Int4Grid
from trtbuild.models.config import ModelConfig
from trtbuild.models.families import canonical_config, config_from_hugging_face
from trtbuild.network import Network
from trtbuild.runtime.generation import generate
from trtbuild.runtime.sampling import SamplingParams
from trtbuild.runtime.session import PortableSession
from trtbuild.tensors.lazy import LazyTensor, from_tensor
from trtbuild.tensors.quantized_weight import QuantizedWeight
from trtbuild.tokenizer.tokenizer import Tokenizer

MODELS = yaml.safe_load((Path(__file__).parents[2] / "config/models.yaml").read_text())
NEW_TOKENS = 64
REST = 0.3  # seconds before a first token
RECIPES = {  # formats of the weights, of activations, and of the cache
    "fp16": (None, None, None),
    "int8wo": ("int8", "16bit", None),
    "int4": ("int4", "16bit", None),
    "int4-act-order": ("int4 reordered", "16bit", None),
    "int8kv": ("int8", "16bit", torch.int8),
    "fp16-int8kv": (None, None, torch.int8),
    "fp8": ("fp8", "static", torch.float8_e4m3fn),
    "fp8-dynamic": ("fp8", "token", None),
    "sq": ("int8", "static", None),
    "w8a8": ("int8", "token", None),
}


GPT_FAST = {"fp16": "fp16", "int8": "int8wo", "int4": "int4"}  # its formats, and our recipes that are like them


def copy_bandwidth() -> float:
    """Bytes a second of a large device-to-device copy, reads plus writes."""
    source = torch.empty(2 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    times = [timed(lambda: target.copy_(source))[0] for _ in range(10)]
    return 2 * source.numel() / statistics.median(times)


def timed(call):
    torch.cuda.synchronize()
    start = time.perf_counter()
    result = call()
    torch.cuda.synchronize()
    return time.perf_counter() - start, result


def rested(call: Callable, repeats: int) -> float:
    """Median seconds of calls, with a rest before each."""

    def one() -> float:
        time.sleep(REST)
        return timed(call)[0]

    return statistics.median(one() for _ in range(repeats))


def ours(session: PortableSession, prompts: list[list[int]]) -> tuple[float, float, float, float]:
    """Time to first token, rested and one after the other, seconds a generation step, greedy; of the host in one."""
    sampler = session.sampler(SamplingParams(), prompts)

    def start():
        logits = session.prefill(prompts)
        return session.sampler(SamplingParams(), prompts)(logits).tolist()

    def run() -> list[float]:
        marks = [time.perf_counter()]
        for _ in range(NEW_TOKENS):
            session.generate(sampler)
            marks.append(time.perf_counter())
        return [after - before for before, after in pairwise(marks)]

    start()
    run()  # captures the graphs, loads the kernels
    repeats = 15 if len(prompts) * len(prompts[0]) <= 4096 else 3  # short ones vary by some ms
    first = rested(start, 5 if repeats > 5 else repeats)
    at_once = statistics.median(timed(start)[0] for _ in range(repeats))
    start()
    total, host = timed(run)
    return first, at_once, total / NEW_TOKENS, statistics.median(host)


def round_to_nearest(weight: LazyTensor, format: str, activations: str) -> QuantizedWeight:
    """`[out, in]`: INT4 in groups of 128, INT8 with a scale an output channel, FP8 with one or, per token, as INT8.

    "int4 reordered": as if groups were of channels that lie anywhere, the same for all products of one width.
    """
    format, _, reordered = format.partition(" ")
    order = None
    if reordered:
        order = from_tensor(torch.randperm(weight.shape[1], generator=torch.Generator().manual_seed(0)).int())
    dtype = torch.float8_e4m3fn if format == "fp8" else torch.int8
    scales_dtype, groups = (torch.float16, weight.shape[1] // 128) if format == "int4" else (torch.float32, 1)

    def rounded() -> tuple[torch.Tensor, torch.Tensor]:
        if format == "int4":
            values, scales, _ = Int4Grid(128, True, scales_dtype).round(weight.load().float())
            return values.to(dtype), scales.to(scales_dtype)
        return round_8bit(weight.load(), dtype, per_tensor=format == "fp8" and activations == "static")

    values = LazyTensor(dtype, weight.shape, lambda: rounded()[0])
    scales = LazyTensor(scales_dtype, (weight.shape[0], groups), lambda: rounded()[1])
    input_scale = from_tensor(torch.full((1,), 0.02)) if activations == "static" else None
    return QuantizedWeight(format, values, scales, None, activations, input_scale, order)


def recipe_network(
    config: ModelConfig,
    recipe: str,
    limits: BuildLimits,
    device: str = "cuda",
    dtype: torch.dtype = torch.float16,
    mapping: Mapping = Mapping(),
) -> Network:
    """One rank's, with dummy weights, those of the layers' projections and the cache as the recipe says."""
    tensors = dummy_tensors(config, 0, dtype, device)
    format, activations, cache_dtype = RECIPES[recipe]

    def weights(name: str) -> LazyTensor | QuantizedWeight:
        quantized = format and name.endswith("_proj.weight")
        return round_to_nearest(tensors[name], format, activations) if quantized else tensors[name]

    scales = torch.full((config.num_hidden_layers, config.num_key_value_heads), 0.02)
    cache = CacheScales(cache_dtype, scales, scales) if cache_dtype else None
    share, own, cache = shard(config, weights, cache, mapping)
    network = decoder(share, own, dtype, limits.max_length, cache, mapping)
    if mapping.world_size > 1:  # of a whole weight a rank's part alone stays in memory, as of a file
        for name, part in network.constants.items():
            network.constants[name] = LazyTensor(
                part.dtype, part.shape, lambda load=part.load: load().clone(memory_format=torch.contiguous_format)
            )
    return network


def recipe_session(config: ModelConfig, recipe: str, limits: BuildLimits, device: str = "cuda") -> PortableSession:
    """A float16 engine of `recipe_network`."""
    return PortableSession(PortableEngine(recipe_network(config, recipe, limits, device), limits, torch.device(device)))


def peer(model, prompts: list[list[int]], compiled: bool) -> tuple[float, float]:
    """Time to first token and seconds a token of `transformers`' `generate`."""
    ids = torch.tensor(prompts, device="cuda")
    options = {"do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(ids)}
    if compiled:
        options["cache_implementation"] = "static"
        options["max_length"] = None

    def run(new: int):
        return model.generate(ids, max_new_tokens=new, min_new_tokens=new, **options)

    total = NEW_TOKENS + 8
    run(total)
    run(total)
    long = min(timed(lambda: run(total))[0] for _ in range(2))
    short = min(timed(lambda: run(8))[0] for _ in range(2))
    first = rested(lambda: run(1), 3)
    return first, (long - short) / NEW_TOKENS


def gpt_fast(
    folder: Path,
    config: ModelConfig,
    format: str,
    contexts: list[int],
    share: Callable[[Any], object] = lambda model: None,
) -> list[tuple[float, float]]:
    """Time to first token and seconds a token of gpt-fast for every context, batch 1; `format`: fp16, int8 or int4.

    Its INT4 is for bfloat16 alone. Weights are random numbers. `share` leaves a rank's part of a model.
    """
    sys.path.insert(0, str(folder))
    with suppress(ImportError):
        import sentencepiece  # noqa: F401
    sys.modules.setdefault("sentencepiece", SimpleNamespace(SentencePieceProcessor=None))  # for text alone
    import generate as theirs
    import quantize
    from model import ModelArgs, Transformer

    sizes = {
        "block_size": max(contexts) + 2 * NEW_TOKENS,
        "vocab_size": config.vocab_size,
        "n_layer": config.num_hidden_layers,
        "n_head": config.num_attention_heads,
        "n_local_heads": config.num_key_value_heads,
        "dim": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "norm_eps": config.rms_norm_eps,
    }
    dtype = torch.bfloat16 if format == "int4" else torch.float16
    with torch.device("meta"):
        model = Transformer(ModelArgs(**sizes))
        if format == "int8":
            model = quantize.WeightOnlyInt8QuantHandler(model).convert_for_runtime()
        if format == "int4":
            model = quantize.WeightOnlyInt4QuantHandler(model, 128).convert_for_runtime(True)
        share(model)
    model = model.to_empty(device="cuda").to(dtype).eval()
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.is_floating_point():
            tensor.normal_(0, 0.02)
        else:
            tensor.random_(-128, 127) if tensor.dtype == torch.int8 else tensor.random_()
    with torch.device("cuda"):
        model.setup_caches(1, max(contexts) + 2 * NEW_TOKENS)
    torch._dynamo.reset()
    eager = theirs.decode_one_token
    theirs.decode_one_token = torch.compile(eager, mode="reduce-overhead", fullgraph=True)
    results = []
    try:
        for context in contexts:
            prompt = torch.randint(0, config.vocab_size, (1, context), device="cuda", dtype=torch.int)
            places = torch.arange(context, device="cuda")

            def start(prompt=prompt, places=places):
                return theirs.prefill(model, prompt, places, temperature=0.0)

            def run(tokens: int, context=context, start=start):
                place = torch.tensor([context], device="cuda", dtype=torch.int)
                return theirs.decode_n_tokens(model, start().view(1, -1), place, tokens, temperature=0.0)

            for _ in range(3):
                run(4)  # compiles, then records its graphs
            run(NEW_TOKENS)
            first = rested(lambda start=start: start().tolist(), 3)
            long = min(timed(lambda run=run: run(NEW_TOKENS))[0] for _ in range(3))
            short = min(timed(lambda run=run: run(4))[0] for _ in range(3))
            results.append((first, (long - short) / (NEW_TOKENS - 4)))
    finally:
        theirs.decode_one_token = eager
    return results


def smollm2(gguf: Path, new_tokens: int = 100) -> None:
    """Converts, builds in float32, and compares greedy tokens of the CPU and the GPU on articles, in ragged batches."""
    articles = [
        json.loads(line)["article"]
        for line in (Path(trtbuild.__file__).parent / "articles/evaluation.jsonl").read_text().splitlines()
    ]
    with tempfile.TemporaryDirectory() as folder:
        checkpoint, engine = Path(folder, "checkpoint"), Path(folder, "rank0.safetensors")
        make_checkpoint({"gguf": {"path": str(gguf)}}, checkpoint)
        limits = BuildLimits(8, 1024, 128)
        build_portable(checkpoint, engine, torch.float32, limits, Mapping())
        tokenizer = Tokenizer(checkpoint)
        prompts = [tokenizer.encode(article, chat=True) for article in articles]
        params = SamplingParams(new_tokens, eos_token_ids=tokenizer.eos_token_ids)
        outputs, logits = {}, {}
        for device in ("cpu", "cuda"):
            session = PortableSession(PortableEngine.load(engine, device))
            start = time.perf_counter()
            outputs[device] = [output.output_ids for output in generate(session, prompts, params)]
            seconds = time.perf_counter() - start
            logits[device] = session.prefill(prompts[:8]).cpu()
            print(f"SmolLM2-135M float32 on {device}: {sum(map(len, outputs[device]))} tokens in {seconds:.1f} s")
    equal = sum(a == b for a, b in zip(outputs["cpu"], outputs["cuda"], strict=True))
    error = ((logits["cpu"] - logits["cuda"]).norm() / logits["cpu"].norm()).item()
    print(f"greedy outputs equal on {equal} of {len(prompts)} articles; logits differ by {error:.1e} (relative)")
    if equal < len(prompts):
        sys.exit("SmolLM2's tokens on the GPU differ from the CPU's")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smollm2", type=Path, metavar="GGUF", help="compare tokens of this model, and nothing else")
    parser.add_argument("--model", choices=MODELS, default="llama-7b", metavar="NAME", help="of config/models.yaml")
    parser.add_argument("--layers", type=int, help="of the model; default: all")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--contexts", type=int, nargs="+", default=[128, 2048])
    parser.add_argument("--recipes", nargs="+", choices=RECIPES, default=["fp16"])
    parser.add_argument("--peers", nargs="*", choices=["eager", "compiled"], default=["eager", "compiled"])
    parser.add_argument("--gpt-fast", type=Path, metavar="DIR", help="also measure that checkout, at batch 1")
    parser.add_argument("--gpt-fast-formats", nargs="+", choices=GPT_FAST, default=list(GPT_FAST))
    parser.add_argument("--json", type=Path, help="also write the numbers there")
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    if args.smollm2:
        smollm2(args.smollm2)
        return
    bandwidth = copy_bandwidth()
    device = torch.cuda.get_device_name()
    print(f"{args.model} on {device}, torch {torch.__version__}, copy bandwidth {bandwidth / 1e12:.2f} TB/s")

    published = MODELS[args.model]["config"] | ({"num_hidden_layers": args.layers} if args.layers else {})
    config = config_from_hugging_face(published, args.model)
    rows = []
    limits = BuildLimits(max(args.batch_sizes), max(args.contexts), NEW_TOKENS + 16)
    cases = [(b, c) for b in args.batch_sizes for c in args.contexts]
    prompts = {(b, c): torch.randint(0, config.vocab_size, (b, c)).tolist() for b, c in cases}
    for recipe in args.recipes:
        start = time.perf_counter()
        session = recipe_session(config, recipe, limits)
        torch.cuda.synchronize()
        gigabytes, seconds = session.weight_bytes / 1e9, time.perf_counter() - start
        print(f"{recipe}: {gigabytes:.2f} GB of weights, made in {seconds:.1f} s", flush=True)
        for batch, context in cases:
            first, at_once, step, host = ours(session, prompts[batch, context])
            length = context + NEW_TOKENS / 2
            read = session.weight_bytes + batch * length * session.bytes_per_position
            floor = read / bandwidth
            rows.append([recipe, batch, context, first * 1e3, step * 1e3, floor * 1e3, step / floor])
            print(
                rows[-1],
                f"first tokens one after the other: {at_once * 1e3:.1f} ms, host: {host * 1e6:.0f} us a step",
                flush=True,
            )
        del session
        gc.collect()
        torch.cuda.empty_cache()

    if args.peers:
        from transformers import AutoConfig, AutoModelForCausalLM

        sizes = canonical_config(published, args.model)
        kind = sizes.pop("model_type")
        hf_config = AutoConfig.for_model("llama" if kind == "baichuan" else kind, **sizes)
        with torch.device("cuda"):
            model = AutoModelForCausalLM.from_config(hf_config, dtype=torch.float16).eval()
        model.generation_config.eos_token_id = None
        for name in args.peers:
            for (batch, context), prompt in prompts.items():
                torch._dynamo.reset()
                try:
                    first, step = peer(model, prompt, name == "compiled")
                except torch.cuda.OutOfMemoryError:
                    first = step = float("nan")
                floor = next(r[5] for r in rows if r[1:3] == [batch, context])
                rows.append(
                    [f"transformers {name}", batch, context, first * 1e3, step * 1e3, floor, step * 1e3 / floor]
                )
                print(rows[-1], flush=True)
                torch.cuda.empty_cache()

    if args.gpt_fast:
        for format, recipe in GPT_FAST.items():
            if format not in args.gpt_fast_formats:
                continue
            name = f"gpt-fast {format}"
            try:
                found = gpt_fast(args.gpt_fast, config, format, args.contexts)
            except Exception as error:  # a peer that does not run is no reason to lose the other rows
                print(f"{name} does not run: {type(error).__name__}: {error}", flush=True)
                continue
            finally:
                gc.collect()
                torch.cuda.empty_cache()
            for context, (first, step) in zip(args.contexts, found, strict=True):
                like = [r[5] for r in rows if r[:3] == [recipe, 1, context]]
                floor = like[0] if like else float("nan")
                rows.append([name, 1, context, first * 1e3, step * 1e3, floor, step * 1e3 / floor])
                print(rows[-1], flush=True)

    print(f"\n| {'engine':24} | batch | context | first token ms | ms/token | floor ms | x floor | vs first |")
    for name, batch, context, first, step, floor, ratio in rows:
        versus = step / next((r[4] for r in rows if r[1:3] == [batch, context]), float("nan"))
        sizes, times = f"{batch:5} | {context:7}", f"{first:14.1f} | {step:8.2f} | {floor:8.2f}"
        print(f"| {name:24} | {sizes} | {times} | {ratio:7.2f} | {versus:8.2f} |")
    if args.json:
        args.json.write_text(json.dumps({"device": device, "bandwidth": bandwidth, "rows": rows}))


if __name__ == "__main__":
    main()
