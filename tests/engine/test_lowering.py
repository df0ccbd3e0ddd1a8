"""What TensorRT is asked to compile, run by the interpreter: every operation, whole decoders, real engines."""

from importlib import metadata
from itertools import accumulate

import pytest
import torch
from numerics import run_reference, step_logits

pytest.importorskip("tensorrt_rtx")

from trtbuild.decoder.decoder import CacheScales, decoder
from trtbuild.engine import tensorrt_api
from trtbuild.engine.build import build_engine_dir
from trtbuild.engine.config import BuildLimits
from trtbuild.engine.interpreter import Interpreter
from trtbuild.engine.portable import PortableEngine, read_portable
from trtbuild.engine.tensorrt import LoweredNetwork, lowered_shapes, profile_shapes
from trtbuild.errors import UserError
from trtbuild.linear.dense import DenseLinear
from trtbuild.models.alibi import alibi_slopes
from trtbuild.models.families import config_from_hugging_face
from trtbuild.network import Network, ops
from trtbuild.network.step import STEP_INPUTS, step_tensors, whole_prompts
from trtbuild.runtime.lowered_session import InterpretedSession, lowered_inputs
from trtbuild.runtime.open import open_engine
from trtbuild.runtime.session import PortableSession
from trtbuild.tensors.lazy import from_tensor
from trtbuild.tensors.rounding import scale_for

# Norm of the difference over the norm. TensorRT's fused layers and the reference round at different places.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
dtypes = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
layouts = pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
MAX_LENGTH = 24


def error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype
    if expected.numel() == 0 or not expected.any():
        return float(actual.any())
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()


# One operation


def tokens_by(network: Network, width: int, dtype: torch.dtype):
    return network.input("x", dtype, ("tokens", width))


def weight(network: Network, *shape: int, dtype: torch.dtype):
    return network.constant("w", from_tensor(torch.randn(shape).to(dtype)))


def dense(network, dtype, bias):
    b = network.constant("b", from_tensor(torch.randn(40).to(dtype))) if bias else None
    x, w = tokens_by(network, 48, dtype), weight(network, 40, 48, dtype=dtype)
    return network.add(DenseLinear(), x=x, weight=w, bias=b)


def rotary(network, dtype, *dynamic):
    frequencies = network.constant("f", from_tensor(1e4 ** (-torch.arange(0, 16, 2) / 16)))
    lengths = (network.input("sequence_lengths", torch.int32, ("tokens",)),) if dynamic else ()
    return ops.rotary_embedding(
        network.input("position_ids", torch.int32, ("tokens",)), frequencies, dtype, *lengths, *dynamic
    )


def by_prompt(network):
    """Rows for prompts of up to 2, 4, 8 and 16 tokens."""
    table = network.constant("table", from_tensor(torch.rand(4, 8)))
    return ops.prompt_ntk(table, network.input("prompt_lengths", torch.int32, ("tokens",)), 2)


def attention(network, dtype, heads, kv_heads, dim, alibi=False, logn=False):
    cache = {
        f"{x}_cache": network.input(f"{x}_cache.0", dtype, ("batch", kv_heads, MAX_LENGTH, dim))
        for x in ("key", "value")
    }
    integers = [
        network.input(name, torch.int32, (size,))
        for name, size in (("position_ids", "tokens"), ("query_starts", "starts"), ("past_lengths", "batch"))
    ]
    frequencies = network.constant("f", from_tensor(1e3 ** (-torch.arange(0, dim, 2) / dim)))
    slopes = network.constant("alibi.slopes", from_tensor(alibi_slopes(heads))) if alibi else None
    x = tokens_by(network, (heads + 2 * kv_heads) * dim, dtype)
    if alibi:
        q, k, v = ops.split_heads(x, heads, kv_heads, dim)
    else:
        q, k, v = ops.rotate(x, *ops.rotary_embedding(integers[0], frequencies, dtype), heads, kv_heads, dim)
    if logn:
        q = ops.scale_tokens(q, ops.log_n(integers[0], 3, dtype))
    return ops.attention(q, k, v, *integers, **cache, slopes=slopes)


