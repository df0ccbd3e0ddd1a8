"""Products on a CPU by oneDNN."""

from functools import cache

import torch
import torch.nn.functional as F

# For which the weight is oneDNN's first factor: the second it brings into an order of its own, every time.
FEW_ROWS = range(4, 33)


def onednn_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`x @ weight.T + bias`, on a CPU by oneDNN, which has to know the dtype; in float32 `F.linear` is MKL's there."""
    if x.is_cuda or not torch.backends.mkldnn.is_available():
        return F.linear(x, weight, bias)
    product = torch.ops.mkldnn._linear_pointwise
    if x.shape[0] in FEW_ROWS and x.dtype == torch.float32:
        y = product(weight, x, None, "none", [], "").t().contiguous()
        return y if bias is None else y.add_(bias)
    return product(x, weight, bias, "none", [], "")


@cache
def multiplies_bfloat16() -> bool:
    """Whether this CPU has instructions for it."""
    return torch.backends.mkldnn.is_available() and torch.cpu._is_avx512_bf16_supported()
