"""SwiGLU with rounding to 8 bits, interpreted, against float64 and the operations."""

import pytest
import torch
import torch.nn.functional as F
from numerics import among_nan, relative_error

from trtbuild.linear.w8a8 import W8A8Linear
from trtbuild.network.ops.swiglu import SwiGlu

pytest.importorskip("triton", "3.7")  # earlier interpreters fail with numpy 2.4

from trtbuild.kernels.swiglu import swiglu

TOLERANCE = {torch.float16: 5e-4, torch.float32: 1e-6}  # the result's own rounding
FP8 = torch.float8_e4m3fn
dtypes = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)


@dtypes
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (3, 80), (2, 1024), (2, 1025), (4, 2752)])
def test_against_float64(rows, width, dtype):
    gate_up = among_nan((4 * torch.randn(rows, 2 * width)).to(dtype))
    gate, up = gate_up.double().chunk(2, -1)
    actual, scales = swiglu(gate_up)
    assert scales is None
    assert actual.shape == (rows, width)
    assert actual.dtype == dtype
    assert relative_error(actual, F.silu(gate) * up) < TOLERANCE[dtype]


def test_fractions_of_the_weights_scales():
    gate_up, scales = among_nan(torch.randn(3, 2200)), among_nan(torch.rand(2200) - 0.1)  # some are below zero
    fractions = 2 * torch.frexp(scales)[0]
    assert relative_error(swiglu(gate_up, weight_scales=scales)[0], swiglu(gate_up * fractions)[0]) < 1e-6


def test_roundings_are_the_operations():
    gate_up = (4 * torch.randn(4, 2000)).half()
    assert (swiglu(gate_up)[0] == SwiGlu().reference(gate_up)).float().mean() > 0.99


@dtypes
@pytest.mark.parametrize("width", [1, 256, 1500])
@pytest.mark.parametrize("static", [True, False])
@pytest.mark.parametrize("narrow", [torch.int8, FP8], ids=str)
def test_rounded_to_8_bits(narrow, static, width, dtype):
    """The values are those in 16 bits, rounded; FP8's nearly: the interpreter loses carries."""
    gate_up = among_nan((4 * torch.randn(5, 2 * width)).to(dtype))
    gate_up[3] = 0
    scale = torch.tensor([0.1]) if static else None
    values, scales = swiglu(gate_up, (narrow, scale))
    op = W8A8Linear("int8" if narrow == torch.int8 else "fp8", "token")
    expected, expected_scales = op._quantized(swiglu(gate_up)[0], scale)
    assert values.dtype == narrow
    assert torch.equal(scales, expected_scales.expand(len(scales), 1))
    if narrow == torch.int8:
        assert torch.equal(values, expected)
    else:
        assert relative_error(values, expected) < 0.1


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # of the far side of a sigmoid
def test_large_gates_of_both_signs():
    gate_up = torch.tensor([[-6e4, 6e4, 2.0, 1.0]]).half()
    assert swiglu(gate_up)[0].tolist() == [[0.0, 6e4]]


@pytest.mark.parametrize("quantize", [None, (torch.int8, None), (FP8, None)], ids=str)
@pytest.mark.filterwarnings("ignore:invalid value encountered")
@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_a_row_that_is_not_finite_shows_and_spoils_no_other(wrong, quantize):
    gate_up = torch.randn(3, 80)
    clean = swiglu(gate_up, quantize)
    gate_up[1, 47] = wrong
    values, scales = swiglu(gate_up, quantize)
    for before, after in zip(clean, (values, scales), strict=True):
        assert before is after is None or torch.equal(before[[0, 2]].float(), after[[0, 2]].float())
    assert not (values.float() * (1 if scales is None else scales))[1].isfinite().all()


def test_the_input_need_not_be_contiguous():
    x = torch.randn(6, 96)[::2]
    assert torch.equal(swiglu(x)[0], swiglu(x.contiguous())[0])