CASES = {
    "embedding": lambda n, d: ops.embedding(n.tensors["input_ids"], weight(n, 50, 16, dtype=d)),
    "add": lambda n, d: ops.add(tokens_by(n, 16, d), n.input("y", d, ("tokens", 16))),
    "cast": lambda n, d: ops.cast(tokens_by(n, 16, torch.float16 if d == torch.float32 else torch.float32), d),
    "rms_norm": lambda n, d: ops.rms_norm(tokens_by(n, 48, d), weight(n, 48, dtype=d), 1e-5),
    "swiglu": lambda n, d: ops.swiglu(tokens_by(n, 2 * 24, d)),
    "select_rows": lambda n, d: ops.select_rows(tokens_by(n, 16, d), n.input("logits_indices", torch.int32, ("rows",))),
    "linear": lambda n, d: dense(n, d, bias=False),
    "linear with bias": lambda n, d: dense(n, d, bias=True),
    "rotary": rotary,
    "dynamic rotary": lambda n, d: rotary(n, d, 4.0, 8),
    "log n": lambda n, d: ops.log_n(n.input("position_ids", torch.int32, ("tokens",)), 5, d),
    "prompt ntk": lambda n, d: by_prompt(n),
    "prompt ntk rotary": lambda n, d: ops.rotary_embedding(
        n.input("position_ids", torch.int32, ("tokens",)), by_prompt(n), d
    ),
    "attention": lambda n, d: attention(n, d, 4, 4, 16),
    "attention in groups": lambda n, d: attention(n, d, 6, 2, 8),
    "attention with log-n": lambda n, d: attention(n, d, 6, 2, 8, logn=True),
    "attention with biases": lambda n, d: attention(n, d, 5, 5, 8, alibi=True),
    "attention with biases and log-n, in groups": lambda n, d: attention(n, d, 6, 2, 8, alibi=True, logn=True),
}
# Lengths of this step's tokens, and of what the caches hold before it.
BATCHES = [
    ((1,), (0,)),
    ((9,), (0,)),
    ((5, 1, 8), (0, 0, 0)),
    ((4, 4), (0, 0)),
    ((1, 1, 1), (12, 0, 5)),
    ((3, 6), (10, 2)),
]


def random_inputs(network: Network, lengths, past) -> dict[str, torch.Tensor]:
    """The network's inputs, packed: the step's own, noise for the rest."""
    shift = torch.tensor(past, dtype=torch.int32).repeat_interleave(torch.tensor(lengths))
    inputs = step_tensors(whole_prompts([torch.randint(50, (n,)).tolist() for n in lengths]), STEP_INPUTS)
    inputs |= {name: inputs[name] + shift for name in ("position_ids", "sequence_lengths")}
    inputs["past_lengths"] = torch.tensor(past, dtype=torch.int32)
    sizes = {"tokens": sum(lengths), "batch": len(lengths)}
    for name in network.inputs:
        if name not in inputs:
            shape = [sizes.get(n, n) for n in network.tensors[name].shape]
            inputs[name] = torch.randn(shape).to(network.tensors[name].dtype)
    return inputs


def run_lowered(interpreter, network, inputs, lengths, packed) -> dict[str, torch.Tensor]:
    """The interpreter's outputs, packed again where the layout is padded."""
    layout = lowered_inputs(whole_prompts([[0] * n for n in lengths]), packed)
    given = {name: layout[name] for name in ("pad_index", "unpad_index", "logits_indices")}
    given |= {"kv_lengths": inputs["past_lengths"] + torch.tensor(lengths, dtype=torch.int32)}
    for name in network.inputs:
        by_token = network.tensors[name].shape[0] == "tokens"
        padded = inputs[name][given["pad_index"]] if by_token and not packed else inputs[name]
        given.setdefault(name, padded.flatten(0, 1) if name in ("x", "y") and not packed else padded)
    outputs = interpreter.run(given)
    unpadded = {n for n in network.outputs if network.tensors[n].shape[0] == "tokens" and not packed}
    return {name: value[given["unpad_index"]] if name in unpadded else value for name, value in outputs.items()}


