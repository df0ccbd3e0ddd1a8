"""Residual addition with RMSNorm, interpreted, against float64."""

import pytest
import torch
import torch.nn.functional as F
from numerics import among_nan, relative_error

pytest.importorskip("triton", "3.7")  # earlier interpreters fail with numpy 2.4

from trtbuild.kernels.add_rms_norm import add_rms_norm

TOLERANCE = {torch.float16: 5e-4, torch.float32: 1e-6}  # the result's own rounding
dtypes = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)


@dtypes
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (3, 48), (2, 576), (1, 1000), (5, 4096)])
def test_add_rms_norm(rows, width, dtype):
    a, b = (among_nan(torch.randn(rows, width).to(dtype)) for _ in range(2))
    weight = among_nan((1 + 0.2 * torch.randn(width)).to(dtype))
    total, normed = add_rms_norm(a, b, weight, 1e-2)
    assert torch.equal(total, a + b)
    expected = F.rms_norm((a + b).double(), (width,), weight.double(), 1e-2)
    assert normed.dtype == dtype
    assert relative_error(normed, expected) < TOLERANCE[dtype]


def test_the_norm_is_that_of_the_rounded_sum():
    """Nearly every number has the bits of the chain in float32; of the norm of the exact sum half have not."""
    a, b, weight = torch.randn(4, 1000).half(), torch.randn(4, 1000).half(), (1 + 0.2 * torch.randn(1000)).half()
    total, normed = add_rms_norm(a, b, weight, 1e-5)
    expected = F.rms_norm(total.float(), (1000,), weight.float(), 1e-5).half()
    assert (normed == expected).float().mean() > 0.99


def test_squares_beyond_float16_are_no_infinity():
    a = torch.full((2, 64), 3e4).half()
    total, normed = add_rms_norm(a, a, torch.ones(64).half(), 1e-6)
    assert torch.equal(total, 2 * a)
    assert torch.equal(normed, torch.ones_like(a))


def test_a_row_that_is_not_finite_spoils_no_other():
    a, b, weight = torch.randn(3, 40), torch.randn(3, 40), torch.ones(40)
    clean = add_rms_norm(a, b, weight, 1e-5)
    a[1, 7] = float("nan")
    for before, after in zip(clean, add_rms_norm(a, b, weight, 1e-5), strict=True):
        assert torch.equal(before[[0, 2]], after[[0, 2]])
        assert after[1, 7].isnan()


def test_inputs_need_not_be_contiguous():
    a, b, weight = torch.randn(6, 96)[::2], torch.randn(96, 3).t(), torch.ones(96)
    expected = add_rms_norm(a.contiguous(), b.contiguous(), weight, 1e-5)
    for actual, right in zip(add_rms_norm(a, b, weight, 1e-5), expected, strict=True):
        assert torch.equal(actual, right)
