"""Two ranks of one thread each beside one rank of two threads, on a CPU: BENCHMARKS.md's table of it.

    .venv/bin/python tests/benchmarks/ranks.py [--dtype bfloat16] [--turns 3]

A dummy LLaMA whose 16 heads two ranks can share: 170M parameters. Both sides run `trtbuild benchmark` in turns, for a
prompt of 256 tokens and 32 more; the fastest turn counts, since others' work only ever adds. Prints the load as well:
with two busy cores beside it ranks that wait for each other are delayed far more than threads.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 8192,
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 12,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}
SIZES = ("--input-len", "256", "--output-len", "32", "--repeats", "1", "--device", "cpu", "--json")


def build(folder: Path, dtype: str, tp_size: int) -> Path:
    import torch

    from trtbuild.checkpoint.canonical import Checkpoint
    from trtbuild.checkpoint.dummy import dummy_tensors
    from trtbuild.decoder.mapping import Mapping
    from trtbuild.engine.build import build_engine_dir
    from trtbuild.engine.config import BuildLimits
    from trtbuild.models.families import config_from_hugging_face

    config = config_from_hugging_face(CONFIG, "this model")
    checkpoint = Checkpoint.in_memory(config, dummy_tensors(config, 0, getattr(torch, dtype)))
    limits, mapping = BuildLimits(16, 256, 32), Mapping(tp_size)
    recipe = {"dtype": dtype}
    build_engine_dir(
        checkpoint, folder, model="dummy", recipe=recipe, limits=limits, engines=["portable"], mapping=mapping
    )
    return folder


def measure(engine: Path, ranks: int, batch_size: int) -> dict:
    """What `benchmark --json` says, on two cores."""
    program = [sys.executable, "-m", "trtbuild", "benchmark", "--engine-dir", str(engine), *SIZES]
    start = [str(Path(sys.executable).with_name("mpiexec")), "-n", str(ranks)] if ranks > 1 else []
    environment = os.environ | {"OMP_NUM_THREADS": str(2 // ranks)}
    command = [*start, *program, "--batch-size", str(batch_size)]
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    return json.loads(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--turns", type=int, default=3)
    options = parser.parse_args()
    print(f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores, {options.dtype}", flush=True)
    with tempfile.TemporaryDirectory() as name:
        engines = {ranks: build(Path(name) / f"tp{ranks}", options.dtype, ranks) for ranks in (1, 2)}
        for batch_size in (1, 8):
            turns = [{n: measure(engine, n, batch_size) for n, engine in engines.items()} for _ in range(options.turns)]
            for key in ("time_to_first_token_s", "time_per_output_token_s"):
                one, two = (min(turn[n][key] for turn in turns) for n in (1, 2))
                print(f"batch {batch_size}, {key}: 1 rank {one:.4f}, 2 ranks {two:.4f}, {two / one:.2f} x", flush=True)
    print(f"load {os.getloadavg()[0]:.1f} afterwards, these ranks included")


if __name__ == "__main__":
    main()
