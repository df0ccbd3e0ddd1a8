"""Dense linear layers against float64, over the row counts where the portable engine changes its method."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import error

from trtbuild.linear.dense import DenseLinear
from trtbuild.network import Network

# Norm of the difference over the norm of the float64 result, for inputs that are already rounded to the dtype.
TOLERANCE = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def case(rows: int, inner: int, outer: int, bias: bool, dtype: torch.dtype):
    """Random inputs of the operation and `x @ weight.T + bias` of them in float64."""
    inputs = [torch.randn(rows, inner).to(dtype), torch.randn(outer, inner).to(dtype)]
    inputs += [torch.randn(outer).to(dtype)] if bias else []
    x, weight, *b = (t.double().numpy() for t in inputs)
    return inputs, x @ weight.T + (b[0] if bias else 0)


ONEDNN = torch.backends.mkldnn.is_available()
# Whether products are of the dtype itself or of what is widened: the former where oneDNN has any, if need be slow ones.
MULTIPLIED = {
    torch.float32: [True],
    torch.float16: [False, True] if ONEDNN and torch.ops.mkldnn._is_mkldnn_fp16_supported() else [False],
    torch.bfloat16: [False, True] if ONEDNN and torch.ops.mkldnn._is_mkldnn_bf16_supported() else [False],
}


@pytest.mark.parametrize(
    ("dtype", "multiplied"), [(dtype, value) for dtype, values in MULTIPLIED.items() for value in values], ids=str
)
@pytest.mark.parametrize("mkl", [False, True], ids=["", "MKL"])
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("rows", [1, 2, 3, 16, 64, 65, 200])
def test_reference_and_portable(rows, bias, mkl, dtype, multiplied, monkeypatch):
    monkeypatch.setattr("trtbuild.linear.dense.multiplies", lambda dtype: multiplied)
    monkeypatch.setattr("trtbuild.linear.cpu.has_fast_mkl", lambda: mkl)
    inputs, expected = case(rows, 96, 64, bias, dtype)
    reference, portable = DenseLinear().reference(*inputs), DenseLinear().portable(None, *inputs)
    assert reference.dtype == portable.dtype == dtype
    assert error(reference, expected) < TOLERANCE[dtype]
    assert error(portable, expected) < TOLERANCE[dtype]
    assert error(portable, reference.double().numpy()) < TOLERANCE[dtype]


@given(st.integers(0, 80), st.integers(1, 70), st.integers(1, 70), st.booleans(), st.sampled_from(list(TOLERANCE)))
@settings(max_examples=40, deadline=None)
def test_portable_of_any_shape(rows, inner, outer, bias, dtype):
    """Odd sizes too: oneDNN and MKL pad and block in their own ways. The bound is absolute: a product may cancel."""
    inputs, expected = case(rows, inner, outer, bias, dtype)
    result = DenseLinear().portable(None, *inputs).double().numpy()
    scale = np.linalg.norm(expected) + np.sqrt(expected.size * inner)
    assert np.linalg.norm(result - expected) <= TOLERANCE[dtype] * scale


@pytest.mark.parametrize("rows", [3, 70])
def test_16_bit_weights_are_widened_in_blocks(rows, monkeypatch):
    """The last one smaller than the others."""
    monkeypatch.setattr("trtbuild.linear.dense.multiplies", lambda dtype: False)
    monkeypatch.setattr("trtbuild.linear.blockwise.BLOCK_ELEMENTS", 96 * 9)
    inputs, expected = case(rows, 96, 64, True, torch.float16)
    assert error(DenseLinear().portable(None, *inputs), expected) < TOLERANCE[torch.float16]


def test_inferred_shape():
    network = Network()
    x = network.input("x", torch.float16, ("tokens", 8))
    w, b = network.input("w", torch.float16, (5, 8)), network.input("b", torch.float16, (5,))
    y = network.add(DenseLinear(), x=x, weight=w, bias=b)
    assert (y.dtype, y.shape) == (torch.float16, ("tokens", 5))


@pytest.mark.parametrize(
    ("weight", "bias"),
    [(((5, 7), torch.float16), None), (((5, 8), torch.float32), None), (((5, 8), torch.float16), (8,))],
)
def test_refuses_another_width_dtype_or_bias(weight, bias):
    network = Network()
    x = network.input("x", torch.float16, ("tokens", 8))
    b = network.input("b", torch.float16, bias) if bias else None
    w = network.input("w", weight[1], weight[0])
    with pytest.raises(ValueError, match="linear of"):
        network.add(DenseLinear(), x=x, weight=w, bias=b)
