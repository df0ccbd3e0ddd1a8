"""INT4 weights with groups against float64, plain and as a CPU's kernel wants them."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import error

from trtbuild.linear.int4 import Int4Linear, dequantize, pack, unpack
from trtbuild.network import Network

CPU = torch.device("cpu")
# Norm of the difference over the norm of the float64 result, for inputs that are already rounded to the dtype.
TOLERANCE = {torch.float32: 1e-6, torch.float16: 1.5e-3, torch.bfloat16: 8e-3}
dtypes = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
symmetries = pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])


PARAMETERS = ("x", "weight", "scales", "zeros", "bias")


def prepare(inputs: list[torch.Tensor | None]) -> dict[str, torch.Tensor]:
    """The constants among the operation's inputs, as a CPU wants them."""
    constants = dict(zip(PARAMETERS[1:], inputs[1:], strict=True))
    return Int4Linear().prepare(CPU, **{name: x for name, x in constants.items() if x is not None})


def case(rows: int, groups: int, group_size: int, outer: int, symmetric: bool, bias: bool, dtype: torch.dtype):
    """Random inputs of the operation; what it means in float64; the same of magnitudes, where nothing cancels."""
    inner = groups * group_size
    x, values = torch.randn(rows, inner).to(dtype), torch.randint(-8, 8, (outer, inner), dtype=torch.int8)
    scales = (torch.rand(outer, groups) * 0.02 + 1e-3).to(dtype)
    zeros = torch.zeros(outer, groups, dtype=torch.int8)
    if not symmetric:
        zeros = torch.randint(-8, 8, (outer, groups), dtype=torch.int8)
    b = torch.randn(outer).to(dtype) if bias else torch.zeros(outer)
    inputs = [x, pack(values), scales, None if symmetric else zeros, b if bias else None]
    x, values, scales, zeros, b = (t.double().numpy() for t in (x, values, scales, zeros, b))
    scales, zeros = (np.repeat(t, group_size, 1) for t in (scales, zeros))
    weight = (values - zeros) * scales
    magnitude = np.abs(x) @ ((np.abs(values) + np.abs(zeros)) * scales).T + np.abs(b)
    return inputs, x @ weight.T + b, magnitude


