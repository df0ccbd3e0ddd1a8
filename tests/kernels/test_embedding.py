"""The kernel that takes rows of an embedding, interpreted."""

import pytest
import torch

from trtbuild.network.ops.embedding import Embedding, EmbeddingPart

pytest.importorskip("triton", "3.7")  # earlier interpreters fail with numpy 2.4

from trtbuild.kernels import embedding as module
from trtbuild.kernels.embedding import embedding

IDS = torch.tensor([0, 7, 4, 19, 5, 4], dtype=torch.int32)


@pytest.mark.parametrize("width", [6, 96])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_embedding(monkeypatch, dtype, width):
    monkeypatch.setattr(module, "BLOCK", 64)
    table = torch.randn(20, width).to(dtype)
    assert embedding(IDS, table).equal(Embedding().reference(IDS, table))
    found = embedding(IDS, table[4:8], first=4)
    assert found.equal(EmbeddingPart(4).reference(IDS, table[4:8]))
    assert found.equal(table[IDS] * ((IDS >= 4) & (IDS < 8))[:, None])
