"""FP8 weights and activations against float64 products of the FP8 values that they are rounded to."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import check_linear

from trtbuild.linear.w8a8 import W8A8Linear
from trtbuild.network import Network

FP8 = torch.float8_e4m3fn
STATIC = W8A8Linear("fp8", "static")
# Norm of the difference over the norm of the float64 result: float32 sums, then rounding to the dtype.
TOLERANCE = {torch.float32: 1e-6, torch.float16: 5e-4, torch.bfloat16: 4e-3}
dtypes = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)


def e4m3(x: np.ndarray) -> np.ndarray:
    """Four significant bits down to 2^-6, steps of 2^-9 below, 448 at most (arXiv 2209.05433)."""
    exponent = np.maximum(np.frexp(x)[1] - 1, -6)
    step = np.exp2(exponent - 3.0)
    return np.clip(np.rint(x / step) * step, -448, 448)


def case(rows: int, inner: int, outer: int, bias: bool, dtype: torch.dtype):
    """Random inputs of the operation; what it means in float64; the same of magnitudes, where nothing cancels.

    Activations span FP8's range: some saturate, some are below its normal numbers.
    """
    x = (torch.randn(rows, inner) * 10 ** (torch.rand(rows, inner) * 4 - 3)).to(dtype)
    weight = (torch.randn(outer, inner) * 50).to(FP8)
    inputs = [x, weight, 10 ** (torch.rand(outer) * 2 - 4), torch.rand(1) * 0.01 + 0.01]
    inputs += [torch.randn(outer).to(dtype)] if bias else []
    narrow = e4m3((x.float() / inputs[3]).double().numpy())
    weight, scale, input_scale, *b = (t.double().numpy() for t in inputs[1:])
    weight = weight * (input_scale * scale)[:, None]
    magnitude = np.abs(narrow) @ np.abs(weight).T + (np.abs(b[0]) if bias else 0)
    return inputs, narrow @ weight.T + (b[0] if bias else 0), magnitude


@dtypes
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, 2, 3, 16, 100])
def test_reference_and_portable(rows, bias, dtype):
    inputs, expected, _ = case(rows, 96, 64, bias, dtype)
    assert inputs[0].dtype == dtype
    check_linear(STATIC, inputs, expected, TOLERANCE[dtype])


@given(st.integers(1, 40), st.integers(1, 70), st.integers(1, 70), st.booleans(), st.sampled_from(list(TOLERANCE)))
@settings(max_examples=60, deadline=None)
def test_any_shape(rows, inner, outer, bias, dtype):
    """Odd sizes too. The bound is absolute: a product may cancel."""
    inputs, expected, magnitude = case(rows, inner, outer, bias, dtype)
    for result in (STATIC.reference(*inputs), STATIC.portable(None, *inputs)):
        assert (np.abs(result.double().numpy() - expected) <= TOLERANCE[dtype] * magnitude + 1e-6).all()


def test_saturates_and_rounds_to_even():
    x = torch.tensor([[1e6], [-float("inf")], [17.0], [19.0], [2.0**-10], [3 * 2.0**-10], [0.0]]) / 2
    weight = torch.ones(1, 1).to(FP8)
    for run in (STATIC.reference, lambda *inputs: STATIC.portable(None, *inputs)):
        result = run(x, weight, torch.tensor([4.0]), torch.tensor([0.5]))
        assert (result[:, 0] / 2).tolist() == [448, -448, 16, 20, 0, 2.0**-8, 0]


def test_every_output_channel_has_its_scale():
    """Projections that are fused keep the scales of their tensors."""
    x, weight = torch.ones(1, 2), torch.tensor([[1.0, 1.0], [2.0, -1.0], [448.0, 0.0]]).to(FP8)
    scale, bias = torch.tensor([1.0, 10.0, 0.5]), torch.tensor([0.25, 0.0, -24.0])
    for run in (STATIC.reference, lambda *inputs: STATIC.portable(None, *inputs)):
        assert run(x, weight, scale, torch.ones(1), bias).tolist() == [[2.25, 10, 200]]


@dtypes
def test_inferred_shape(dtype):
    network = Network()
    x, w = network.input("x", dtype, ("tokens", 8)), network.input("w", FP8, (5, 8))
    s, i, b = (
        network.input(*spec) for spec in (("s", torch.float32, (5,)), ("i", torch.float32, (1,)), ("b", dtype, (5,)))
    )
    for bias in (None, b):
        y = network.add(STATIC, x=x, weight=w, scales=s, input_scale=i, bias=bias)
        assert (y.dtype, y.shape) == (dtype, ("tokens", 5))


@pytest.mark.parametrize(
    "change",
    [
        {"w": (FP8, (5, 7))},
        {"w": (torch.int8, (5, 8))},
        {"w": (torch.float8_e5m2, (5, 8))},
        {"s": (torch.float16, (5,))},
        {"s": (torch.float32, (1,))},
        {"i": (torch.float16, (1,))},
        {"i": (torch.float32, (5,))},
        {"b": (torch.float16, (8,))},
        {"b": (torch.float32, (5,))},
    ],
    ids=str,
)
def test_refuses_another_width_dtype_scale_or_bias(change):
    right = {
        "x": (torch.float16, ("tokens", 8)),
        "w": (FP8, (5, 8)),
        "s": (torch.float32, (5,)),
        "i": (torch.float32, (1,)),
        "b": (torch.float16, (5,)),
    }
    network = Network()
    x, w, s, i, b = (network.input(name, *spec) for name, spec in (right | change).items())
    with pytest.raises(ValueError, match=r"W8A8Linear\(dtype='fp8', activations='static'\) (of|with)"):
        network.add(STATIC, x=x, weight=w, scales=s, input_scale=i, bias=b)