@layouts
@dtypes
@pytest.mark.parametrize("case", CASES)
def test_operation(case, dtype, packed):
    """Lowered, a one-operation network computes what `reference` does, for every batch of `BATCHES`."""
    network = Network()
    network.input("input_ids", torch.int32, ("tokens",))
    results = CASES[case](network, dtype)
    for i, result in enumerate(results if isinstance(results, tuple) else (results,)):
        network.mark_output(result, f"result{i}")
    interpreter = Interpreter(LoweredNetwork(network, packed))
    for lengths, past in BATCHES:
        inputs = random_inputs(network, lengths, past)
        expected = run_reference(network, inputs)
        results = run_lowered(interpreter, network, inputs, lengths, packed)
        for name, value in expected.items():
            if network.tensors[name].shape[0] != "batch":
                assert error(results[name], value) < TOLERANCE[dtype]
                continue
            for b, (n, p) in enumerate(zip(lengths, past, strict=True)):  # a cache; beyond its end it holds padding
                assert error(results[name][b, :, : p + n], value[b, :, : p + n]) < TOLERANCE[dtype]


# The tiny decoder

LIMITS = BuildLimits(max_batch_size=3, max_input_len=24, max_output_len=8)
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 16}
POSITIONS = {
    "default": {},
    "linear": {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    "dynamic": {"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}},
    "llama3": {"rope_scaling": LLAMA3},
    "alibi": {"trtbuild": {"family": "baichuan", "position_embedding": "alibi"}},
    "qwen": {"trtbuild": {"family": "qwen", "ntk_length": 7, "logn_length": 9}},
}


def random_decoder(config: dict, dtype: torch.dtype, cache_dtype: torch.dtype | None = None) -> Network:
    """Weights that make every part matter: unit-scale activations, norms away from 1, biases away from 0."""
    model = config_from_hugging_face(config, "test")
    shapes = model.tensor_shapes()
    weights = {
        name: 1 + 0.2 * torch.randn(shape) if "norm" in name else torch.randn(shape) * shape[-1] ** -0.5
        for name, shape in shapes.items()
    }
    cache = None
    if cache_dtype:
        scales = scale_for(torch.full((model.num_hidden_layers, model.num_key_value_heads), 6.0), cache_dtype)
        cache = CacheScales(cache_dtype, scales, 0.5 * scales)
    return decoder(model, lambda name: from_tensor(weights[name]), dtype, LIMITS.max_length, cache)


@layouts
@pytest.mark.parametrize("positions", POSITIONS)
@pytest.mark.parametrize("lengths", [(1,), (24,), (7, 1, 20)], ids=str)
def test_decoder(tiny_config, positions, lengths, packed):
    """Prefill and four decode steps: the definition computes what the portable engine does, to 1e-5 in float32.

    With 16 positions, `dynamic` is beyond its limit for some sequences and reaches it while decoding for others; so is
    `qwen` with 7, whose frequencies then stay, and log-n with 9.
    """
    config = tiny_config | {"attention_bias": True, "max_position_embeddings": 16} | POSITIONS[positions]
    network = random_decoder(config, torch.float32)
    prompts = [torch.randint(320, (n,)).tolist() for n in lengths]
    new_tokens = torch.randint(320, (4, len(lengths)), dtype=torch.int32)
    portable = PortableSession(PortableEngine(network, LIMITS, torch.device("cpu")))
    interpreted = InterpretedSession(network, LIMITS, packed)
    for all_logits in (True, False):  # the second run also finds the caches used
        expected = step_logits(portable, prompts, new_tokens, all_logits)
        assert error(step_logits(interpreted, prompts, new_tokens, all_logits), expected) < 1e-5


@layouts
@pytest.mark.parametrize("positions", ["default", "alibi", "qwen"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 4e-3), (torch.bfloat16, 3e-2)], ids=str)
def test_decoder_in_16_bits(tiny_config, dtype, tolerance, positions, packed):
    torch.manual_seed(0)
    network = random_decoder(tiny_config | POSITIONS[positions], dtype)
    prompts = [torch.randint(320, (n,)).tolist() for n in (7, 1, 20)]
    new_tokens = torch.randint(320, (4, 3), dtype=torch.int32)
    portable = PortableSession(PortableEngine(network, LIMITS, torch.device("cpu")))
    expected = step_logits(portable, prompts, new_tokens, True)
    results = step_logits(InterpretedSession(network, LIMITS, packed), prompts, new_tokens, True)
    assert error(results, expected) < tolerance


@layouts
@pytest.mark.parametrize("positions", ["alibi", "qwen"])
@pytest.mark.parametrize("cache_dtype", [torch.int8, torch.float8_e4m3fn], ids=str)
def test_decoder_with_a_cache_of_8_bits(tiny_config, cache_dtype, positions, packed):
    torch.manual_seed(0)  # a number between two steps of a cache may be rounded either way
    network = random_decoder(tiny_config | POSITIONS[positions], torch.float32, cache_dtype)
    prompts = [torch.randint(320, (n,)).tolist() for n in (7, 1, 20)]
    new_tokens = torch.randint(320, (4, 3), dtype=torch.int32)
    portable = PortableSession(PortableEngine(network, LIMITS, torch.device("cpu")))
    interpreted = InterpretedSession(network, LIMITS, packed)
    for _ in range(2):  # the second run finds the caches used
        expected = step_logits(portable, prompts, new_tokens)
        assert error(step_logits(interpreted, prompts, new_tokens), expected) < 1e-3


def test_biases_are_finite_where_masked(tiny_config):
    """A score added to them does not overflow, and a block of them alone is not NaN after the softmax."""
    network = random_decoder(tiny_config | POSITIONS["alibi"], torch.float16)
    buffers = LoweredNetwork(network, True).lowering.buffers.values()
    scalars = [x.item() for x in buffers if x.dtype == torch.float16 and x.shape == (1, 1, 1, 1)]
    assert min(scalars) == torch.finfo(torch.float16).min / 2


def test_interpreted_runtime_of_an_engine_folder(tiny_engine):
    prompts = [[5, 6, 7], [8, 9, 10, 11, 12, 13]]
    interpreted, portable = (open_engine(tiny_engine, kind, "cpu").session for kind in ("interpreted", "portable"))
    assert (interpreted.kind, portable.kind) == ("interpreted", "portable")
    assert error(interpreted.prefill(prompts), portable.prefill(prompts)) < 1e-5


# Engines


@layouts
def test_definition(tiny_engine, packed):
    """Inputs, outputs and their types as the design has them: strongly typed, caches in and out of one shape."""
    network, _ = read_portable(tiny_engine / "rank0.safetensors")
    definition = LoweredNetwork(network, packed).definition
    inputs = {t.name: tuple(t.shape) for t in (definition.get_input(i) for i in range(definition.num_inputs))}
    outputs = {t.name: tuple(t.shape) for t in (definition.get_output(i) for i in range(definition.num_outputs))}
    tokens = (-1,) if packed else (-1, -1)
    caches = {f"{x}_cache.{i}": (-1, 2, 48, 16) for i in range(2) for x in ("key", "value")}
    index = {"pad_index": (-1, -1), "unpad_index": (-1,)} if packed else {}
    steps = {"input_ids": tokens, "position_ids": tokens}
    steps |= dict.fromkeys(["past_lengths", "logits_indices", "kv_lengths"], (-1,))
    assert inputs == steps | index | caches
    assert outputs.pop("logits")[1] == 320
    assert outputs == {f"present_{x}.{i}": (-1, 2, 48, 16) for i in range(2) for x in ("key", "value")}
    assert definition.get_flag(tensorrt_api.api().NetworkDefinitionCreationFlag.STRONGLY_TYPED)


@layouts
def test_serialized_engine(tiny_engine, packed):
    """A real build, no GPU: the engine holds all weights, and not twice (they are 0.3 MB, its code a few)."""
    network, limits = read_portable(tiny_engine / "rank0.safetensors")
    engine = LoweredNetwork(network, packed).build(limits, ["8.6"])
    weights = sum(constant.nbytes for constant in network.constants.values())
    assert engine.nbytes > weights
    head = network.constants["lm_head.weight"].load().numpy().tobytes()
    assert head[:64] in bytes(engine)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("positions", ["alibi", "qwen"])
def test_positions_build(tiny_config, positions, dtype):
    """ALiBi's mask is of the network's dtype; log-n and the frequencies by prompt length add an input."""
    network = random_decoder(tiny_config | POSITIONS[positions], dtype)
    lowered = LoweredNetwork(network, dtype != torch.bfloat16)
    assert ("prompt_lengths" in lowered.lowering.inputs) == (positions == "qwen")
    assert lowered.build(LIMITS, ["8.6"]).nbytes > sum(constant.nbytes for constant in network.constants.values())


@pytest.mark.slow
@pytest.mark.parametrize("cache_dtype", [torch.int8, torch.float8_e4m3fn], ids=str)
def test_biases_build_with_a_cache_of_8_bits(tiny_config, cache_dtype):
    network = random_decoder(tiny_config | POSITIONS["alibi"], torch.float16, cache_dtype)
    assert LoweredNetwork(network, True).build(LIMITS, ["8.9"]).nbytes


@pytest.mark.parametrize("capability", ["9.0", "1.2.3", "abc"])
def test_an_unknown_compute_capability_is_refused(tiny_engine, capability):
    network, limits = read_portable(tiny_engine / "rank0.safetensors")
    with pytest.raises(UserError, match=rf"compute capability {capability} is not one.*8\.0, 8\.6, 8\.9, 12\.0"):
        LoweredNetwork(network, True).build(limits, ["8.6", capability])


def step_shapes(packed):
    """The shapes of all that a step may read, by name."""
    network = Network()
    for name, known in STEP_INPUTS.items():
        if name not in ("kv_lengths", "pad_index", "unpad_index"):  # those are the lowering's own
            network.input(name, torch.int32, known.shape)
    network.input("key_cache.0", torch.float16, ("batch", 2, 120, 16))
    return lowered_shapes(network, packed)


@pytest.mark.parametrize(
    ("name", "shape", "packed", "context", "generation"),
    [
        ("input_ids", (-1,), True, [1, 4 * 50, 8 * 100], [1, 4, 8]),
        ("position_ids", (-1,), True, [1, 4 * 50, 8 * 100], [1, 4, 8]),
        ("unpad_index", (-1,), True, [1, 4 * 50, 8 * 100], [1, 4, 8]),
        ("pad_index", (-1, -1), True, [(1, 1), (4, 50), (8, 100)], [(1, 1), (4, 1), (8, 1)]),
        ("input_ids", (-1, -1), False, [(1, 1), (4, 50), (8, 100)], [(1, 1), (4, 1), (8, 1)]),
        ("sequence_lengths", (-1, -1), False, [(1, 1), (4, 50), (8, 100)], [(1, 1), (4, 1), (8, 1)]),
        ("prompt_lengths", (-1,), True, [1, 4 * 50, 8 * 100], [1, 4, 8]),
        ("prompt_lengths", (-1, -1), False, [(1, 1), (4, 50), (8, 100)], [(1, 1), (4, 1), (8, 1)]),
        ("logits_indices", (-1,), True, [1, 4, 100], [1, 4, 8]),
        ("kv_lengths", (-1,), True, [1, 4, 8], [1, 4, 8]),
        ("past_lengths", (-1,), False, [1, 4, 8], [1, 4, 8]),
        ("key_cache.0", (-1, 2, 120, 16), True, *[[(b, 2, 120, 16) for b in (1, 4, 8)]] * 2),
    ],
)
def test_profile_shapes(name, shape, packed, context, generation):
    """Batch 1 to 8, prompts of 1 to 100 tokens: smallest, typical, largest."""
    limits = BuildLimits(max_batch_size=8, max_input_len=100, max_output_len=20)
    for expected, phase in ((context, False), (generation, True)):
        shapes = [(n,) if isinstance(n, int) else n for n in expected]
        named = step_shapes(packed)[name]
        assert tuple(-1 if isinstance(n, str) else n for n in named) == shape
        assert profile_shapes(named, limits, phase) == shapes


@pytest.mark.parametrize("limits", [(1, 1, 1), (1, 7, 3), (5, 1, 9), (8, 1024, 128)], ids=str)
@layouts
def test_profiles_are_ordered(limits, packed):
    """TensorRT refuses a profile whose smallest, typical and largest shapes are not in that order."""
    for shape in step_shapes(packed).values():
        for generation in (False, True):
            shapes = profile_shapes(shape, BuildLimits(*limits), generation)
            for sizes in zip(*shapes, strict=True):
                assert 1 <= sizes[0] <= sizes[1] <= sizes[2]


# No TensorRT


@pytest.fixture
def no_tensorrt(monkeypatch):
    monkeypatch.setattr(tensorrt_api, "DISTRIBUTIONS", ("no_such_tensorrt", "no_such_tensorrt_rtx"))
    monkeypatch.delenv("TRTBUILD_TENSORRT", raising=False)
    tensorrt_api.api.cache_clear()
    yield
    tensorrt_api.api.cache_clear()


@pytest.mark.usefixtures("no_tensorrt")
def test_without_tensorrt_a_build_names_the_package(tiny_checkpoint, tmp_path):
    with pytest.raises(UserError, match="no TensorRT distribution is installed; 'pip install tensorrt-rtx-cu13'"):
        build_engine_dir(
            tiny_checkpoint,
            tmp_path / "engine",
            model="tiny",
            recipe={"dtype": "float32"},
            limits=LIMITS,
            engines=["portable", "tensorrt"],
        )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("no_tensorrt")
def test_without_tensorrt_portable_engines_run(tiny_engine):
    assert not tensorrt_api.runs_here({"distribution": "tensorrt_rtx", "compute_capabilities": ["8.9"]})
    assert open_engine(tiny_engine, "auto", "cpu").session.prefill([[1, 2, 3]]).shape == (1, 320)


@pytest.fixture
def choose(monkeypatch):
    """Sets `TRTBUILD_TENSORRT` for a module that has not been imported yet."""

    def set_name(name: str) -> None:
        monkeypatch.setenv("TRTBUILD_TENSORRT", name)
        tensorrt_api.api.cache_clear()

    yield set_name
    tensorrt_api.api.cache_clear()


def test_a_chosen_distribution_that_is_missing(choose):
    choose("no_such_tensorrt")
    with pytest.raises(UserError, match="TRTBUILD_TENSORRT names 'no_such_tensorrt', which cannot be imported"):
        tensorrt_api.api()


@pytest.mark.parametrize(("given", "targets"), [(["8.6"], ["8.6"]), (None, ["8.0", "8.6", "8.9", "12.0"])])
def test_description_of_the_chosen_builder(choose, given, targets):
    choose("tensorrt_rtx")
    expected = {"distribution": "tensorrt_rtx", "version": metadata.version("tensorrt_rtx_cu13")}
    assert tensorrt_api.describe_builder(given) == expected | {"compute_capabilities": targets}


# Layout of a step


@pytest.mark.parametrize("all_logits", [False, True])
def test_lowered_inputs_padded_and_packed_are_one_batch(all_logits):
    """Padding and back is the identity on rows, and both layouts choose the same tokens' logits."""
    prompts = [[11, 12, 13], [21], [31, 32]]
    packed, padded = (lowered_inputs(whole_prompts(prompts, all_logits), layout) for layout in (True, False))
    flat = packed["input_ids"]
    assert flat.tolist() == [11, 12, 13, 21, 31, 32]
    assert flat[packed["pad_index"]].tolist() == [[11, 12, 13], [21, 21, 21], [31, 32, 32]]
    assert packed["pad_index"].flatten()[packed["unpad_index"]].tolist() == list(range(6))
    assert torch.equal(padded["input_ids"], flat[packed["pad_index"]])
    assert padded["position_ids"].tolist() == [[0, 1, 2], [0, 0, 0], [0, 1, 1]]
    chosen = flat.tolist() if all_logits else [row[-1] for row in prompts]
    assert flat[packed["logits_indices"]].tolist() == chosen
    assert padded["input_ids"].flatten()[padded["logits_indices"]].tolist() == chosen
    assert packed["kv_lengths"].tolist() == [3, 1, 2]
    assert packed["query_starts"].tolist() == [0, *accumulate(map(len, prompts))]
