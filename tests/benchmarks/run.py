"""The CPU numbers of BENCHMARKS.md: speed beside transformers, build time, memory, Python work a step.

    .venv/bin/python tests/benchmarks/run.py --checkpoint-dir results/smollm2-135m/checkpoint [--gguf FILE]

Engines are built in a temporary folder. Both sides run the same dtype, threads, prompt and number of tokens in this
process, in turns; times are medians.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from trtbuild.checkpoint.canonical import Checkpoint
from trtbuild.checkpoint.dummy import dummy_tensors
from trtbuild.decoder.decoder import decoder
from trtbuild.engine.config import BuildLimits
from trtbuild.engine.portable import PortableEngine
from trtbuild.evaluation.benchmark import measure_bandwidth
from trtbuild.evaluation.hugging_face import HuggingFaceModel
from trtbuild.models.families import config_from_hugging_face
from trtbuild.runtime.session import PortableSession

INPUT_LEN, OUTPUT_LEN, TURNS = 512, 64, 3
PEAK = (
    "import resource,subprocess,sys,time; t=time.perf_counter(); code=subprocess.run(sys.argv[1:],"
    "stdout=subprocess.DEVNULL,stderr=subprocess.DEVNULL).returncode; "
    "print(code, time.perf_counter()-t, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss*1024)"
)


def ours(session: PortableSession, prompt: list[int]) -> tuple[float, float]:
    """Seconds to the first token and a token after it."""
    start = time.perf_counter()
    tokens = session.prefill([prompt]).argmax(-1).int()
    first = time.perf_counter()
    for _ in range(OUTPUT_LEN):
        tokens = session.decode(tokens).argmax(-1).int()
    return first - start, (time.perf_counter() - first) / OUTPUT_LEN


@torch.inference_mode()
def theirs(model, prompt: list[int]) -> tuple[float, float]:
    """The same of transformers' model, called directly: no `generate`, which only adds to it."""
    start = time.perf_counter()
    output = model(torch.tensor([prompt]), logits_to_keep=1)
    token = output.logits[:, -1:].argmax(-1)
    first = time.perf_counter()
    for _ in range(OUTPUT_LEN):
        output = model(token, past_key_values=output.past_key_values)
        token = output.logits[:, -1:].argmax(-1)
    return first - start, (time.perf_counter() - first) / OUTPUT_LEN


def speed(checkpoint_dir: Path) -> None:
    checkpoint = Checkpoint(checkpoint_dir)
    prompt = torch.randint(0, checkpoint.config.vocab_size, (INPUT_LEN,)).tolist()
    bandwidth = measure_bandwidth(torch.device("cpu"))
    print(f"\nread bandwidth {bandwidth / 1e9:.1f} GB/s; {INPUT_LEN}-token prompt, {OUTPUT_LEN} new tokens, batch 1")
    print("| dtype | prefill ms: ours | transformers | ratio | ms/token: ours | transformers | ratio | x floor |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for dtype in ("float32", "bfloat16", "float16"):
        limits = BuildLimits(1, INPUT_LEN, OUTPUT_LEN)
        network = decoder(checkpoint.config, checkpoint.__getitem__, getattr(torch, dtype), limits.max_length)
        session = PortableSession(PortableEngine(network, limits, torch.device("cpu")))
        model = HuggingFaceModel(checkpoint_dir, dtype, "cpu").model
        ours(session, prompt)
        theirs(model, prompt)
        turns = [(ours(session, prompt), theirs(model, prompt)) for _ in range(TURNS)]
        a, b, c, d = (statistics.median(turn[who][what] for turn in turns) for what in (0, 1) for who in (0, 1))
        read = session.weight_bytes + (INPUT_LEN + OUTPUT_LEN / 2) * session.bytes_per_position
        cells = [f"{a * 1e3:.0f}", f"{b * 1e3:.0f}", f"{b / a:.2f}", f"{c * 1e3:.1f}", f"{d * 1e3:.1f}", f"{d / c:.2f}"]
        print(f"| {dtype} | {' | '.join(cells)} | {c * bandwidth / read:.2f} |", flush=True)


def overhead() -> None:
    """A two-layer model so small that a step is all Python and dispatch."""
    config = config_from_hugging_face(
        {
            "model_type": "llama",
            "vocab_size": 258,
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "max_position_embeddings": 256,
        },
        "dummy",
    )
    limits = BuildLimits(1, 16, 240)
    network = decoder(config, dummy_tensors(config, 0, torch.float32).__getitem__, torch.float32, limits.max_length)
    engine = PortableEngine(network, limits, torch.device("cpu"))
    session = PortableSession(engine)
    tokens = session.prefill([[1] * 16]).argmax(-1).int()
    times = []
    for _ in range(200):
        start = time.perf_counter()
        session.decode(tokens)
        times.append(time.perf_counter() - start)
    step = statistics.median(times)
    engine._plan = [
        (lambda step, *x, n=len(outs): x[0] if n == 1 else (x[0],) * n, ins, outs, dead)
        for _, ins, outs, dead in engine._plan
    ]
    times = []
    session.prefill([[1] * 16])
    for _ in range(200):
        start = time.perf_counter()
        session.decode(tokens)
        times.append(time.perf_counter() - start)
    empty = statistics.median(times)
    without = f"{empty * 1e6:.0f} us without the {len(network.nodes)} operations"
    print(f"\n2-layer dummy model: {step * 1e6:.0f} us a step, of which {without}")


def memory(checkpoint_dir: Path, gguf: Path | None) -> None:
    """Seconds and peak resident bytes of each command, in a process of its own."""
    weights = sum(tensor.nbytes for tensor in Checkpoint(checkpoint_dir).tensors.values())
    print("\n| command | seconds | peak resident MiB | x float32 weights |")
    print("| --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory() as folder:
        trtbuild = [sys.executable, "-m", "trtbuild"]
        build = [*trtbuild, "build", "--checkpoint-dir", str(checkpoint_dir), "--output-dir", f"{folder}/engine"]
        commands = {
            "imports alone": [sys.executable, "-c", "import torch, transformers, trtbuild.engine.build"],
            "build portable, float16": build,
            "build portable + tensorrt, float16": [*build, "--engine", "portable", "--engine", "tensorrt"],
        }
        if gguf:
            commands["convert from GGUF"] = [*trtbuild, "convert", "--gguf", str(gguf), "--output-dir", f"{folder}/c"]
        for name, command in commands.items():
            result = subprocess.run([sys.executable, "-c", PEAK, *command], capture_output=True, text=True, check=True)
            code, seconds, peak = result.stdout.split()
            if code != "0":
                sys.exit(f"{name} failed")
            peak = float(peak)
            print(f"| {name} | {float(seconds):.1f} | {peak / 2**20:.0f} | {peak / weights:.2f} |", flush=True)
    print(f"float32 weights: {weights / 2**20:.0f} MiB; mapped pages count as resident")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint-dir", type=Path, required=True)
    parser.add_argument("--gguf", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    overhead()
    memory(args.checkpoint_dir, args.gguf)
    speed(args.checkpoint_dir)


if __name__ == "__main__":
    main()
