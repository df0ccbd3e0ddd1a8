"""compressed-tensors, what llm-compressor writes: INT8, FP8 and packed integers, with or without quantized activations.

For a product `[out, in]`: `weight` int8 or float8_e4m3fn `[out, in]` (formats int-quantized, float-quantized), or
`weight_packed` int32 `[out, in * bits / 32]` of unsigned values with `weight_shape` int64 `[2]` (pack-quantized);
`weight_scale` `[1]`, `[out, 1]` or `[out, groups]`; for asymmetric groups `weight_zero_point` int32
`[out * bits / 32, groups]`, packed along the outputs; for static activations `input_scale` `[1]`. `weight_g_idx`
int32 `[in]`, the group of each input channel, is there with `actorder: group` alone (-1: not used); with `weight`, or
`static`, the order was that of rounding, and nothing in the file is reordered.
"""

from collections.abc import Mapping

import torch

from trtbuild.checkpoint.formats.int32 import count_groups, expect, group_order, pack, signed
from trtbuild.errors import UserError
from trtbuild.linear.format import WeightFormat
from trtbuild.linear.linear import WEIGHT_FORMATS, weight_format
from trtbuild.tensors.lazy import FLOATS, LazyTensor, Rearranged
from trtbuild.tensors.quantized_weight import QuantizedWeight

PARTS = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx", "input_scale")
IGNORED = ("k_scale", "v_scale", "output_scale", "output_zero_point")  # the cache's come from our own calibration
WAYS = {"16bit": None, "static": ("tensor", False), "token": ("token", True)}  # strategy and dynamic of activations
DEFAULTS = {"num_bits": 8, "type": "int", "symmetric": True, "group_size": None, "dynamic": False, "actorder": None}


def read(quantization: dict, tensors: Mapping[str, LazyTensor], where: str) -> dict[str, LazyTensor | QuantizedWeight]:
    """See `read_quantized`."""
    groups = list(quantization["config_groups"].values())
    if len(groups) != 1:
        raise UserError(f"{where}: {len(groups)} config_groups are not supported; all weights must be quantized alike")
    (group,) = groups
    sparsity = quantization.get("sparsity_config") or {}
    for name, value in (
        ("transform_config", quantization.get("transform_config")),
        ("sparsity_config", sparsity.get("format", "dense") != "dense"),
        ("output_activations", group.get("output_activations")),
    ):
        if value:
            raise UserError(f"{where}: {name} is not supported; take a checkpoint without it")
    if not isinstance(group["weights"], dict):
        raise UserError(f"{where}: weights of config_groups is {group['weights']!r}; a scheme is expected")
    weights, activations = _scheme(group["weights"]), None
    if group.get("input_activations") is not None:
        activations = _scheme(group["input_activations"])
    known = _format(weights, activations, where)
    result: dict[str, LazyTensor | QuantizedWeight] = {}
    for name, tensor in tensors.items():
        prefix, _, kind = name.rpartition(".")
        if kind == "weight_scale":
            result[f"{prefix}.weight"] = _weight(prefix, tensors, known, weights, activations, where)
        elif kind not in (*PARTS, "input_zero_point", *IGNORED) and name not in result:
            result[name] = tensor
    return result


def _scheme(scheme: dict) -> dict:
    """With compressed-tensors' own values for what is left out."""
    size = scheme.get("group_size")
    strategy = scheme.get("strategy") or ("tensor" if size is None else "channel" if size == -1 else "group")
    return DEFAULTS | scheme | {"strategy": strategy}


def _format(weights: dict, activations: dict | None, where: str) -> WeightFormat:
    """The weight format that computes these schemes; raises `UserError` where none does."""
    number = weights["type"], weights["num_bits"]
    way = activations and (activations["strategy"], bool(activations["dynamic"]))
    symmetric = activations is None or activations["symmetric"]
    same = activations is None or (activations["type"], activations["num_bits"]) == number
    for known in WEIGHT_FORMATS:
        strategies = ("tensor", "channel", "group") if known.groups else ("tensor", "channel")
        if (
            (known.scheme, WAYS[known.activations]) == (number, way)
            and weights["strategy"] in strategies
            and (weights["symmetric"] or known.groups)
            and symmetric
            and same
        ):
            return known
    raise UserError(
        f"{where}: weights {weights['type']}{weights['num_bits']} per {weights['strategy']} with activations "
        f"{activations and (activations['type'], activations['num_bits'], activations['strategy'])} are not "
        "supported; int4 groups, int8, int8 with int8 activations and fp8 with fp8 activations are"
    )


