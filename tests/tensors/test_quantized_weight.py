"""Quantized weights that become one product."""

import pytest
import torch

from trtbuild.tensors.lazy import from_tensor
from trtbuild.tensors.quantized_weight import QuantizedWeight, fuse

WIDTH = 24


def part(out: int, input_scale: torch.Tensor | None = None, groups: int = 1, zeros: bool = False) -> QuantizedWeight:
    return QuantizedWeight(
        "int8",
        from_tensor(torch.randint(-128, 128, (out, WIDTH), dtype=torch.int8)),
        from_tensor(torch.rand(out, groups)),
        from_tensor(torch.randint(-8, 8, (out, groups), dtype=torch.int8)) if zeros else None,
        "16bit" if input_scale is None else "static",
        None if input_scale is None else from_tensor(input_scale),
    )


@pytest.mark.parametrize("steps", [(0.02, 0.05, 0.03), (0.05, 0.02), (0.01, 0.04)], ids=str)
@pytest.mark.parametrize("shape", [(1,), ()], ids=str)
def test_the_largest_input_scale_serves_all_parts(steps, shape):
    """Every part saturates where its activations end, at 127 scales; a smaller one would cut those of another off."""
    fused = fuse([part(4, torch.full(shape, step)) for step in steps])
    assert fused.input_scale.shape == (1,)
    assert fused.input_scale.load().equal(torch.tensor([max(steps)]))


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("groups", [1, 3])
def test_fused_means_what_its_parts_mean(groups, zeros):
    parts = [part(out, groups=groups, zeros=zeros) for out in (5, 2, 9)]
    fused = fuse(parts)
    assert fused.dequantize().load().equal(torch.cat([p.dequantize().load() for p in parts]))
    assert (fused.values.shape, fused.scales.shape, fused.group_size) == ((16, WIDTH), (16, groups), WIDTH // groups)
    assert fused.input_scale is None


def test_one_part_is_itself():
    weight = part(3, torch.ones(1))
    assert fuse([weight]) is weight


@pytest.mark.parametrize(
    "other", [{"input_scale": torch.ones(1)}, {"groups": 2}, {"zeros": True}], ids=lambda other: next(iter(other))
)
def test_parts_of_two_kinds_are_refused(other):
    with pytest.raises(ValueError, match="cannot be fused"):
        fuse([part(3), part(3, **other)])
