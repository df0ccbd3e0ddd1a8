"""The grids of weights: how far rounding moves a weight, and what must stay exact."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from trtbuild.linear.format import round_8bit
from trtbuild.linear.int4 import Int4Grid

INT8, FP8 = torch.int8, torch.float8_e4m3fn
# Of a scale's dtype: the largest relative error of rounding, and half of the smallest step.
PRECISION = {
    torch.float32: (2.0**-24, 2.0**-150),
    torch.float16: (2.0**-11, 2.0**-25),
    torch.bfloat16: (2.0**-8, 2.0**-134),
}
dtypes = pytest.mark.parametrize("dtype", PRECISION, ids=str)
symmetries = pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
numbers = st.one_of(
    st.floats(-8, 8, width=32),
    st.floats(-(2.0**-13), 2.0**-13, width=32),
    st.floats(-(2.0**-26), 2.0**-26, width=32),  # scales below float16's range
    st.sampled_from([0.0, 1e4, -1e4]),
)
groups_of_six = st.lists(st.lists(numbers, min_size=6, max_size=6), min_size=1, max_size=6)


def rounded(weight, group_size, symmetric, dtype):
    """Values, scales and zeros after the checks that every result must pass."""
    values, scales, zeros = Int4Grid(group_size, symmetric, dtype).round(weight)
    assert values.shape == weight.shape
    assert scales.shape == zeros.shape == (len(weight), weight.shape[1] // group_size)
    for integers in (values, zeros):
        assert integers.round().equal(integers)
        assert ((integers >= -8) & (integers <= 7)).all()
    assert (scales > 0).all()
    assert scales.to(dtype).float().equal(scales), "a scale is not exact in its dtype"
    if symmetric:
        assert zeros.eq(0).all()
    return values, scales, zeros


@dtypes
@symmetries
@given(rows=groups_of_six)
@example(rows=[[0.0] * 6])
@example(rows=[[1.0] * 6])
@example(rows=[[-1.0] * 6])
@example(rows=[[-7.5, 7.5, 0.5, 1.5, 2.5, -0.5]])
@example(rows=[[1e4, 1e-3, -1e-3, 0.0, 1.0, -1.0]])
@settings(max_examples=60, deadline=None)
def test_int4_round_trip_is_within_half_a_step(rows, symmetric, dtype):
    """And what the scale itself was rounded by, times the 15 steps that it may be off."""
    weight = torch.tensor(rows, dtype=torch.float32)
    values, scales, zeros = rounded(weight, 3, symmetric, dtype)
    steps = scales.double().repeat_interleave(3, 1)
    relative, absolute = PRECISION[dtype]
    error = (Int4Grid.dequantize(values.double(), scales.double(), zeros.double()) - weight.double()).abs()
    assert (error <= steps / 2 + 15 * (steps * (relative + 1e-7) + absolute)).all()


@dtypes
@given(rows=groups_of_six)
@settings(max_examples=60, deadline=None)
def test_asymmetric_levels_contain_zero_exactly(rows, dtype):
    weight = torch.tensor(rows, dtype=torch.float32)
    weight[:, ::2] = 0
    back = Int4Grid.dequantize(*rounded(weight, 6, False, dtype))
    assert back[:, ::2].eq(0).all()


@dtypes
@pytest.mark.parametrize("sign", [1, -1])
def test_asymmetric_group_of_one_sign_uses_every_level(sign, dtype):
    """The zero point is at an end of the range, as far as it goes."""
    weight = sign * torch.arange(16.0)[None] / 4
    values, scales, zeros = rounded(weight, 16, False, dtype)
    assert (scales.item(), zeros.item()) == (0.25, -8 if sign > 0 else 7)
    assert sorted(values[0].tolist()) == list(range(-8, 8))
    assert Int4Grid.dequantize(values, scales, zeros).equal(weight)


@dtypes
def test_symmetric_levels(dtype):
    """The largest magnitude is 7.5 steps, which is the lowest level or the highest but half a step."""
    weight = torch.tensor([[-7.5, 7.5, 0.5, 1.5, 2.5, -0.5, -1.5, 6.9]])
    values, scales, _ = rounded(weight, 8, True, dtype)
    assert scales.item() == 1
    assert values[0].tolist() == [-8, 7, 0, 2, 2, 0, -2, 7]  # ties to even


@symmetries
@dtypes
def test_int4_zero_group_and_denormals(symmetric, dtype):
    """A scale that the dtype rounds to zero is 1, and the values are 0."""
    weight = torch.tensor([[0.0, 0.0, 1e-45, -1e-45, 1.0, 0.0]])
    values, scales, zeros = rounded(weight, 2, symmetric, dtype)
    assert scales[0, :2].tolist() == [1, 1]
    assert Int4Grid.dequantize(values, scales, zeros)[0, :4].eq(0).all()


@symmetries
def test_int4_outlier_flattens_its_own_group_alone(symmetric):
    weight = torch.randn(4, 64)
    weight[2, 5] = 1e4
    values, scales, zeros = rounded(weight, 32, symmetric, torch.float32)
    back = Int4Grid.dequantize(values, scales, zeros)
    assert back[2, :32].ne(0).sum() == 1
    assert back[2, 5].item() == pytest.approx(1e4, rel=1 / 15 + 1e-6)
    weight[2, 5] = 0
    others = rounded(weight, 32, symmetric, torch.float32)
    for with_outlier, without in zip((scales, zeros), others[1:], strict=True):
        changed = with_outlier.ne(without)
        changed[2, 0] = False
        assert not changed.any()


def test_groups_are_rounded_on_their_own():
    weight = torch.randn(8, 96) * torch.logspace(-3, 3, 96)
    whole = rounded(weight, 32, False, torch.float16)
    for i in range(3):
        part = rounded(weight[:, 32 * i : 32 * (i + 1)], 32, False, torch.float16)
        assert part[0].equal(whole[0][:, 32 * i : 32 * (i + 1)])
        assert part[1].equal(whole[1][:, i : i + 1])
        assert part[2].equal(whole[2][:, i : i + 1])


@pytest.mark.parametrize("dtype", [INT8, FP8], ids=str)
@pytest.mark.parametrize("wide", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("per_tensor", [False, True], ids=["channel", "tensor"])
def test_8bit_round_trip(per_tensor, wide, dtype):
    weight = (torch.randn(17, 40) * torch.logspace(-3, 1, 17)[:, None]).to(wide)
    values, scales = round_8bit(weight, dtype, per_tensor)
    assert (values.dtype, values.shape) == (dtype, (17, 40))
    assert (scales.dtype, scales.shape, scales.is_contiguous()) == (torch.float32, (17, 1), True)
    exact = weight.double()
    largest = exact.abs().amax() if per_tensor else exact.abs().amax(1, keepdim=True)
    torch.testing.assert_close(scales.double(), (largest / (127 if dtype == INT8 else 448)).expand(17, 1))
    error = (values.double() * scales.double() - exact).abs()
    step = scales.double() / 2
    if dtype == FP8:
        step = torch.maximum(exact.abs() / 16, scales.double() * 2.0**-10)
    assert (error <= step * (1 + 1e-5)).all()
    assert values.float().abs().max() == (127 if dtype == INT8 else 448)


@pytest.mark.parametrize("dtype", [INT8, FP8], ids=str)
def test_8bit_zero_channel_and_outlier(dtype):
    weight = torch.randn(3, 50)
    weight[0] = 0
    weight[1, 7] = -1e6
    values, scales = round_8bit(weight, dtype, per_tensor=False)
    limit = 127 if dtype == INT8 else 448
    assert scales[0].item() == 1
    assert values[0].float().eq(0).all()
    assert values[1, 7].float().item() == -limit
    if dtype == INT8:  # the rest of its channel is lost; of FP8's values some lie near zero
        assert values[1].ne(0).sum() == 1
    alone = round_8bit(weight[2:], dtype, per_tensor=False)
    assert alone[0].float().equal(values[2:].float())
    assert alone[1].equal(scales[2:])
    assert round_8bit(torch.zeros(2, 4), dtype, per_tensor=True)[1].tolist() == [[1], [1]]


def test_dequantize_by_hand():
    values = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    scales, zeros = torch.tensor([[2.0, 0.5]]), torch.tensor([[1.0, -4.0]])
    assert Int4Grid.dequantize(values, scales, zeros).tolist() == [[0, 2, 3.5, 4]]
