"""Every operation's `reference` against a formula in float64 numpy, and `portable` against `reference`."""

import math
import sys

import numpy as np
import pytest
import torch

from trtbuild.models.alibi import alibi_slopes
from trtbuild.models.config import RopeConfig
from trtbuild.network import Network, ops
from trtbuild.network.ops.add import Add
from trtbuild.network.ops.attention import Attention
from trtbuild.network.ops.cast import Cast
from trtbuild.network.ops.embedding import Embedding
from trtbuild.network.ops.log_n import LogN
from trtbuild.network.ops.prompt_ntk import PromptNtk
from trtbuild.network.ops.rms_norm import RmsNorm
from trtbuild.network.ops.rotary_embedding import RotaryEmbedding
from trtbuild.network.ops.rotate import Rotate
from trtbuild.network.ops.scale_tokens import ScaleTokens
from trtbuild.network.ops.select_columns import SelectColumns
from trtbuild.network.ops.select_rows import SelectRows
from trtbuild.network.ops.split_heads import SplitHeads
from trtbuild.network.ops.swiglu import SwiGlu
from trtbuild.network.step import Step, whole_prompts
from trtbuild.tensors.cpu import multiplies
from trtbuild.tensors.rounding import quantize

# Norm of the difference over the norm of the float64 result, for inputs that are already rounded to the dtype.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
WORKING_DTYPES = [torch.float32, torch.float16, torch.bfloat16]
dtypes = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
working_dtypes = pytest.mark.parametrize("dtype", WORKING_DTYPES, ids=str)
row_counts = pytest.mark.parametrize("rows", [1, 2, 15, 16, 40])


def wide(x: torch.Tensor) -> np.ndarray:
    return x.double().numpy()


def error(actual: torch.Tensor, expected: np.ndarray | torch.Tensor) -> float:
    expected = wide(expected) if isinstance(expected, torch.Tensor) else expected
    assert tuple(actual.shape) == expected.shape
    return np.linalg.norm(wide(actual) - expected) / np.linalg.norm(expected)


# Operations of one token


@dtypes
@row_counts
def test_embedding(rows, dtype):
    table, ids = torch.randn(50, 8, dtype=dtype), torch.randint(50, (rows,), dtype=torch.int32)
    result = Embedding().reference(ids, table)
    assert result.dtype == dtype
    assert (wide(result) == wide(table)[ids.numpy()]).all()


@dtypes
def test_add(dtype):
    a, b = torch.randn(2, 7, 33, dtype=dtype)
    assert error(Add().reference(a, b), wide(a) + wide(b)) < TOLERANCE[dtype]


def test_cast_rounds_to_nearest_even():
    x = torch.cat((torch.randn(1000) * 100, torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-11, 1 + 3 * 2**-11])))
    assert (Cast("float16").reference(x).numpy() == x.numpy().astype(np.float16)).all()
    bits = x.numpy().view(np.uint32).astype(np.uint64)
    nearest = ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)
    assert (Cast("bfloat16").reference(x).view(torch.int16).numpy().view(np.uint16) == nearest).all()
    assert (wide(Cast("float32").reference(x.bfloat16())) == wide(x.bfloat16())).all()


def test_cast_to_the_same_dtype_adds_nothing():
    network = Network()
    x = network.input("x", torch.float16, ("tokens", 4))
    assert ops.cast(x, torch.float16) is x
    assert ops.cast(x, torch.float32).dtype == torch.float32
    assert len(network.nodes) == 1


@dtypes
@pytest.mark.parametrize("eps", [1e-6, 0.1])
def test_rms_norm(dtype, eps):
    x, weight = torch.randn(9, 48, dtype=dtype) * 0.3, torch.randn(48, dtype=dtype)
    expected = wide(x) / np.sqrt((wide(x) ** 2).mean(-1, keepdims=True) + eps) * wide(weight)
    assert error(RmsNorm(eps).reference(x, weight), expected) < TOLERANCE[dtype]


