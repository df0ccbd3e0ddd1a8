"""The layout of AutoGPTQ and GPTQModel, 4 bits; act-order is read, not written.

For a product `[out, in]`: `qweight` int32 `[in / 8, out]`, eight input channels a word; `qzeros` int32
`[groups, out / 8]`, eight output channels a word; `scales` `[groups, out]`; `g_idx` int32 `[in]`, the group of each
channel (of neighbours, unless channels were quantized by their activations: `desc_act`). Weights and zero points are
unsigned. Checkpoint format "gptq" stores zero points less one, "gptq_v2" as they are; the one is taken off and put back
on whole words, as GPTQModel does, so that a borrow comes back as a carry.
"""

import re
from collections.abc import Mapping

import torch

from trtbuild.checkpoint.formats.int32 import count_groups, expect, group_order, pack, signed
from trtbuild.errors import UserError
from trtbuild.tensors.lazy import FLOATS, LazyTensor, Rearranged, transposed
from trtbuild.tensors.quantized_weight import QuantizedWeight

ONES = 0x11111111
SEVENS = 0x77777777  # a zero point of 8, less one


def read(quantization: dict, tensors: Mapping[str, LazyTensor], where: str) -> dict[str, LazyTensor | QuantizedWeight]:
    """See `read_quantized`."""
    if quantization["bits"] != 4:
        raise UserError(f"{where}: GPTQ with {quantization['bits']} bits is not supported; 4 bits are")
    version = "marlin" if quantization.get("is_marlin_format") else quantization.get("checkpoint_format") or "gptq"
    if version not in ("gptq", "gptq_v2"):
        raise UserError(f"{where}: checkpoint_format {version!r} is not supported; supported are gptq and gptq_v2")
    result: dict[str, LazyTensor | QuantizedWeight] = {}
    for name, tensor in tensors.items():
        prefix, _, kind = name.rpartition(".")
        if kind == "qweight":
            result[f"{prefix}.weight"] = _weight(prefix, tensors, quantization, version, where)
        elif kind not in ("qzeros", "scales", "g_idx"):
            result[name] = tensor
    return result


def _weight(
    prefix: str, tensors: Mapping[str, LazyTensor], quantization: dict, version: str, where: str
) -> QuantizedWeight:
    qweight, qzeros, scales = (tensors[f"{prefix}.{kind}"] for kind in ("qweight", "qzeros", "scales"))
    width, out = qweight.shape[0] * 8, qweight.shape[1]
    groups = count_groups(width, quantization["group_size"], where)
    expect(f"{prefix}.qweight", qweight, (torch.int32,), (width // 8, out), where)
    expect(f"{prefix}.qzeros", qzeros, (torch.int32,), (groups, out // 8), where)
    expect(f"{prefix}.scales", scales, FLOATS, (groups, out), where)
    order = None
    if f"{prefix}.g_idx" in tensors or (quantization.get("desc_act") and groups > 1):
        order = group_order(f"{prefix}.g_idx", tensors[f"{prefix}.g_idx"], width, groups, where)

    def values(words: torch.Tensor) -> torch.Tensor:
        return signed(words.T) if order is None else signed(words.T)[:, order.load()]

    zeros = Rearranged(
        qzeros, lambda words: signed(words + ONES if version == "gptq" else words).T.contiguous(), ((1, 8), (0, 1))
    )
    symmetric = quantization.get("sym", True)
    if symmetric and zeros().any():
        raise UserError(f"{where}: sym: true, but {prefix}.qzeros are not all 8")
    channels = (0, 8) if order is None else None
    return QuantizedWeight(
        "int4",
        LazyTensor(torch.int8, (out, width), Rearranged(qweight, values, ((1, 1), channels))),
        transposed(scales),
        None if symmetric else LazyTensor(torch.int8, (out, groups), zeros),
        order=order,
    )


def write(prefix: str, weight: QuantizedWeight) -> dict[str, LazyTensor]:
    """A quantized product's tensors, in checkpoint format "gptq"."""
    (out, width), groups = weight.values.shape, weight.scales.shape[1]

    def qzeros() -> torch.Tensor:
        if weight.zeros is None:
            return torch.full((groups, out // 8), SEVENS, dtype=torch.int32)
        return pack(weight.zeros.load().T.int() + 8) - ONES

    return {
        f"{prefix}.qweight": LazyTensor(
            torch.int32, (width // 8, out), lambda: pack(weight.values.load().int() + 8).T.contiguous()
        ),
        f"{prefix}.qzeros": LazyTensor(torch.int32, (groups, out // 8), qzeros),
        f"{prefix}.scales": LazyTensor(weight.scales.dtype, (groups, out), lambda: weight.scales.load().T.contiguous()),
        f"{prefix}.g_idx": LazyTensor(
            torch.int32, (width,), lambda: torch.arange(width, dtype=torch.int32) // weight.group_size
        ),
    }


def describe(weight: QuantizedWeight, kept: list[str], lm_head: bool) -> dict:
    """`quantization_config` of a checkpoint whose products are all like `weight`, but for those `kept` in 16 bits."""
    return {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": weight.group_size,
        "desc_act": False,
        "sym": weight.zeros is None,
        "lm_head": lm_head,
        "checkpoint_format": "gptq",
        "pack_dtype": "int32",
        "meta": {"quantizer": ["trtbuild"]},
    } | ({"dynamic": {f"-:^{re.escape(name)}$": {} for name in kept}} if kept else {})
