"""Steps of any mix: prompts in chunks, and continuations beside new prompts, give the logits of each prompt at once."""

from functools import cache

import pytest
import torch
from numerics import run_reference
from published_models import LLAMA, QWEN, baichuan_config

pytest.importorskip("tensorrt_rtx")

from trtbuild.checkpoint.sources import dummy_model
from trtbuild.decoder.decoder import CacheScales, decoder
from trtbuild.engine.config import BuildLimits
from trtbuild.engine.portable import PortableEngine
from trtbuild.errors import UserError
from trtbuild.network import Network
from trtbuild.network.step import STEP_INPUTS, Chunk, Step, step_tensors
from trtbuild.runtime.lowered_session import InterpretedSession
from trtbuild.runtime.session import PortableSession, Session

CPU = torch.device("cpu")
LIMITS = BuildLimits(max_batch_size=4, max_input_len=40, max_output_len=8)
PROMPTS = [torch.randint(2, 300, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (23, 1, 40, 9)]

FAMILIES = {
    "llama": LLAMA,
    "llama, base by length": LLAMA
    | {"max_position_embeddings": 16, "rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
    "qwen beyond": QWEN | {"seq_length": 16},
    "baichuan 7b": baichuan_config("v1_7b"),
    "baichuan 13b": baichuan_config("v1_13b"),
}
VERSIONS = {"baichuan 7b": "v1_7b", "baichuan 13b": "v1_13b"}
# dtype of the network and of its cache; norm of the difference over the norm of one prompt's logits. A key or value
# whose last bit lies between two 8-bit numbers may fall on either side.
CACHES = {
    "float32": (torch.float32, None, 2e-6),
    "float16": (torch.float16, None, 3e-3),
    "bfloat16": (torch.bfloat16, None, 2e-2),
    "int8": (torch.float32, torch.int8, 1e-3),
    "fp8": (torch.float32, torch.float8_e4m3fn, 1e-3),
}


class ReferenceSession(Session):
    """Runs a network by the definitions of its operations."""

    kind = "reference"

    def __init__(self, network: Network) -> None:
        super().__init__(network, LIMITS, CPU)
        self.network = network

    def _step(self, chunks) -> torch.Tensor:
        slots = [chunk.slot for chunk in chunks]
        caches = {name: buffer[slots] for name, buffer in self.cache.buffers.items()}
        outputs = run_reference(self.network, step_tensors(chunks, STEP_INPUTS) | caches)
        for name, buffer in self.cache.buffers.items():
            buffer[slots] = outputs[self.network.states[name]]
        return outputs["logits"]

    def _decode(self, tokens) -> torch.Tensor:
        raise AssertionError("steps of one token each are chunks here, too")


@cache
def network_of(family: str, name: str) -> Network:
    dtype, cache_dtype, _ = CACHES[name]
    _, checkpoint = dummy_model(FAMILIES[family], seed=3, model_version=VERSIONS.get(family))
    scales = None
    if cache_dtype:
        shape = checkpoint.config.num_hidden_layers, checkpoint.config.num_key_value_heads
        limit = 127 if cache_dtype == torch.int8 else 448
        scales = CacheScales(cache_dtype, *((1 + torch.rand(shape)) * 2 / limit for _ in range(2)))
    return decoder(checkpoint.config, checkpoint.dequantized, dtype, LIMITS.max_length, scales)


def session_of(kind: str, network: Network) -> Session:
    if kind == "portable":
        return PortableSession(PortableEngine(network, LIMITS, CPU))
    return ReferenceSession(network) if kind == "reference" else InterpretedSession(network, LIMITS, kind == "packed")


def alone(session: Session, tokens: list[int], prompt_length: int) -> torch.Tensor:
    """Every token's logits of one sequence in one step."""
    session.lengths, session.prompt_lengths = [], []
    return session.step([Chunk(tokens, prompt_length, all_logits=True)]).clone()


def run(session: Session, schedule: list[list[tuple[int, int]]], prompts=PROMPTS) -> list[torch.Tensor]:
    """Each prompt's logits after steps of (slot, number of tokens); what is left of it is its continuation."""
    rows: list[list[torch.Tensor]] = [[] for _ in prompts]
    done = [0] * len(prompts)
    session.lengths, session.prompt_lengths = [], []
    for step in schedule:
        chunks = []
        for slot, count in step:
            tokens = prompts[slot][done[slot] : done[slot] + count]
            chunks.append(Chunk(tokens, len(prompts[slot]), done[slot], slot, all_logits=True))
            done[slot] += count
        logits = session.step(chunks).clone()
        for chunk, part in zip(chunks, logits.split([len(chunk.tokens) for chunk in chunks]), strict=True):
            rows[chunk.slot].append(part)
    assert done == [len(prompt) for prompt in prompts]
    return [torch.cat(parts) for parts in rows]


def in_chunks_of(size: int) -> list[list[tuple[int, int]]]:
    """All prompts side by side; the shorter ones end earlier."""
    longest = max(map(len, PROMPTS))
    counts = [
        [(i, min(size, len(p) - start)) for i, p in enumerate(PROMPTS) if start < len(p)]
        for start in range(0, longest, size)
    ]
    return counts


SCHEDULES = {
    "chunks of 7": in_chunks_of(7),
    "chunks of 16": in_chunks_of(16),
    # New prompts beside continuations of one token and of several, slots out of order.
    "any mix": [
        [(0, 20)],
        [(0, 1), (1, 1), (2, 17)],
        [(2, 1), (0, 1)],
        [(3, 2), (0, 1), (2, 21)],
        [(3, 1), (2, 1)],
        [(3, 6)],
    ],
}
kinds = pytest.mark.parametrize("kind", ["portable", "reference", "packed", "padded"])


@kinds
@pytest.mark.parametrize("name", CACHES)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.usefixtures("one_thread")
def test_chunks_give_the_logits_of_the_prompt_at_once(family, name, kind):
    network, tolerance = network_of(family, name), CACHES[name][2]
    session = session_of(kind, network)
    expected = [alone(session, prompt, len(prompt)) for prompt in PROMPTS]
    for schedule in SCHEDULES.values():
        for actual, wanted in zip(run(session, schedule), expected, strict=True):
            assert (actual - wanted).norm() / wanted.norm() < tolerance


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.usefixtures("one_thread")
def test_one_token_at_a_time(family):
    """Of a prompt; behind it they are generation steps."""
    session = session_of("portable", network_of(family, "float32"))
    prompt = PROMPTS[0]
    expected = alone(session, prompt, len(prompt))
    (actual,) = run(session, [[(0, 1)]] * len(prompt), [prompt])
    assert (actual - expected).norm() / expected.norm() < 2e-6


def test_decoding_goes_on_after_chunks():
    session = session_of("portable", network_of("llama", "float32"))
    prompt, other = PROMPTS[0], PROMPTS[3]
    expected = [alone(session, tokens, 9)[-1] for tokens in (prompt[:11], other[:6])]
    run(session, [[(0, 4)], [(0, 6), (1, 5)]], [prompt[:10], other[:5]])
    actual = session.decode(torch.tensor([prompt[10], other[5]], dtype=torch.int32))
    for row, wanted in zip(actual, expected, strict=True):
        assert (row - wanted).norm() / wanted.norm() < 2e-6


def test_a_prompt_of_another_length_is_no_generation_step():
    """Qwen's base follows the chunk's prompt, as it does beside another sequence."""
    tokens, logits = PROMPTS[0], []
    for others in ([], [Chunk([1], 1, slot=1)]):
        session = session_of("portable", network_of("qwen beyond", "float32"))
        session.step([Chunk(tokens, 40)])
        logits.append(session.step([Chunk([7], 10, past=len(tokens)), *others])[0].clone())
    assert (logits[0] - logits[1]).norm() / logits[1].norm() < 2e-6


def test_biases_of_a_long_sequences_next_token_are_few():
    step = Step.of_chunks([Chunk([1], 4096, past=4095), Chunk([1, 2], 4000, past=4094, slot=1)])
    assert step.alibi(torch.tensor([4095, 4094, 4095]), torch.rand(8), 8, torch.float32).shape == (1, 8, 2, 4096)


def test_a_sequence_goes_back():
    """What follows an earlier position replaces what was there."""
    session = session_of("portable", network_of("llama", "float32"))
    prompt = PROMPTS[0]
    expected = alone(session, prompt, len(prompt))
    session.step([Chunk([*prompt[:10], 5, 6, 7], 13)])
    actual = session.step([Chunk(prompt[10:], len(prompt), past=10, all_logits=True)])
    assert (actual - expected[10:]).norm() / expected[10:].norm() < 2e-6
    assert session.lengths == [len(prompt)]


@pytest.mark.parametrize("kind", ["portable", "packed", "padded"])
def test_single_tokens_that_are_no_generation_step(kind):
    """Their slots are in another order than the batch's; or one goes back."""
    session = session_of(kind, network_of("llama", "float32"))
    a, b = PROMPTS[0][:8], PROMPTS[3][:5]
    for chunks, sequences in (
        ([Chunk([7], 5, past=5, slot=1), Chunk([8], 8, past=8)], ([*b, 7], [*a, 8])),
        ([Chunk([9], 8, past=8), Chunk([6], 5, past=6, slot=1)], ([*a, 9], [*b, 7, 6])),
    ):
        expected = [alone(session, tokens, len(tokens))[-1] for tokens in sequences]
        session.lengths, session.prompt_lengths = [], []
        session.step([Chunk(a, 8), Chunk(b, 5, slot=1)])
        if len(sequences[1]) == 7:
            session.step([Chunk([8], 8, past=8), Chunk([7], 5, past=5, slot=1)])
        for row, wanted in zip(session.step(chunks).clone(), expected, strict=True):
            assert (row - wanted).norm() / wanted.norm() < 2e-6


@kinds
def test_a_longer_chunk_beside_a_full_cache(kind):
    """Where keys are padded, as many as the other's would not fit behind what the cache holds, by one."""
    network, long = network_of("llama", "float32"), [*PROMPTS[2], *PROMPTS[3]][:48]
    expected = run(session_of("portable", network), [[(0, 40)], [(0, 8)]], [long])[0]
    session = session_of(kind, network)
    first, second = run(session, [[(0, 40)], [(0, 6)], [(0, 2), (1, 3)]], [long, long[:3]])
    assert (first - expected).norm() / expected.norm() < 2e-6
    assert (second - expected[:3]).norm() / expected[:3].norm() < 2e-6


@pytest.mark.parametrize(
    ("chunk", "message"),
    [
        (Chunk([1], 1, slot=4), "slot 4 is outside the engine's max_batch_size 4"),
        (Chunk([1], 9, past=6), "slot 0 holds 5 positions; tokens cannot follow 6"),
        (Chunk([1], 9, past=1, slot=1), "slot 1 holds 0 positions; tokens cannot follow 1"),
        (Chunk([], 5), "prompt 0 is empty"),
        (Chunk([1], 0, slot=1), "slot 1: a prompt of 0 tokens"),
        (Chunk([1] * 41, 41), "prompt 0 has 41 tokens, the engine's max_input_len is 40"),
        (Chunk([1] * 40, 49), "would have 49 positions; the engine's max_length is 48"),
        (Chunk([320], 1), "the token 320"),
    ],
)
def test_chunks_that_an_engine_cannot_take(chunk, message):
    session = session_of("portable", network_of("llama", "float32"))
    session.step([Chunk([1, 2, 3, 4, 5], 5)])
    with pytest.raises(UserError, match=message):
        session.step([chunk])
    assert session.lengths == [5]


def test_two_chunks_of_one_slot():
    session = session_of("portable", network_of("llama", "float32"))
    with pytest.raises(UserError, match=r"the slots \[0, 0\] of one step are not different sequences'"):
        session.step([Chunk([1], 2), Chunk([2], 2)])
