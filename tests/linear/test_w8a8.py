"""INT8 weights and activations against the integers that they are, multiplied exactly."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import error

from trtbuild.linear import w8a8
from trtbuild.linear.w8a8 import W8A8Linear
from trtbuild.network import Network
from trtbuild.tensors.cpu import multiplies

STATIC, TOKEN = W8A8Linear("int8", "static"), W8A8Linear("int8", "token")
# Norm of the difference over the norm of the exact result: rounding to the dtype, since the integers are the same.
TOLERANCE = {torch.float32: 3e-7, torch.float16: 5e-4, torch.bfloat16: 4e-3}
dtypes = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
ways = pytest.mark.parametrize("activations", ["static", "token"])
# Whether a CPU multiplies integers, as this one does or not.
products = pytest.mark.parametrize("integers", [False, True] if multiplies(torch.int8) else [False])


def exact(x, weight, scale, input_scale=None, bias=None) -> np.ndarray:
    """The operation in numpy: quotients in float32 as they are defined, the product of integers in int64."""
    x, weight, scale = x.float().numpy(), weight.numpy(), scale.numpy()
    if input_scale is None:
        s = np.abs(x).max(1, keepdims=True) / np.float32(127)
        s[s == 0] = 1
    else:
        s = input_scale.numpy()
    integers = np.clip(np.rint(x / s), -128, 127).astype(np.int64)
    product = (
        (integers @ weight.T.astype(np.int64)).astype(np.float64) * s.astype(np.float64) * scale.astype(np.float64)
    )
    return product if bias is None else product + bias.double().numpy()


def case(rows: int, inner: int, outer: int, bias: bool, activations: str, dtype: torch.dtype) -> list:
    """Random inputs of the operation; a static scale saturates the largest activations."""
    inputs = [torch.randn(rows, inner).to(dtype), torch.randint(-128, 128, (outer, inner), dtype=torch.int8)]
    inputs.append(10 ** (torch.rand(outer) * 2 - 4))
    inputs.append(None if activations == "token" else torch.rand(1) * 0.01 + 0.01)
    return inputs + ([torch.randn(outer).to(dtype)] if bias else [])


@dtypes
@ways
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, 2, 3, 16, 100])
@products
def test_reference_and_portable(integers, rows, bias, activations, dtype, monkeypatch):
    monkeypatch.setattr(w8a8, "multiplies", lambda dtype: integers)
    inputs = case(rows, 96, 64, bias, activations, dtype)
    given = [t for t in inputs if t is not None]
    before = [t.clone() for t in given]
    op, expected = W8A8Linear("int8", activations), exact(*inputs)
    for result in (op.reference(*inputs), op.portable(None, *inputs)):
        assert result.dtype == dtype
        assert error(result, expected) < TOLERANCE[dtype]
    assert all(t.equal(b) for t, b in zip(given, before, strict=True))


@given(
    st.integers(1, 40),
    st.integers(1, 70),
    st.integers(1, 70),
    st.booleans(),
    st.sampled_from(["static", "token"]),
    st.sampled_from(list(TOLERANCE)),
)
@settings(max_examples=60, deadline=None)
def test_any_shape(rows, inner, outer, bias, activations, dtype):
    inputs = case(rows, inner, outer, bias, activations, dtype)
    op, expected = W8A8Linear("int8", activations), exact(*inputs)
    bound = TOLERANCE[dtype] * (np.abs(expected) + (np.abs(inputs[-1].double().numpy()) if bias else 0)) + 1e-7
    for result in (op.reference(*inputs), op.portable(None, *inputs)):
        assert (np.abs(result.double().numpy() - expected) <= 2 * bound).all()


@ways
@pytest.mark.parametrize("inner", [1024, 1040])
@products
def test_sums_of_the_largest_products_are_exact(integers, inner, activations, monkeypatch):
    """2^24 is as far as float32 counts: 1040 products of 127 and 127, or 1024 of 128 and 128."""
    monkeypatch.setattr(w8a8, "multiplies", lambda dtype: integers)
    x = torch.full((2, inner), 127.0)
    x[1] = -127
    weight = torch.full((3, inner), 127, dtype=torch.int8)
    weight[1] = -127
    weight[2, ::2] = -127
    expected = 127 * 127 * inner * torch.tensor([[1.0, -1.0, 0.0], [-1.0, 1.0, 0.0]])
    rest = [] if activations == "token" else [torch.ones(1)]
    assert W8A8Linear("int8", activations).portable(None, x, weight, torch.ones(3), *rest).equal(expected)
    assert W8A8Linear("int8", activations).reference(x, weight, torch.ones(3), *rest).equal(expected)


@ways
def test_one_row_of_any_stride(activations):
    """Of which torch's product of integers makes something else, unless it is laid out anew."""
    _, weight, scale, input_scale = case(1, 64, 16, False, activations, torch.float32)
    given = [weight, scale, *([] if input_scale is None else [input_scale])]
    for x in (torch.randn(64, 1).T, torch.randn(64, 4).T[1:2], torch.randn(1, 1).expand(1, 64)):
        expected = exact(x, weight, scale, input_scale)
        assert error(W8A8Linear("int8", activations).portable(None, x, *given), expected) < TOLERANCE[torch.float32]


