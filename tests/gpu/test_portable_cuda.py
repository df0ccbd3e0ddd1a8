"""The portable engine on CUDA. Run by hand: `pytest -m gpu tests/gpu`."""

from pathlib import Path

import pytest
import torch

from trtbuild.checkpoint.canonical import Checkpoint
from trtbuild.checkpoint.dummy import dummy_tensors
from trtbuild.decoder.decoder import decoder
from trtbuild.engine import portable
from trtbuild.engine.config import BuildLimits
from trtbuild.engine.memory import captured_memory
from trtbuild.engine.portable import PortableEngine
from trtbuild.errors import UserError
from trtbuild.models.families import config_from_hugging_face
from trtbuild.network.step import Chunk, Step
from trtbuild.runtime import session as runtime
from trtbuild.runtime.generation import generate
from trtbuild.runtime.in_flight import InFlight, schedule
from trtbuild.runtime.sampling import SamplingParams
from trtbuild.runtime.scheduler import Sequence
from trtbuild.runtime.session import PortableSession
from trtbuild.tensors.lazy import from_tensor

pytestmark = pytest.mark.gpu

LIMITS = BuildLimits(max_batch_size=4, max_input_len=300, max_output_len=300)
PROMPTS = [list(range(2, 2 + n)) for n in (5, 1, 250, 93)]  # the third crosses a graph's bound of 256


ALIBI = {"family": "baichuan", "position_embedding": "alibi"}
QWEN = {"family": "qwen", "ntk_length": 32, "logn_length": 32}


@pytest.fixture(
    scope="module",
    params=[
        {},
        {"num_key_value_heads": 4},
        {"rope_scaling": {"type": "dynamic", "factor": 2}},
        {"trtbuild": ALIBI},
        {"trtbuild": ALIBI, "num_attention_heads": 5, "num_key_value_heads": 5},
        {"trtbuild": QWEN},
    ],
    ids=str,
)
def model(request, tiny_config):
    config = config_from_hugging_face(tiny_config | request.param, "test")
    return config, dummy_tensors(config, 3, torch.float32)


def session(model, dtype: torch.dtype, device: str) -> PortableSession:
    config, weights = model
    network = decoder(config, weights.__getitem__, dtype, LIMITS.max_length)
    return PortableSession(PortableEngine(network, LIMITS, torch.device(device)))


SAMPLING = {
    "greedy": {},
    "penalty": {"repetition_penalty": 1.3},
    "drawn": {"temperature": 0.8, "seed": 5},
    "filtered": {"temperature": 1.2, "top_k": 50, "top_p": 0.9, "repetition_penalty": 1.1, "seed": 2**40},
}


@pytest.mark.parametrize("sampling", SAMPLING)
def test_float32_tokens_equal_the_cpus(model, sampling):
    params = SamplingParams(max_output_len=40, **SAMPLING[sampling])
    cpu, cuda = (generate(session(model, torch.float32, device), PROMPTS, params) for device in ("cpu", "cuda"))
    assert [output.output_ids for output in cpu] == [output.output_ids for output in cuda]


def test_float32_tokens_of_a_batch_of_one_equal_the_cpus(model):
    """Without kernels, over a cache in which a longer prompt has been: attention stops at the sequence's end."""
    params = SamplingParams(max_output_len=40)
    both = [session(model, torch.float32, device) for device in ("cpu", "cuda")]
    for prompt in sorted(PROMPTS, key=len, reverse=True):
        cpu, cuda = (generate(own, [prompt], params) for own in both)
        assert cpu[0].output_ids == cuda[0].output_ids


MANY = [PROMPTS[i % 4][: 1 + 37 * i % 250] for i in range(21)]  # some are the same


