"""Sampling on CUDA, against the CPU's. Run by hand: `pytest -m gpu tests/gpu`."""

import pytest
import torch

from trtbuild.checkpoint.dummy import dummy_tensors
from trtbuild.decoder.decoder import decoder
from trtbuild.engine.config import BuildLimits
from trtbuild.engine.portable import PortableEngine
from trtbuild.models.families import config_from_hugging_face
from trtbuild.runtime.generation import generate
from trtbuild.runtime.sampling import Sampler, SamplingParams
from trtbuild.runtime.session import PortableSession

pytestmark = pytest.mark.gpu

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
GREEDY, DRAWN = {}, {"temperature": 0.9, "seed": 11}
OTHERS = {"temperature": 1.3, "top_k": 40, "top_p": 0.7, "repetition_penalty": 1.2, "seed": -3}
PENALIZED = {"presence_penalty": 0.5, "frequency_penalty": 0.3, "min_output_len": 3, "eos_token_ids": tuple(range(40))}
PENALIZED |= {"bad_words": (*((i,) for i in range(40, 60)), (60, 61), (62, 63, 64, 65))}


@pytest.mark.parametrize("params", [GREEDY, DRAWN, OTHERS, PENALIZED], ids=["greedy", "drawn", "filtered", "penalized"])
@pytest.mark.parametrize(("batch", "vocab"), [(1, 32000), (16, 32000), (3, 151936), (256, 8000), (5, 77)])
def test_tokens_equal_the_cpus(batch, vocab, params):
    """Six steps, each of which must leave what the next one needs; a last bit may decide one draw in some thousands."""
    prompts = [[i % vocab] * (1 + i) for i in range(batch)]
    kind = SamplingParams(**params)
    cpu, cuda = (Sampler(kind.kind, batch, vocab, device).start(kind, prompts) for device in (CPU, CUDA))
    differ = 0
    for step in range(6):
        logits = 3 * torch.randn(batch, vocab)
        expected, actual = cpu(logits).clone(), cuda(logits.cuda()).cpu()
        cuda.ring.send()
        assert cuda.ring.receive() == [actual.tolist()]
        differ += expected.ne(actual).sum().item()
        cuda.tokens.copy_(expected)
        assert cuda._places.tolist() == [len(prompt) + step + 1 for prompt in prompts]
    assert differ <= (0 if kind.temperature == 0 else 1 + batch // 100)


def test_equal_bit_for_bit_between_runs():
    logits = torch.randn(64, 32000, device="cuda").half().float()  # many equal ones
    runs = []
    for _ in range(20):
        sampler = Sampler(SamplingParams().kind, 64, 32000, CUDA).start(SamplingParams(), [[0]] * 64)
        runs.append(sampler(logits).clone())
    assert all(run.equal(logits.argmax(-1).int()) for run in runs)


@pytest.fixture(scope="module")
def session(tiny_config):
    config = config_from_hugging_face(tiny_config, "test")
    limits = BuildLimits(max_batch_size=8, max_input_len=300, max_output_len=300)
    network = decoder(config, dummy_tensors(config, 3, torch.float32).__getitem__, torch.float32, limits.max_length)
    return PortableSession(PortableEngine(network, limits, CUDA))


def test_one_captured_step_for_all_numbers_of_a_kind(session):
    prompts = [[5, 9, 40], [7], list(range(2, 250))]
    outputs, graphs = {}, set()
    for temperature, seed in ((0.5, 1), (1.5, 2), (0.5, 1)):
        params = SamplingParams(20, temperature=temperature, seed=seed)
        found = [output.output_ids for output in generate(session, prompts, params)]
        assert outputs.setdefault(seed, found) == found
        alone = generate(session, prompts[2:], SamplingParams(20, temperature=temperature, seed=seed + 2))
        assert alone[0].output_ids == found[2]
        graphs.add(len(session._graphs))
    assert outputs[1] != outputs[2]
    assert len(graphs) == 1


@pytest.mark.parametrize("params", [PENALIZED, PENALIZED | OTHERS], ids=["greedy", "drawn"])
def test_penalties_within_a_captured_step(session, params):
    """As a sampler outside of it, from the same logits; the second run takes the first one's graph."""
    prompts = [[5, 9, 40], [7, 60], list(range(2, 250))]
    params = SamplingParams(12, **params)
    for _ in range(2):
        sampler = session.sampler(params, prompts)
        apart = Sampler(params.kind, 3, session.vocab_size, CUDA).start(params, prompts)
        logits = session.prefill(prompts)
        assert sampler(logits).equal(apart(logits))
        for _ in range(11):
            logits = session.generate(sampler)
            assert sampler.tokens.equal(apart(logits))
            assert sampler._seen.equal(apart._seen)


def test_stop_words_at_every_step(session):
    letters = lambda ids: "".join(chr(0x100 + i) for i in ids)
    prompts = [[5, 9, 40], [7]]
    runs = [output.output_ids for output in generate(session, prompts, SamplingParams(24))]
    for end in range(2, 24):
        word = letters(runs[0][end - 2 : end])
        outputs = generate(session, prompts, SamplingParams(24, stop_words=(word,)), letters)
        for run, output in zip(runs, outputs, strict=True):
            found = letters(run).find(word)
            assert output.output_ids == (run if found < 0 else run[: found + 2])


def test_a_step_waits_for_nothing(session):
    """The host may launch all that a ring holds; a wait inside would raise."""
    prompts = [[5, 9, 40], [7]]
    generate(session, prompts, SamplingParams(30, temperature=1.0, repetition_penalty=1.1))
    sampler = session.sampler(SamplingParams(30, temperature=1.0, repetition_penalty=1.1), prompts)
    sampler(session.prefill(prompts))
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(sampler.ring.ahead):
            session.generate(sampler)
    finally:
        torch.cuda.set_sync_debug_mode("default")
