"""Tensors that are read ahead to a GPU. Run by hand: `pytest -m gpu tests/gpu`."""

import pytest
import torch

from trtbuild.tensors import upload
from trtbuild.tensors.lazy import from_tensor
from trtbuild.tensors.safetensors_stream import open_file, write_file
from trtbuild.tensors.upload import Upload

pytestmark = pytest.mark.gpu


def test_memory_that_kernels_still_read_is_not_overwritten(tmp_path, monkeypatch):
    """Every tensor is used and dropped at once, while the next ones come into the memory that it leaves."""
    monkeypatch.setattr(upload, "WINDOW", 64 << 20)
    tensors = {f"{i}": torch.randn(1000 + 37 * i, 2048) for i in range(60)}
    write_file(tmp_path / "x.safetensors", {name: from_tensor(x) for name, x in tensors.items()})
    stored, _ = open_file(tmp_path / "x.safetensors")
    coming = Upload(stored, list(stored), torch.device("cuda"))
    sums = {name: (coming.take(name).double() ** 2).sum() for name in stored}
    coming.close()
    for name, x in tensors.items():
        assert sums[name].item() == pytest.approx((x.double() ** 2).sum().item(), rel=1e-12)