def _weight(
    prefix: str,
    tensors: Mapping[str, LazyTensor],
    known: WeightFormat,
    scheme: dict,
    activations: dict | None,
    where: str,
) -> QuantizedWeight:
    for name, part in (("weight_zero_point", scheme), ("input_zero_point", activations)):
        zero_point = tensors.get(f"{prefix}.{name}")
        if zero_point is not None and part and part["symmetric"] and zero_point.load().float().any():
            raise UserError(f"{where}: symmetric: true, but {prefix}.{name} is not zero")
    bits, scale = scheme["num_bits"], tensors[f"{prefix}.weight_scale"]
    if packed := tensors.get(f"{prefix}.weight_packed"):
        out, width = packed.shape[0], packed.shape[1] * 32 // bits
        expect(f"{prefix}.weight_packed", packed, (torch.int32,), packed.shape, where)
        words = Rearranged(packed, lambda words: signed(words, bits), ((0, 1), (1, 32 // bits)))
        values = LazyTensor(torch.int8, (out, width), words)
    else:
        values = tensors[f"{prefix}.weight"]
        out, width = values.shape
        expect(f"{prefix}.weight", values, (known.values,), (out, width), where)
    groups = count_groups(width, scheme["group_size"], where) if scheme["strategy"] == "group" else 1
    if scheme["strategy"] == "tensor":
        one = scale
        scale = LazyTensor(one.dtype, one.shape or (1,), lambda: one.load().reshape(-1))
        expect(f"{prefix}.weight_scale", scale, FLOATS, (1,), where)
    else:
        expect(f"{prefix}.weight_scale", scale, FLOATS, (out, groups), where)
    order, g_idx = None, f"{prefix}.weight_g_idx"
    if scheme["actorder"] in ("group", "dynamic", True) and not (tensors[g_idx].load() == -1).any():
        order = group_order(g_idx, tensors[g_idx], width, groups, where)
    if order is not None:
        stored = values
        values = LazyTensor(
            torch.int8, (out, width), Rearranged(stored, lambda rows: rows[:, order.load()], ((0, 1), None))
        )
    zeros = None
    if not scheme["symmetric"]:
        zeros = tensors[f"{prefix}.weight_zero_point"]
        if zeros.dtype != torch.int8:  # as until 2025; packed since then
            zeros = _unpacked(f"{prefix}.weight_zero_point", zeros, out, groups, where)
        expect(f"{prefix}.weight_zero_point", zeros, (torch.int8,), (out, groups), where)
    input_scale = None
    if known.activations == "static":
        static = tensors[f"{prefix}.input_scale"]
        if static.shape not in ((), (1,)):
            expect(f"{prefix}.input_scale", static, FLOATS, (1,), where)
        input_scale = LazyTensor(torch.float32, (1,), lambda: static.load().float().reshape(1))
    return QuantizedWeight(
        known.dtype,
        values,
        LazyTensor(scale.dtype, (out, groups), lambda: scale.load().reshape(-1, groups).expand(out, groups)),
        zeros,
        known.activations,
        input_scale,
        order,
    )


def _unpacked(name: str, zero_point: LazyTensor, out: int, groups: int, where: str) -> LazyTensor:
    expect(name, zero_point, (torch.int32,), (out // 8, groups), where)
    return LazyTensor(
        torch.int8,
        (out, groups),
        Rearranged(zero_point, lambda words: signed(words.T).T.contiguous(), ((0, 8), (1, 1))),
    )


def write(prefix: str, weight: QuantizedWeight) -> dict[str, LazyTensor]:
    """A quantized product's tensors; a scale an output channel, or a group, also where the recipe has one a tensor."""
    out, width = weight.values.shape
    tensors = {}
    if weight_format(weight.format, weight.activations).layout == "pack-quantized":
        tensors[f"{prefix}.weight_packed"] = LazyTensor(
            torch.int32, (out, width // 8), lambda: pack(weight.values.load().int() + 8)
        )
        tensors[f"{prefix}.weight_shape"] = LazyTensor(torch.int64, (2,), lambda: torch.tensor([out, width]))
    else:
        tensors[f"{prefix}.weight"] = weight.values
    tensors[f"{prefix}.weight_scale"] = weight.scales
    if (zeros := weight.zeros) is not None:
        tensors[f"{prefix}.weight_zero_point"] = LazyTensor(
            torch.int32,
            (out // 8, weight.scales.shape[1]),
            lambda: pack(zeros.load().T.int() + 8).T.contiguous(),
        )
    if weight.input_scale is not None:
        tensors[f"{prefix}.input_scale"] = weight.input_scale
    return tensors


def describe(weight: QuantizedWeight, kept: list[str], lm_head: bool) -> dict:
    """`quantization_config` of a checkpoint whose products are all like `weight`, but for those `kept` in 16 bits."""
    known = weight_format(weight.format, weight.activations)
    kind = dict(zip(("type", "num_bits"), known.scheme, strict=True))
    grouped = weight.scales.shape[1] > 1
    weights = kind | {
        "strategy": "group" if grouped else "channel",
        "group_size": weight.group_size if grouped else None,
        "symmetric": weight.zeros is None,
        "dynamic": False,
    }
    activations = None
    if way := WAYS[known.activations]:
        activations = kind | {"strategy": way[0], "symmetric": True, "dynamic": way[1]}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": activations, "format": known.layout}
    return {
        "quant_method": "compressed-tensors",
        "format": known.layout,
        "config_groups": {"group_0": group},
        "ignore": kept if lm_head else [*kept, "lm_head"],
        "quantization_status": "compressed",
        "kv_cache_scheme": None,
    }