@pytest.mark.parametrize("sampling", SAMPLING)
def test_float32_tokens_in_flight_equal_the_cpus(model, sampling):
    """More prompts than a batch has, two of whose tokens end a sequence."""
    cpu = session(model, torch.float32, "cpu")
    ends = tuple(output.output_ids[7] for output in generate(cpu, MANY[:2], SamplingParams(8)))
    params = SamplingParams(max_output_len=40, eos_token_ids=ends, **SAMPLING[sampling])
    assert generate(session(model, torch.float32, "cuda"), MANY, params) == generate(cpu, MANY, params)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_in_flight_equals_one_prompt_at_a_time(model, dtype):
    """In 16 bits kernels and products for other numbers of rows round otherwise: most tokens are the same."""
    tested = session(model, dtype, "cuda")
    params = SamplingParams(max_output_len=40)
    many = generate(tested, MANY, params)
    assert many == generate(tested, MANY, params)
    alone = [generate(tested, [prompt], params)[0] for prompt in MANY]
    pairs = [pair for a, b in zip(many, alone, strict=True) for pair in zip(a.output_ids, b.output_ids, strict=True)]
    assert sum(a == b for a, b in pairs) > 0.6 * len(pairs)
    assert sum(a.output_ids[0] == b.output_ids[0] for a, b in zip(many, alone, strict=True)) > 0.9 * len(MANY)


class Watched(InFlight):
    """Launches nothing that waits for the device."""

    def _launch(self):
        torch.cuda.set_sync_debug_mode("error")
        try:
            return super()._launch()
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_steps_in_flight_are_launched_without_waiting(model):
    tested = session(model, torch.float16, "cuda")
    lengths = [5 + 3 * i % 30 for i in range(len(MANY))]
    counts = []
    for kind in (InFlight, InFlight, Watched):  # the first ones capture
        sequences = [Sequence(i, prompt, n) for i, (prompt, n) in enumerate(zip(MANY, lengths, strict=True))]
        drawn = [0] * len(MANY)

        def take(sequence: Sequence, token: int) -> bool:
            drawn[sequence.index] += 1  # noqa: B023
            return drawn[sequence.index] == sequence.max_output_len  # noqa: B023

        params = SamplingParams(40)
        kind(tested, schedule(tested, sequences, params), params, take).run()
        counts.append(drawn)
    assert counts == [lengths] * 3
    assert {key[:2] for key in tested._graphs if "chunks" in key} == {("pages", "chunks")}


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float16, 1e-2), (torch.bfloat16, 6e-2)])
def test_logits_of_both_phases(model, dtype, tolerance):
    """Relative error against the float32 engine on the CPU, prefill and decode, tokens forced to be the same."""
    reference, tested = session(model, torch.float32, "cpu"), session(model, dtype, "cuda")
    pairs = [(reference.prefill(PROMPTS), tested.prefill(PROMPTS).clone())]
    for _ in range(12):
        tokens = pairs[-1][0].argmax(-1).int()
        pairs.append((reference.decode(tokens), tested.decode(tokens.cuda()).clone()))
    for expected, actual in pairs:
        assert (actual.cpu() - expected).norm() / expected.norm() < tolerance


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float16, 1e-2), (torch.bfloat16, 6e-2)])
def test_prompts_in_chunks(model, dtype, tolerance):
    """Beside continuations, and generation steps afterwards, against the float32 engine on the CPU."""
    reference, tested = session(model, torch.float32, "cpu"), session(model, dtype, "cuda")
    prompts = [prompt for prompt in PROMPTS if len(prompt) > 50]
    done, total = [0, 0], 0
    while total < sum(map(len, prompts)):
        chunks = [
            Chunk(prompt[start : start + size], len(prompt), start, slot)
            for slot, (prompt, start, size) in enumerate(zip(prompts, done, (64, 17), strict=True))
            if start < len(prompt)
        ]
        logits = tested.step(chunks).clone()
        for chunk in chunks:
            done[chunk.slot] = chunk.end
        total = sum(done)
    expected = reference.prefill(prompts)
    last = {chunk.slot: row for chunk, row in zip(chunks, logits.cpu(), strict=True)}
    pairs = [(expected[slot], row) for slot, row in last.items()]
    for _ in range(3):
        tokens = expected.argmax(-1).int()
        expected = reference.decode(tokens)
        pairs.append((expected, tested.decode(tokens.cuda()).cpu()))
    for wanted, actual in pairs:
        assert (actual - wanted).norm() / wanted.norm() < tolerance


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float16, 5e-3), (torch.bfloat16, 4e-2)])
def test_fused_equals_unfused(model, dtype, tolerance, monkeypatch):
    """Logits of a prompt's step and of captured ones, with the same kernels for all else."""
    fused = session(model, dtype, "cuda")
    monkeypatch.setattr(portable, "fuse", lambda network, rules: network)
    unfused = session(model, dtype, "cuda")
    pairs = [(unfused.prefill(PROMPTS).clone(), fused.prefill(PROMPTS).clone())]
    for _ in range(4):
        tokens = pairs[-1][0].argmax(-1).int()
        pairs.append((unfused.decode(tokens).clone(), fused.decode(tokens).clone()))
    for expected, actual in pairs:
        assert (actual - expected).norm() / expected.norm() < tolerance


