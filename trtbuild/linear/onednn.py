"""Products on a CPU by oneDNN."""

from functools import cache

import torch
import torch.nn.functional as F


def onednn_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`x @ weight.T + bias`, on a CPU by oneDNN, which has to know the dtype; in float32 `F.linear` is MKL's there."""
    if x.is_cuda or not torch.backends.mkldnn.is_available():
        return F.linear(x, weight, bias)
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


@cache
def multiplies_bfloat16() -> bool:
    """Whether this CPU has instructions for it."""
    return torch.backends.mkldnn.is_available() and torch.cpu._is_avx512_bf16_supported()
