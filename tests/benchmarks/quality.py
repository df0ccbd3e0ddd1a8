"""Perplexity of SmolLM2-135M quantized by trtbuild and by other packages, from the same calibration text.

    python tests/benchmarks/quality.py --model FOLDER --work FOLDER [--peers llmcompressor gptqmodel] [--python PYTHON]

FOLDER is a canonical checkpoint. Every checkpoint is evaluated by trtbuild's portable engine in float32, which reads
all of their formats, on the shipped evaluation articles; PYTHON is an interpreter that has the peers.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch

from trtbuild.checkpoint.canonical import Checkpoint
from trtbuild.datasets import load_articles
from trtbuild.decoder.decoder import decoder
from trtbuild.engine.config import BuildLimits
from trtbuild.engine.portable import PortableEngine
from trtbuild.evaluation.perplexity import perplexity
from trtbuild.quantization.calibration import calibrate
from trtbuild.quantization.quantize import quantize
from trtbuild.quantization.recipe import Quantization, Text
from trtbuild.quantization.samples import calibration_samples
from trtbuild.runtime.open import pick_device
from trtbuild.runtime.session import PortableSession
from trtbuild.tokenizer.tokenizer import Tokenizer

INT4 = {"dtype": "int4", "group_size": 64, "symmetric": False}
STATIC = {"dtype": "int8", "per": "tensor", "smoothquant": 0.5}
OURS = {
    "int8": {"weights": {"dtype": "int8"}},
    "int4 to nearest": {"weights": INT4},
    "gptq": {"weights": INT4 | {"method": "gptq"}},
    "gptq symmetric": {"weights": INT4 | {"method": "gptq", "symmetric": True}},
    "awq": {"weights": INT4 | {"method": "awq"}},
    "smoothquant static": {"weights": {"dtype": "int8"}, "activations": STATIC},
    "smoothquant per token": {"weights": {"dtype": "int8"}, "activations": STATIC | {"per": "token"}},
    "fp8": {"weights": {"dtype": "fp8"}, "activations": {"dtype": "fp8"}},
    "fp8 per token": {"weights": {"dtype": "fp8", "per": "channel"}, "activations": {"dtype": "fp8", "per": "token"}},
}
PEERS = [
    ("llmcompressor", "int8", "int8", []),
    ("llmcompressor", "int4", "int4 to nearest", []),
    ("llmcompressor", "gptq", "gptq", []),
    ("gptqmodel", "gptq", "gptq", []),
    ("llmcompressor", "gptq", "gptq symmetric", ["--symmetric"]),
    ("gptqmodel", "gptq", "gptq symmetric", ["--symmetric"]),
    ("llmcompressor", "awq", "awq", []),
    ("llmcompressor", "smoothquant", "smoothquant static", []),
    ("llmcompressor", "smoothquant", "smoothquant per token", ["--dynamic"]),
    ("llmcompressor", "fp8", "fp8", []),
    ("llmcompressor", "fp8-dynamic", "fp8 per token", []),
]


def measure(folder: Path, texts: list[list[int]], device: torch.device) -> float:
    """Perplexity of a checkpoint, quantized or not, computed in float32."""
    checkpoint = Checkpoint(folder)
    network = decoder(checkpoint.config, checkpoint.__getitem__, torch.float32, 1152)
    session = PortableSession(PortableEngine(network, BuildLimits(1, 1024, 128), device))
    with torch.inference_mode():
        return perplexity(texts, lambda ids: session.prefill([ids], all_logits=True), 1024)["perplexity"]


def main() -> None:
    """Quantize, evaluate, print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--peers", nargs="*", default=["llmcompressor", "gptqmodel"])
    parser.add_argument("--python", default=sys.executable)
    parser.add_argument("--only", nargs="*", default=list(OURS))
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    device = pick_device("auto")
    tokenizer = Tokenizer(args.model)
    texts = [tokenizer.encode(a.article) for a in load_articles("trtbuild-news", "evaluation", 16)]
    settings = Text().settings
    tokens = args.work / "tokens.json"
    tokens.write_text(json.dumps({"input_ids": calibration_samples(args.model, **settings).tokens}))
    ranges = args.work / "ranges.npz"
    start = time.perf_counter()
    calibrate(args.model, ranges, **settings)
    print(f"calibration {time.perf_counter() - start:.1f} s", flush=True)
    base = measure(args.model, texts, device)
    rows = [("float32", "", base, 0.0)]
    for name in args.only:
        quantization = Quantization.parse({"dtype": "float32"} | OURS[name])
        folder = args.work / name.replace(" ", "-")
        start = time.perf_counter()
        quantize(args.model, folder, quantization, ranges if quantization.needs_ranges else None)
        seconds = time.perf_counter() - start
        rows.append((name, "trtbuild", measure(folder, texts, device), seconds))
        print(rows[-1], flush=True)
        for package, peer, ours, flags in PEERS:
            if ours == name and package in args.peers:
                folder = args.work / f"{package}-{name.replace(' ', '-')}"
                command = [args.python, str(Path(__file__).with_name("peer_quantizers.py"))]
                command += ["--peer", f"{package}-{peer}", "--model", str(args.model), "--tokens", str(tokens)]
                run = subprocess.run([*command, "--output", str(folder), *flags], capture_output=True, text=True)
                if run.returncode:
                    print(package, name, "failed:", run.stderr[-600:], flush=True)
                    continue
                report = json.loads([line for line in run.stdout.splitlines() if line.startswith('{"peer"')][-1])
                label = f"{package} {report['version']}"
                rows.append((name, label, measure(folder, texts, device), report["seconds"]))
                print(rows[-1], flush=True)
    print(f"\n| weights and activations | by | perplexity | increase % | s |\n{'| --- ' * 5}|")
    for name, package, value, seconds in rows:
        print(f"| {name} | {package} | {value:.4f} | {100 * (value / base - 1):+.3f} | {seconds:.1f} |")


if __name__ == "__main__":
    main()
