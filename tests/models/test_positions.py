"""ALiBi, log-n scaling and the first Qwen's NTK in whole models, against a decoder written out in float64."""

import math

import numpy as np
import pytest
import torch

from trtbuild.decoder.decoder import decoder
from trtbuild.decoder.mapping import Mapping
from trtbuild.engine.build import build_portable
from trtbuild.engine.config import BuildLimits
from trtbuild.engine.portable import PortableEngine
from trtbuild.errors import UserError
from trtbuild.models.families import config_from_hugging_face
from trtbuild.runtime.session import PortableSession
from trtbuild.tensors.lazy import from_tensor

TOLERANCE = {torch.float32: 2e-5, torch.float16: 1e-2, torch.bfloat16: 8e-2}  # norm of the difference over the norm
LIMITS = BuildLimits(max_batch_size=12, max_input_len=70, max_output_len=6)
NTK, LOGN = 16, 12
ALIBI = {"trtbuild": {"family": "baichuan", "position_embedding": "alibi"}}
QWEN = {"trtbuild": {"family": "qwen", "ntk_length": NTK, "logn_length": LOGN, "attention_out_bias": False}}
MODELS = {
    "alibi": ALIBI,
    "alibi, 3 heads": ALIBI | {"num_attention_heads": 3, "num_key_value_heads": 1},
    "alibi, 5 heads": ALIBI | {"num_attention_heads": 5, "num_key_value_heads": 5},
    "alibi, 12 heads in groups": ALIBI | {"num_attention_heads": 12, "num_key_value_heads": 4},
    "qwen": QWEN | {"attention_bias": True, "num_key_value_heads": 4},
    "ntk alone": {"trtbuild": {"family": "qwen", "ntk_length": NTK}},
    "log-n alone": {"trtbuild": {"family": "qwen", "logn_length": LOGN}},
}
# Prompts on both sides of 16, 32 and 64 for the NTK and of 12 for log-n.
LENGTHS = (1, 11, 12, 13, 15, 16, 17, 32, 33, 64, 65, 70)
STEPS = 4
models = pytest.mark.parametrize("name", MODELS)


@pytest.fixture(scope="module")
def made(tiny_config):
    """Configuration and float32 weights by model name. The weights make every part matter."""
    known = {}

    def make(name: str):
        if name not in known:
            config = config_from_hugging_face(tiny_config | {"vocab_size": 90} | MODELS[name], "test")
            random = torch.Generator().manual_seed(len(known))
            weights = {
                key: torch.randn(shape, generator=random) * (0.2 if "norm" in key else shape[-1] ** -0.5)
                + ("norm" in key)
                for key, shape in config.tensor_shapes().items()
            }
            known[name] = config, weights
        return known[name]

    return make


