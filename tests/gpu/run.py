"""The portable engine on one GPU: SmolLM2's tokens against the CPU's, and LLaMA-7B's speed beside transformers'.

    python tests/gpu/run.py --smollm2 SmolLM2-135M-Instruct.Q4_1.gguf     (also needs the package gguf)
    python tests/gpu/run.py --batch-sizes 1 16 --contexts 128 2048 --peers eager compiled

Needs torch, triton, transformers, safetensors and numpy alone; LLaMA-7B's dummy weights are made on the GPU. The table:
time to first token, ms per generated token, the floor that the measured memory bandwidth sets for the bytes a token
reads, and the ratios to that floor and to the portable engine.
"""

import argparse
import gc
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch

import trtbuild
from trtbuild.checkpoint.dummy import dummy_tensors
from trtbuild.checkpoint.sources import make_checkpoint
from trtbuild.engine.build import build_portable
from trtbuild.engine.config import BuildLimits
from trtbuild.engine.portable import PortableEngine
from trtbuild.models.decoder import decoder
from trtbuild.models.families import config_from_hugging_face
from trtbuild.models.mapping import Mapping
from trtbuild.runtime.generation import generate
from trtbuild.runtime.sampling import SamplingParams
from trtbuild.runtime.session import PortableSession
from trtbuild.runtime.tokenizer import Tokenizer

LLAMA_7B = {
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}
NEW_TOKENS = 64


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


def ours(session: PortableSession, prompts: list[list[int]]) -> tuple[float, list[float]]:
    """Time to first token, and the times of generation steps, each waited for."""
    for _ in range(2):  # captures the graphs, loads the kernels
        tokens = session.prefill(prompts).argmax(-1).int()
        for _ in range(NEW_TOKENS):
            tokens = session.decode(tokens).argmax(-1).int()
    first = statistics.median(timed(lambda: session.prefill(prompts).argmax(-1).int().tolist())[0] for _ in range(3))
    tokens = session.prefill(prompts).argmax(-1).int()
    steps = []
    for _ in range(NEW_TOKENS):
        seconds, tokens = timed(lambda tokens=tokens: session.decode(tokens).argmax(-1).int())
        steps.append(seconds)
    tokens = session.prefill(prompts).argmax(-1).int()

    def run():
        current = tokens
        for _ in range(NEW_TOKENS):
            current = session.decode(current).argmax(-1).int()

    return first, [timed(run)[0] / NEW_TOKENS, statistics.median(steps)]


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
    first = min(timed(lambda: run(1))[0] for _ in range(3))
    return first, (long - short) / NEW_TOKENS


def smollm2(gguf: Path, new_tokens: int = 100) -> None:
    """Converts, builds in float32, and compares greedy tokens of the CPU and the GPU on articles, in ragged batches."""
    articles = [
        json.loads(line)["article"]
        for line in (Path(trtbuild.__file__).parent / "evaluation/articles/evaluation.jsonl").read_text().splitlines()
    ]
    with tempfile.TemporaryDirectory() as folder:
        checkpoint, engine = Path(folder, "checkpoint"), Path(folder, "rank0.safetensors")
        make_checkpoint({"gguf": {"path": str(gguf)}}, checkpoint)
        limits = BuildLimits(8, 1024, 128)
        build_portable(checkpoint, engine, {"dtype": "float32"}, limits, Mapping())
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
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--contexts", type=int, nargs="+", default=[128, 2048])
    parser.add_argument("--peers", nargs="*", choices=["eager", "compiled"], default=["eager", "compiled"])
    parser.add_argument("--json", type=Path, help="also write the numbers there")
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    if args.smollm2:
        smollm2(args.smollm2)
        return
    bandwidth = copy_bandwidth()
    device = torch.cuda.get_device_name()
    print(f"{device}, torch {torch.__version__}, copy bandwidth {bandwidth / 1e12:.2f} TB/s")

    config = config_from_hugging_face(LLAMA_7B, "LLaMA-7B")
    rows = []
    limits = BuildLimits(max(args.batch_sizes), max(args.contexts), NEW_TOKENS + 16)
    weights = dummy_tensors(config, 0, torch.float16, "cuda")
    network = decoder(config, weights.__getitem__, torch.float16, limits.max_length)
    session = PortableSession(PortableEngine(network, limits, torch.device("cuda")))
    cases = [(b, c) for b in args.batch_sizes for c in args.contexts]
    prompts = {(b, c): torch.randint(0, 32000, (b, c)).tolist() for b, c in cases}
    for batch, context in cases:
        first, (step, synced) = ours(session, prompts[batch, context])
        length = context + NEW_TOKENS / 2
        read = session.weight_bytes + batch * length * session.cache.bytes_per_position()
        floor = read / bandwidth
        rows.append(["portable", batch, context, first * 1e3, step * 1e3, floor * 1e3, step / floor])
        print(rows[-1], f"synchronized every step: {synced * 1e3:.2f}", flush=True)
    del session, network, weights
    gc.collect()
    torch.cuda.empty_cache()

    if args.peers:
        from transformers import AutoModelForCausalLM, LlamaConfig

        hf_config = LlamaConfig(**{k: v for k, v in LLAMA_7B.items() if k != "model_type"})
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

    print(f"\n| {'engine':24} | batch | context | first token ms | ms/token | floor ms | x floor | vs portable |")
    mine = {tuple(r[1:3]): r for r in rows if r[0] == "portable"}
    for name, batch, context, first, step, floor, ratio in rows:
        versus = step / mine[batch, context][4]
        sizes, times = f"{batch:5} | {context:7}", f"{first:14.1f} | {step:8.2f} | {floor:8.2f}"
        print(f"| {name:24} | {sizes} | {times} | {ratio:7.2f} | {versus:11.2f} |")
    if args.json:
        args.json.write_text(json.dumps({"device": device, "bandwidth": bandwidth, "rows": rows}))


if __name__ == "__main__":
    main()
