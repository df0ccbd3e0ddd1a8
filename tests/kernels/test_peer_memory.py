"""Sums and gathers over ranks that reach each other's memory: a process a rank, interpreted, against float64."""

import multiprocessing
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from numerics import relative_error

pytest.importorskip("triton", "3.7")  # earlier interpreters fail with numpy 2.4

from trtbuild.kernels import one_shot_all_gather, one_shot_all_reduce, peer_memory
from trtbuild.kernels.one_shot_all_gather import all_gather
from trtbuild.kernels.one_shot_all_reduce import all_reduce, all_reduce_add_rms_norm
from trtbuild.kernels.peer_memory import PeerMemory

TOLERANCE = {torch.float16: 5e-4, torch.float32: 1e-6}  # the result's own rounding
EPS = 1e-2
SECONDS = 60


@pytest.fixture(autouse=True)
def little_memory(monkeypatch):
    monkeypatch.setattr(peer_memory, "WORDS", 1 << 11)
    monkeypatch.setattr(peer_memory, "CAPACITY", 1 << 13)
    monkeypatch.setattr(peer_memory, "PROGRAMS", 64)


def on_ranks(size: int, run: Callable[[PeerMemory], list[torch.Tensor]]) -> list[list[torch.Tensor]]:
    """What `run` returns on every rank; ranks are processes that share memory."""
    processes = multiprocessing.get_context("fork")
    blocks = [torch.zeros(PeerMemory.nbytes(size), dtype=torch.uint8).share_memory_() for _ in range(size)]
    table = torch.tensor([block.data_ptr() for block in blocks])
    ends = [processes.Pipe(duplex=False) for _ in range(size)]

    def rank(i: int) -> None:
        results = run(PeerMemory(i, size, table.data_ptr(), torch.device("cpu")))
        ends[i][1].send([result.numpy() for result in results])

    started = [processes.Process(target=rank, args=(i,), daemon=True) for i in range(size)]
    for process in started:
        process.start()
    try:
        assert all(ends[i][0].poll(SECONDS) for i in range(size)), "ranks wait for each other"
        return [[torch.from_numpy(x) for x in ends[i][0].recv()] for i in range(size)]
    finally:
        for process in started:
            process.kill()


def drawn(rank: int, call: int, *shape: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(100 * call + rank)
    return torch.randn(*shape, generator=generator).to(dtype)


SHAPES = [(1, 96), (3, 5), (1, 1024), (2, 90)]  # more programs in one call than in another
WAYS = {  # ranks, dtype, from how many bytes on not in words, and not in one shot
    "words": (2, torch.float16, 1 << 20, 1 << 20),
    "one shot": (2, torch.float32, 0, 1 << 20),
    "two shots": (3, torch.float16, 0, 0),
}


@pytest.mark.parametrize("way", WAYS)
def test_sums_and_their_norms(way, monkeypatch):
    size, dtype, in_words, in_one_shot = WAYS[way]
    monkeypatch.setattr(one_shot_all_reduce, "IN_WORDS", in_words)
    monkeypatch.setattr(one_shot_all_reduce, "IN_ONE_SHOT", in_one_shot)
    monkeypatch.setattr(one_shot_all_reduce, "processors", lambda device: 1)  # a piece would wait for the next one

    def inputs(call):
        rows, width = SHAPES[call]
        return drawn(50, call, rows, width, dtype=dtype), 1 + drawn(51, call, width, dtype=dtype) / 5

    def run(memory):
        results = []
        for i, shape in enumerate(SHAPES):
            x = drawn(memory.rank, i, *shape, dtype=dtype)
            results += [all_reduce(memory, x.clone()), *all_reduce_add_rms_norm(memory, x, *inputs(i), EPS)]
        return results

    results = on_ranks(size, run)
    assert all(a.equal(b) for result in results for a, b in zip(result, results[0], strict=True))
    for i, shape in enumerate(SHAPES):
        residual, weight = inputs(i)
        exact = sum(drawn(rank, i, *shape, dtype=dtype).double() for rank in range(size))
        alone, total, normed = results[0][3 * i : 3 * i + 3]
        assert alone.dtype == total.dtype == normed.dtype == dtype
        assert relative_error(alone, exact) < TOLERANCE[dtype]
        assert relative_error(total, exact + residual.double()) < TOLERANCE[dtype]
        expected = F.rms_norm(total.double(), weight.shape, weight.double(), EPS)
        assert relative_error(normed, expected) < TOLERANCE[dtype]


def test_what_does_not_fit_goes_in_parts(monkeypatch):
    monkeypatch.setattr(one_shot_all_reduce, "CAPACITY", 4 * 2 * 80)
    monkeypatch.setattr(one_shot_all_reduce, "FLAT", 64)

    def run(memory):
        x, residual = (drawn(rank, 0, 5, 80, dtype=torch.float32) for rank in (memory.rank, 50))
        return [*all_reduce_add_rms_norm(memory, x.clone(), residual, torch.ones(80), EPS), all_reduce(memory, x)]

    results = on_ranks(2, run)
    exact = sum(drawn(rank, 0, 5, 80, dtype=torch.float32) for rank in range(2))
    for total, normed, alone in results:
        assert total.equal(exact + drawn(50, 0, 5, 80, dtype=torch.float32))
        assert relative_error(normed, F.rms_norm(total.double(), (80,), eps=EPS)) < 1e-6
        assert alone.equal(exact)


def test_gathers(monkeypatch):
    monkeypatch.setattr(one_shot_all_gather, "BLOCK", 64)

    def run(memory):
        return [all_gather(memory, drawn(memory.rank, i, *s, dtype=torch.float32)) for i, s in enumerate(SHAPES)]

    for result in on_ranks(2, run):
        for i, shape in enumerate(SHAPES):
            assert result[i].equal(torch.cat([drawn(rank, i, *shape, dtype=torch.float32) for rank in range(2)], 1))


def test_infinities_and_nan_arrive():
    def run(memory):
        x = torch.zeros(2, 64).half()
        x[0, 3], x[1, 5] = (float("inf"), float("nan")) if memory.rank else (1, 2)
        return [all_reduce(memory, x)]

    for (total,) in on_ranks(2, run):
        assert total[0, 3] == float("inf")
        assert total[1, 5].isnan()
        assert total.isfinite().sum() == 126