def formula(config, weights, tokens: list[int], prompt_length: int) -> np.ndarray:
    """Logits of every token of one sequence, whose first `prompt_length` were its prompt."""
    w = {name: value.double().numpy() for name, value in weights.items()}
    n, dim, half = len(tokens), config.head_dim, config.head_dim // 2
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    positions, x = np.arange(n), w["model.embed_tokens.weight"][tokens]
    if config.rope:
        doublings = 0
        while config.rope.type == "qwen" and prompt_length > NTK * 2**doublings:
            doublings += 1
        base = config.rope.theta * (2 ** (doublings + 1) - 1) ** (dim / (dim - 2))
        angles = positions[:, None] * base ** (-2 * np.arange(half) / dim)

    def norm(x, name):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + config.rms_norm_eps) * w[f"{name}.weight"]

    def project(x, name):
        return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0)

    def rotate(x):
        first, second, cos, sin = x[:, :half], x[:, half:], np.cos(angles), np.sin(angles)
        return np.concatenate((first * cos - second * sin, second * cos + first * sin), 1)

    for i in range(config.num_hidden_layers):
        layer = f"model.layers.{i}"
        normed, mixed = norm(x, f"{layer}.input_layernorm"), []
        q, k, v = (project(normed, f"{layer}.self_attn.{kind}_proj") for kind in "qkv")
        for h in range(heads):
            g = h // (heads // kv_heads)
            query, key, value = (y[:, j * dim : (j + 1) * dim] for y, j in ((q, h), (k, g), (v, g)))
            if config.rope:
                query, key = rotate(query), rotate(key)
            if config.logn_length:
                query = query * [[max(1, math.log(p + 1, LOGN))] for p in range(n)]
            scores = query @ key.T / math.sqrt(dim)
            if not config.rope:
                scores += slope(h, heads) * (positions - positions[:, None])
            scores[positions > positions[:, None]] = -np.inf
            exponentials = np.exp(scores - scores.max(1, keepdims=True))
            mixed.append(exponentials @ value / exponentials.sum(1, keepdims=True))
        x = x + project(np.concatenate(mixed, 1), f"{layer}.self_attn.o_proj")
        normed = norm(x, f"{layer}.post_attention_layernorm")
        gate, up = (project(normed, f"{layer}.mlp.{kind}_proj") for kind in ("gate", "up"))
        x = x + project(gate / (1 + np.exp(-gate)) * up, f"{layer}.mlp.down_proj")
    return norm(x, "model.norm") @ w["lm_head.weight"].T


def slope(h: int, heads: int) -> float:
    below = 2 ** int(math.log2(heads))
    return 2 ** (-8 * (h + 1) / below) if h < below else 2 ** (-8 * (2 * (h - below) + 1) / (2 * below))


def session(kind: str, made, dtype: torch.dtype = torch.float32, limits: BuildLimits = LIMITS):
    config, weights = made
    network = decoder(config, lambda name: from_tensor(weights[name]), dtype, limits.max_length)
    if kind == "portable":
        return PortableSession(PortableEngine(network, limits, torch.device("cpu")))
    pytest.importorskip("tensorrt_rtx")
    from trtbuild.runtime.lowered_session import InterpretedSession

    return InterpretedSession(network, limits, kind == "packed")


def random_sequences() -> list[list[int]]:
    """Prompts of `LENGTHS`, each with the tokens that follow it."""
    return [torch.randint(90, (n + STEPS,)).tolist() for n in LENGTHS]


def run(session, sequences: list[list[int]]) -> list[torch.Tensor]:
    """The logits of every token of every sequence; the last `STEPS` are decoded."""
    prompts = [sequence[:-STEPS] for sequence in sequences]
    rows = [[x] for x in session.prefill(prompts, True).split([len(prompt) for prompt in prompts])]
    for i in range(-STEPS, 0):
        logits = session.decode(torch.tensor([sequence[i] for sequence in sequences], dtype=torch.int32)).clone()
        for row, logit in zip(rows, logits, strict=True):
            row.append(logit[None])
    return [torch.cat(row) for row in rows]


def check(logits: list[torch.Tensor], made, sequences: list[list[int]], dtype: torch.dtype) -> None:
    """Every sequence, its prompt and each decoded token by itself."""
    for actual, sequence in zip(logits, sequences, strict=True):
        expected = formula(*made, sequence, len(sequence) - STEPS)
        parts = [slice(0, -STEPS), *(slice(n - 1, n) for n in range(len(sequence) - STEPS + 1, len(sequence) + 1))]
        for part in parts:
            difference = np.linalg.norm(actual[part].double().numpy() - expected[part])
            assert difference < TOLERANCE[dtype] * np.linalg.norm(expected[part])


@models
@pytest.mark.parametrize("kind", ["portable", "packed", "padded"])
def test_logits(made, kind, name):
    sequences = random_sequences()
    tested = session(kind, made(name))
    for _ in range(2 if kind == "portable" else 1):  # the second run finds the caches and buffers used
        check(run(tested, sequences), made(name), sequences, torch.float32)
        sequences = sequences[::-1]


