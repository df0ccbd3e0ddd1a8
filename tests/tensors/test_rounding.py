"""Rounding to int8 and FP8 against float64 arithmetic and the list of all FP8 values."""

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from trtbuild.tensors.rounding import LIMIT, quantize, scale_for, widened

INT8, FP8 = torch.int8, torch.float8_e4m3fn
both = pytest.mark.parametrize("dtype", [INT8, FP8], ids=str)
finite = st.floats(-(2.0**120), 2.0**120, width=32)
magnitudes = st.integers(-149, 119).flatmap(lambda e: st.floats(-1, 1, width=32).map(lambda x: float(x * 2.0**e)))
rows = st.lists(st.one_of(finite, magnitudes, st.just(0.0)), min_size=1, max_size=20)
LOST = 2.0**-150  # half of float32's smallest step: what a scale that is not a normal number is off by


def fp8_values() -> np.ndarray:
    """All finite values by code, 0 .. 126: positive and rising."""
    return torch.arange(127, dtype=torch.uint8).view(FP8).double().numpy()


def nearest_fp8(x: np.ndarray) -> np.ndarray:
    """By comparing with all values: of two as near, the one with the even code."""
    values = fp8_values()
    distance = np.abs(np.abs(x)[..., None].astype(np.float64) - values)
    nearest = distance == distance.min(-1, keepdims=True)
    code = np.argmax(nearest * (2 - np.arange(127) % 2), -1)
    return np.sign(x) * values[code]


@given(rows)
@example([0.0])
@example([1e-45])
@example([190 * 1.4e-45, 0.0])  # no scale can be right: 1.5 steps of float32
@example([3e-39, -1e-40])
@example([1e30, 1e-3])
@settings(max_examples=60, deadline=None)
def test_int8_round_trip_is_within_half_a_step(row):
    x = torch.tensor(row, dtype=torch.float32)
    scale = scale_for(x.abs().amax(), INT8)
    back = quantize(x, scale, INT8).double() * scale.double()
    assert ((back - x.double()).abs() <= scale.double() / 2 * (1 + 1e-5) + 127 * LOST).all()


@given(rows)
@example([1e-45])
@example([1.0, 2.0**-16, 2.0**-20, 0.0])
@settings(max_examples=60, deadline=None)
def test_fp8_round_trip_is_within_half_a_step(row):
    """Four significant bits: a sixteenth of the number, and 2^-10 of the scale below 2^-6."""
    x = torch.tensor(row, dtype=torch.float32)
    scale = scale_for(x.abs().amax(), FP8)
    back = quantize(x, scale, FP8).double() * scale.double()
    step = torch.maximum(x.double().abs() / 16, scale.double() * 2.0**-10)
    assert ((back - x.double()).abs() <= step * (1 + 1e-5) + 448 * LOST).all()


@both
@given(row=rows.filter(lambda row: max(map(abs, row)) > 1e-30))
@settings(max_examples=60, deadline=None)
def test_the_largest_magnitude_becomes_the_limit(dtype, row):
    x = torch.tensor(row, dtype=torch.float32)
    values = quantize(x, scale_for(x.abs().amax(), dtype), dtype).float()
    assert values.abs().max() == LIMIT[dtype]
    assert (values.sign() * x.sign() >= 0).all()


@both
@pytest.mark.parametrize("size", [2.0, 1e6, 1e30, float("inf")])
def test_saturates(dtype, size):
    lowest = {INT8: -128.0, FP8: -448.0}[dtype]
    x = torch.tensor([LIMIT[dtype], -LIMIT[dtype]]) * size
    assert quantize(x, torch.ones(1), dtype).tolist() == [LIMIT[dtype], lowest]


@both
def test_zeros_have_scale_one_and_stay_zero(dtype):
    scale = scale_for(torch.tensor([0.0, 254.0, 0.0]), dtype)
    assert scale.tolist() == [1.0, torch.tensor(254.0).div(LIMIT[dtype]).item(), 1.0]
    assert quantize(torch.zeros(5, 3), scale, dtype).float().eq(0).all()