def test_rms_norm_of_large_float16_does_not_overflow():
    x = torch.full((2, 64), 3e4, dtype=torch.float16)  # the mean square is 9e8
    assert error(RmsNorm(1e-6).reference(x, torch.ones(64, dtype=torch.float16)), np.ones((2, 64))) < 1e-3


@dtypes
def test_swiglu(dtype):
    gate_up = torch.randn(5, 2 * 24, dtype=dtype) * 3
    gate, up = np.split(wide(gate_up), 2, axis=1)
    before = gate_up.clone()
    assert error(SwiGlu().reference(gate_up), gate / (1 + np.exp(-gate)) * up) < TOLERANCE[dtype]
    assert torch.equal(gate_up, before)


@dtypes
def test_select_rows(dtype):
    x, indices = torch.randn(12, 6, dtype=dtype), torch.tensor([11, 0, 5, 5], dtype=torch.int32)
    assert (wide(SelectRows().reference(x, indices)) == wide(x)[[11, 0, 5, 5]]).all()


@dtypes
def test_select_columns(dtype):
    x, indices = torch.randn(3, 6, dtype=dtype), torch.tensor([5, 0, 3, 3], dtype=torch.int32)
    assert (wide(SelectColumns().reference(x, indices)) == wide(x)[:, [5, 0, 3, 3]]).all()


@working_dtypes
@row_counts
@pytest.mark.parametrize("case", ["embedding", "add", "rms_norm", "swiglu", "select_rows"])
def test_portable_equals_reference(case, rows, dtype):
    x = torch.randn(rows, 64).to(dtype)
    ids = torch.randint(rows, (rows,), dtype=torch.int32)
    op, inputs = {
        "embedding": (Embedding(), (ids, x)),
        "add": (Add(), (x, x.flip(1))),
        "rms_norm": (RmsNorm(1e-5), (x, torch.randn(64).to(dtype))),
        "swiglu": (SwiGlu(), (x,)),
        "select_rows": (SelectRows(), (x, ids)),
    }[case]
    result = op.portable(Step.of_chunks(whole_prompts([[0] * rows])), *inputs)
    assert result.dtype == dtype
    assert error(result, op.reference(*inputs)) < TOLERANCE[dtype]


# Rotary embedding


