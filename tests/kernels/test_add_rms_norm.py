"""RMSNorm with its residual addition and rounding to 8 bits, interpreted, against float64 and the operations."""

import pytest
import torch
import torch.nn.functional as F
from numerics import among_nan, relative_error

from trtbuild.linear.w8a8 import W8A8Linear
from trtbuild.network.ops.rms_norm import RmsNorm

pytest.importorskip("triton", "3.7")  # earlier interpreters fail with numpy 2.4

from trtbuild.kernels.add_rms_norm import norm_rows

TOLERANCE = {torch.float16: 5e-4, torch.float32: 1e-6}  # the result's own rounding
FP8 = torch.float8_e4m3fn
dtypes = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)


@dtypes
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (3, 48), (2, 576), (1, 1000), (5, 4096)])
def test_against_float64(rows, width, dtype):
    a, b = (among_nan(torch.randn(rows, width).to(dtype)) for _ in range(2))
    weight = among_nan((1 + 0.2 * torch.randn(width)).to(dtype))
    total, normed, scales = norm_rows(a, weight, 1e-2, b=b)
    assert torch.equal(total, a + b)
    assert scales is None
    assert normed.dtype == dtype
    assert relative_error(normed, F.rms_norm((a + b).double(), (width,), weight.double(), 1e-2)) < TOLERANCE[dtype]
    nothing, normed, scales = norm_rows(a, weight, 1e-2)
    assert nothing is scales is None
    assert relative_error(normed, F.rms_norm(a.double(), (width,), weight.double(), 1e-2)) < TOLERANCE[dtype]


def test_fractions_of_the_weights_scales():
    a, b, weight, scales = torch.randn(3, 500), torch.randn(3, 500), torch.rand(500), among_nan(torch.rand(500))
    total, normed, _ = norm_rows(a, weight, 1e-5, b=b, b_scales=scales)
    expected = norm_rows(a, weight, 1e-5, b=b * 2 * torch.frexp(scales)[0])
    assert torch.equal(total, expected[0])
    assert torch.equal(normed, expected[1])


def test_roundings_are_the_operations():
    """Nearly every number has the bits of the chain; with one rounding more or less a third have not."""
    a, b, weight = torch.randn(4, 1000).half(), torch.randn(4, 1000).half(), (1 + 0.2 * torch.randn(1000)).half()
    total, normed, _ = norm_rows(a, weight, 1e-5, b=b)
    assert (normed == RmsNorm(1e-5).reference(total, weight)).float().mean() > 0.99


@dtypes
@pytest.mark.parametrize("with_b", [True, False])
@pytest.mark.parametrize("static", [True, False])
@pytest.mark.parametrize("narrow", [torch.int8, FP8], ids=str)
def test_rounded_to_8_bits(narrow, static, with_b, dtype):
    """The values are those of the norm in 16 bits, rounded; FP8's nearly: the interpreter loses carries."""
    a, weight = among_nan((torch.randn(6, 500) * 3).to(dtype)), (1 + 0.2 * torch.randn(500)).to(dtype)
    a[4] = 0
    b = torch.randn(6, 500).to(dtype) if with_b else None
    scale = torch.tensor([0.017]) if static else None
    total, values, scales = norm_rows(a, weight, 1e-5, b=b, quantize=(narrow, scale))
    assert values.dtype == narrow
    sums, normed, _ = norm_rows(a, weight, 1e-5, b=b)
    assert total is sums is None if b is None else torch.equal(total, sums)
    op = W8A8Linear("int8" if narrow == torch.int8 else "fp8", "token")
    expected, expected_scales = op._quantized(normed, scale)
    assert torch.equal(scales, expected_scales.expand(len(scales), 1))
    if narrow == torch.int8:
        assert torch.equal(values, expected)
    else:
        assert relative_error(values, expected) < 0.1


def test_squares_beyond_float16_are_no_infinity():
    a = torch.full((2, 64), 3e4).half()
    total, normed, _ = norm_rows(a, torch.ones(64).half(), 1e-6, b=a)
    assert torch.equal(total, 2 * a)
    assert torch.equal(normed, torch.ones_like(a))


@pytest.mark.parametrize("quantize", [None, (torch.int8, None), (FP8, None)], ids=str)
@pytest.mark.filterwarnings("ignore:invalid value encountered")
@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_a_row_that_is_not_finite_shows_and_spoils_no_other(wrong, quantize):
    a, b, weight = torch.randn(3, 40), torch.randn(3, 40), torch.ones(40)
    clean = norm_rows(a, weight, 1e-5, b=b, quantize=quantize)
    a[1, 7] = wrong
    *values, scales = norm_rows(a, weight, 1e-5, b=b, quantize=quantize)
    for before, after in zip(clean, [*values, scales], strict=True):
        assert before is after is None or torch.equal(before[[0, 2]].float(), after[[0, 2]].float())
    assert not (values[1].float() * (1 if scales is None else scales))[1].isfinite().all()


def test_inputs_need_not_be_contiguous():
    a, b, weight = torch.randn(6, 96)[::2], torch.randn(96, 3).t(), torch.ones(96)
    expected = norm_rows(a.contiguous(), weight, 1e-5, b=b.contiguous())
    for actual, right in zip(norm_rows(a, weight, 1e-5, b=b)[:2], expected, strict=False):
        assert torch.equal(actual, right)
