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
STATIC, TOKEN = W8A8Linear("fp8", "static"), W8A8Linear("fp8", "token")
# Norm of the difference over the norm of the float64 result: float32 sums, then rounding to the dtype.
TOLERANCE = {torch.float32: 1e-6, torch.float16: 5e-4, torch.bfloat16: 4e-3}
dtypes = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
ways = pytest.mark.parametrize("op", [STATIC, TOKEN], ids=["static", "token"])


def e4m3(x: np.ndarray) -> np.ndarray:
    """Four significant bits down to 2^-6, steps of 2^-9 below, 448 at most (arXiv 2209.05433)."""
    exponent = np.maximum(np.frexp(x)[1] - 1, -6)
    step = np.exp2(exponent - 3.0)
    return np.clip(np.rint(x / step) * step, -448, 448)


def case(op: W8A8Linear, rows: int, inner: int, outer: int, bias: bool, dtype: torch.dtype):
    """Random inputs of the operation; what it means in float64; the same of magnitudes, where nothing cancels.

    Activations span FP8's range: some saturate (with a static scale), some are below its normal numbers.
    """
    x = (torch.randn(rows, inner) * 10 ** (torch.rand(rows, inner) * 4 - 3)).to(dtype)
    weight = (torch.randn(outer, inner) * 50).to(FP8)
    inputs = [x, weight, 10 ** (torch.rand(outer) * 2 - 4), torch.rand(1) * 0.01 + 0.01 if op is STATIC else None]
    inputs += [torch.randn(outer).to(dtype)] if bias else []
    s = inputs[3] if op is STATIC else x.float().abs().amax(1, keepdim=True) / np.float32(448)
    narrow = e4m3((x.float() / s).double().numpy()) * s.double().numpy()
    weight, scales, *b = (t.double().numpy() for t in inputs[1:] if t is not None and t is not inputs[3])
    weight = weight * scales[:, None]
    magnitude = np.abs(narrow) @ np.abs(weight).T + (np.abs(b[0]) if bias else 0)
    return inputs, narrow @ weight.T + (b[0] if bias else 0), magnitude


@dtypes
@ways
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [1, 2, 3, 16, 100])
def test_reference_and_portable(rows, bias, op, dtype):
    inputs, expected, _ = case(op, rows, 96, 64, bias, dtype)
    assert inputs[0].dtype == dtype
    check_linear(op, inputs, expected, TOLERANCE[dtype])


@given(
    st.sampled_from([STATIC, TOKEN]),
    st.integers(1, 40),
    st.integers(1, 70),
    st.integers(1, 70),
    st.booleans(),
    st.sampled_from(list(TOLERANCE)),
)
@settings(max_examples=60, deadline=None)
def test_any_shape(op, rows, inner, outer, bias, dtype):
    """Odd sizes too. The bound is absolute: a product may cancel."""
    inputs, expected, magnitude = case(op, rows, inner, outer, bias, dtype)
    for result in (op.reference(*inputs), op.portable(None, *inputs)):
        assert (np.abs(result.double().numpy() - expected) <= TOLERANCE[dtype] * magnitude + 1e-6).all()


def test_saturates_and_rounds_to_even():
    x = torch.tensor([[1e6], [-float("inf")], [17.0], [19.0], [2.0**-10], [3 * 2.0**-10], [0.0]]) / 2
    weight = torch.ones(1, 1).to(FP8)
    for run in (STATIC.reference, lambda *inputs: STATIC.portable(None, *inputs)):
        result = run(x, weight, torch.tensor([4.0]), torch.tensor([0.5]))
        assert (result[:, 0] / 2).tolist() == [448, -448, 16, 20, 0, 2.0**-8, 0]


def test_a_scale_a_token_as_in_compressed_tensors():
    """What its version 0.19.0 rounds these tokens to by the preset FP8_DYNAMIC; it has a scale of 1.2e-7 for zeros."""
    x = [[0.1, -3.7, 12.5, 0, 900, -0.004], [1, 2, 3, -4, 5.5, 0.3], [0] * 6, [1e-3, -7e-4, 3e-5, 2e-6, 0, 5e-4]]
    scales = [2.0089285373687744, 0.01227678544819355, 1, 2.2321430606098147e-06]
    values = [
        [0.05078125, -1.875, 6, 0, 448, -0.001953125],
        [80, 160, 240, -320, 448, 24],
        [0] * 6,
        [448, -320, 13, 0.875, 0, 224],
    ]
    actual, actual_scales = TOKEN._quantized(torch.tensor(x))
    assert actual.float().tolist() == values
    assert actual_scales.flatten().tolist() == scales


@dtypes
def test_tokens_have_scales_of_their_own(dtype):
    """An outlier in one row changes no other, a power of two in front of a row comes out of it, and zeros stay zero."""
    (x, weight, scales, *_), _, _ = case(TOKEN, 5, 64, 16, False, dtype)
    changed = x.clone()
    changed[1] *= 8
    changed[2] = 0
    changed[3, 7] = 1000
    for run in (TOKEN.reference, lambda *inputs: TOKEN.portable(None, *inputs)):
        before, after = run(x, weight, scales), run(changed, weight, scales)
        assert after[[0, 4]].equal(before[[0, 4]])
        torch.testing.assert_close(after[1], before[1] * 8, rtol=TOLERANCE[dtype], atol=1e-5)
        assert after[2].eq(0).all()
        assert after[3].ne(before[3]).any()


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