def rotary_formula(positions: np.ndarray, theta: float, head_dim: int) -> tuple[np.ndarray, np.ndarray]:
    """cos | cos and -sin | sin of position * theta^(-2i / d); theta may be one number a token."""
    exponents = -2 * np.arange(head_dim // 2) / head_dim
    angles = positions[:, None] * np.broadcast_to(theta, positions.shape)[:, None] ** exponents
    cos, sin = np.cos(angles), np.sin(angles)
    return np.concatenate((cos, cos), 1), np.concatenate((-sin, sin), 1)


def inverse_frequencies(theta: float, head_dim: int) -> torch.Tensor:
    return theta ** (-2 * torch.arange(head_dim // 2, dtype=torch.float64) / head_dim)


# Angles are float32 also for 16-bit results: the error of an angle is 2^-24 of it, up to 300 radians here.
ROTARY_TOLERANCE = {torch.float64: 1e-12, torch.float32: 3e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def frequencies_for(dtype: torch.dtype, theta: float, head_dim: int) -> torch.Tensor:
    return inverse_frequencies(theta, head_dim).to(torch.float64 if dtype == torch.float64 else torch.float32)


@dtypes
@pytest.mark.parametrize("theta", [1e4, 5e5])
def test_rotary_embedding(dtype, theta):
    positions = torch.randint(300, (20,), dtype=torch.int32)
    op = RotaryEmbedding(str(dtype).removeprefix("torch."))
    results = op.reference(positions, frequencies_for(dtype, theta, 16))
    for result, expected in zip(results, rotary_formula(positions.numpy(), theta, 16), strict=True):
        assert result.dtype == dtype
        assert error(result, expected) < ROTARY_TOLERANCE[dtype]


@dtypes
def test_dynamic_ntk_grows_each_sequences_base(dtype):
    """Base 10000 * (factor * length / limit - (factor - 1)) ^ (d / (d - 2)) beyond the limit, 10000 up to it."""
    factor, limit, head_dim = 4.0, 64, 16
    lengths = torch.tensor([5, 64, 65, 100, 300], dtype=torch.int32).repeat_interleave(3)
    positions = torch.cat([torch.randint(int(n), (1,), dtype=torch.int32) for n in lengths])
    growth = factor * np.maximum(lengths.numpy(), limit) / limit - (factor - 1)
    theta = 1e4 * growth ** (head_dim / (head_dim - 2))
    op = RotaryEmbedding(str(dtype).removeprefix("torch."), factor, limit)
    results = op.reference(positions, frequencies_for(dtype, 1e4, head_dim), lengths)
    for result, expected in zip(results, rotary_formula(positions.numpy(), theta, head_dim), strict=True):
        assert error(result, expected) < ROTARY_TOLERANCE[dtype]


def doublings(length: int, limit: int) -> int:
    """How often `limit` is doubled to hold `length`."""
    return next(c for c in range(30) if length <= limit * 2**c)


@pytest.mark.parametrize(("limit", "max_length"), [(2048, 32768), (8192, 8193), (3, 50)])
def test_prompt_ntk(limit, max_length):
    """Every length: Qwen's base, alpha = 2^ceil(log2(length / limit) + 1) - 1 or 1, to its powers of two exactly."""
    theta, head_dim = 1e4, 128
    rope = RopeConfig(theta, "qwen", original_max_position_embeddings=limit)
    table = rope.qwen_frequencies(head_dim, max_length)
    lengths = torch.arange(1, max_length + 1, dtype=torch.int32)
    rows = PromptNtk(limit).reference(torch.arange(len(table))[:, None], lengths)[:, 0]
    assert rows.tolist() == [doublings(n, limit) for n in range(1, max_length + 1)]
    for n in (1, limit - 1, limit, limit + 1, 2 * limit - 1, 2 * limit, 2 * limit + 1, 4 * limit + 1, max_length):
        if n <= max_length:
            alpha = max(2 ** math.ceil(math.log2(n / limit) + 1) - 1, 1)
            base = theta * alpha ** (head_dim / (head_dim - 2))
            (frequencies,) = PromptNtk(limit).reference(table, torch.tensor([n], dtype=torch.int32))
            assert error(frequencies, base ** (-2 * np.arange(head_dim // 2) / head_dim)) < 1e-7


def test_prompt_ntk_refuses_a_table_without_a_choice():
    network = Network()
    lengths = network.input("lengths", torch.int32, ("tokens",))
    for i, shape in enumerate([(1, 8), (8,)]):
        with pytest.raises(ValueError, match="RoPE frequencies"):
            ops.prompt_ntk(network.input(f"table{i}", torch.float32, shape), lengths, 16)


@dtypes
def test_rotary_embedding_with_each_tokens_own_frequencies(dtype):
    positions = torch.randint(300, (20,), dtype=torch.int32)
    theta = 1e4 * (1 + 7 * np.random.default_rng(0).random(20))
    frequencies = torch.from_numpy(theta[:, None] ** (-2 * np.arange(8) / 16))
    op = RotaryEmbedding(str(dtype).removeprefix("torch."))
    results = op.reference(positions, frequencies if dtype == torch.float64 else frequencies.float())
    for result, expected in zip(results, rotary_formula(positions.numpy(), theta, 16), strict=True):
        assert error(result, expected) < ROTARY_TOLERANCE[dtype]


@working_dtypes
@pytest.mark.parametrize("length", [2, 100, 8192])
def test_log_n(dtype, length):
    positions = torch.tensor([0, 1, length - 2, length - 1, length, 3 * length, 32767], dtype=torch.int32)
    result = LogN(str(dtype).removeprefix("torch."), length).reference(positions)
    expected = np.maximum(1, np.log(positions.numpy() + 1.0) / np.log(length))
    assert result.dtype == dtype
    assert error(result, expected) < TOLERANCE[dtype]
    assert (result[:4] == 1).all() or length == 2


# Attention


def attention_inputs(dtype, lengths, past, heads, kv_heads, dim, max_length, options=None):
    """Random inputs by name; what the caches hold beyond `past` is noise.

    With scales, which are powers of two, new keys and values are such that the cache holds them exactly.
    """
    position, logn, cache_dtype = (options or PLAIN).values()
    tokens, batch = sum(lengths), len(lengths)
    angles = torch.rand(tokens, dim // 2, dtype=torch.float64) * 6
    cos, sin = angles.cos(), angles.sin()
    cache = [torch.randn(batch, kv_heads, max_length, dim).to(dtype) for _ in range(2)]
    qkv = torch.randn(tokens, (heads + 2 * kv_heads) * dim)
    extra = {"cos": torch.cat((cos, cos), 1).to(dtype), "sin": torch.cat((-sin, sin), 1).to(dtype)}
    if position == "alibi":
        extra = {"slopes": alibi_slopes(heads).to(torch.float64 if dtype == torch.float64 else torch.float32)}
    if logn:
        extra["logn"] = (1 + torch.rand(tokens)).to(dtype)
    if cache_dtype:
        largest = torch.tensor(2.0**-5 if cache_dtype == torch.int8 else 1.0)
        scales = largest, largest / 2
        cache = [quantize(x.float(), scale, cache_dtype) for x, scale in zip(cache, scales, strict=True)]
        for new, scale in zip(qkv[:, heads * dim :].chunk(2, 1), scales, strict=True):
            new.copy_(quantize(new, scale, cache_dtype).float() * scale)
        extra |= zip(("key_scale", "value_scale"), (scale.expand(kv_heads) for scale in scales), strict=True)
    positions = torch.cat([torch.arange(p, p + n, dtype=torch.int32) for n, p in zip(lengths, past, strict=True)])
    return {
        "qkv": qkv.to(dtype),
        "key_cache": cache[0],
        "value_cache": cache[1],
        "position_ids": positions,
        "query_starts": torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32),
        "past_lengths": torch.tensor(past, dtype=torch.int32),
    } | extra


def attend(inputs, heads, kv_heads, dim, run=lambda op, **inputs: op.reference(**inputs)):
    """From the fused projection to attention's outputs, every operation by `run`."""
    inputs = dict(inputs)
    positional = {name: inputs.pop(name) for name in ("cos", "sin") if name in inputs}
    op = (Rotate if positional else SplitHeads)(heads, kv_heads, dim)
    q, k, v = run(op, qkv=inputs.pop("qkv"), **positional)
    if "logn" in inputs:
        q = run(ScaleTokens(), x=q, factors=inputs.pop("logn"))
    return run(Attention(), q=q, k=k, v=v, **inputs)


def attention_formula(inputs, lengths, past, heads, kv_heads, dim, options=None):
    """One token, one head at a time: rotate, append to the cache, softmax over what is there."""
    position, logn, cache_dtype = (options or PLAIN).values()
    qkv, keys, values = (wide(inputs[name]).copy() for name in ("qkv", "key_cache", "value_cache"))
    if cache_dtype:
        keys, values = keys * inputs["key_scale"][0].item(), values * inputs["value_scale"][0].item()
    extra = {name: wide(inputs[name]) for name in ("cos", "sin", "slopes", "logn") if name in inputs}
    half, group, output, row = dim // 2, heads // kv_heads, np.zeros((len(qkv), heads * dim)), 0

    def rotate(x):
        if position == "alibi":
            return x
        c, s = extra["cos"][row], extra["sin"][row]
        return np.concatenate((x[:half] * c[:half] - x[half:] * s[half:], x[half:] * c[half:] + x[:half] * s[half:]))

    for b, (n, p) in enumerate(zip(lengths, past, strict=True)):
        for i in range(p, p + n):
            vectors = qkv[row].reshape(-1, dim)
            for g in range(kv_heads):
                keys[b, g, i] = rotate(vectors[heads + g])
                values[b, g, i] = vectors[heads + kv_heads + g]
            for h in range(heads):
                scores = keys[b, h // group, : i + 1] @ rotate(vectors[h]) / np.sqrt(dim)
                if logn:
                    scores *= extra["logn"][row]
                if position == "alibi":
                    scores += extra["slopes"][h] * (np.arange(i + 1) - i)
                weights = np.exp(scores - scores.max())
                mixed = weights @ values[b, h // group, : i + 1] / weights.sum()
                output[row, h * dim : (h + 1) * dim] = mixed
            row += 1
    return output, keys, values


HEADS = pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (3, 1)])
PLAIN = {"position": "rope", "logn": False, "cache_dtype": None}
OPTIONS = {
    "rope": PLAIN,
    "log-n": PLAIN | {"logn": True},
    "alibi": PLAIN | {"position": "alibi"},
    "alibi and log-n": PLAIN | {"position": "alibi", "logn": True},
}
options = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
QUANTIZED = {
    f"alibi, log-n {logn}, {dtype}": {"position": "alibi", "logn": logn, "cache_dtype": dtype}
    for logn in (False, True)
    for dtype in (torch.int8, torch.float8_e4m3fn)
}


@dtypes
@options
@HEADS
@pytest.mark.parametrize(
    ("lengths", "past"),
    [((1,), (0,)), ((1,), (7,)), ((9,), (0,)), ((5, 1, 8), (0, 0, 0)), ((5, 1, 3), (2, 10, 0)), ((1, 1, 1), (4, 0, 9))],
)
def test_attention(dtype, options, heads, kv_heads, lengths, past):
    inputs = attention_inputs(dtype, lengths, past, heads, kv_heads, 8, 14, options)
    results = attend(inputs, heads, kv_heads, 8)
    formula = attention_formula(inputs, lengths, past, heads, kv_heads, 8, options)
    for result, expected in zip(results, formula, strict=True):
        assert result.dtype == dtype
        assert error(result, expected) < TOLERANCE[dtype]


@dtypes
@pytest.mark.parametrize("options", QUANTIZED.values(), ids=QUANTIZED)
def test_attention_with_a_cache_of_8_bits(dtype, options):
    lengths, past = (5, 1, 3), (2, 10, 0)
    inputs = attention_inputs(dtype, lengths, past, 6, 2, 8, 14, options)
    result, keys, values = attend(inputs, 6, 2, 8)
    expected, *caches = attention_formula(inputs, lengths, past, 6, 2, 8, options)
    assert error(result, expected) < TOLERANCE[dtype]
    for cache, scale, wanted in zip((keys, values), (inputs["key_scale"], inputs["value_scale"]), caches, strict=True):
        assert error(cache.double() * scale[0], wanted) == 0


def check_portable_attention(dtype, step, lengths, past, heads, kv_heads, options):
    inputs = attention_inputs(dtype, lengths, past, heads, kv_heads, 8, 24, options)
    expected, *expected_caches = attend(inputs, heads, kv_heads, 8)
    result, *caches = attend(inputs, heads, kv_heads, 8, lambda op, **inputs: op.portable(step, **inputs))
    assert result.dtype == dtype
    assert error(result, expected) < TOLERANCE[dtype]
    formula, *_ = attention_formula(inputs, lengths, past, heads, kv_heads, 8, options)
    assert error(result, formula) < TOLERANCE[dtype]
    both = inputs["key_cache"], inputs["value_cache"]
    for cache, given, wanted in zip(caches, both, expected_caches, strict=True):
        assert cache.data_ptr() == given.data_ptr()  # updated in place
        assert torch.equal(cache.float(), wanted.float())


@working_dtypes
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("lengths", [(9,), (6, 6, 6), (5, 1, 8)])
def test_attention_without_caches(dtype, options, lengths):
    """What a step's tokens see of each other: as with caches that were empty."""
    inputs = attention_inputs(dtype, lengths, (0,) * len(lengths), 6, 2, 8, 24, options)
    expected, *_ = attention_formula(inputs, lengths, (0,) * len(lengths), 6, 2, 8, options)
    alone = {name: x for name, x in inputs.items() if "cache" not in name}
    step = Step.of_chunks(whole_prompts([[0] * n for n in lengths]))
    for run in (lambda op, **inputs: op.reference(**inputs), lambda op, **inputs: op.portable(step, **inputs)):
        assert error(attend(alone, 6, 2, 8, run), expected) < TOLERANCE[dtype]
    together, *_ = attend(inputs, 6, 2, 8, lambda op, **inputs: op.portable(step, **inputs))
    assert torch.equal(attend(alone, 6, 2, 8, run), together)


every_option = pytest.mark.parametrize("options", (OPTIONS | QUANTIZED).values(), ids=OPTIONS | QUANTIZED)


@working_dtypes
@every_option
@HEADS
@pytest.mark.parametrize("lengths", [(1,), (9,), (6, 6, 6), (1, 1), (5, 1, 8), (7, 7, 2)])
def test_portable_attention_context_phase(dtype, options, heads, kv_heads, lengths):
    step = Step.of_chunks(whole_prompts([[0] * n for n in lengths]))
    check_portable_attention(dtype, step, lengths, (0,) * len(lengths), heads, kv_heads, options)


@working_dtypes
@every_option
@HEADS
@pytest.mark.parametrize(
    ("past", "bound", "exact"),
    [
        ((6,), 7, True),
        ((0,), 1, True),
        ((5, 5, 5), 6, True),
        ((6,), 20, False),
        ((3, 0, 11), 12, False),
        ((2, 9), 24, False),
    ],
)
def test_portable_attention_generation_phase(dtype, options, heads, kv_heads, past, bound, exact):
    """One token a sequence; `exact` needs no mask but ALiBi's, a larger bound or ragged lengths do."""
    step = Step.generation(torch.arange(len(past)), bound, exact)
    check_portable_attention(dtype, step, (1,) * len(past), past, heads, kv_heads, options)


@pytest.mark.parametrize("multiplied", [False, True] if multiplies(torch.float16) else [False])
@every_option
def test_portable_attention_in_float16(multiplied, options, monkeypatch):
    """As on CPUs without products of float16, and with them where this one has them."""
    monkeypatch.setattr(sys.modules[Attention.__module__], "multiplies", lambda dtype: multiplied)
    chunks = Step.of_chunks(whole_prompts([[0] * n for n in (5, 1, 8)]))
    check_portable_attention(torch.float16, chunks, (5, 1, 8), (0, 0, 0), 6, 2, options)
    generation = Step.generation(torch.arange(3), 12)
    check_portable_attention(torch.float16, generation, (1, 1, 1), (3, 0, 11), 6, 2, options)


# Shape rules


ROTARY = [("tokens", 8)] * 2


def attention_of(
    width=48, key=("batch", 2, 32, 8), value=("batch", 2, 32, 8), dtype=torch.float32, positional=ROTARY, logn=None
):
    network = Network()
    x = network.input("x", dtype, ("tokens", width))
    positional = [network.input(f"positional{i}", torch.float32, shape) for i, shape in enumerate(positional)]
    cache = [network.input(name, dtype, shape) for name, shape in (("key", key), ("value", value))]
    integers = [network.input(name, torch.int32, (dim,)) for name, dim in (("p", "tokens"), ("s", "s"), ("l", "batch"))]
    slopes = positional[0] if len(positional) == 1 else None
    q, k, v = ops.split_heads(x, 2, 2, 8) if slopes else ops.rotate(x, *positional, 2, 2, 8)
    if logn:
        q = ops.scale_tokens(q, network.input("logn", *logn))
    return ops.attention(q, k, v, *integers, *cache, slopes=slopes)


def test_attention_without_caches_has_one_output():
    network = Network()
    x = network.input("x", torch.float16, ("tokens", 48))
    integers = [network.input(name, torch.int32, (dim,)) for name, dim in (("p", "tokens"), ("s", "s"), ("l", "batch"))]
    q, k, v = ops.split_heads(x, 4, 1, 8)
    assert [x.shape for x in (q, k, v)] == [("tokens", 4, 8), ("tokens", 1, 8), ("tokens", 1, 8)]
    output = ops.attention(q, k, v, *integers)
    assert (output.dtype, output.shape) == (torch.float16, ("tokens", 32))
    cache, scale = network.input("c", torch.int8, ("batch", 1, 32, 8)), network.input("scale", torch.float32, (1,))
    for wrong in ({"key_cache": cache}, {"key_scale": scale, "value_scale": scale}):
        with pytest.raises(ValueError, match="attention"):
            ops.attention(q, k, v, *integers, **wrong)
    for scales in ({}, {"key_scale": scale}):
        with pytest.raises(ValueError, match="attention"):
            ops.attention(q, k, v, *integers, cache, cache, **scales)


def test_attention_infers_its_outputs():
    output, key, value = attention_of(dtype=torch.bfloat16)
    assert (output.dtype, output.shape) == (torch.bfloat16, ("tokens", 16))
    assert key.shape == value.shape == ("batch", 2, 32, 8)


@pytest.mark.parametrize(
    "arguments",
    [
        {"width": 40},
        {"value": ("batch", 2, 31, 8)},
        {"key": ("batch", 1, 32, 8), "value": ("batch", 1, 32, 8)},
        {"key": ("batch", 2, 32, 4), "value": ("batch", 2, 32, 4)},
        {"positional": [("tokens", 4)] * 2},
        {"positional": [(3,)]},
        {"logn": (torch.float32, ("rows",))},
        {"logn": (torch.float16, ("tokens",))},
    ],
)
def test_attention_refuses_shapes_that_do_not_fit(arguments):
    with pytest.raises(ValueError, match=r"attention|SplitHeads|Rotate|factors"):
        attention_of(**arguments)


@pytest.mark.parametrize(("shape", "dtype"), [(("tokens", 9), torch.float32), (("tokens", 8), torch.float16)])
def test_add_refuses_another_shape_or_dtype(shape, dtype):
    network = Network()
    with pytest.raises(ValueError, match="cannot add"):
        ops.add(network.input("a", torch.float32, ("tokens", 8)), network.input("b", dtype, shape))


@pytest.mark.parametrize(("shape", "dtype"), [((9,), torch.float32), ((8,), torch.float16)])
def test_rms_norm_refuses_another_width_or_dtype(shape, dtype):
    network = Network()
    with pytest.raises(ValueError, match="rms_norm"):
        ops.rms_norm(network.input("x", torch.float32, ("tokens", 8)), network.input("w", dtype, shape), 1e-5)


def test_inferred_shapes():
    network = Network()
    ids = network.input("ids", torch.int32, ("tokens",))
    hidden = ops.embedding(ids, network.input("table", torch.float16, (50, 8)))
    assert (hidden.dtype, hidden.shape) == (torch.float16, ("tokens", 8))
    assert ops.swiglu(hidden).shape == ("tokens", 4)
    assert ops.select_rows(hidden, network.input("indices", torch.int32, ("rows",))).shape == ("rows", 8)
    factors = ops.log_n(ids, 100, torch.bfloat16)
    assert (factors.dtype, factors.shape) == (torch.bfloat16, ("tokens",))
    frequencies = ops.prompt_ntk(network.input("rows_of_frequencies", torch.float32, (3, 4)), ids, 16)
    assert (frequencies.dtype, frequencies.shape) == (torch.float32, ("tokens", 4))
    assert [x.shape for x in ops.rotary_embedding(ids, frequencies, torch.float16)] == [("tokens", 8)] * 2
    cos, sin = ops.rotary_embedding(ids, network.input("f", torch.float32, (4,)), torch.float16)
    assert (cos.dtype, cos.shape, sin.shape) == (torch.float16, ("tokens", 8), ("tokens", 8))
