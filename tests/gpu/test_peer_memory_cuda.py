"""Kernels that sum and gather over ranks, compiled: two processes on one GPU, each of which takes its turns.

With `tests/gpu/ranks.py sums` a GPU a rank does the same, and measures.
"""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

pytestmark = pytest.mark.gpu

RANKS = 2
SHAPES = [(1, 5), (1, 4096), (4, 8192), (7, 5120), (16, 4096), (33, 8192), (200, 4096), (2048, 4096)]
TOLERANCE = {torch.float16: 1e-3, torch.bfloat16: 8e-3, torch.float32: 1e-6}


def test_ranks_on_one_gpu():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {
        "TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES": "1",
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]),
    }
    started = [
        subprocess.Popen([sys.executable, __file__, str(rank), port], env=os.environ | shared) for rank in range(RANKS)
    ]
    try:
        assert [process.wait(120) for process in started] == [0] * RANKS
    finally:
        for process in started:
            process.kill()


def error(found: torch.Tensor, exact: torch.Tensor) -> float:
    return ((found.double() - exact).norm() / exact.norm()).item()


def run(rank: int, port: int) -> None:
    from trtbuild.kernels.one_shot_all_gather import all_gather
    from trtbuild.kernels.one_shot_all_reduce import all_reduce, all_reduce_add_rms_norm
    from trtbuild.kernels.peer_memory import PeerMemory

    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=RANKS)
    device = torch.device("cuda", 0)
    memory = PeerMemory.of(dist.group.WORLD, PeerMemory.block(RANKS, device))
    draw = torch.Generator(device).manual_seed(0)  # all ranks draw the same
    for dtype, tolerance in TOLERANCE.items():
        for rows, width in SHAPES:
            parts = [torch.randn(rows, width, generator=draw, device=device).to(dtype) for _ in range(RANKS)]
            residual = torch.randn(rows, width, generator=draw, device=device).to(dtype)
            weight = (1 + torch.randn(width, generator=draw, device=device) / 5).to(dtype)
            exact = sum(part.double() for part in parts)
            assert error(all_reduce(memory, parts[rank].clone()), exact) < tolerance, (dtype, rows, width)
            total, normed = all_reduce_add_rms_norm(memory, parts[rank].clone(), residual, weight, 1e-5)
            assert error(total, exact + residual.double()) < tolerance, (dtype, rows, width)
            expected = F.rms_norm(total.double(), (width,), weight.double(), 1e-5)
            assert error(normed, expected) < tolerance, (dtype, rows, width)
    for rows, width in ((1, 1), (3, 5), (1, 16000), (16, 16000)):
        parts = [torch.randn(rows, width, generator=draw, device=device) for _ in range(RANKS)]
        assert all_gather(memory, parts[rank]).equal(torch.cat(parts, 1))
    x = torch.empty(3, 4096, device=device, dtype=torch.float16)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = all_reduce(memory, x.clone())
    for _ in range(20):
        parts = [torch.randn(3, 4096, generator=draw, device=device).half() for _ in range(RANKS)]
        x.copy_(parts[rank])
        graph.replay()
        assert found.equal(sum(part.float() for part in parts).half())
    torch.cuda.synchronize()
    dist.barrier()  # nobody's memory goes before the others have read it


if __name__ == "__main__":
    run(*map(int, sys.argv[1:]))
