"""What a CPU is said to do."""

from pathlib import Path

import pytest
import torch

from trtbuild.tensors.cpu import has_fast_mkl, multiplies


def test_what_it_multiplies():
    """float32 everywhere, and what it says of fewer bits holds: oneDNN refuses what it does not have."""
    assert multiplies(torch.float32)
    assert not multiplies(torch.uint8)
    if multiplies(torch.int8):
        x, weight = (torch.randint(-128, 128, (rows, 500), dtype=torch.int8) for rows in (30, 70))
        assert torch.equal(torch._int_mm(x, weight.T), (x.double() @ weight.T.double()).int())
    for dtype in (torch.float16, torch.bfloat16):
        if multiplies(dtype):
            x, weight = torch.ones(5, 32, dtype=dtype), torch.ones(7, 32, dtype=dtype)
            assert (torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "") == 32).all()


@pytest.mark.parametrize(("maker", "fast"), [("GenuineIntel", True), ("AuthenticAMD", False), (None, False)])
def test_where_mkl_is_fast(maker, fast, monkeypatch):
    def read_text(path: Path) -> str:
        if maker is None:
            raise FileNotFoundError(path)
        return f"processor\t: 0\nvendor_id\t: {maker}\n"

    monkeypatch.setattr(Path, "read_text", read_text)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    assert has_fast_mkl.__wrapped__() == fast


def test_integers_that_saturate_are_not_multiplied(monkeypatch):
    """What oneDNN makes of them without VNNI: sums of two products in 16 bits, one factor raised by 128."""

    def saturated(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        pairs = x.int().add(128)[:, None].mul(y.T.int()).unflatten(-1, (-1, 2)).sum(-1)
        return pairs.clamp(-(2**15), 2**15 - 1).sum(-1) - 128 * y.int().sum(0)

    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: True)
    monkeypatch.setattr(torch, "_int_mm", lambda x, y: (x.double() @ y.double()).int())
    assert multiplies.__wrapped__(torch.int8)
    monkeypatch.setattr(torch, "_int_mm", saturated)
    assert not multiplies.__wrapped__(torch.int8)
