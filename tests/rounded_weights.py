"""Weights rounded to nearest, in every format."""

import torch

from trtbuild.linear.format import round_8bit
from trtbuild.linear.int4 import Int4Grid
from trtbuild.tensors.lazy import from_tensor
from trtbuild.tensors.quantized_weight import QuantizedWeight
from trtbuild.tensors.rounding import DTYPES, LIMIT


def rounded(weight: torch.Tensor, kind: str, group: int, dtype: torch.dtype = torch.float32) -> QuantizedWeight:
    """`[out, in]` as "int4 symmetric", "int4 asymmetric" or "int4 rows" (a group each), or in 8 bits with what happens
    to activations, which reach 4 where that is static: "int8 16bit", "fp8 static", "int8 token".
    """
    name, _, option = kind.partition(" ")
    if name == "int4":
        size = weight.shape[1] if option == "rows" else group
        values, scales, zeros = Int4Grid(size, option == "symmetric", dtype).round(weight.float())
        kept = None if option == "symmetric" else from_tensor(zeros.to(torch.int8))
        return QuantizedWeight("int4", from_tensor(values.to(torch.int8)), from_tensor(scales), kept)
    values, scales = round_8bit(weight, DTYPES[name], per_tensor=False)
    input_scale = from_tensor(torch.tensor([4 / LIMIT[DTYPES[name]]])) if option == "static" else None
    return QuantizedWeight(name, from_tensor(values), from_tensor(scales), None, option, input_scale)