@both
@pytest.mark.parametrize("wide", [torch.float16, torch.bfloat16, torch.float32])
def test_scales_are_float32_quotients(dtype, wide):
    absmax = (torch.rand(50) * 100).to(wide)
    expected = absmax.float().numpy() / np.float32(LIMIT[dtype])
    scale = scale_for(absmax, dtype)
    assert scale.dtype == torch.float32
    np.testing.assert_array_equal(scale.numpy(), expected)


@pytest.mark.parametrize(
    ("x", "expected"),
    [(0.5, 0), (1.5, 2), (2.5, 2), (-0.5, 0), (-1.5, -2), (126.5, 126), (127.5, 127), (-127.5, -128), (-128.5, -128)],
)
def test_int8_ties_go_to_even(x, expected):
    assert quantize(torch.tensor([x]), torch.ones(1), INT8).item() == expected
    assert quantize(torch.tensor([x * 0.25]), torch.tensor([0.25]), INT8).item() == expected


@pytest.mark.parametrize(
    ("x", "expected"),
    [
        (17, 16),
        (19, 20),
        (21, 20),
        (-19, -20),
        (432, 448),  # whose code is even
        (2.0**-10, 0),  # half of the smallest value
        (3 * 2.0**-10, 2.0**-8),
        (5 * 2.0**-10, 2.0**-8),
    ],
)
def test_fp8_ties_go_to_even(x, expected):
    assert quantize(torch.tensor([float(x)]), torch.ones(1), FP8).float().item() == expected


@given(
    st.lists(st.one_of(st.floats(-448, 448, width=32), st.floats(-0.0625, 0.0625, width=32)), min_size=1, max_size=40)
)
@settings(max_examples=60, deadline=None)
def test_fp8_is_the_nearest_of_all_values(row):
    x = torch.tensor(row, dtype=torch.float32)
    np.testing.assert_array_equal(quantize(x, torch.ones(1), FP8).double().numpy(), nearest_fp8(x.numpy()))


def test_fp8_is_the_nearest_half_way_and_beside_it():
    values = fp8_values()
    middle = ((values[1:] + values[:-1]) / 2).astype(np.float32)
    x = np.concatenate([middle, np.nextafter(middle, np.float32(0)), np.nextafter(middle, np.float32(1e9))])
    x = np.concatenate([x, -x])
    np.testing.assert_array_equal(quantize(torch.tensor(x), torch.ones(1), FP8).double().numpy(), nearest_fp8(x))


@pytest.mark.parametrize("exponent", [-100, -7, 0, 3, 60])
def test_every_value_is_kept_under_a_power_of_two(exponent):
    scale = torch.tensor([2.0**exponent])
    for dtype, bits in ((INT8, torch.arange(-128, 128)), (FP8, torch.arange(256))):
        values = bits.to(INT8) if dtype == INT8 else bits.to(torch.uint8).view(FP8)
        values = values[~values.float().isnan()]
        assert quantize(values.float() * scale, scale, dtype).view(torch.uint8).equal(values.view(torch.uint8))


def test_scales_broadcast_and_the_input_stays():
    x = torch.tensor([[1.0, -2.0], [3.0, 127.0]])
    before = x.clone()
    assert quantize(x, torch.tensor([[1.0], [0.5]]), INT8).tolist() == [[1, -2], [6, 127]]
    assert quantize(x, torch.tensor([1.0, 0.5]), INT8).tolist() == [[1, -4], [3, 127]]
    assert x.equal(before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_8_bits_are_widened_to_what_they_are(dtype):
    codes = torch.arange(256, dtype=torch.uint8).view(INT8)
    assert torch.equal(widened(codes, dtype), codes.to(dtype))
    codes = codes.view(FP8)
    numbers = codes[codes.float().isfinite()]
    for x in (codes, numbers, numbers.expand(3, -1).T[::2], numbers[:0]):
        assert widened(x, dtype).dtype == dtype
        assert torch.equal(widened(x, dtype).isnan(), x.to(dtype).isnan())
        assert torch.equal(widened(x, dtype).nan_to_num(), x.to(dtype).nan_to_num())
    assert widened(numbers, dtype).signbit().tolist() == numbers.to(dtype).signbit().tolist()  # also of zero
