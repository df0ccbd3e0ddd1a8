"""Products on a CPU by whichever of torch's libraries is the fastest (BENCHMARKS.md)."""

import torch
import torch.nn.functional as F

from trtbuild.tensors.cpu import has_fast_mkl

# In float32, for which the weight is oneDNN's first factor: the second it brings into an order of its own, every time.
FEW_ROWS = range(4, 33)
FEW_ROWS_BESIDE_MKL = range(7, 33)  # where that, which is `F.linear`, is faster for all others


def cpu_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`x @ weight.T + bias`, all of a dtype that the CPU multiplies; on CUDA torch's own."""
    if x.is_cuda or not torch.backends.mkldnn.is_available():
        return F.linear(x, weight, bias)
    product = torch.ops.mkldnn._linear_pointwise
    if x.dtype == torch.float32:
        if x.shape[0] in (FEW_ROWS_BESIDE_MKL if has_fast_mkl() else FEW_ROWS):
            y = product(weight, x, None, "none", [], "").t().contiguous()
            return y if bias is None else y.add_(bias)
        if has_fast_mkl():
            return F.linear(x, weight, bias)
    return product(x, weight, bias, "none", [], "")