@dtypes
@symmetries
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("groups", [1, 3, 16])
@pytest.mark.parametrize("rows", [1, 2, 3, 16, 100])
def test_reference_and_portable(rows, groups, bias, symmetric, dtype):
    inputs, expected, _ = case(rows, groups, 96 // groups, 64, symmetric, bias, dtype)
    given = [t for t in inputs if t is not None]
    before = [t.clone() for t in given]
    op = Int4Linear()
    reference, portable = op.reference(*inputs), op.portable(None, *inputs)
    prepared = op.portable(None, inputs[0], **prepare(inputs))
    for result in (reference, portable, prepared):
        assert result.dtype == dtype
        assert error(result, expected) < TOLERANCE[dtype]
        assert error(result, reference.double().numpy()) < TOLERANCE[dtype]
    assert all(t.equal(b) for t, b in zip(given, before, strict=True))


@given(
    st.integers(0, 40),
    st.integers(1, 5),
    st.integers(1, 40),
    st.integers(1, 70),
    st.booleans(),
    st.booleans(),
    st.sampled_from(list(TOLERANCE)),
)
@settings(max_examples=100, deadline=None)
def test_any_shape(rows, groups, group_size, outer, symmetric, bias, dtype):
    """Odd group sizes too, of an even number of channels. The bound is absolute: a product may cancel."""
    groups += groups * group_size % 2
    inputs, expected, magnitude = case(rows, groups, group_size, outer, symmetric, bias, dtype)
    op, prepared = Int4Linear(), prepare(inputs)
    for result in (op.reference(*inputs), op.portable(None, *inputs), op.portable(None, inputs[0], **prepared)):
        assert (np.abs(result.double().numpy() - expected) <= TOLERANCE[dtype] * magnitude + 1e-6).all()


@symmetries
@pytest.mark.parametrize("rows", [5, 16])  # beside 64 outputs few, which follow the weight's order, and many
def test_weights_wider_than_a_block(rows, symmetric, monkeypatch):
    """The weight is widened a few rows at a time, the last time fewer."""
    monkeypatch.setattr("trtbuild.linear.blockwise.BLOCK_ELEMENTS", 96 * 9)
    inputs, expected, _ = case(rows, 3, 32, 64, symmetric, True, torch.float32)
    assert error(Int4Linear().portable(None, *inputs), expected) < 1e-6


@symmetries
@pytest.mark.parametrize(
    ("groups", "group_size", "kernel_size"),
    [(2, 32, 32), (1, 64, 64), (2, 128, 128), (3, 96, 32), (1, 160, 32), (2, 256, 256), (1, 512, 256), (2, 1024, 256)],
)
@pytest.mark.parametrize("outer", [16, 48, 128])
def test_prepared_for_a_cpu_in_bfloat16_keeps_four_bits(outer, groups, group_size, kernel_size, symmetric):
    """Half a byte a weight, and a scale and an offset in bfloat16 for every group that the kernel knows."""
    width = groups * group_size
    for rows in (1, 2, 3, 16, 100):
        inputs, expected, _ = case(rows, groups, group_size, outer, symmetric, True, torch.bfloat16)
        prepared = prepare(inputs)
        scales = prepared["scales"]
        assert prepared["weight"].nbytes == outer * width // 2
        assert (scales.dtype, scales.shape) == (torch.bfloat16, (width // kernel_size, outer, 2))
        assert len(prepared) == 3 if symmetric else 4
        assert error(Int4Linear().portable(None, inputs[0], **prepared), expected) < TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize(
    ("group_size", "outer", "dtype"),
    [
        (48, 64, torch.bfloat16),
        (16, 64, torch.bfloat16),
        (64, 40, torch.bfloat16),
        (64, 64, torch.float16),
        (64, 64, torch.float32),
    ],
)
def test_left_as_it_is_where_the_kernel_does_not_serve(group_size, outer, dtype):
    inputs, _, _ = case(1, 2, group_size, outer, False, True, dtype)
    prepared = prepare(inputs)
    assert all(prepared[name] is x for name, x in zip(PARAMETERS[1:], inputs[1:], strict=True))


def test_the_even_channel_is_in_the_low_nibble():
    values = torch.tensor([[0, 1, -1, 7, -8, 3]], dtype=torch.int8)
    assert pack(values).tolist() == [[0x10, 0x7F, 0x38]]
    assert unpack(torch.tensor([0x10, 0x7F, 0x38], dtype=torch.uint8)).tolist() == values[0].tolist()


def test_every_byte_is_unpacked_and_packed():
    everything = torch.arange(256, dtype=torch.uint8)
    assert pack(unpack(everything)).equal(everything)
    assert sorted(map(tuple, unpack(everything).view(-1, 2).tolist())) == [
        (a, b) for a in range(-8, 8) for b in range(-8, 8)
    ]


@given(st.lists(st.integers(-8, 7), min_size=2, max_size=40).filter(lambda row: len(row) % 2 == 0))
@settings(max_examples=60, deadline=None)
def test_packing_is_undone(row):
    values = torch.tensor([row, row[::-1]], dtype=torch.int8)
    packed = pack(values)
    assert packed.nbytes == values.nbytes // 2
    assert unpack(packed).equal(values)


def test_dequantized_by_hand():
    weight, scales = pack(torch.tensor([[1, -2, 7, -8]], dtype=torch.int8)), torch.tensor([[0.5, 2.0]])
    assert dequantize(weight, scales).tolist() == [[0.5, -1, 14, -16]]
    zeros = torch.tensor([[-8, 7]], dtype=torch.int8)
    assert dequantize(weight, scales, zeros).tolist() == [[4.5, 3, 0, -30]]


@symmetries
@dtypes
def test_inferred_shape(dtype, symmetric):
    network = Network()
    x, w = network.input("x", dtype, ("tokens", 8)), network.input("w", torch.uint8, (5, 4))
    s, b = network.input("s", dtype, (5, 2)), network.input("b", dtype, (5,))
    zeros = None if symmetric else network.input("z", torch.int8, (5, 2))
    for bias in (None, b):
        y = network.add(Int4Linear(), x=x, weight=w, scales=s, zeros=zeros, bias=bias)
        assert (y.dtype, y.shape) == (dtype, ("tokens", 5))


@pytest.mark.parametrize(
    "change",
    [
        {"w": (torch.uint8, (5, 8))},
        {"w": (torch.uint8, (6, 4))},
        {"w": (torch.int8, (5, 4))},
        {"s": (torch.float32, (5, 2))},
        {"s": (torch.float16, (5, 3))},
        {"s": (torch.float16, (2, 5))},
        {"z": (torch.int8, (5, 1))},
        {"z": (torch.uint8, (5, 2))},
        {"z": (torch.float16, (5, 2))},
        {"b": (torch.float16, (8,))},
        {"b": (torch.float32, (5,))},
    ],
    ids=str,
)
def test_refuses_another_width_dtype_scale_zero_or_bias(change):
    right = {
        "x": (torch.float16, ("tokens", 8)),
        "w": (torch.uint8, (5, 4)),
        "s": (torch.float16, (5, 2)),
        "z": (torch.int8, (5, 2)),
        "b": (torch.float16, (5,)),
    }
    network = Network()
    x, w, s, z, b = (network.input(name, *spec) for name, spec in (right | change).items())
    with pytest.raises(ValueError, match=r"Int4Linear\(\) of Tensor\(name='x'"):
        network.add(Int4Linear(), x=x, weight=w, scales=s, zeros=z, bias=b)
