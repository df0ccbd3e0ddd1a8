"""AutoAWQ's GEMM layout, 4 bits.

For a product `[out, in]`: `qweight` int32 `[in, out / 8]` and `qzeros` int32 `[groups, out / 8]`, eight output channels
a word in the order 0, 2, 4, 6, 1, 3, 5, 7 from the lowest bits on; `scales` `[groups, out]`. All unsigned.
"""

from collections.abc import Mapping

import torch

from trtbuild.checkpoint.formats.int32 import count_groups, expect, pack, signed
from trtbuild.errors import UserError
from trtbuild.tensors.lazy import FLOATS, LazyTensor, Rearranged, transposed
from trtbuild.tensors.quantized_weight import QuantizedWeight

EIGHTS = -0x77777778  # 0x88888888 as int32: zero points of 8
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def read(quantization: dict, tensors: Mapping[str, LazyTensor], where: str) -> dict[str, LazyTensor | QuantizedWeight]:
    """See `read_quantized`."""
    bits = quantization.get("bits", quantization.get("w_bit"))
    version = str(quantization.get("version") or "gemm").lower()
    if bits != 4 or version != "gemm":
        raise UserError(f"{where}: AWQ version {version!r} with {bits} bits is not supported; gemm with 4 bits is")
    group_size = quantization["group_size" if "group_size" in quantization else "q_group_size"]
    symmetric = not quantization.get("zero_point", True)
    result: dict[str, LazyTensor | QuantizedWeight] = {}
    for name, tensor in tensors.items():
        prefix, _, kind = name.rpartition(".")
        if kind == "qweight":
            result[f"{prefix}.weight"] = _weight(prefix, tensors, group_size, symmetric, where)
        elif kind not in ("qzeros", "scales"):
            result[name] = tensor
    return result


def _weight(
    prefix: str, tensors: Mapping[str, LazyTensor], group_size: int, symmetric: bool, where: str
) -> QuantizedWeight:
    qweight, qzeros, scales = (tensors[f"{prefix}.{kind}"] for kind in ("qweight", "qzeros", "scales"))
    width, out = qweight.shape[0], qweight.shape[1] * 8
    groups = count_groups(width, group_size, where)
    expect(f"{prefix}.qweight", qweight, (torch.int32,), (width, out // 8), where)
    expect(f"{prefix}.qzeros", qzeros, (torch.int32,), (groups, out // 8), where)
    expect(f"{prefix}.scales", scales, FLOATS, (groups, out), where)

    def values(words: torch.Tensor) -> torch.Tensor:
        return signed(words, order=ORDER).T.contiguous()

    zeros = Rearranged(qzeros, values, ((1, 8), (0, 1)))
    if symmetric and zeros().any():
        raise UserError(f"{where}: zero_point: false, but {prefix}.qzeros are not all 8")
    return QuantizedWeight(
        "int4",
        LazyTensor(torch.int8, (out, width), Rearranged(qweight, values, ((1, 8), (0, 1)))),
        transposed(scales),
        None if symmetric else LazyTensor(torch.int8, (out, groups), zeros),
    )


def _packed(values: torch.Tensor) -> torch.Tensor:
    """int8 `[rows, n]` to int32 `[rows, n / 8]` in AWQ's order, 0 being 8."""
    return pack((values.unflatten(1, (-1, 8))[..., list(ORDER)].flatten(1)).int() + 8)


def write(prefix: str, weight: QuantizedWeight) -> dict[str, LazyTensor]:
    """A quantized product's tensors."""
    (out, width), groups = weight.values.shape, weight.scales.shape[1]

    def qzeros() -> torch.Tensor:
        if weight.zeros is None:
            return torch.full((groups, out // 8), EIGHTS, dtype=torch.int32)
        return _packed(weight.zeros.load().T)

    return {
        f"{prefix}.qweight": LazyTensor(torch.int32, (width, out // 8), lambda: _packed(weight.values.load().T)),
        f"{prefix}.qzeros": LazyTensor(torch.int32, (groups, out // 8), qzeros),
        f"{prefix}.scales": LazyTensor(weight.scales.dtype, (groups, out), lambda: weight.scales.load().T.contiguous()),
    }


def describe(weight: QuantizedWeight, kept: list[str], lm_head: bool) -> dict:
    """`quantization_config` of a checkpoint whose products are all like `weight`, but for those `kept` in 16 bits."""
    return {
        "quant_method": "awq",
        "bits": 4,
        "group_size": weight.group_size,
        "zero_point": weight.zeros is not None,
        "version": "gemm",
        "modules_to_not_convert": kept if lm_head else [*kept, "lm_head"],
    }
