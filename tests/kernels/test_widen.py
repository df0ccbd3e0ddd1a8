"""INT8 and INT4 weights to 16 bits, interpreted, and the layout of INT4."""

import pytest
import torch

from trtbuild.linear.int4 import Int4Linear, dequantize, pack

pytest.importorskip("triton", "3.7")  # earlier interpreters fail with numpy 2.4

from trtbuild.kernels.widen import interleave_int4, widen


def int4(out: int, width: int, group_size: int, symmetric: bool) -> list[torch.Tensor]:
    scales = (torch.rand(out, width // group_size) * 0.1).half()
    zeros = [] if symmetric else [torch.randint(-8, 8, scales.shape, dtype=torch.int8)]
    return [pack(torch.randint(-8, 8, (out, width), dtype=torch.int8)), scales, *zeros]


@pytest.mark.parametrize(("out", "width"), [(64, 128), (33, 320), (70, 1104)])
def test_int8(out, width):
    weight, scale = torch.randint(-128, 128, (out, width), dtype=torch.int8), torch.rand(out) * 0.01
    assert torch.equal(widen(weight, scale, None, torch.float16), (weight * scale[:, None]).half())


def test_int8_without_the_fractions_of_scales():
    weight, scale = torch.randint(-128, 128, (7, 130), dtype=torch.int8), torch.rand(7) * 0.01
    scale[2:4] = torch.tensor([0.25, 0.0])
    power = torch.exp2(torch.floor(torch.log2(scale)))
    assert torch.equal(widen(weight, scale, None, torch.float16, False).float(), weight * power[:, None])


@pytest.mark.parametrize(
    ("out", "width", "group_size"),
    [
        (40, 384, 128),
        (33, 160, 32),
        (16, 96, 96),  # blocks of 32 in groups of 96
        (48, 512, 512),
        (70, 48, 24),  # no block fits
        (16, 1088, 64),
    ],
)
@pytest.mark.parametrize("symmetric", [True, False])
def test_int4(out, width, group_size, symmetric):
    constants = int4(out, width, group_size, symmetric)
    assert torch.equal(widen(*interleave_int4(*constants), torch.float16), dequantize(*constants))


def test_prepare_gives_cuda_the_kernels_layout():
    weight, scales, zeros = int4(16, 64, 32, symmetric=False)
    bias = torch.zeros(16)
    constants, cuda = {"weight": weight, "scales": scales, "bias": bias}, torch.device("cuda")
    prepared = Int4Linear().prepare(cuda, **constants, zeros=zeros)
    expected = (*interleave_int4(weight, scales, zeros), bias)
    names = ("weight", "scales", "zeros", "bias")
    assert all(torch.equal(prepared[name], x) for name, x in zip(names, expected, strict=True))
    words = prepared["weight"].view(torch.int16)[:, :8].int()  # the first group's block
    channels = torch.cat([words >> shift & 15 for shift in (0, 4, 8, 12)], 1)
    assert torch.equal(dequantize(weight, torch.ones_like(scales))[:, :32] + 8, channels.half())
    assert len(Int4Linear().prepare(cuda, **constants)) == 3