def test_static_saturates_at_both_ends():
    x, weight = torch.tensor([[1e6], [-1e6], [63.75], [0.25], [0.75]]), torch.ones(1, 1, dtype=torch.int8)
    for run in (
        STATIC.reference,
        lambda *inputs: STATIC.portable(None, *inputs),
    ):
        result = run(x, weight, torch.ones(1), torch.tensor([0.5]))
        assert result[:, 0].tolist() == [63.5, -64, 63.5, 0, 1]  # ties to even: 0.5 to 0, 1.5 to 2


@dtypes
def test_a_row_of_zeros_gives_the_bias(dtype):
    x, weight, scale, _, bias = case(4, 32, 8, True, "token", dtype)
    x[2] = 0
    for result in (
        TOKEN.reference(x, weight, scale, bias=bias),
        TOKEN.portable(None, x, weight, scale, bias=bias),
    ):
        assert result[2].equal(bias)
        assert result.isfinite().all()


@dtypes
def test_tokens_have_scales_of_their_own(dtype):
    """An outlier in one row changes no other, and a power of two in front of a row comes out of it."""
    x, weight, scale, _ = case(5, 64, 16, False, "token", dtype)
    for run in (
        TOKEN.reference,
        lambda *inputs: TOKEN.portable(None, *inputs),
    ):
        before = run(x, weight, scale)
        changed = x.clone()
        changed[1] *= 8
        changed[3, 7] = 1000
        after = run(changed, weight, scale)
        assert after[[0, 2, 4]].equal(before[[0, 2, 4]])
        torch.testing.assert_close(after[1], before[1] * 8, rtol=TOLERANCE[dtype], atol=1e-5)
        assert after[3].ne(before[3]).any()


@dtypes
@ways
def test_inferred_shape(activations, dtype):
    network = Network()
    x, w = network.input("x", dtype, ("tokens", 8)), network.input("w", torch.int8, (5, 8))
    s, b = network.input("s", torch.float32, (5,)), network.input("b", dtype, (5,))
    i = None if activations == "token" else network.input("i", torch.float32, (1,))
    for bias in (None, b):
        y = network.add(W8A8Linear("int8", activations), x=x, weight=w, scales=s, input_scale=i, bias=bias)
        assert (y.dtype, y.shape) == (dtype, ("tokens", 5))


@pytest.mark.parametrize(
    "change",
    [
        {"w": (torch.int8, (5, 7))},
        {"w": (torch.uint8, (5, 8))},
        {"s": (torch.float16, (5,))},
        {"s": (torch.float32, (5, 1))},
        {"i": (torch.float16, (1,))},
        {"i": (torch.float32, (5,))},
        {"i": (torch.float32, ())},
        {"b": (torch.float16, (8,))},
        {"b": (torch.float32, (5,))},
    ],
    ids=str,
)
def test_refuses_another_width_dtype_scale_or_bias(change):
    right = {
        "x": (torch.float16, ("tokens", 8)),
        "w": (torch.int8, (5, 8)),
        "s": (torch.float32, (5,)),
        "i": (torch.float32, (1,)),
        "b": (torch.float16, (5,)),
    }
    network = Network()
    x, w, s, i, b = (network.input(name, *spec) for name, spec in (right | change).items())
    with pytest.raises(ValueError, match=r"W8A8Linear\(dtype='int8', activations='static'\) (of|with)"):
        network.add(STATIC, x=x, weight=w, scales=s, input_scale=i, bias=b)
