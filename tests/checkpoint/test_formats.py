"""Published layouts of quantized weights: what other packages wrote, what we write, and what is refused.

`tests/data/README.md` says who wrote the fixtures, and that `expected.safetensors` is their own dequantization.
"""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from trtbuild.checkpoint.canonical import Checkpoint
from trtbuild.checkpoint.formats import FORMATS, read_quantized
from trtbuild.checkpoint.formats.int32 import pack, unpack
from trtbuild.errors import UserError
from trtbuild.tensors.lazy import from_tensor
from trtbuild.tensors.quantized_weight import QuantizedWeight
from trtbuild.tensors.safetensors_stream import open_file, write_file

DATA = Path(__file__).parent.parent / "data"
# Of a projection with 128 input channels: format, group size, symmetric, activations; then the scales' dtype.
FIXTURES = {
    "gptqmodel-sym": (("int4", 64, True, "16bit"), torch.float16),
    "gptqmodel-asym": (("int4", 64, False, "16bit"), torch.float16),
    "gptqmodel-act-order": (("int4", 32, False, "16bit"), torch.float16),
    "autoawq-gemm": (("int4", 64, False, "16bit"), torch.float16),
    "llmcompressor-int4-sym": (("int4", 64, True, "16bit"), torch.bfloat16),
    "llmcompressor-int4-asym": (("int4", 64, False, "16bit"), torch.bfloat16),
    "llmcompressor-int8": (("int8", 128, True, "16bit"), torch.bfloat16),
    "llmcompressor-w8a8-static": (("int8", 128, True, "static"), torch.bfloat16),
    "llmcompressor-w8a8-dynamic": (("int8", 128, True, "token"), torch.bfloat16),
    "llmcompressor-fp8": (("fp8", 128, True, "static"), torch.bfloat16),
    "llmcompressor-fp8-dynamic": (("fp8", 128, True, "token"), torch.bfloat16),
}
PROJECTIONS = [
    f"model.layers.{i}.{name}_proj"
    for i in range(2)
    for name in ("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "mlp.gate", "mlp.up", "mlp.down")
]
O_PROJ, K_PROJ, DOWN_PROJ = "model.layers.0.self_attn.o_proj", "model.layers.1.self_attn.k_proj", PROJECTIONS[-1]


# What other packages wrote


@pytest.mark.parametrize("fixture", FIXTURES)
def test_equals_what_its_own_package_dequantizes(fixture):
    """Exactly: integers times a scale, in float32."""
    checkpoint, expected = Checkpoint(DATA / fixture), load_file(DATA / fixture / "expected.safetensors")
    assert sorted(expected) == sorted(f"{name}.weight" for name in PROJECTIONS)
    kind, dtype = FIXTURES[fixture]
    assert checkpoint[f"{O_PROJ}.weight"].kind == kind
    for name, matrix in expected.items():
        weight, dequantized = checkpoint[name], checkpoint.dequantized(name)
        assert (dequantized.dtype, dequantized.shape) == (torch.float32, tuple(matrix.shape))
        assert torch.equal(dequantized.load(), matrix), name
        assert weight.scales.dtype == weight.scales.load().dtype == dtype
        assert matrix.std() > 0.02, "the fixture's weights are random, with a deviation of 0.05"


@pytest.mark.parametrize("fixture", FIXTURES)
def test_what_is_announced_is_what_is_loaded(fixture):
    checkpoint = Checkpoint(DATA / fixture)
    assert checkpoint.quant_method == json.loads((DATA / fixture / "config.json").read_text())[
        "quantization_config"
    ].get("quant_method")
    quantized = checkpoint.quantized()
    assert len(quantized) == len(PROJECTIONS)
    for weight in quantized:
        for part in (weight.values, weight.scales, weight.zeros, weight.input_scale, weight.order):
            if part is not None:
                value = part.load()
                assert (value.dtype, tuple(value.shape)) == (part.dtype, part.shape)


@pytest.mark.parametrize("fixture", [name for name, (kind, _) in FIXTURES.items() if not kind[2]])
def test_zero_points_reach_both_ends(fixture):
    """The fixtures have rows of one sign, so that the layouts' borrows and signs are at their worst."""
    zeros = torch.cat([weight.zeros.load().flatten() for weight in Checkpoint(DATA / fixture).quantized()])
    assert (zeros.dtype, zeros.min().item(), zeros.max().item()) == (torch.int8, -8, 7)
    assert len(zeros.unique()) > 8


def test_only_act_order_reorders_channels():
    for fixture in FIXTURES:
        orders = [weight.order for weight in Checkpoint(DATA / fixture).quantized()]
        assert all(order is not None for order in orders) == (fixture == "gptqmodel-act-order")
        assert all(order is None for order in orders) == (fixture != "gptqmodel-act-order")


@pytest.mark.parametrize("fixture", ["llmcompressor-w8a8-static", "llmcompressor-fp8"])
def test_static_input_scales(fixture):
    checkpoint, stored = Checkpoint(DATA / fixture), load_file(DATA / fixture / "model.safetensors")
    for name in PROJECTIONS:
        scale = checkpoint[f"{name}.weight"].input_scale
        assert (scale.dtype, scale.shape) == (torch.float32, (1,))
        assert scale.load().equal(stored[f"{name}.input_scale"].float())
        assert scale.load().item() > 1e-3
    q, k, v = (checkpoint[f"model.layers.0.self_attn.{name}_proj.weight"].input_scale.load() for name in "qkv")
    assert q.equal(k)
    assert q.equal(v)


def test_other_fixtures_have_no_input_scales():
    for fixture, (kind, _) in FIXTURES.items():
        if kind[3] != "static":
            assert all(weight.input_scale is None for weight in Checkpoint(DATA / fixture).quantized())


# What we write


# By what is written: layout, format, symmetric, activations.
WRITTEN = {
    "gptq-sym": ("gptq", "int4", True, "16bit"),
    "gptq-asym": ("gptq", "int4", False, "16bit"),
    "awq-sym": ("awq", "int4", True, "16bit"),
    "awq-asym": ("awq", "int4", False, "16bit"),
    "int4-sym": ("compressed-tensors", "int4", True, "16bit"),
    "int4-asym": ("compressed-tensors", "int4", False, "16bit"),
    "int8": ("compressed-tensors", "int8", True, "16bit"),
    "int8-static": ("compressed-tensors", "int8", True, "static"),
    "int8-token": ("compressed-tensors", "int8", True, "token"),
    "fp8-static": ("compressed-tensors", "fp8", True, "static"),
    "fp8-token": ("compressed-tensors", "fp8", True, "token"),
}
written = pytest.mark.parametrize(("layout", "format", "symmetric", "activations"), WRITTEN.values(), ids=WRITTEN)


def random_weight(out, groups, group_size, format, symmetric, activations, seed) -> QuantizedWeight:
    """Every value and zero point equally likely; one group of float32 scales where the format is 8 bits wide."""
    draw = torch.Generator().manual_seed(seed)
    width = groups * group_size
    low, high = (-8, 8) if format == "int4" else (-127, 128)
    values = torch.randint(low, high, (out, width), generator=draw).to(torch.int8)
    if format == "fp8":
        values = (torch.randn((out, width), generator=draw) * 100).to(torch.float8_e4m3fn)
    groups = groups if format == "int4" else 1
    scales = torch.rand((out, groups), generator=draw) + 1e-3
    zeros = torch.randint(-8, 8, (out, groups), generator=draw).to(torch.int8)
    return QuantizedWeight(
        format,
        from_tensor(values),
        from_tensor(scales.half() if format == "int4" else scales),
        None if symmetric else from_tensor(zeros),
        activations,
        from_tensor(torch.rand(1, generator=draw)) if activations == "static" else None,
    )


def assert_equal(actual: QuantizedWeight, expected: QuantizedWeight) -> None:
    assert actual.kind == expected.kind
    for name in ("values", "scales", "zeros", "input_scale"):
        ours, theirs = getattr(actual, name), getattr(expected, name)
        assert (ours is None) == (theirs is None), name
        if ours is not None:
            assert (ours.dtype, ours.shape) == (theirs.dtype, theirs.shape), name
            assert ours.load().float().equal(theirs.load().float()), name


def read_back(layout: str, weight: QuantizedWeight, **changes) -> QuantizedWeight:
    description = FORMATS[layout].describe(weight, [], False) | changes
    result = read_quantized(json.loads(json.dumps(description)), FORMATS[layout].write("p", weight), "memory")
    assert result.keys() == {"p.weight"}
    return result["p.weight"]


@written
@given(st.integers(1, 5), st.integers(1, 4), st.integers(1, 4), st.integers(0, 2**32))
@settings(max_examples=20, deadline=None)
def test_written_weights_are_read_back(layout, format, symmetric, activations, eighths, groups, words, seed):
    weight = random_weight(8 * eighths, groups, 8 * words, format, symmetric, activations, seed)
    assert_equal(read_back(layout, weight), weight)


@pytest.mark.parametrize("part", [(0, 8, 16), (0, 4, 8), (1, 32, 64)], ids=str)
@written
def test_parts_are_parts_of_the_whole(layout, format, symmetric, activations, part, tmp_path):
    """As a rank reads them; four rows are no whole words of AWQ's, so all are read."""
    weight = random_weight(32, 3, 32, format, symmetric, activations, 0)
    write_file(tmp_path / "x.safetensors", FORMATS[layout].write("p", weight))
    tensors, _ = open_file(tmp_path / "x.safetensors")
    read = read_quantized(FORMATS[layout].describe(weight, [], False), tensors, "file")["p.weight"]
    assert_equal(read.narrow(*part), weight.narrow(*part))


@pytest.mark.parametrize("fixture", FIXTURES)
def test_rows_of_published_weights_are_rows_of_the_whole(fixture):
    for weight in Checkpoint(DATA / fixture).quantized():
        out = weight.values.shape[0]
        rows = weight.narrow(0, out // 2, out // 2)
        assert torch.equal(rows.dequantize().load(), weight.dequantize().load()[out // 2 :])


@written
def test_written_to_a_file_and_read_back(layout, format, symmetric, activations, tmp_path):
    """Every tensor is of the dtype and shape that was announced, or the writer refuses it."""
    weight = random_weight(24, 3, 32, format, symmetric, activations, 0)
    write_file(tmp_path / "x.safetensors", FORMATS[layout].write("a.b.q_proj", weight) | {"norm.weight": weight.scales})
    tensors, _ = open_file(tmp_path / "x.safetensors")
    result = read_quantized(FORMATS[layout].describe(weight, ["a.b.o_proj"], True), tensors, "file")
    assert result.keys() == {"a.b.q_proj.weight", "norm.weight"}
    assert_equal(result["a.b.q_proj.weight"], weight)
    assert result["norm.weight"].load().equal(weight.scales.load())


@pytest.mark.parametrize("layout", ["gptq", "awq", "compressed-tensors"])
@pytest.mark.parametrize("zero", range(-8, 8))
def test_every_zero_point_in_every_place(layout, zero):
    """GPTQ's are stored less one: those of 0 (here -8) borrow from the next in the word, and take it back."""
    draw = torch.Generator().manual_seed(zero + 8)
    zeros = torch.randint(-8, 8, (16, 5), generator=draw).to(torch.int8)
    zeros[:, 0] = zero
    zeros[torch.arange(5) * 3, torch.arange(5)] = zero
    weight = random_weight(16, 5, 8, "int4", False, "16bit", 0)
    weight = QuantizedWeight("int4", weight.values, weight.scales, from_tensor(zeros))
    assert read_back(layout, weight).zeros.load().equal(zeros)


def by_hand(channel: int, symmetric: bool) -> QuantizedWeight:
    """8 x 8, values -8 .. 7 rising along dimension `channel`, and zero points rising along the outputs."""
    rising = torch.arange(8, dtype=torch.int8) - 8
    values = rising.expand(8, 8).contiguous()
    zeros = None if symmetric else from_tensor(rising[:, None].contiguous())
    values = values.T.contiguous() if channel == 0 else values
    return QuantizedWeight("int4", from_tensor(values), from_tensor(torch.ones(8, 1)), zeros)


def words(tensors, name: str) -> list[str]:
    return [f"{word & 0xFFFFFFFF:08x}" for word in tensors[name].load().flatten().tolist()]


def test_words_of_gptq():
    """Along the inputs, the first in the lowest bits; 76543210 - 11111111 with borrows is 654320ff."""
    tensors = FORMATS["gptq"].write("p", by_hand(1, symmetric=False))
    assert tensors.keys() == {"p.qweight", "p.qzeros", "p.scales", "p.g_idx"}
    assert (tensors["p.qweight"].shape, words(tensors, "p.qweight")) == ((1, 8), ["76543210"] * 8)
    assert (tensors["p.qzeros"].shape, words(tensors, "p.qzeros")) == ((1, 1), ["654320ff"])
    assert tensors["p.scales"].shape == (1, 8)
    assert tensors["p.g_idx"].load().equal(torch.zeros(8, dtype=torch.int32))


def test_words_of_gptq_symmetric():
    assert words(FORMATS["gptq"].write("p", by_hand(1, symmetric=True)), "p.qzeros") == ["77777777"]


def test_words_of_awq():
    """Along the outputs, in the order 0 2 4 6 1 3 5 7 from the lowest bits."""
    tensors = FORMATS["awq"].write("p", by_hand(0, symmetric=False))
    assert tensors.keys() == {"p.qweight", "p.qzeros", "p.scales"}
    assert (tensors["p.qweight"].shape, words(tensors, "p.qweight")) == ((8, 1), ["75316420"] * 8)
    assert (tensors["p.qzeros"].shape, words(tensors, "p.qzeros")) == ((1, 1), ["75316420"])
    assert words(FORMATS["awq"].write("p", by_hand(0, symmetric=True)), "p.qzeros") == ["88888888"]


def test_words_of_compressed_tensors():
    """Weights along the inputs, zero points along the outputs."""
    tensors = FORMATS["compressed-tensors"].write("p", by_hand(1, symmetric=False))
    assert tensors.keys() == {"p.weight_packed", "p.weight_shape", "p.weight_scale", "p.weight_zero_point"}
    assert (tensors["p.weight_packed"].shape, words(tensors, "p.weight_packed")) == ((8, 1), ["76543210"] * 8)
    assert (tensors["p.weight_zero_point"].shape, words(tensors, "p.weight_zero_point")) == ((1, 1), ["76543210"])
    assert tensors["p.weight_shape"].load().tolist() == [8, 8]


def test_gptq_v2_stores_zero_points_as_they_are():
    weight = random_weight(16, 2, 16, "int4", False, "16bit", 3)
    tensors = FORMATS["gptq"].write("p", weight)
    tensors["p.qzeros"] = from_tensor(pack(weight.zeros.load().T.int() + 8))
    description = FORMATS["gptq"].describe(weight, [], False) | {"checkpoint_format": "gptq_v2"}
    assert_equal(read_quantized(description, tensors, "memory")["p.weight"], weight)


@pytest.mark.parametrize("layout", ["gptq", "awq"])
def test_group_size_of_minus_one_is_one_group_a_row(layout):
    weight = random_weight(16, 1, 48, "int4", False, "16bit", 4)
    assert_equal(read_back(layout, weight, group_size=-1), weight)


@pytest.mark.parametrize("bits", [4, 8])
@given(seed=st.integers(0, 2**32), words=st.integers(1, 9))
@settings(max_examples=60, deadline=None)
def test_words_are_unpacked_and_packed(bits, seed, words):
    draw = torch.Generator().manual_seed(seed)
    packed = torch.randint(-(2**31), 2**31, (3, words), generator=draw).to(torch.int32)
    values = unpack(packed, bits)
    assert values.shape == (3, words * 32 // bits)
    assert values.min() >= 0
    assert values.max() < 2**bits
    assert pack(values, bits).equal(packed)


def test_the_first_value_is_in_the_lowest_bits():
    assert unpack(torch.tensor([0x76543210, -1, -0x80000000], dtype=torch.int32)).view(3, 8).tolist() == [
        [0, 1, 2, 3, 4, 5, 6, 7],
        [15] * 8,
        [0] * 7 + [8],
    ]
    assert unpack(torch.tensor([0x04030281], dtype=torch.int32), 8).tolist() == [0x81, 2, 3, 4]


# What is refused


def change_config(folder, change):
    config = json.loads((folder / "config.json").read_text())
    change(config["quantization_config"])
    (folder / "config.json").write_text(json.dumps(config))


def change_tensors(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


@pytest.fixture
def copy(tmp_path):
    """A function that copies a fixture into a folder to spoil."""

    def copied(fixture):
        for file in ("config.json", "model.safetensors"):
            shutil.copyfile(DATA / fixture / file, tmp_path / file)
        return tmp_path

    return copied


def refused(folder, message):
    """It is refused with one line, which names the folder and matches."""
    with pytest.raises(UserError, match=message) as caught:
        Checkpoint(folder)
    assert str(caught.value).startswith(str(folder))
    assert "\n" not in str(caught.value)


def named(value):
    return value if isinstance(value, str) else ""


def test_scales_of_a_cache_are_ignored(copy):
    """The recipe's own calibration gives the cache's scales."""
    folder, more = copy("llmcompressor-w8a8-static"), {"k_scale": torch.ones(1), "v_scale": torch.ones(1)}
    change_tensors(
        folder, lambda tensors: tensors.update({f"model.layers.0.self_attn.{n}": t for n, t in more.items()})
    )
    assert Checkpoint(folder).tensors.keys() == Checkpoint(DATA / "llmcompressor-w8a8-static").tensors.keys()


def test_a_kept_projection_stays_in_16_bits(copy):
    folder = copy("llmcompressor-w8a8-static")
    dense = torch.randn(64, 128).bfloat16()

    def keep(tensors):
        tensors[f"{O_PROJ}.weight"] = dense
        for part in ("weight_scale", "input_scale"):
            del tensors[f"{O_PROJ}.{part}"]

    change_tensors(folder, keep)
    checkpoint = Checkpoint(folder)
    assert len(checkpoint.quantized()) == len(PROJECTIONS) - 1
    assert checkpoint.dequantized(f"{O_PROJ}.weight").load().equal(dense)


@pytest.mark.parametrize(
    ("fixture", "file", "content"),
    [
        ("gptqmodel-sym", "quantize_config.json", {"bits": 4, "group_size": 64, "desc_act": False, "sym": True}),
        ("autoawq-gemm", "quant_config.json", {"w_bit": 4, "q_group_size": 64, "zero_point": True, "version": "GEMM"}),
    ],
)
def test_old_checkpoints_say_it_in_a_file_of_their_own(copy, fixture, file, content):
    folder = copy(fixture)
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    (folder / file).write_text(json.dumps(content))
    name = f"{O_PROJ}.weight"
    assert Checkpoint(folder).dequantized(name).load().equal(load_file(DATA / fixture / "expected.safetensors")[name])


# Other ways to say the same


def read_the_same(folder, fixture):
    """Every weight is what its own package dequantizes."""
    checkpoint = Checkpoint(folder)
    assert checkpoint[f"{O_PROJ}.weight"].kind == FIXTURES[fixture][0]
    for name, expected in load_file(DATA / fixture / "expected.safetensors").items():
        assert checkpoint.dequantized(name).load().equal(expected), name
    assert checkpoint.tensors.keys() == Checkpoint(DATA / fixture).tensors.keys()


def as_strings(value):
    if isinstance(value, dict):
        return {key: as_strings(x) for key, x in value.items()}
    return str(value) if type(value) is int else value


def without_defaults(config):
    """Every key that compressed-tensors' own classes would fill in with the same value is left out."""
    defaults = {"num_bits": 8, "type": "int", "symmetric": True, "dynamic": False}
    (scheme,) = config["config_groups"].values()
    for part in ("weights", "input_activations"):
        if scheme[part] is None:
            del scheme[part]
            continue
        kept = {key: x for key, x in scheme[part].items() if x is not None and (key, x) not in defaults.items()}
        strategy = kept["strategy"]
        if strategy == "channel":
            kept["group_size"] = -1
        if strategy != "token":
            del kept["strategy"]
        scheme[part] = kept


@pytest.mark.parametrize("fixture", FIXTURES)
def test_numbers_as_strings(copy, fixture):
    folder = copy(fixture)
    change_config(folder, lambda config: config.update(as_strings(config)))
    read_the_same(folder, fixture)


@pytest.mark.parametrize("fixture", [name for name in FIXTURES if name.startswith("llmcompressor")])
def test_keys_left_out(copy, fixture):
    folder = copy(fixture)
    change_config(folder, without_defaults)
    read_the_same(folder, fixture)


@pytest.mark.parametrize(
    ("fixture", "values"),
    [
        ("gptqmodel-sym", {"desc_act": True}),
        ("gptqmodel-sym", {"static_groups": True, "true_sequential": False, "damp_percent": 0.01, "lm_head": False}),
        ("gptqmodel-asym", {"checkpoint_format": None, "is_marlin_format": False, "model_file_base_name": "model"}),
        ("autoawq-gemm", {"version": None, "modules_to_not_convert": ["lm_head"], "exllama_config": None}),
        ("llmcompressor-int8", {"ignore": ["re:.*lm_head"], "quantization_status": "compressed"}),
        ("llmcompressor-int8", {"kv_cache_scheme": {"num_bits": 8, "type": "float"}, "sparsity_config": None}),
        ("llmcompressor-int8", {"sparsity_config": {"format": "dense"}, "global_compression_ratio": 1.2}),
    ],
)
def test_keys_that_change_nothing(copy, fixture, values):
    folder = copy(fixture)
    change_config(folder, lambda config: config.update(values))
    read_the_same(folder, fixture)


@pytest.mark.parametrize("actorder", ["weight", "static", False])
def test_an_order_of_rounding_alone(copy, actorder):
    folder = copy("llmcompressor-int4-asym")
    change_config(folder, weights(actorder=actorder))
    read_the_same(folder, "llmcompressor-int4-asym")


@pytest.mark.parametrize("fixture", [name for name in FIXTURES if name.startswith("llmcompressor")])
def test_zero_points_that_are_zero_and_scales_that_nothing_uses(copy, fixture):
    """The first compressed-tensors wrote them; the scales are of outputs that no scheme rounds."""
    folder, zero = copy(fixture), torch.zeros(1, dtype=torch.int8)
    unused = {"input_zero_point": zero, "output_scale": torch.ones(1), "output_zero_point": zero + 3}
    if FIXTURES[fixture][0][2]:
        unused["weight_zero_point"] = torch.zeros(64, 2, dtype=torch.int8)
    change_tensors(folder, lambda tensors: tensors.update({f"{O_PROJ}.{n}": x.clone() for n, x in unused.items()}))
    read_the_same(folder, fixture)


def test_an_input_zero_point_that_nothing_uses(copy):
    folder = copy("llmcompressor-int8")
    change_tensors(folder, put(f"{O_PROJ}.input_zero_point", torch.ones(1, dtype=torch.int8)))
    read_the_same(folder, "llmcompressor-int8")


def test_zero_points_that_are_not_packed(copy):
    """As compressed-tensors wrote them until 2025."""
    fixture = "llmcompressor-int4-asym"
    folder, plain = copy(fixture), Checkpoint(DATA / fixture)
    zeros = {name: plain[f"{name}.weight"].zeros.load() for name in PROJECTIONS}
    change_tensors(folder, lambda tensors: tensors.update({f"{n}.weight_zero_point": z for n, z in zeros.items()}))
    read_the_same(folder, fixture)


BIASES = {  # of the configuration: which projections have one
    "none": ({}, ()),
    "attention": ({"attention_bias": True}, ("q", "k", "v", "o")),
    "attention but its output": (
        {"attention_bias": True, "trtbuild": {"attention_out_bias": False}},
        ("q", "k", "v"),
    ),
    "all": ({"attention_bias": True, "mlp_bias": True}, ("q", "k", "v", "o", "gate", "up", "down")),
}


@pytest.mark.parametrize("fixture", ["gptqmodel-sym", "autoawq-gemm"])
@pytest.mark.parametrize(("changes", "expected"), BIASES.values(), ids=BIASES)
def test_biases_of_zeros_are_kept_where_the_model_has_them(copy, fixture, changes, expected):
    folder, plain = copy(fixture), Checkpoint(DATA / fixture)
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))
    sizes = {name: plain[f"{name}.weight"].values.shape[0] for name in PROJECTIONS}
    biases = {f"{name}.bias": torch.zeros(size).half() for name, size in sizes.items()}
    change_tensors(folder, lambda tensors: tensors.update(biases))
    kept = {name for name in Checkpoint(folder).tensors if name.endswith(".bias")}
    assert kept == {f"{name}.bias" for name in PROJECTIONS if name.endswith(tuple(f".{x}_proj" for x in expected))}


def test_a_bias_that_the_model_does_not_have(copy):
    folder = copy("gptqmodel-sym")
    change_tensors(folder, put(f"{O_PROJ}.bias", torch.tensor([0.0] * 63 + [1e-3]).half()))
    refused(folder, rf"{O_PROJ}\.bias is no part of the model")


# Act-order: channels of a group lie anywhere


def reordered(out: int, groups: int, group_size: int, seed: int):
    """Integers of each channel `[out, in]`, scales and zeros `[out, groups]`, each channel's group, and the weight."""
    draw = torch.Generator().manual_seed(seed)
    g_idx = (torch.arange(groups * group_size) // group_size)[torch.randperm(groups * group_size, generator=draw)]
    q = torch.randint(0, 16, (out, groups * group_size), generator=draw)
    zeros, scales = torch.randint(0, 16, (out, groups), generator=draw), torch.rand((out, groups), generator=draw)
    return q, scales, zeros, g_idx.int(), scales.double()[:, g_idx] * (q - zeros[:, g_idx])


def check_reordered(weight: QuantizedWeight, g_idx: torch.Tensor, expected: torch.Tensor) -> None:
    """Neighbours are of one group, and the weight has its channels where they belong."""
    order = weight.order.load()
    assert (order.dtype, weight.order.shape) == (torch.int32, (len(g_idx),))
    assert g_idx[order].equal(g_idx.sort().values)
    assert weight.values.load().shape == weight.values.shape
    assert (weight.dequantize().load().double() - expected).abs().max() < 1e-6


@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("desc_act", [True, False])
def test_act_order_of_gptq(version, desc_act):
    """The groups are what `g_idx` says, as in GPTQModel, whatever the configuration does."""
    q, scales, zeros, g_idx, expected = reordered(24, 4, 16, 1)
    tensors = {
        "p.qweight": pack(q).T.contiguous(),
        "p.qzeros": pack(zeros.T) - (0x11111111 if version == "gptq" else 0),
        "p.scales": scales.T.contiguous(),
        "p.g_idx": g_idx,
    }
    config = {"quant_method": "gptq", "bits": 4, "group_size": 16, "sym": False, "desc_act": desc_act}
    lazy = {name: from_tensor(tensor) for name, tensor in tensors.items()}
    check_reordered(read_quantized(config | {"checkpoint_format": version}, lazy, "x")["p.weight"], g_idx, expected)


def packed_in_groups(seed: int):
    """A configuration with `actorder`, tensors of product `p`, and what they mean, by compressed-tensors."""
    q, scales, zeros, g_idx, expected = reordered(24, 4, 16, seed)
    tensors = {
        "p.weight_packed": pack(q),
        "p.weight_shape": torch.tensor([24, 64]),
        "p.weight_scale": scales,
        "p.weight_zero_point": pack(zeros.T).T.contiguous(),
        "p.weight_g_idx": g_idx,
    }
    scheme = {"num_bits": 4, "symmetric": False, "group_size": 16, "actorder": "group"}
    config = {"quant_method": "compressed-tensors", "config_groups": {"group_0": {"weights": scheme}}}
    return config, {name: from_tensor(tensor) for name, tensor in tensors.items()}, g_idx, expected


def test_act_order_of_compressed_tensors():
    config, tensors, g_idx, expected = packed_in_groups(2)
    check_reordered(read_quantized(config, tensors, "x")["p.weight"], g_idx, expected)


def test_an_order_that_was_never_set():
    """compressed-tensors' first value of `weight_g_idx`, -1, stays where nothing was reordered."""
    config, tensors, *_ = packed_in_groups(2)
    plain = {name: tensor for name, tensor in tensors.items() if name != "p.weight_g_idx"}
    tensors["p.weight_g_idx"] = from_tensor(torch.full((64,), -1, dtype=torch.int32))
    weight = read_quantized(config, tensors, "x")["p.weight"]
    config["config_groups"]["group_0"]["weights"]["actorder"] = None
    assert weight.order is None
    assert_equal(weight, read_quantized(config, plain, "x")["p.weight"])


@pytest.mark.parametrize("group_size", [-1, 48])
def test_act_order_of_one_group_is_none(group_size):
    weight = random_weight(16, 1, 48, "int4", False, "16bit", 4)
    read = read_back("gptq", weight, group_size=group_size, desc_act=True)
    assert read.order is None
    assert_equal(read, weight)


def test_act_order_needs_the_groups_of_the_channels(copy):
    folder = copy("gptqmodel-sym")
    change_config(folder, top(desc_act=True))
    change_tensors(folder, drop(f"{O_PROJ}.g_idx"))
    refused(folder, rf"lacks '{O_PROJ}\.g_idx'")


def group(**values):
    return lambda config: config["config_groups"]["group_0"].update(values)


def weights(**values):
    return lambda config: config["config_groups"]["group_0"]["weights"].update(values)


def activations(**values):
    return lambda config: config["config_groups"]["group_0"]["input_activations"].update(values)


def top(**values):
    return lambda config: config.update(values)


def second_group(config):
    config["config_groups"]["group_1"] = config["config_groups"]["group_0"]


CONFIGS = [
    ("gptqmodel-sym", top(bits=3), "GPTQ with 3 bits is not supported; 4 bits are"),
    ("gptqmodel-asym", top(bits=8), "GPTQ with 8 bits is not supported; 4 bits are"),
    ("gptqmodel-sym", top(checkpoint_format="marlin"), "checkpoint_format 'marlin' is not supported; .* gptq_v2"),
    ("gptqmodel-asym", top(sym=True), r"sym: true, but model\.layers\..*\.qzeros are not all 8"),
    ("gptqmodel-sym", top(is_marlin_format=True), "checkpoint_format 'marlin' is not supported"),
    ("gptqmodel-sym", top(checkpoint_format="gptq_v2"), r"sym: true, but .*\.qzeros are not all 8"),
    ("gptqmodel-sym", top(group_size=32), r"qzeros is int32 \[2, 8\]; int32 \[4, 8\] is expected"),
    (
        "gptqmodel-sym",
        top(quant_method="bitsandbytes"),
        "quant_method 'bitsandbytes' is not supported; supported are gptq",
    ),
    ("gptqmodel-sym", lambda config: config.pop("quant_method"), "quant_method None is not supported"),
    ("gptqmodel-sym", lambda config: config.pop("bits"), "the quantized checkpoint lacks 'bits'"),
    ("autoawq-gemm", top(version="gemv"), "AWQ version 'gemv' with 4 bits is not supported; gemm with 4 bits is"),
    ("autoawq-gemm", top(version="GEMV_fast"), "AWQ version 'gemv_fast' with 4 bits is not supported"),
    ("autoawq-gemm", top(bits=3), "AWQ version 'gemm' with 3 bits is not supported"),
    ("autoawq-gemm", top(bits=8), "AWQ version 'gemm' with 8 bits is not supported"),
    ("autoawq-gemm", top(zero_point=False), r"zero_point: false, but .*\.qzeros are not all 8"),
    ("autoawq-gemm", top(group_size=32), r"qzeros is int32 \[2, 8\]; int32 \[4, 8\] is expected"),
    ("llmcompressor-int4-sym", weights(actorder="group"), r"lacks '.*\.weight_g_idx'"),
    ("llmcompressor-int4-asym", weights(num_bits=3), "weights int3 per group with activations None are not supported"),
    ("llmcompressor-int4-sym", weights(group_size=32), r"weight_scale is bfloat16 \[64, 2\]; .* \[64, 4\] is expected"),
    ("llmcompressor-int8", weights(strategy="group", group_size=64), "weights int8 per group .* are not supported"),
    ("llmcompressor-int8", weights(symmetric=False), "weights int8 per channel .* are not supported"),
    ("llmcompressor-int8", group(input_activations={}), "the quantized checkpoint lacks '.*'"),
    ("llmcompressor-w8a8-static", activations(symmetric=False), "weights int8 per channel .* are not supported"),
    ("llmcompressor-w8a8-dynamic", activations(dynamic=False), r"activations \('int', 8, 'token'\) are not supported"),
    ("llmcompressor-w8a8-dynamic", activations(num_bits=4), r"activations \('int', 4, 'token'\) are not supported"),
    ("llmcompressor-fp8", activations(dynamic=True), r"activations \('float', 8, 'tensor'\) are not supported"),
    ("llmcompressor-fp8", activations(strategy="token"), r"\('float', 8, 'token'\) are not supported"),
    ("llmcompressor-fp8-dynamic", activations(type="int"), r"\('int', 8, 'token'\) are not supported"),
    ("llmcompressor-fp8-dynamic", activations(symmetric=False), r"\('float', 8, 'token'\) are not supported"),
    ("llmcompressor-fp8", group(input_activations=None), "weights float8 per tensor with activations None are not"),
    (
        "llmcompressor-fp8",
        weights(type="int"),
        "weights int8 per tensor with activations .*'float', 8, .* not supported",
    ),
    ("gptqmodel-sym", lambda config: config.pop("group_size"), "lacks 'group_size'"),
    ("gptqmodel-sym", top(group_size=None), "group_size"),
    ("autoawq-gemm", lambda config: config.pop("group_size"), "group_size"),
    ("llmcompressor-int4-sym", weights(group_size=None), "group_size"),
    ("llmcompressor-int8", group(weights=None), "weights"),
    ("llmcompressor-int8", top(transform_config={"config_groups": {"R4": {"type": "hadamard"}}}), "transform_config"),
    ("llmcompressor-int8", top(sparsity_config={"format": "sparse-24-bitmask"}), "sparsity_config is not supported"),
    ("llmcompressor-int8", second_group, "2 config_groups are not supported; all weights must be quantized alike"),
    ("llmcompressor-int8", top(config_groups={}), "0 config_groups are not supported"),
    (
        "llmcompressor-int8",
        lambda config: config.pop("config_groups"),
        "the quantized checkpoint lacks 'config_groups'",
    ),
]


@pytest.mark.parametrize(("fixture", "change", "message"), CONFIGS, ids=named)
def test_configurations_that_are_not_supported(copy, fixture, change, message):
    folder = copy(fixture)
    change_config(folder, change)
    refused(folder, message)


def put(name, tensor):
    return lambda tensors: tensors.update({name: tensor})


def drop(name):
    return lambda tensors: tensors.pop(name)


def to(name, dtype):
    return lambda tensors: tensors.update({name: tensors[name].to(dtype)})


REORDERED = (torch.arange(128, dtype=torch.int32) // 64).flip(0)
TENSORS = [
    (
        "gptqmodel-sym",
        put(f"{O_PROJ}.g_idx", torch.zeros(128, dtype=torch.int32)),
        r"o_proj\.g_idx does not give each of 2 groups 64 input channels",
    ),
    ("gptqmodel-sym", put(f"{O_PROJ}.g_idx", REORDERED + 1), r"o_proj\.g_idx does not give each of 2 groups 64"),
    ("gptqmodel-sym", put(f"{O_PROJ}.g_idx", REORDERED[:8].clone()), r"o_proj\.g_idx is int32 \[8\]; .* \[128\] is"),
    ("gptqmodel-asym", drop(f"{O_PROJ}.qzeros"), r"lacks 'model\.layers\.0\.self_attn\.o_proj\.qzeros'"),
    ("gptqmodel-asym", drop(f"{O_PROJ}.scales"), r"lacks '.*o_proj\.scales'"),
    ("gptqmodel-asym", drop(f"{O_PROJ}.qweight"), r"tensor .*o_proj\.weight is missing; .* shape \(64, 128\)"),
    ("gptqmodel-sym", put(f"{O_PROJ}.scales", torch.ones(64, 2).half()), r"scales is float16 \[64, 2\]; .* \[2, 64\]"),
    (
        "gptqmodel-sym",
        to(f"{O_PROJ}.scales", torch.int32),
        r"scales is int32 \[2, 64\]; float16 or bfloat16 or float32",
    ),
    (
        "gptqmodel-sym",
        to(f"{O_PROJ}.qweight", torch.int64),
        r"qweight is int64 \[16, 64\]; int32 \[16, 64\] is expected",
    ),
    ("gptqmodel-sym", put(f"{O_PROJ}.qzeros", torch.ones(2, 64).int()), r"qzeros is int32 \[2, 64\]; int32 \[2, 8\]"),
    ("gptqmodel-sym", put(f"{O_PROJ}.qweight", torch.ones(8, 64).int()), r"o_proj\.qzeros is int32 \[2, 8\]"),
    ("gptqmodel-sym", put("model.layers.0.extra", torch.ones(3)), r"model\.layers\.0\.extra is no part of the model"),
    ("autoawq-gemm", drop(f"{O_PROJ}.qzeros"), r"lacks 'model\.layers\.0\.self_attn\.o_proj\.qzeros'"),
    ("autoawq-gemm", drop(f"{O_PROJ}.scales"), r"lacks '.*o_proj\.scales'"),
    ("autoawq-gemm", put(f"{O_PROJ}.scales", torch.ones(2, 32).half()), r"scales is float16 \[2, 32\]; .* \[2, 64\]"),
    ("autoawq-gemm", to(f"{O_PROJ}.scales", torch.int8), r"scales is int8 \[2, 64\]; float16 or bfloat16 or float32"),
    ("autoawq-gemm", to(f"{O_PROJ}.qzeros", torch.float32), r"qzeros is float32 \[2, 8\]; int32 \[2, 8\] is expected"),
    (
        "autoawq-gemm",
        to(f"{O_PROJ}.qweight", torch.float32),
        r"qweight is float32 \[128, 8\]; int32 \[128, 8\] is expected",
    ),
    (
        "llmcompressor-int4-sym",
        put(f"{O_PROJ}.weight_scale", torch.ones(64, 3).bfloat16()),
        r"weight_scale is bfloat16 \[64, 3\]; .* \[64, 2\] is expected",
    ),
    ("llmcompressor-int4-sym", to(f"{O_PROJ}.weight_packed", torch.int64), r"weight_packed is int64 \[64, 16\]; int32"),
    ("llmcompressor-int4-sym", drop(f"{O_PROJ}.weight_packed"), r"lacks '.*o_proj\.weight'"),
    ("llmcompressor-int4-sym", drop(f"{O_PROJ}.weight_scale"), r"tensor .*o_proj\.weight is missing"),
    ("llmcompressor-int4-asym", drop(f"{O_PROJ}.weight_zero_point"), r"lacks '.*o_proj\.weight_zero_point'"),
    (
        "llmcompressor-int4-asym",
        put(f"{O_PROJ}.weight_zero_point", torch.zeros(64, 1, dtype=torch.int8)),
        r"weight_zero_point is int8 \[64, 1\]; int8 \[64, 2\] is expected",
    ),
    (
        "llmcompressor-int4-asym",
        put(f"{O_PROJ}.weight_zero_point", torch.zeros(64, 2, dtype=torch.int32)),
        r"weight_zero_point is int32 \[64, 2\]; int32 \[8, 2\] is expected",
    ),
    (
        "llmcompressor-int4-sym",
        put(f"{O_PROJ}.weight_zero_point", torch.ones(64, 2, dtype=torch.int8)),
        r"symmetric: true, but .*o_proj\.weight_zero_point is not zero",
    ),
    (
        "llmcompressor-w8a8-static",
        put(f"{O_PROJ}.input_zero_point", torch.ones(1, dtype=torch.int8)),
        r"symmetric: true, but .*o_proj\.input_zero_point is not zero",
    ),
    ("llmcompressor-w8a8-static", drop(f"{O_PROJ}.input_scale"), r"lacks '.*o_proj\.input_scale'"),
    ("llmcompressor-w8a8-static", to(f"{O_PROJ}.weight", torch.int16), r"weight is int16 \[64, 128\]; int8"),
    ("llmcompressor-w8a8-static", drop(f"{O_PROJ}.weight_scale"), r"o_proj"),
    ("llmcompressor-fp8", drop(f"{O_PROJ}.weight_scale"), r"o_proj"),
    ("llmcompressor-fp8", to(f"{O_PROJ}.weight", torch.float8_e5m2), r"has the dtype F8_E5M2"),
    ("llmcompressor-fp8", to(f"{O_PROJ}.weight", torch.int8), r"weight is int8 \[64, 128\]; float8_e4m3fn"),
    (
        "llmcompressor-fp8",
        put(f"{O_PROJ}.weight_scale", torch.ones(64, 1)),
        r"weight_scale is float32 \[64, 1\]; .* \[1\]",
    ),
]


@pytest.mark.parametrize(("fixture", "change", "message"), TENSORS, ids=named)
def test_tensors_that_do_not_fit(copy, fixture, change, message):
    folder = copy(fixture)
    change_tensors(folder, change)
    refused(folder, message)


@pytest.mark.parametrize("fixture", FIXTURES)
@pytest.mark.parametrize(("odd", "beside"), [("self_attn.k", "self_attn.q"), ("mlp.up", "mlp.gate")])
def test_products_that_are_quantized_in_part(copy, fixture, odd, beside):
    """q, k and v run as one, and so do gate and up: one of them in 16 bits cannot be served."""
    folder = copy(fixture)
    name = f"model.layers.1.{odd}_proj"
    shape = Checkpoint(DATA / fixture).dequantized(f"{name}.weight").shape

    def keep(tensors):
        for part in [part for part in tensors if part.startswith(f"{name}.")]:
            del tensors[part]
        tensors[f"{name}.weight"] = torch.zeros(shape).half()

    change_tensors(folder, keep)
    refused(folder, re.escape(f"model.layers.1.{beside}_proj and {name} are computed as one product"))
