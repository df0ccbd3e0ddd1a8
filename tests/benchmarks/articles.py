"""Seconds in which SmolLM2 summarizes 16 articles on a CPU (BENCHMARKS.md).

    .venv/bin/python tests/benchmarks/articles.py --checkpoint-dir results/smollm2-135m/checkpoint --dtype float16

Of `generate` alone, on the clock and of cores. `--operations` puts a clock around every operation, which slows it down.
With PYTHONPATH another commit's folder is measured, in turns with this one since a machine's guests come and go.
"""

import argparse
import time
import zlib
from collections import defaultdict
from pathlib import Path

import torch

from trtbuild.checkpoint.canonical import Checkpoint
from trtbuild.datasets import load_articles
from trtbuild.decoder.decoder import decoder
from trtbuild.engine.config import BuildLimits
from trtbuild.engine.portable import PortableEngine
from trtbuild.evaluation.summarization import summarization_prompts
from trtbuild.runtime.generation import generate
from trtbuild.runtime.sampling import SamplingParams
from trtbuild.runtime.session import PortableSession
from trtbuild.tokenizer.tokenizer import Tokenizer

LIMITS = BuildLimits(8, 1024, 128)  # as config/config.yaml
PROMPT = "Summarize the following article in two sentences.\n\n{article}"


def timed(engine: PortableEngine) -> dict[tuple[str, str], float]:
    """Seconds by phase and operation, as they come."""
    seconds: dict[tuple[str, str], float] = defaultdict(float)

    def clocked(run, name: str):
        def call(step, *values):
            start = time.perf_counter()
            result = run(step, *values)
            seconds["generation" if step.generates else "prompts", name] += time.perf_counter() - start
            return result

        return call

    for plan in engine._plans.values():
        plan[:] = [(clocked(run, type(run.__self__).__name__), *slots) for run, *slots in plan]
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint-dir", type=Path, required=True)
    parser.add_argument("--dtype", default="float16", choices=["float32", "float16", "bfloat16"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--operations", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    checkpoint, tokenizer = Checkpoint(args.checkpoint_dir), Tokenizer(args.checkpoint_dir)
    network = decoder(checkpoint.config, checkpoint.__getitem__, getattr(torch, args.dtype), LIMITS.max_length)
    session = PortableSession(PortableEngine(network, LIMITS, torch.device("cpu")))
    articles = load_articles("trtbuild-news", split="evaluation", samples=16)
    prompts = summarization_prompts(articles, tokenizer, PROMPT, True, LIMITS.max_input_len)
    params = SamplingParams(100, eos_token_ids=tokenizer.eos_token_ids)
    generate(session, [prompt[:32] for prompt in prompts], SamplingParams(2))
    seconds = timed(session.engine) if args.operations else {}
    clock, cores = time.perf_counter(), time.process_time()
    outputs = generate(session, prompts, params)
    clock, cores = time.perf_counter() - clock, time.process_time() - cores
    ids = [output.output_ids for output in outputs]
    print(f"{args.dtype}, {args.threads} threads: {clock:.1f} s, {cores:.1f} of cores; ", end="")
    print(f"{sum(map(len, prompts))} tokens in, {sum(map(len, ids))} out, {zlib.crc32(str(ids).encode()):08x}")
    for (phase, name), value in sorted(seconds.items(), key=lambda item: -item[1]):
        print(f"  {phase:11} {name:20} {value:6.2f}")


if __name__ == "__main__":
    main()
