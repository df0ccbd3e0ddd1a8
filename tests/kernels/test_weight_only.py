"""The kernels for INT8 and INT4 weights, interpreted."""

import pytest
import torch
import torch.nn.functional as F
from numerics import relative_error

from trtbuild.linear.int4 import Int4Linear, dequantize, pack
from trtbuild.linear.int8 import Int8Linear

pytest.importorskip("triton", "3.7")  # earlier interpreters fail with numpy 2.4

from trtbuild.kernels.weight_only import interleave_int4, weight_only_linear, widen

TOLERANCE = 5e-4  # the result's own rounding to float16
# rows, out, in: widths that blocks of channels divide or not, sums that are split (3 parts, the last one short and
# with a part of a block; 2 parts) or not, more rows than the kernel takes
SHAPES = [(1, 64, 128), (5, 40, 96), (16, 33, 320), (17, 32, 64), (2, 70, 3168), (33, 96, 1104), (65, 32, 64)]


def int4(out: int, width: int, group_size: int, symmetric: bool) -> list[torch.Tensor]:
    values = torch.randint(-8, 8, (out, width), dtype=torch.int8)
    scales = (torch.rand(out, width // group_size) * 0.1).half()
    zeros = [] if symmetric else [torch.randint(-8, 8, scales.shape, dtype=torch.int8)]
    return [pack(values), scales, *zeros]


@pytest.mark.parametrize(("rows", "out", "width"), SHAPES)
@pytest.mark.parametrize("with_bias", [False, True])
def test_int8(rows, out, width, with_bias):
    torch.manual_seed(rows)
    x, bias = torch.randn(rows, width).half(), torch.randn(out).half() if with_bias else None
    weight, scale = torch.randint(-128, 128, (out, width), dtype=torch.int8), torch.rand(out) * 0.01
    expected = F.linear(x.double(), weight * scale.double()[:, None], bias.double() if with_bias else None)
    assert relative_error(weight_only_linear(x, weight, scale, None, bias), expected) < TOLERANCE
    rounded = Int8Linear().reference(x.float(), weight, scale, *([bias.float()] if with_bias else []))
    assert relative_error(weight_only_linear(x, weight, scale, None, bias), rounded) < TOLERANCE
    assert torch.equal(widen(weight, scale, None, torch.float16), (weight * scale[:, None]).half())


@pytest.mark.parametrize(
    ("rows", "out", "width", "group_size"),
    [
        (1, 40, 384, 128),
        (5, 64, 256, 64),
        (3, 33, 160, 32),
        (2, 16, 96, 96),  # blocks of 32 in groups of 96
        (16, 48, 512, 512),
        (4, 16, 48, 24),  # no block fits
        (2, 48, 3456, 128),  # a sum of 27 blocks in parts
        (33, 48, 1088, 64),
        (70, 16, 128, 64),  # too many rows
    ],
)
@pytest.mark.parametrize("symmetric", [True, False])
def test_int4(rows, out, width, group_size, symmetric):
    torch.manual_seed(rows)
    x, bias = torch.randn(rows, width).half(), torch.randn(out).half()
    constants = int4(out, width, group_size, symmetric)
    prepared = interleave_int4(*constants)
    assert (
        relative_error(
            weight_only_linear(x, *prepared, bias),
            Int4Linear().reference(x.double(), constants[0], constants[1].double(), *constants[2:], bias=bias.double()),
        )
        < TOLERANCE
    )
    assert torch.equal(widen(*prepared, torch.float16), dequantize(*constants))


@pytest.mark.parametrize("width", [352, 3104])
def test_nothing_beyond_the_activations_counts(width):
    """The steps do not divide these widths: one that went on past the last channel would meet NaN."""
    weight, scale = torch.randint(-128, 128, (16, width), dtype=torch.int8), torch.rand(16) * 0.01
    memory = torch.full((3 * width,), float("nan")).half()
    x = memory[:width].view(1, width).normal_()
    expected = F.linear(x.double(), weight * scale.double()[:, None])
    assert relative_error(weight_only_linear(x, weight, scale), expected) < TOLERANCE
    packed = interleave_int4(*int4(16, width, 32, symmetric=True))
    expected = F.linear(x.double(), widen(*packed, torch.float64))
    assert relative_error(weight_only_linear(x, *packed), expected) < TOLERANCE


def test_prepare_gives_cuda_the_kernels_layout():
    weight, scales, zeros = int4(16, 64, 32, symmetric=False)
    bias = torch.zeros(16)
    constants, cuda = {"weight": weight, "scales": scales, "bias": bias}, torch.device("cuda")
    prepared = Int4Linear().prepare(cuda, **constants, zeros=zeros)
    expected = (*interleave_int4(weight, scales, zeros), bias)
    names = ("weight", "scales", "zeros", "bias")
    assert all(torch.equal(prepared[name], x) for name, x in zip(names, expected, strict=True))
    low, high = prepared["weight"][:, :16] & 15, prepared["weight"][:, :16] >> 4  # the first group's block
    assert torch.equal(dequantize(weight, torch.ones_like(scales))[:, :32] + 8, torch.cat((low, high), 1).half())
    assert len(Int4Linear().prepare(cuda, **constants)) == 3