@torch.inference_mode()
def test_a_replayed_graph_equals_the_eager_step(model):
    tested = session(model, torch.float16, "cuda")
    tokens = tested.prefill(PROMPTS).argmax(-1).int()
    graph = tested.decode(tokens).clone()
    again = session(model, torch.float16, "cuda")
    again.prefill(PROMPTS)
    state = again._decode_state
    state["input_ids"].copy_(tokens)
    eager = again.engine.run(Step.generation(again._slots[: len(PROMPTS)], 256), state)
    assert torch.equal(graph, eager)


def test_short_prompts_are_replayed(model, monkeypatch):
    """Steps of chunks, padded and not yet captured, and then captured, equal those as they are."""
    tested, short = session(model, torch.float16, "cuda"), [PROMPTS[0], PROMPTS[3]]
    batches = [short, [PROMPTS[3]], [prompt[::-1] for prompt in short], short[::-1]]
    first, *others = [tested.prefill(prompts).clone() for prompts in batches]
    assert len(tested._graphs) == 1
    continued = tested.step([Chunk([3, 4, 5], 93, past=50, slot=0)]).clone()
    monkeypatch.setattr(runtime, "CAPTURED_ROWS", ())
    plain = session(model, torch.float16, "cuda")
    expected = [plain.prefill(prompts).clone() for prompts in batches]
    expected.append(plain.step([Chunk([3, 4, 5], 93, past=50, slot=0)]).clone())
    for actual, wanted in zip((first, *others, continued), expected, strict=True):
        assert (actual - wanted).norm() / wanted.norm() < 5e-3
    assert not plain._graphs


def test_graphs_used_last_are_kept(model, monkeypatch):
    monkeypatch.setattr(runtime, "MAX_GRAPHS", 2)
    tested = session(model, torch.float16, "cuda")
    prompts = [[7] * n for n in (3, 20, 40, 3, 20, 40)]
    first, again = ([tested.prefill([prompt]).clone() for prompt in prompts] for _ in range(2))
    assert [key[2] for key in tested._graphs] == [32, 64]
    for expected, actual in zip(first, again, strict=True):
        assert torch.equal(actual, expected)


def test_long_prompts_go_in_pieces(model, monkeypatch):
    tested = session(model, torch.float16, "cuda")
    wanted = tested.prefill(PROMPTS).clone()
    monkeypatch.setattr(runtime, "LAUNCHED_ROWS", 100)
    actual = tested.prefill(PROMPTS).clone()
    assert (actual - wanted).norm() / wanted.norm() < 5e-3


