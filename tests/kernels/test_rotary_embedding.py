"""The kernel for a step's rotary angles, interpreted."""

import pytest
import torch

from trtbuild.network.ops.rotary_embedding import RotaryEmbedding

pytest.importorskip("triton", "3.7")  # earlier interpreters fail with numpy 2.4

from trtbuild.kernels.rotary_embedding import rotary_embedding

POSITIONS = torch.tensor([0, 1, 77, 2047, 16383], dtype=torch.int32)


@pytest.mark.parametrize("head_dim", [16, 80])
@pytest.mark.parametrize("kind", ["plain", "per token", "dynamic"])
def test_rotary_embedding(kind, head_dim):
    frequencies = 10000.0 ** -(torch.arange(0, head_dim, 2) / head_dim)
    dynamic = ()
    if kind == "per token":
        frequencies = frequencies * torch.linspace(0.5, 1, len(POSITIONS))[:, None]
    if kind == "dynamic":
        dynamic = POSITIONS + 1, 2.0, 2048
    for dtype in ("float32", "float16"):
        expected = RotaryEmbedding(dtype, *dynamic[1:]).reference(POSITIONS, frequencies, *dynamic[:1])
        actual = rotary_embedding(POSITIONS, frequencies, getattr(torch, dtype), *dynamic)
        for x, wanted in zip(actual, expected, strict=True):
            # Powers differ by rounding, which a position multiplies.
            torch.testing.assert_close(x, wanted, rtol=0, atol=1e-2 if dynamic else 1e-3)
            torch.testing.assert_close(x[:4], wanted[:4], rtol=0, atol=1e-3 if dtype == "float16" else 5e-4)
