"""What engines take of a GPU's memory beside what a plan says of them, and whether its largest batch fits.

    python tests/gpu/memory.py --recipes fp16 int8wo int4 fp8

LLaMA-7B's shapes with dummy weights (`run.py`). Each engine runs its largest steps: `max_batch_size` prompts of
`max_input_len` tokens, the longest captured ones, and generation to the last position; then the same with the largest
batch of these lengths that the plan says fits into what is free. `torch` is the most that tensors took, `used` the most
that torch had for them, and what libraries and kernels took besides.
"""

import argparse
import gc
from dataclasses import replace

import torch
from run import MODELS, recipe_network

from trtbuild.engine.config import BuildLimits
from trtbuild.engine.memory import largest_batch, needed
from trtbuild.engine.portable import PortableEngine
from trtbuild.models.families import config_from_hugging_face
from trtbuild.network import Network
from trtbuild.network.step import captured_rows
from trtbuild.runtime.sampling import SamplingParams
from trtbuild.runtime.session import PortableSession


def run(network: Network, limits: BuildLimits) -> int:
    """Bytes that torch's tensors took at most; dummy weights take more while they are made."""
    session = PortableSession(PortableEngine(network, limits, torch.device("cuda")))
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    batch = limits.max_batch_size
    short = min(limits.max_input_len, captured_rows(network) // batch)
    for length in (limits.max_input_len, *([short] * 3 if short else []), limits.max_input_len):
        prompts = torch.randint(1, session.vocab_size, (batch, length)).tolist()
        sampler = session.sampler(SamplingParams(), prompts)
        sampler(session.prefill(prompts))
    for _ in range(limits.max_output_len - 1):
        session.generate(sampler)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated()


def used() -> int:
    free, total = torch.cuda.mem_get_info()
    return total - free


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--recipes", nargs="+", default=["fp16", "int8wo", "int4", "fp8"])
    parser.add_argument("--model", default="llama-7b")
    options = parser.parse_args()
    config = config_from_hugging_face(MODELS[options.model]["config"], options.model)
    limits = BuildLimits()
    torch.zeros(1, device="cuda")
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    print(f"{torch.cuda.get_device_name()}: {total >> 20} MiB, {total - free >> 20} of them taken from the start")
    print("| recipe | batch | planned GB | torch | used | planned / used | of it weights | caches | step |")
    print("| --- " * 9 + "|")
    for recipe in options.recipes:
        network = recipe_network(config, recipe, limits)
        for batch in (limits.max_batch_size, None):
            gc.collect()
            torch.cuda.empty_cache()
            batch = batch or largest_batch(network, limits, torch.cuda.mem_get_info()[0])
            sizes = replace(limits, max_batch_size=batch)
            before, plan = used(), needed(network, sizes)
            allocated = run(network, sizes)
            taken = torch.cuda.max_memory_reserved() + used() - torch.cuda.memory_reserved() - before
            parts = (plan.total, allocated, taken)
            cells = [*(f"{x / 1e9:.2f}" for x in parts), f"{plan.total / taken:.3f}"]
            cells += [f"{x / 1e9:.2f}" for x in (plan.weights, plan.caches, plan.step)]
            print("| " + " | ".join([recipe, str(batch), *cells]) + " |", flush=True)


if __name__ == "__main__":
    main()
