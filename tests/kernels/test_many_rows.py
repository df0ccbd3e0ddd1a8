"""Products of 8-bit numbers, interpreted, against float64."""

import pytest
import torch
from numerics import among_nan, relative_error

pytest.importorskip("triton", "3.7")  # earlier interpreters fail with numpy 2.4

from trtbuild.kernels.many_rows import _tiles, product_8bit

FP8 = torch.float8_e4m3fn
TOLERANCE = 5e-4  # the result's own rounding


def operands(rows: int, out: int, width: int, narrow: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Activations and their scales, a weight and its own, all of them among numbers that nobody may read."""
    around = torch.full((3, rows, width), 127.0 if narrow == torch.int8 else torch.nan)
    around[1] = (torch.randn(rows, width) * 40).to(narrow)
    x, weight = around.to(narrow)[1], (torch.randn(out, width) * 40).to(narrow)
    return x, among_nan(torch.rand(rows, 1) * 1e-3), weight, among_nan(torch.rand(out))


@pytest.mark.parametrize("narrow", [torch.int8, FP8], ids=str)
@pytest.mark.parametrize(
    ("rows", "out", "width"),
    [(1, 16, 16), (5, 48, 336), (65, 272, 144), (150, 144, 272), (257, 144, 160)],
    ids=["one row", "steps that end early", "several tiles", "wide tiles", "tall tiles"],
)
def test_against_float64(rows, out, width, narrow):
    x, row_scale, weight, column_scale = operands(rows, out, width, narrow)
    expected = x.double() @ weight.double().T * row_scale * column_scale
    bias = among_nan((torch.randn(out) * expected.std()).half())
    actual = product_8bit(x, row_scale, weight, column_scale, bias, torch.float16)
    assert relative_error(actual, expected + bias) < TOLERANCE
    alone = product_8bit(x.clone(), row_scale, weight, column_scale, bias, torch.float16)  # no memory behind it
    assert torch.equal(actual, alone)


@pytest.mark.parametrize(
    ("rows", "out", "stages"),
    [
        (128, 22016, 3),  # 344 programs on 132 processors: three of each take all of them at once, two do not
        (192, 22016, 4),  # 516: twice two, as often as three
        (128, 12288, 4),  # 192
        (256, 12288, 3),  # 384
    ],
)
def test_programs_side_by_side(rows, out, stages):
    assert _tiles(rows, out, 132)["num_stages"] == stages


def test_integers_are_added_exactly():
    """More than float32 holds: 2^24 and more, with a one that it would lose."""
    x, weight = torch.full((1, 2048), 127, dtype=torch.int8), torch.full((16, 2048), 127, dtype=torch.int8)
    weight[:, 0] = 126
    x[0, 1:3], weight[:, 1:3] = torch.tensor([1, 0], dtype=torch.int8), 1
    ones = torch.ones(16)
    actual = product_8bit(x, torch.full((1, 1), 2.0**-20), weight, ones, None, torch.float32)
    total = torch.tensor(127 * 126 + 1 + 2045 * 127 * 127, dtype=torch.float32)
    assert (actual * 2**20).tolist() == [[total.item()] * 16]


@pytest.mark.filterwarnings("ignore:invalid value encountered")
@pytest.mark.parametrize("narrow", [torch.int8, FP8], ids=str)
@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_a_row_that_is_not_finite_shows_and_spoils_no_other(wrong, narrow):
    x, row_scale, weight, column_scale = operands(3, 32, 64, narrow)
    clean = product_8bit(x, row_scale, weight, column_scale, None, torch.float16)
    row_scale = row_scale.clone()
    row_scale[1] = wrong
    actual = product_8bit(x, row_scale, weight, column_scale, None, torch.float16)
    assert torch.equal(actual[[0, 2]], clean[[0, 2]])
    assert not actual[1].isfinite().any()
