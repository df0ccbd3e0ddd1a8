"""The benchmark's numbers are there, make sense together, and its sizes are checked."""

import math

import pytest
import torch

from trtbuild.engine.config import BuildLimits
from trtbuild.errors import UserError
from trtbuild.evaluation import benchmark as module
from trtbuild.evaluation.benchmark import benchmark, by_engine, by_transformers, compare, random_prompts, table
from trtbuild.evaluation.hugging_face import HuggingFaceModel
from trtbuild.runtime.open import open_engine

ALWAYS = {
    *("batch_size", "parts", "input_len", "output_len"),
    *("time_to_first_token_s", "output_tokens_per_s", "peak_memory_bytes"),
}
STEPS = {"time_per_output_token_s", "time_per_output_token_p90_s"}
TRAFFIC = {
    *("bytes_per_step", "bytes_per_token", "bandwidth_bytes_per_s", "bandwidth_share"),
    *("floor_per_output_token_s", "times_floor"),
}


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
    assert result["times_floor"] == pytest.approx(1 / share, rel=1e-4)
    assert result["floor_per_output_token_s"] == pytest.approx(share * result["time_per_output_token_s"], rel=1e-4)


def test_one_token_has_no_steps(session):
    assert benchmark(session, 1, 4, 1, 1).keys() == ALWAYS


def test_counts_of_runs_and_steps(session, monkeypatch):
    calls = []
    prefill, generate = session.start_prefill, session.start_generate
    monkeypatch.setattr(session, "start_prefill", lambda prompts: calls.append(prompts) or prefill(prompts))
    monkeypatch.setattr(session, "start_generate", lambda s: calls.append(s.tokens.shape) or generate(s))
    benchmark(session, 2, 5, 4, repeats=3)
    prompts = calls[0]
    assert [len(prompt) for prompt in prompts] == [5, 5]
    assert calls == [prompts, *[torch.Size([2])] * 3] * 4  # one run to warm up


class Part:
    """Of a batch, which notes what is asked of it."""

    device = torch.device("cpu")

    def __init__(self, name: str, size: int, calls: list[str]) -> None:
        self.name, self.calls, self.limits = name, calls, BuildLimits(max_batch_size=size)

    def sampler(self, params, prompts):
        assert len(prompts) == self.limits.max_batch_size
        return lambda logits: self.calls.append(f"{self.name} drawn")

    def _begin(self, what):
        self.calls.append(f"{self.name} {what}")
        return lambda: self.calls.append(f"{self.name} there")

    def start_prefill(self, prompts):
        return self._begin("prompts")

    def start_generate(self, sampler):
        return self._begin("step")


def test_parts_of_a_batch_are_under_way_at_the_same_time(monkeypatch):
    """A part's next step begins before the other's logits are asked for, as in `generate`; in the end all are there."""
    calls: list[str] = []
    whole = Part("whole", 3, calls)
    whole.parts = lambda batch_size: [Part("a", 1, calls), Part("b", 2, calls)]
    generation = by_engine(whole, random_prompts(3, 4))
    assert generation.parts == 2
    generation.start()
    assert calls == ["a prompts", "b prompts", "a there", "a drawn", "b there", "b drawn"]
    calls.clear()
    for _ in range(3):
        generation.step()
    assert calls == ["a step", "b step", "a there", *["a step", "b there", "b step", "a there"] * 2]
    generation.wait()
    assert calls[11:] == ["b there"]


def test_both_generate_the_same_tokens(session, tiny_checkpoint):
    """What is timed is greedy generation of the same prompts, by the engine and by transformers."""
    model = HuggingFaceModel(tiny_checkpoint, "float32", "cpu")
    prompts = random_prompts(3, 20)
    tokens = []
    decode, forward = session._decode, model.model.forward

    def heard(*arguments, **options):
        tokens.append(arguments[0].view(-1).tolist())
        return forward(*arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(session, "_decode", lambda given: tokens.append(given.tolist()) or decode(given))
        patch.setattr(model.model, "forward", heard)
        for generation in (by_engine(session, prompts), by_transformers(model, prompts)):
            for _ in range(2):  # a second time from the start
                generation.start()
                for _ in range(6):
                    generation.step()
    ours, theirs = tokens[:12], tokens[12:]
    assert ours[:6] == ours[6:]
    assert theirs[0] == theirs[7] == [token for prompt in prompts for token in prompt]
    assert theirs[1:7] == theirs[8:] == ours[:6]


def test_compared(session, tiny_checkpoint):
    result = benchmark(session, 2, 8, 4, 1)
    both = compare(result, HuggingFaceModel(tiny_checkpoint, "float32", "cpu"), 1)
    assert both.items() > result.items()
    assert both["transformers"].keys() == {"dtype", "output_tokens_per_s", "time_to_first_token_s"} | STEPS
    for name, ratio in both["times_as_fast"].items():
        assert ratio == both["transformers"][f"{name}_s"] / result[f"{name}_s"]
    one = compare(benchmark(session, 1, 4, 1, 1), HuggingFaceModel(tiny_checkpoint, "float32", "cpu"), 1)
    assert one["times_as_fast"].keys() == {"time_to_first_token"}


def test_table(session):
    origin = {"model": "tiny", "engine": "portable", "dtype": "float32", "device": "cpu"}
    result = benchmark(session, 2, 8, 4, 1) | {"provenance": origin}
    theirs = {"dtype": "float32", "time_to_first_token_s": 0.5, "time_per_output_token_s": 0.25}
    ratios = {"time_to_first_token": 2.0, "time_per_output_token": 3.0}
    lines = table(result | {"transformers": theirs, "times_as_fast": ratios}).splitlines()
    assert lines[0] == "tiny, portable engine, float32, cpu; batch 2, 8 tokens in, 4 out"
    names = ("time to first token", "time a token", "floor", "times its floor", "tokens a second", "peak memory")
    assert [line[:24].strip() for line in lines[1:]] == [*names, "time to first token", "time a token"]
    assert lines[-1].split()[3:] == ["250", "ms", "transformers,", "float32;", "3.00", "times", "ours"]
    assert float(lines[2].split()[3]) == pytest.approx(1e3 * result["time_per_output_token_s"], rel=1e-3)
    assert len(table(benchmark(session, 1, 4, 1, 1) | {"provenance": origin}).splitlines()) == 4


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
