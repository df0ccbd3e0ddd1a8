"""Parts of tensors that are not read yet, and of quantized weights, against parts of what the whole ones hold."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from trtbuild.errors import UserError
from trtbuild.tensors.lazy import from_tensor
from trtbuild.tensors.quantized_weight import QuantizedWeight
from trtbuild.tensors.safetensors_stream import open_file

DRAW = torch.Generator().manual_seed(0)
PARTS = [(0, 0, 4), (0, 4, 8), (0, 0, 12), (1, 0, 16), (1, 16, 32), (1, 0, 48)]
parts = pytest.mark.parametrize("part", PARTS, ids=str)


def integers(low: int, high: int, *shape: int) -> torch.Tensor:
    return torch.randint(low, high, shape, generator=DRAW, dtype=torch.int8)


def weight(kind: str, groups: int, zeros: bool = False) -> QuantizedWeight:
    """`[12, 48]`."""
    values = integers(-8, 8, 12, 48) if kind == "int4" else integers(-127, 128, 12, 48)
    if kind == "fp8":
        values = values.float().to(torch.float8_e4m3fn)
    scales = torch.rand(12, groups, generator=DRAW) + 0.1
    return QuantizedWeight(
        kind, from_tensor(values), from_tensor(scales), from_tensor(integers(-8, 8, 12, groups)) if zeros else None
    )


WEIGHTS = {
    "int8": weight("int8", 1),
    "fp8": weight("fp8", 1),
    "int4 in groups": weight("int4", 3),
    "int4 in groups with zeros": weight("int4", 3, zeros=True),
    "int4 in rows with zeros": weight("int4", 1, zeros=True),
}


@parts
def test_of_a_file_it_is_read_alone(tmp_path, part):
    x = torch.randn(12, 48, generator=DRAW)
    save_file({"x": x}, tmp_path / "x.safetensors")
    lazy = open_file(tmp_path / "x.safetensors")[0]["x"].narrow(*part)
    assert (lazy.dtype, lazy.shape) == (torch.float32, x.narrow(*part).shape)
    assert torch.equal(lazy.load(), x.narrow(*part))
    assert lazy.load().untyped_storage().nbytes() == x.narrow(*part).nbytes or lazy.shape == x.shape


@parts
def test_of_a_part(part):
    x = torch.randn(12, 48, generator=DRAW)
    both = from_tensor(x).narrow(*part).narrow(0, 1, 3)
    assert both.shape == both.load().shape
    assert torch.equal(both.load(), x.narrow(*part)[1:4])


def test_no_more_is_rounded_than_the_part():
    x = torch.ones(4, 2)
    x[3, 1] = torch.inf
    whole = from_tensor(x).fitting(torch.float16, "x")
    assert torch.equal(whole.narrow(0, 0, 3).load(), x[:3].half())
    assert torch.equal(whole.to(torch.bfloat16).narrow(1, 0, 1).load(), x[:, :1].bfloat16())
    with pytest.raises(UserError, match="x holds NaN or infinite numbers"):
        whole.narrow(1, 1, 1).load()


def test_the_same_part_is_known_again():
    """Without being loaded: a tied table is asked for twice."""
    x = from_tensor(torch.ones(12, 48))
    part = x.fitting(torch.float16, "x").narrow(0, 4, 4)
    assert part == x.fitting(torch.float16, "x").narrow(0, 4, 4)
    assert part != x.fitting(torch.float16, "x").narrow(0, 8, 4)
    assert part != x.narrow(0, 4, 4).to(torch.float16)


@pytest.mark.parametrize("part", [(0, 8, 5), (0, -1, 2), (1, 0, 49), (0, 3, -1)], ids=str)
def test_beyond_the_tensor(part):
    with pytest.raises(ValueError, match="of a tensor"):
        from_tensor(torch.ones(12, 48)).narrow(*part)


@parts
@pytest.mark.parametrize("name", WEIGHTS)
def test_of_a_quantized_weight(name, part):
    whole = WEIGHTS[name]
    cut = whole.narrow(*part)
    assert cut.group_size == whole.group_size or whole.scales.shape[1] == 1
    assert torch.equal(cut.dequantize().load(), whole.dequantize().load().narrow(*part))
    assert cut.values.shape == cut.dequantize().load().shape


@pytest.mark.parametrize("part", [(1, 8, 16), (1, 0, 24)], ids=str)
def test_groups_are_not_cut(part):
    with pytest.raises(ValueError, match="input channels are not whole groups of 16"):
        WEIGHTS["int4 in groups"].narrow(*part)


def test_channels_in_another_order():
    """Rows keep it; which input channels a stored column is of is not of one part."""
    order = torch.randperm(48, generator=DRAW).int()
    whole = replace(WEIGHTS["int4 in groups with zeros"], order=from_tensor(order))
    assert torch.equal(whole.narrow(0, 4, 8).dequantize().load(), whole.dequantize().load()[4:])
    with pytest.raises(ValueError, match="another order"):
        whole.narrow(1, 0, 16)
