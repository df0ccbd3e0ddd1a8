"""What a CPU is said to do."""

from pathlib import Path

import pytest
import torch

from trtbuild.tensors.cpu import has_fast_mkl, multiplies


def test_what_it_multiplies():
    """float32 everywhere, and what it says of 16 bits holds: oneDNN refuses what it does not have."""
    assert multiplies(torch.float32)
    assert not multiplies(torch.int8)
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
