"""SwiGLU, interpreted, against float64."""

import pytest
import torch
import torch.nn.functional as F
from numerics import among_nan, relative_error

pytest.importorskip("triton", "3.7")  # earlier interpreters fail with numpy 2.4

from trtbuild.kernels.swiglu import swiglu

TOLERANCE = {torch.float16: 5e-4, torch.float32: 1e-6}  # the result's own rounding
dtypes = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)


@dtypes
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (3, 80), (2, 1024), (2, 1025), (4, 2752)])
def test_swiglu(rows, width, dtype):
    gate_up = among_nan((4 * torch.randn(rows, 2 * width)).to(dtype))
    gate, up = gate_up.double().chunk(2, -1)
    actual = swiglu(gate_up)
    assert actual.shape == (rows, width)
    assert actual.dtype == dtype
    assert relative_error(actual, F.silu(gate) * up) < TOLERANCE[dtype]


@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # of the far side of a sigmoid
def test_large_gates_of_both_signs():
    gate_up = torch.tensor([[-6e4, 6e4, 2.0, 1.0]]).half()
    assert swiglu(gate_up).tolist() == [[0.0, 6e4]]


def test_the_input_need_not_be_contiguous():
    x = torch.randn(6, 96)[::2]
    assert torch.equal(swiglu(x), swiglu(x.contiguous()))
