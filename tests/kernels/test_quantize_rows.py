"""Rounding activations to 8 bits, interpreted."""

import pytest
import torch

from trtbuild.linear.w8a8 import W8A8Linear

pytest.importorskip("triton", "3.7")  # earlier interpreters fail with numpy 2.4

from trtbuild.kernels.quantize_rows import quantize_rows

FP8 = torch.float8_e4m3fn


@pytest.mark.parametrize("width", [300, 576, 1])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_a_scale_per_row(width, dtype):
    x = (torch.randn(5, width) * 3).to(dtype)
    x[2] = 0
    integers, scales = quantize_rows(x, None, torch.int8)
    expected, expected_scales = W8A8Linear("int8", "token")._quantized(x)
    assert torch.equal(integers, expected)
    assert torch.equal(scales, expected_scales)


@pytest.mark.parametrize("width", [300, 576, 1])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_a_scale_per_row_of_fp8(width, dtype):
    """Rows are multiples of what FP8 holds, since the interpreter rounds to it in its own way."""
    expected = (torch.randn(5, width) * 50).to(FP8).float()
    expected[:, 0] = 448
    expected[2] = 0
    narrow, scales = quantize_rows((expected * 2.0 ** torch.arange(-2, 3)[:, None]).to(dtype), None, FP8)
    assert torch.equal(narrow.float(), expected)
    assert scales.flatten().tolist() == [0.25, 0.5, 1, 2, 4]


def test_there_is_memory_behind_the_rows():
    """For the GPU's copies of tiles, of which those that reach beyond a tensor are slow."""
    narrow, _ = quantize_rows(torch.randn(65, 16), None, torch.int8)
    assert narrow.shape == (65, 16)
    assert narrow.untyped_storage().nbytes() == 128 * 16


def test_one_scale_rounds_half_to_even_and_saturates():
    x = torch.tensor([[0.5, 1.5, -2.5, 126.5, 200.0, -200.0, 3.0, 1e30]])
    integers, scale = quantize_rows(x, torch.ones(1), torch.int8)
    assert integers[0].tolist() == [0, 2, -2, 126, 127, -128, 3, 127]
    assert scale.tolist() == [[1]]


def test_fp8_keeps_what_it_can_hold_and_saturates():
    """No more than that: the interpreter rounds to FP8 in its own way. Rounding is tested on a GPU."""
    expected = torch.randn(4, 200).mul(50).to(FP8).float()
    x = expected / 2
    x[0, :2] = torch.tensor([1000.0, -1000.0])
    expected[0, :2] = torch.tensor([448.0, -448.0])
    actual, _ = quantize_rows(x, torch.tensor([0.5]), FP8)
    assert torch.equal(actual.float(), expected)
