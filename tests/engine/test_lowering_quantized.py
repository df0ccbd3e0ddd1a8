"""Quantized weights and KV caches as TensorRT is asked to compile them: interpreted, and built."""

from dataclasses import replace

import pytest
import torch
from numerics import run_reference, step_logits

pytest.importorskip("tensorrt_rtx")

from trtbuild.decoder.decoder import CacheScales, decoder
from trtbuild.engine.config import BuildLimits
from trtbuild.engine.interpreter import Interpreter
from trtbuild.engine.portable import PortableEngine
from trtbuild.engine.tensorrt import LoweredNetwork
from trtbuild.engine.tensorrt_api import target_capabilities
from trtbuild.errors import UserError
from trtbuild.linear.linear import linear
from trtbuild.models.families import config_from_hugging_face
from trtbuild.network import Network, ops
from trtbuild.network.step import STEP_INPUTS, step_tensors, whole_prompts
from trtbuild.runtime.lowered_session import InterpretedSession, lowered_inputs, write_rows
from trtbuild.runtime.session import PortableSession
from trtbuild.tensors.lazy import from_tensor
from trtbuild.tensors.quantized_weight import QuantizedWeight
from trtbuild.tensors.rounding import quantize, scale_for

# Norm of the difference over the norm.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
# A key that differs in its last bit, because the rotation rounds elsewhere, may go to the cache's next step: 6% in FP8.
# In 16 bits some always do.
CACHE_TOLERANCE = {torch.float32: 1e-3, torch.float16: 1.5e-2, torch.bfloat16: 5e-2}
dtypes = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
layouts = pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
cache_dtypes = pytest.mark.parametrize("cache_dtype", [torch.int8, torch.float8_e4m3fn], ids=str)
FP8 = torch.float8_e4m3fn


def error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()


# Linear layers


def quantized(out: int, width: int, kind: str, group_size: int | None = None) -> QuantizedWeight:
    """A random weight of the size that a trained one has."""
    format_, _, activations = kind.partition(" ")
    groups = width // (group_size or width)
    scales = (0.5 + torch.rand(out, groups)) * width**-0.5
    zeros = None
    if format_ == "int4":
        values = torch.randint(-8, 8, (out, width), dtype=torch.int8)
        zeros = from_tensor(torch.randint(-8, 8, (out, groups), dtype=torch.int8)) if activations == "zeros" else None
        return QuantizedWeight("int4", from_tensor(values), from_tensor(scales / 4), zeros)
    dtype, step = (torch.int8, 3 / 127) if format_ == "int8" else (FP8, 3 / 448)
    values = quantize(torch.randn(out, width), torch.tensor(step), dtype)
    scales = scales * step if format_ == "int8" else torch.full_like(scales, step * width**-0.5)
    input_scale = from_tensor(torch.tensor([step])) if activations == "static" else None
    return QuantizedWeight(format_, from_tensor(values), from_tensor(scales), None, activations or "16bit", input_scale)


LINEARS = {
    "int8": ("int8",),
    "int4 in groups of 32": ("int4", 32),
    "int4 in groups of 128": ("int4", 128),
    "int4 per channel": ("int4",),
    "int4 with zeros": ("int4 zeros", 64),
    "int4 with zeros per channel": ("int4 zeros",),
    "int8 by int8, static": ("int8 static",),
    "int8 by int8, per token": ("int8 token",),
    "fp8": ("fp8 static",),
    "fp8, per token": ("fp8 token",),
    "int4 with zeros, reordered": ("int4 zeros", 64),
}


