"""Runs a small engine, then another with its largest batch, and prints the bytes that the second took at its peak.

    python tests/engine/memory_of_runs.py SMALL.safetensors ENGINE.safetensors

On a CPU, of the resident set, weights included, which are mapped: what libraries take is there after the small one.
"""

import sys
from pathlib import Path

import torch

from trtbuild.engine.portable import PortableEngine
from trtbuild.runtime.session import PortableSession


def status(key: str) -> int:
    """Bytes, as the kernel counts them for this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(key)).split()[1]) * 1024


def run(engine: str) -> PortableSession:
    session = PortableSession(PortableEngine.load(Path(engine)))
    limits = session.limits
    prompts = torch.randint(session.vocab_size, (limits.max_batch_size, limits.max_input_len)).tolist()
    for _ in range(2):  # all weights are mapped when the second one is at its peak
        session.prefill(prompts)
    for _ in range(limits.max_output_len - 1):
        session.decode(torch.ones(limits.max_batch_size, dtype=torch.int32))
    return session


if __name__ == "__main__":
    torch.set_num_threads(1)
    small = run(sys.argv[1])
    before = status("VmRSS")
    large = run(sys.argv[2])
    print(status("VmHWM") - before)
