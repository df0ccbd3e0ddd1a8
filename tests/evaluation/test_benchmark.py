"""The benchmark's numbers are there, make sense together, and its sizes are checked."""

import math

import pytest
import torch

from trtbuild.errors import UserError
from trtbuild.evaluation import benchmark as module
from trtbuild.evaluation.benchmark import benchmark
from trtbuild.runtime.open import open_engine

ALWAYS = {"batch_size", "input_len", "output_len", "time_to_first_token_s", "output_tokens_per_s", "peak_memory_bytes"}
STEPS = {"time_per_output_token_s", "time_per_output_token_p90_s"}
TRAFFIC = {"bytes_per_step", "bytes_per_token", "bandwidth_bytes_per_s", "bandwidth_share"}


@pytest.fixture(scope="module")
def session(tiny_engine):
    return open_engine(tiny_engine, "portable", "cpu").session


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(module, "BANDWIDTH_BYTES", 1 << 22)


def test_all_keys_are_finite_and_positive(session):
    result = benchmark(session, batch_size=3, input_len=20, output_len=9, repeats=2)
    assert result.keys() == ALWAYS | STEPS | TRAFFIC
    assert all(math.isfinite(value) and value > 0 for value in result.values())
    assert (result["batch_size"], result["input_len"], result["output_len"]) == (3, 20, 9)
    assert result["time_per_output_token_s"] <= result["time_per_output_token_p90_s"]
    assert result["peak_memory_bytes"] > 50 << 20  # a process with torch in it


def test_bytes_of_a_step(session):
    """Every float32 weight but the embedding, and 20 + 9/2 cached positions of 3 sequences."""
    result = benchmark(session, batch_size=3, input_len=20, output_len=9, repeats=1)
    attention, mlp, norms = 64 * 64 * 2 + 64 * 32 * 2, 3 * 64 * 96, 2 * 64
    weights = 4 * (2 * (attention + mlp + norms) + 64 + 320 * 64)
    cache = 4 * 2 * 2 * (2 * 16)  # float32, layers, keys and values, heads
    tables = session.weight_bytes - weights  # rotary angles, which a step reads a row of
    assert 0 <= tables <= 2 * 48 * 16 * 4
    assert result["bytes_per_step"] == int(weights + tables + 3 * 24.5 * cache)
    assert result["bytes_per_token"] == result["bytes_per_step"] // 3
    share = result["bytes_per_step"] / result["time_per_output_token_s"] / result["bandwidth_bytes_per_s"]
    assert result["bandwidth_share"] == pytest.approx(share, rel=1e-4)


def test_one_token_has_no_steps(session):
    assert benchmark(session, 1, 4, 1, 1).keys() == ALWAYS


def test_counts_of_runs_and_steps(session, monkeypatch):
    calls = []
    prefill, decode = session.prefill, session.decode
    monkeypatch.setattr(session, "prefill", lambda prompts: calls.append(prompts) or prefill(prompts))
    monkeypatch.setattr(session, "decode", lambda tokens: calls.append(tokens.shape) or decode(tokens))
    benchmark(session, 2, 5, 4, repeats=3)
    prompts = calls[0]
    assert [len(prompt) for prompt in prompts] == [5, 5]
    assert calls == [prompts, *[torch.Size([2])] * 3] * 4  # one run to warm up


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((5, 8, 4), "batch size 5 is outside the engine's limits; it must be 1 to 4"),
        ((0, 8, 4), "batch size 0 is outside"),
        ((1, 33, 4), "input length 33 is outside the engine's limits; it must be 1 to 32"),
        ((1, 8, 17), "output length 17 is outside the engine's limits; it must be 1 to 16"),
        ((1, 8, 4, 0), "repeats is 0; it must be at least 1"),
    ],
)
def test_sizes_beyond_the_limits(session, sizes, message):
    with pytest.raises(UserError, match=message):
        benchmark(session, *sizes)