def linear_network(dtype: torch.dtype, out: int, width: int, case: str, bias: bool) -> Network:
    network = Network()
    network.input("input_ids", torch.int32, ("tokens",))
    x = network.input("x", dtype, ("tokens", width))
    biases = [from_tensor(torch.randn(n)) for n in (out, out // 2)] if bias else []
    parts = [quantized(n, width, *LINEARS[case]) for n in (out, out // 2)]  # two fused into one product
    if "reordered" in case:
        order = from_tensor(torch.randperm(width).int())
        parts = [replace(part, order=order) for part in parts]
    network.mark_output(linear(x, "product", parts, biases), "result")
    return network


@dtypes
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("case", LINEARS)
def test_linear(case, bias, dtype):
    """The layers compute what `reference` does, for one row, some, and a row of zeros."""
    network = linear_network(dtype, 40, 256, case, bias)
    interpreter = Interpreter(LoweredNetwork(network, True))
    for rows in (1, 5, 33):
        x = torch.randn(rows, 256).to(dtype)
        x[1:2] = 0
        expected = run_reference(network, {"x": x})["result"]
        inputs = dict.fromkeys(interpreter.inputs, torch.zeros(1, dtype=torch.int32)) | {"x": x}
        assert error(interpreter.run(inputs)["result"], expected) < TOLERANCE[dtype]


# Attention

MAX_LENGTH = 24
HEADS, KV_HEADS, HEAD_DIM = 6, 2, 8
# Lengths of this step's tokens, and of what the caches hold before it.
BATCHES = [
    ((1,), (0,)),
    ((9,), (0,)),
    ((5, 1, 8), (0, 0, 0)),
    ((1, 1, 1), (12, 0, 5)),
    ((3, 6), (10, 2)),
]


def attention_network(dtype: torch.dtype, cache_dtype: torch.dtype) -> Network:
    network = Network()
    network.input("input_ids", torch.int32, ("tokens",))
    shape = ("batch", KV_HEADS, MAX_LENGTH, HEAD_DIM)
    cache = {f"{kind}_cache": network.input(f"{kind}_cache.0", cache_dtype, shape) for kind in ("key", "value")}
    for kind, largest in (("key", 4.0), ("value", 3.0)):  # some keys and values saturate
        scales = scale_for(largest * torch.tensor([0.5, 1.0]), cache_dtype)
        cache[f"{kind}_scale"] = network.constant(f"{kind}_scale", from_tensor(scales))
    integers = [
        network.input(name, torch.int32, (size,))
        for name, size in (("position_ids", "tokens"), ("query_starts", "starts"), ("past_lengths", "batch"))
    ]
    frequencies = network.constant("f", from_tensor(1e3 ** (-torch.arange(0, HEAD_DIM, 2) / HEAD_DIM)))
    angles = ops.rotary_embedding(integers[0], frequencies, dtype)
    x = network.input("x", dtype, ("tokens", (HEADS + 2 * KV_HEADS) * HEAD_DIM))
    results = ops.attention(*ops.rotate(x, *angles, HEADS, KV_HEADS, HEAD_DIM), *integers, **cache)
    for name, result in zip(("result", "present_key.0", "present_value.0"), results, strict=True):
        network.mark_output(result, name)
    return network


@layouts
@dtypes
@cache_dtypes
def test_attention(cache_dtype, dtype, packed):
    """Prompts, decode steps and ragged batches over caches that hold random numbers, beyond each sequence's end too.

    The layers return the quantized keys and values of the step alone, and read the caches as if those were in them.
    """
    network = attention_network(dtype, cache_dtype)
    interpreter = Interpreter(LoweredNetwork(network, packed))
    pairs = []
    for lengths, past in BATCHES:
        inputs = step_tensors(whole_prompts([[0] * n for n in lengths]), STEP_INPUTS)
        inputs["past_lengths"] = torch.tensor(past, dtype=torch.int32)
        inputs["position_ids"] += inputs["past_lengths"].repeat_interleave(torch.tensor(lengths))
        inputs["x"] = torch.randn(sum(lengths), network.tensors["x"].shape[1]).to(dtype)
        for name in ("key_cache.0", "value_cache.0"):
            noise = torch.randn(len(lengths), *network.tensors[name].shape[1:])
            inputs[name] = quantize(noise, torch.tensor(3 / 127), cache_dtype)
        expected = run_reference(network, inputs)

        layout = lowered_inputs(whole_prompts([[0] * n for n in lengths]), packed)
        given = inputs | {name: layout[name] for name in ("pad_index", "unpad_index")}
        given["kv_lengths"] = inputs["past_lengths"] + torch.tensor(lengths, dtype=torch.int32)
        if not packed:
            given |= {name: inputs[name][layout["pad_index"]] for name in ("input_ids", "position_ids")}
            given["x"] = inputs["x"][layout["pad_index"]].flatten(0, 1)
        outputs = interpreter.run(given)
        result = outputs["result"] if packed else outputs["result"][layout["unpad_index"]]
        pairs.append((result, expected["result"]))
        for kind in ("key", "value"):
            cache, rows = inputs[f"{kind}_cache.0"].clone(), outputs[f"present_{kind}.0"]
            assert rows.shape == (len(lengths), KV_HEADS, max(lengths), HEAD_DIM)
            write_rows(cache, rows, inputs["past_lengths"])
            stored = expected[f"present_{kind}.0"]
            for b, (n, p) in enumerate(zip(lengths, past, strict=True)):
                assert torch.equal(cache[b, :, :p].float(), stored[b, :, :p].float())
                assert error(cache[b, :, : p + n], stored[b, :, : p + n]) < CACHE_TOLERANCE[torch.bfloat16]
    results, expected = (torch.cat([pair[i] for pair in pairs]) for i in (0, 1))
    assert error(results, expected) < CACHE_TOLERANCE[dtype]


# The tiny decoder

LIMITS = BuildLimits(max_batch_size=3, max_input_len=24, max_output_len=8)


def quantized_decoder(config: dict, dtype: torch.dtype, kind: str, cache_dtype: torch.dtype | None = None) -> Network:
    """All linear layers but the head quantized; weights and caches of the size that trained ones have."""
    model = config_from_hugging_face(config, "test")

    def weight(name: str):
        shape = model.tensor_shapes()[name]
        if "norm" in name:
            return from_tensor(1 + 0.2 * torch.randn(shape))
        if "_proj.weight" in name:
            return quantized(*shape, *LINEARS[kind]) if kind != "dense" else from_tensor(torch.randn(shape) * 0.1)
        return from_tensor(torch.randn(shape) * shape[-1] ** -0.5)

    cache = None
    if cache_dtype:
        scales = scale_for(torch.full((model.num_hidden_layers, model.num_key_value_heads), 6.0), cache_dtype)
        cache = CacheScales(cache_dtype, scales, 0.5 * scales)
    return decoder(model, weight, dtype, LIMITS.max_length, cache)


@layouts
@pytest.mark.parametrize(
    ("kind", "cache_dtype"),
    [
        ("int8", None),
        ("int4 in groups of 32", torch.int8),
        ("int8 by int8, per token", FP8),
        ("fp8", FP8),
        ("fp8, per token", None),
    ],
    ids=str,
)
def test_decoder(tiny_config, kind, cache_dtype, packed):
    """Prefill and four decode steps through sessions: the definition computes what the portable engine does."""
    torch.manual_seed(0)  # a number between two steps of a cache may be rounded either way
    network = quantized_decoder(tiny_config, torch.float32, kind, cache_dtype)
    prompts = [torch.randint(320, (n,)).tolist() for n in (7, 1, 20)]
    new_tokens = torch.randint(320, (4, 3), dtype=torch.int32)
    portable = PortableSession(PortableEngine(network, LIMITS, torch.device("cpu")))
    interpreted = InterpretedSession(network, LIMITS, packed)
    for _ in range(2):  # the second run finds the caches used
        expected = step_logits(portable, prompts, new_tokens)
        assert error(step_logits(interpreted, prompts, new_tokens), expected) < CACHE_TOLERANCE[torch.float32]


# Engines


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "bits"),
    [
        ("int8", 8),
        ("int4 in groups of 32", 4.5),
        ("int4 per channel", 4),
        ("int4 with zeros", 4.5),
        ("int8 by int8, static", 8),
        ("int8 by int8, per token", 8),
        ("fp8", 8),
        ("fp8, per token", 8),
    ],
)
def test_weights_stay_small(case, bits):
    """An engine holds `bits` a weight: values, scales and zeros. Its code is half a megabyte or so."""
    out, width = 2048, 2048
    network = linear_network(torch.float16, out, width, case, bias=True)
    engine = LoweredNetwork(network, True).build(BuildLimits(4, 32, 8), ["8.9"])
    weights = 1.5 * out * width
    assert weights * bits / 8 < engine.nbytes < weights * bits / 8 + 700_000


@pytest.mark.slow
@layouts
@cache_dtypes
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_caches_build(tiny_config, dtype, cache_dtype, packed):
    """Both profiles, caches in 8 bits in and the step's rows out."""
    network = quantized_decoder(tiny_config, dtype, "dense", cache_dtype)
    lowered = LoweredNetwork(network, packed)
    definition = lowered.definition
    types = {t.name: t.dtype for t in (definition.get_input(i) for i in range(definition.num_inputs))}
    rows = {
        t.name: (t.dtype, tuple(t.shape)) for t in (definition.get_output(i) for i in range(definition.num_outputs))
    }
    cache_type = lowered.lowering.dtype(cache_dtype)
    assert types["key_cache.1"] == types["value_cache.0"] == cache_type
    assert rows["present_key.0"] == rows["present_value.1"] == (cache_type, (-1, 2, -1, 16))
    assert lowered.build(LIMITS, None).nbytes > network.weight_bytes


@pytest.mark.parametrize("kind", ["weights", "caches"])
def test_fp8_wants_a_newer_gpu(tiny_config, kind):
    """TensorRT-RTX compiles FP8 for 8.9 and 12.0 alone, so those are the default, and others a user's mistake."""
    network = quantized_decoder(tiny_config, torch.float16, *(("fp8",) if kind == "weights" else ("dense", FP8)))
    assert LoweredNetwork(network, True).build(LIMITS, None).nbytes > network.weight_bytes
    with pytest.raises(UserError, match=r"compute capability 8\.0, 8\.6 have no FP8; build for 8\.9, 12\.0"):
        LoweredNetwork(network, True).build(LIMITS, ["8.0", "8.6", "8.9"])


@pytest.mark.parametrize(
    ("given", "fp8", "expected"),
    [(None, False, ["8.0", "8.6", "8.9", "12.0"]), (None, True, ["8.9", "12.0"]), (["8.9"], True, ["8.9"])],
)
def test_target_capabilities(given, fp8, expected):
    assert target_capabilities(given, fp8) == expected


# The interpreter is as strict as TensorRT


def lowered(make, dtype: torch.dtype = torch.float32) -> LoweredNetwork:
    """`make(lowering, x)` gives the only result, x being `[tokens, 6]`."""
    network = Network()
    network.input("x", dtype, ("tokens", 6))
    result = LoweredNetwork(network, True)
    output = make(result.lowering, result.lowering.inputs["x"])
    output.name = "result"
    result.definition.mark_output(output)
    return result


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (torch.int8, [0, 2, 2, -2, 127, -128]),  # ties go to the even number
        (FP8, [0.5, 1.5, 2.5, -1.5, 192, -448]),  # 200 lies between 192 and 208
    ],
    ids=str,
)
def test_rounding(dtype, expected):
    """`x / 0.5` rounded and saturated: what the TensorRT documentation has of `IQuantizeLayer`."""
    x = torch.tensor([[0.25, 0.75, 1.25, -0.75, 100, -1e4]])

    def make(lowering, x):
        like = lowering.constant(torch.zeros(1).to(dtype))
        return lowering.quantize(x, lowering.constant(torch.tensor([0.5])), like)

    given = {"x": x, "pad_index": None, "unpad_index": None, "kv_lengths": None}
    assert Interpreter(lowered(make)).run(given)["result"].tolist() == [expected]


def _int4(lowering):
    return lowering.constant(torch.zeros(4, 3, dtype=torch.uint8))


REFUSED = {
    "blocks' scales in another dtype": lambda low, x: low.matmul(
        x, low.dequantize(_int4(low), low.constant(torch.ones(4, 2)), like=x), transpose_b=True
    ),
    "FP8 gathered": lambda low, x: low.dequantize(
        low.gather(low.constant(torch.zeros(4, 6).to(FP8)), low.inputs["unpad_index"]),
        low.scalar(1, torch.float32, 0),
        like=x,
    ),
    "integers times 16 bits": lambda low, x: low.matmul(
        x, low.constant(torch.zeros(4, 6, dtype=torch.int8)), transpose_b=True
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_by_both(case):
    definition = lowered(REFUSED[case], torch.float16)
    inputs = dict.fromkeys(("pad_index", "unpad_index", "kv_lengths"), torch.zeros(1, dtype=torch.int32))
    with pytest.raises(TypeError):
        Interpreter(definition).run(inputs | {"x": torch.ones(1, 6, dtype=torch.float16)})
    with pytest.raises(UserError, match="TensorRT could not build the engine"):
        definition.build(LIMITS, ["8.9"])
