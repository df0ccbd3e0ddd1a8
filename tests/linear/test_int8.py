"""INT8 weights against float64, over the row counts where the portable engine changes its kernel."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import check_linear, error

from trtbuild.linear.int8 import Int8Linear
from trtbuild.network import Network
from trtbuild.tensors.cpu import multiplies

# Norm of the difference over the norm of the float64 result, for inputs that are already rounded to the dtype.
TOLERANCE = {torch.float32: 1e-6, torch.float16: 1.5e-3, torch.bfloat16: 8e-3}
dtypes = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
# Whether a CPU multiplies bfloat16, as this one does or not.
bfloat16 = pytest.mark.parametrize("multiplied", [False, True] if multiplies(torch.bfloat16) else [False])


def case(rows: int, inner: int, outer: int, bias: bool, dtype: torch.dtype):
    """Random inputs of the operation; what it means in float64; the same of magnitudes, where nothing cancels."""
    x, weight = torch.randn(rows, inner).to(dtype), torch.randint(-128, 128, (outer, inner), dtype=torch.int8)
    scale = 10 ** (torch.rand(outer) * 2 - 4)
    inputs = [x, weight, scale] + ([torch.randn(outer).to(dtype)] if bias else [])
    x, weight, scale, *b = (t.double().numpy() for t in inputs)
    weight = weight * scale[:, None]
    magnitude = np.abs(x) @ np.abs(weight).T + (np.abs(b[0]) if bias else 0)
    return inputs, x @ weight.T + (b[0] if bias else 0), magnitude


@dtypes
@pytest.mark.parametrize("bias", [False, True])
@bfloat16
@pytest.mark.parametrize("rows", [1, 2, 3, 8, 9, 33, 100])
def test_reference_and_portable(rows, bias, dtype, multiplied, monkeypatch):
    monkeypatch.setattr("trtbuild.linear.int8.multiplies", lambda dtype: multiplied)
    inputs, expected, _ = case(rows, 96, 64, bias, dtype)
    assert inputs[0].dtype == dtype
    check_linear(Int8Linear(), inputs, expected, TOLERANCE[dtype])


@given(st.integers(0, 40), st.integers(1, 70), st.integers(1, 70), st.booleans(), st.sampled_from(list(TOLERANCE)))
@settings(max_examples=60, deadline=None)
def test_any_shape(rows, inner, outer, bias, dtype):
    """Odd sizes too, for which torch's kernel is wrong in bfloat16. The bound is absolute: a product may cancel."""
    inputs, expected, magnitude = case(rows, inner, outer, bias, dtype)
    for result in (Int8Linear().reference(*inputs), Int8Linear().portable(None, *inputs)):
        assert (np.abs(result.double().numpy() - expected) <= TOLERANCE[dtype] * magnitude + 1e-6).all()


@dtypes
@bfloat16
def test_weights_wider_than_a_block(dtype, multiplied, monkeypatch):
    """The weight is widened a few rows at a time, the last time fewer."""
    monkeypatch.setattr("trtbuild.linear.int8.multiplies", lambda dtype: multiplied)
    monkeypatch.setattr("trtbuild.linear.blockwise.BLOCK_ELEMENTS", 96 * 9)
    inputs, expected, _ = case(33, 96, 64, True, dtype)
    assert error(Int8Linear().portable(None, *inputs), expected) < TOLERANCE[dtype]


def test_exact_by_hand():
    x = torch.tensor([[1.0, -2.0, 0.5]])
    weight = torch.tensor([[127, -128, 2], [0, 0, 0]], dtype=torch.int8)
    scale, bias = torch.tensor([0.25, 3.0]), torch.tensor([10.0, -1.0])
    for result in (Int8Linear().reference(x, weight, scale, bias), Int8Linear().portable(None, x, weight, scale, bias)):
        assert result.tolist() == [[(127 + 256 + 1) * 0.25 + 10, -1.0]]


@dtypes
def test_inferred_shape(dtype):
    network = Network()
    x, w = network.input("x", dtype, ("tokens", 8)), network.input("w", torch.int8, (5, 8))
    s, b = network.input("s", torch.float32, (5,)), network.input("b", dtype, (5,))
    for y in (network.add(Int8Linear(), x=x, weight=w, scales=s, bias=bias) for bias in (None, b)):
        assert (y.dtype, y.shape) == (dtype, ("tokens", 5))


@pytest.mark.parametrize(
    "change",
    [
        {"w": (torch.int8, (5, 7))},
        {"w": (torch.uint8, (5, 8))},
        {"w": (torch.float16, (5, 8))},
        {"s": (torch.float16, (5,))},
        {"s": (torch.float32, (8,))},
        {"s": (torch.float32, (5, 1))},
        {"b": (torch.float16, (8,))},
        {"b": (torch.float32, (5,))},
    ],
    ids=str,
)
def test_refuses_another_width_dtype_scale_or_bias(change):
    right = {"x": (torch.float16, ("tokens", 8)), "w": (torch.int8, (5, 8)), "s": (torch.float32, (5,))}
    network = Network()
    x, w, s, b = (network.input(name, *spec) for name, spec in (right | {"b": (torch.float16, (5,))} | change).items())
    with pytest.raises(ValueError, match=r"Int8Linear\(\) of Tensor\(name='x'"):
        network.add(Int8Linear(), x=x, weight=w, scales=s, bias=b)