@pytest.mark.parametrize("name", ["alibi", "alibi, 5 heads", "qwen"])
@pytest.mark.parametrize("kind", ["portable", "packed"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_logits_in_16_bits(made, dtype, kind, name):
    config, weights = made(name)
    rounded = config, {key: value.to(dtype) for key, value in weights.items()}
    sequences = random_sequences()
    check(run(session(kind, rounded, dtype), sequences), rounded, sequences, dtype)


@models
def test_a_neighbour_does_not_change_a_sequence(made, name):
    """Alone and beside ones that are shorter and longer than every limit."""
    sequences, tested = random_sequences(), session("portable", made(name))
    together = run(tested, sequences)
    for sequence, expected in zip(sequences, together, strict=True):
        (alone,) = run(tested, [sequence])
        assert (alone - expected).norm() < 1e-5 * expected.norm()


def test_the_base_stays_while_a_sequence_grows(made):
    """A prompt of 16 keeps its frequencies past 16; a prompt that is one longer has others from the start."""
    tested, sequence = session("portable", made("ntk alone")), random_sequences()[-1]
    grown, other = run(tested, [sequence[:20]])[0], tested.prefill([sequence[:17]], True)
    assert (grown[:16] - other[:16]).norm() > 0.01 * grown[:16].norm()


@pytest.mark.parametrize(
    ("length", "parts"), [(LOGN, []), (LOGN + 1, ["LogN"]), (NTK, ["LogN"]), (NTK + 1, ["LogN", "PromptNtk"])]
)
def test_what_short_sequences_do_not_need_is_left_out(made, length, parts):
    config, weights = made("qwen")
    network = decoder(config, lambda name: from_tensor(weights[name]), torch.float32, length)
    kinds = {type(node.op).__name__ for node in network.nodes}
    assert kinds & {"LogN", "PromptNtk"} == {*parts}
    assert ("prompt_lengths" in network.inputs) == ("PromptNtk" in parts)


def test_slopes_are_one_constant_of_all_layers(made):
    config, weights = made("alibi")
    network = decoder(config, lambda name: from_tensor(weights[name]), torch.float16, 32)
    readers = [node for node in network.nodes if "alibi.slopes" in node.inputs.values()]
    assert [type(node.op).__name__ for node in readers] == ["Attention"] * config.num_hidden_layers
    assert network.tensors["alibi.slopes"].dtype == torch.float32
    assert "RotaryEmbedding" not in {type(node.op).__name__ for node in network.nodes}
    assert type(network).from_json(network.to_json(), network.constants).to_json() == network.to_json()


@pytest.mark.parametrize(
    ("change", "positions"),
    [
        ({}, 256),
        ({"rope_scaling": {"rope_type": "linear", "factor": 4.0}}, 1024),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}}, math.inf),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1, "high_freq_factor": 4}}, 256),
        ({"trtbuild": {"family": "qwen", "ntk_length": 64}}, math.inf),
        ({"trtbuild": {"family": "baichuan", "position_embedding": "alibi"}}, math.inf),
    ],
)
def test_positions_that_a_model_was_made_for(tiny_config, change, positions):
    assert config_from_hugging_face(tiny_config | change, "x").positions == positions


def test_an_engine_of_more_positions_is_refused(tiny_checkpoint, tmp_path):
    """256 of them; asked for by name, they are extrapolated."""
    build = lambda length, **options: build_portable(
        tiny_checkpoint, tmp_path / "x", torch.float32, BuildLimits(1, length, 6), Mapping(), **options
    )
    build(250)
    message = (
        r"max_input_len 251 and max_output_len 6 are more than the 256 positions that the model was made for "
        r"\(max_position_embeddings\); take less, or give extrapolate_positions \(--extrapolate-positions\)"
    )
    (tmp_path / "x").unlink()
    with pytest.raises(UserError, match=message):
        build(251)
    assert not (tmp_path / "x").exists()
    build(251, extrapolate_positions=True)