def test_captured_steps_have_one_piece_of_memory(tiny_config):
    """However many sequences they are of, in whatever order: not one of its own for each that is larger than others."""
    limits = BuildLimits(2, 64, 64)
    config = config_from_hugging_face(tiny_config | {"vocab_size": 65536}, "test")
    weights = dummy_tensors(config, 3, torch.float16)
    network = decoder(config, weights.__getitem__, torch.float16, limits.max_length)
    tested = PortableSession(PortableEngine(network, limits, torch.device("cuda")))
    counts = [*range(16, 257, 16)]
    prompts = [[1 + i % 50] * (3 + i % 5) for i in range(counts[-1])]
    found = {}
    for count in (256, *counts, *counts[::-1]):  # the first has pages for all others
        outputs = [output.output_ids for output in generate(tested, prompts[:count], SamplingParams(8))]
        assert found.setdefault(count, outputs) == outputs
    piece = captured_memory(network, 256)
    own = tested._memory[0].pool()
    sizes = [x["total_size"] for x in torch.cuda.memory_snapshot() if tuple(x["segment_pool_id"]) == tuple(own)]
    assert max(sizes) >= piece > 256 * 65536 * 6
    assert sum(sizes) - max(sizes) < piece / 2  # cuBLAS's work space, and small tensors; logits alone would be 6 pieces


def test_a_replayed_prompt_never_waits_for_the_host(model):
    tested = session(model, torch.float16, "cuda")
    for _ in range(2):
        tested.prefill(PROMPTS[:2])  # captures
    torch.cuda.set_sync_debug_mode("error")
    try:
        logits = tested.prefill(PROMPTS[:2])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert logits.isfinite().all()


def test_where_numbers_end_to_be_finite(model):
    """The search runs the operations, which fused kernels hide."""
    config, weights = model
    name = "model.layers.1.mlp.down_proj"
    damaged = dict(weights)
    for part, factor in (("up", 1e3), ("down", 1e5)):
        weight = f"model.layers.1.mlp.{part}_proj.weight"
        damaged[weight] = from_tensor(weights[weight].load() * factor)
    tested = session((config, damaged), torch.float16, "cuda")
    with pytest.raises(UserError, match=f"^numbers are not finite in layer 1, from {name} on; float16 ends at 65504"):
        tested.check_finite(PROMPTS, tested.prefill(PROMPTS))


def test_an_engine_that_does_not_fit(model):
    config, weights = model
    limits = BuildLimits(1 << 20, 1 << 12, 300)
    network = decoder(config, weights.__getitem__, torch.float16, limits.max_length)
    with pytest.raises(UserError, match=r"^the engine needs .* GB of GPU memory .* with --max-batch-size \d+$"):
        PortableEngine(network, limits, torch.device("cuda"))


def test_generation_steps_never_wait_for_the_host(model):
    tested = session(model, torch.float16, "cuda")
    tokens = tested.prefill(PROMPTS).argmax(-1).int()
    tested.decode(tokens)  # captures
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(4):
            tokens = tested.decode(tokens).argmax(-1).int()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert tokens.shape == (4,)


def test_sampling_is_reproducible(model):
    params = SamplingParams(max_output_len=20, temperature=0.8, top_k=40, top_p=0.9, seed=5)
    runs = [generate(session(model, torch.float16, "cuda"), PROMPTS, params) for _ in range(2)]
    assert [o.output_ids for o in runs[0]] == [o.output_ids for o in runs[1]]


def test_logits_of_a_model_quantized_by_act_order():
    """GPTQModel's own file, float16, prefill and decode, against float32 on the CPU."""
    checkpoint = Checkpoint(Path(__file__).parents[1] / "data" / "gptqmodel-act-order")
    model, prompts = (checkpoint.config, checkpoint), [list(range(2, 2 + n)) for n in (5, 1, 90)]
    reference, tested = session(model, torch.float32, "cpu"), session(model, torch.float16, "cuda")
    pairs = [(reference.prefill(prompts), tested.prefill(prompts).clone())]
    for _ in range(8):
        tokens = pairs[-1][0].argmax(-1).int()
        pairs.append((reference.decode(tokens), tested.decode(tokens.cuda()).clone()))
    for expected, actual in pairs:
        assert (actual.cpu() - expected).norm() / expected.norm() < 5e-3
