"""Runs an `INetworkDefinition` on the CPU, layer by layer, with torch.

It proves, with no GPU, that what TensorRT is asked to compile computes what the network means. Layers are read back
from the definition itself, through TensorRT's API; only the constants' values come from the buffers that it points to.
Semantics: the operator pages of the TensorRT documentation.
"""

from collections.abc import Callable
from dataclasses import dataclass
from graphlib import TopologicalSorter

import torch
import torch.nn.functional as F

from trtbuild.engine.tensorrt import LoweredNetwork
from trtbuild.engine.tensorrt_api import api
from trtbuild.linear.int4 import unpack
from trtbuild.network import lockstep
from trtbuild.network.ops.collectives import Meeting
from trtbuild.tensors.rounding import quantize

Values = dict[str, torch.Tensor]
FP8_READERS = ("DEQUANTIZE", "CONCATENATION", "SHUFFLE", "SHAPE", "IDENTITY")  # TensorRT refuses any other layer


@dataclass(frozen=True)
class DistCollective:
    """What TensorRT's layer makes of all its ranks' inputs: their sum, or one's rows after another's."""

    operation: str
    ranks: tuple[int, ...]

    def meeting(self, rank: int) -> Meeting:
        return self.operation, self.ranks

    def together(self, *brought: Values) -> list[torch.Tensor]:
        parts = [inputs["x"] for inputs in brought]
        result = torch.stack(parts).sum(0) if self.operation == "ALL_REDUCE" else torch.cat(parts)
        return [result] * len(parts)


Layers = dict[str, tuple[list[str], Callable | DistCollective]]


class Interpreter:
    """A lowered network prepared for running: one closure a layer, over values by tensor name.

    Layers at which ranks meet are run by `lockstep.meet`.
    """

    def __init__(self, lowered: LoweredNetwork) -> None:
        self.lowered = lowered
        definition = lowered.definition
        self.inputs = [definition.get_input(i).name for i in range(definition.num_inputs)]
        self.outputs = [definition.get_output(i).name for i in range(definition.num_outputs)]
        self._constants: Values = {}
        layers: Layers = {}  # by the name of the tensor that they make
        for i in range(definition.num_layers):
            self._prepare(definition.get_layer(i), layers)
        # A definition lists layers in any order: a slice may precede the layer that computes its size.
        order = TopologicalSorter({target: sources for target, (sources, _) in layers.items()}).static_order()
        steps = [(target, *layers[target]) for target in order if target in layers]
        last_use = {name: i for i, (_, sources, _) in enumerate(steps) for name in sources}
        dead: list[list[str]] = [[] for _ in steps]  # what no later layer reads
        for name, i in last_use.items():
            if name in layers and name not in self.outputs:
                dead[i].append(name)
        self._steps = [(*step, names) for step, names in zip(steps, dead, strict=True)]

    @torch.inference_mode()
    def run(self, inputs: Values) -> Values:
        """Values by engine input name to values by engine output name, of one rank. Inputs are not modified."""
        return lockstep.meet([self.walk(inputs)])[0]

    def walk(self, inputs: Values) -> lockstep.Run:
        """The same, to be run in lock-step with other ranks'."""
        values = self._constants | {name: inputs[name] for name in self.inputs}
        for target, sources, compute, dead in self._steps:
            if isinstance(compute, DistCollective):
                values[target] = yield compute, {"x": values[sources[0]]}
            else:
                values[target] = compute(*(values[name] for name in sources))
            for name in dead:
                del values[name]
        return {name: values[name] for name in self.outputs}

    def _prepare(self, layer, layers: Layers) -> None:
        trt = api()
        kind = layer.type.name
        if kind == "CONSTANT":
            value, tensor = self.lowered.lowering.buffers[layer.name], layer.get_output(0)
            self._constants[tensor.name] = unpack(value) if tensor.dtype == trt.int4 else value
            return
        if kind == "ATTENTION_INPUT":
            return  # an attention is two layers; the output layer computes all of it
        if kind == "ATTENTION_OUTPUT":
            layer.__class__ = trt.IAttentionOutputLayer
            layers[layer.attention.get_output(0).name] = _attention(layer.attention)
            return
        if kind == "DIST_COLLECTIVE":
            layer.__class__ = trt.IDistCollectiveLayer
            operation, ranks = self.lowered.lowering.collectives[layer.name]
            if layer.num_ranks != len(ranks):
                raise ValueError(f"{operation} of {layer.num_ranks} ranks among {ranks}")
            layers[layer.get_output(0).name] = [layer.get_input(0).name], DistCollective(operation, tuple(ranks))
            return
        make, interface = LAYERS[kind]
        layer.__class__ = getattr(trt, interface)
        inputs = [tensor for i in range(layer.num_inputs) if (tensor := layer.get_input(i)) is not None]
        if kind not in FP8_READERS and any(tensor.dtype == trt.fp8 for tensor in inputs):
            raise TypeError(f"{kind} of an FP8 tensor")
        layers[layer.get_output(0).name] = [tensor.name for tensor in inputs], make(layer)


def _shuffle(layer):
    first, second = tuple(layer.first_transpose), tuple(layer.second_transpose)
    dynamic = layer.num_inputs > 1
    dims = None if dynamic else layer.reshape_dims  # None also where the layer only transposes

    def compute(x, shape=None):
        x = x.permute(first[: x.ndim])
        if dynamic:
            x = x.reshape(shape.tolist())
        elif dims is not None:
            x = x.reshape([x.shape[i] if n == 0 else n for i, n in enumerate(dims)])
        return x.permute(second[: x.ndim])

    return compute


def _gather(layer):
    axis, mode, batch_dims = layer.axis, layer.mode.name, layer.num_elementwise_dims
    if mode != "DEFAULT" or batch_dims > 1:
        raise NotImplementedError(f"gather of mode {mode}")

    def compute(x, indices, axis=axis):
        rows = x.index_select(axis, indices.reshape(-1).long())
        return rows.reshape(*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :])

    def compute_each(x, indices):
        return torch.stack([compute(a, b, axis - 1) for a, b in zip(x, indices, strict=True)])

    return compute_each if batch_dims else compute


def _slice(layer):
    start, stride, dynamic = tuple(layer.start), tuple(layer.stride), layer.num_inputs > 1
    fixed = () if dynamic else tuple(layer.shape)

    def compute(x, *shape):
        size = shape[0].tolist() if dynamic else fixed
        index = tuple(slice(a, a + n * s, s) for a, n, s in zip(start, size, stride, strict=True))
        return x[index]

    return compute


def _elementwise(layer):
    op = layer.op.name
    functions: dict[str, Callable[..., torch.Tensor]] = {
        "SUM": torch.add,
        "PROD": torch.mul,
        "SUB": torch.sub,
        "DIV": torch.div,
        "MAX": torch.maximum,
        "MIN": torch.minimum,
        "POW": torch.pow,
        "LESS": torch.lt,
        "EQUAL": torch.eq,
    }
    compute = functions[op]

    def checked(a, b):
        if a.dtype != b.dtype:  # a strongly typed network has no implicit casts
            raise TypeError(f"elementwise {op} of {a.dtype} and {b.dtype}")
        return compute(a, b)

    return checked


def _unary(layer):
    return {
        "SQRT": torch.sqrt,
        "RECIP": torch.reciprocal,
        "NEG": torch.neg,
        "ABS": torch.abs,
        "COS": torch.cos,
        "SIN": torch.sin,
        "LOG": torch.log,
    }[layer.op.name]


def _activation(layer):
    return {"SIGMOID": torch.sigmoid}[layer.type.name]


def _reduce(layer):
    axes = [i for i in range(8) if layer.axes >> i & 1]
    functions: dict[str, Callable[..., torch.Tensor]] = {"AVG": torch.mean, "SUM": torch.sum, "MAX": torch.amax}
    compute, keep = functions[layer.op.name], layer.keep_dims
    return lambda x: compute(x, axes, keepdim=keep)


def _matmul(layer):
    transposed = [op.name == "TRANSPOSE" for op in (layer.op0, layer.op1)]

    def compute(a, b):
        if a.dtype != b.dtype:
            raise TypeError(f"matrix product of {a.dtype} and {b.dtype}")
        wide = [(x.mT if t else x).float() for x, t in zip((a, b), transposed, strict=True)]
        return (wide[0] @ wide[1]).to(a.dtype)

    return compute


def _cast(layer):
    dtype = _torch_dtype(layer.to_type)
    return lambda x: x.to(dtype)


def _select(layer):
    def compute(condition, a, b):
        if condition.dtype != torch.bool or a.dtype != b.dtype:
            raise TypeError(f"select by {condition.dtype} of {a.dtype} and {b.dtype}")
        return torch.where(condition, a, b)

    return compute


def _quantize(layer):
    scale_of, dtype = _scale(layer, layer.get_input(0)), _torch_dtype(layer.to_type)
    if dtype not in (torch.int8, torch.float8_e4m3fn):
        raise NotImplementedError(f"quantization to {dtype}")
    return lambda x, scale: quantize(x.float(), scale_of(x, scale), dtype)


def _dequantize(layer):
    scale_of, dtype = _scale(layer, layer.get_output(0)), _torch_dtype(layer.to_type)
    if layer.get_input(0).dtype.name not in ("INT4", "INT8", "FP8"):
        raise TypeError(f"dequantization of {layer.get_input(0).dtype.name}")
    return lambda x, scale: (x.float() * scale_of(x, scale)).to(dtype)


def _scale(layer, wide):
    """Function that makes a layer's scale float32 and of a shape that broadcasts; `wide`: the floating-point tensor."""
    tensor, rank = layer.get_input(1), len(wide.shape)
    if layer.num_inputs > 2:
        raise NotImplementedError("a zero point")
    if _has_block_shape(layer):
        raise NotImplementedError("a block shape that is not that of the scale")
    if wide.dtype.name not in ("FLOAT", "HALF", "BF16"):
        raise TypeError(f"{layer.type.name} between {layer.get_input(0).dtype.name} and {wide.dtype.name}")
    blocks = len(tensor.shape) == rank and rank > 1
    if tensor.dtype != wide.dtype and (blocks or tensor.dtype.name != "FLOAT"):
        raise TypeError(f"{layer.type.name} of {wide.dtype.name} with scales in {tensor.dtype.name}")
    axis = layer.axis

    def scale_of(x, scale):
        if scale.numel() == 1:
            return scale.float().reshape(())
        if blocks:
            for i, (size, count) in enumerate(zip(x.shape, scale.shape, strict=True)):
                if size % count:
                    raise ValueError(f"scales {tuple(scale.shape)} of {tuple(x.shape)}")
                scale = scale.repeat_interleave(size // count, i)
            return scale.float()
        if scale.shape != x.shape[axis : axis + 1]:
            raise ValueError(f"scales {tuple(scale.shape)} of axis {axis} of {tuple(x.shape)}")
        return scale.float().reshape(-1, *[1] * (rank - axis - 1))

    return scale_of


def _has_block_shape(layer) -> bool:
    try:
        return layer.block_shape is not None
    except RuntimeError:  # the API's way to say that there is none
        return False


def _concatenation(layer):
    axis = layer.axis
    return lambda *parts: torch.cat(parts, axis)


def _shape(layer):
    return lambda x: torch.tensor(x.shape, dtype=torch.int64)


def _rotary(layer):
    if layer.interleaved or layer.num_inputs > 3:
        raise NotImplementedError("rotary embedding with interleaved pairs or position ids")
    size = layer.rotary_embedding_dim

    def compute(x, cos, sin):
        """x `[batch, heads, length, dim]`, cos and sin `[batch, length, dim / 2]`."""
        cos, sin = cos[:, None].float(), sin[:, None].float()
        first, second = x[..., : size // 2].float(), x[..., size // 2 : size].float()
        rotated = torch.cat((first * cos - second * sin, second * cos + first * sin), -1).to(x.dtype)
        return torch.cat((rotated, x[..., size:]), -1)

    return compute


def _kv_cache_update(layer):
    if layer.cache_mode.name != "LINEAR":
        raise NotImplementedError(f"KV cache mode {layer.cache_mode.name}")

    def compute(cache, update, write_indices):
        cache = cache.clone()
        for b, start in enumerate(write_indices.tolist()):
            if start + update.shape[2] > cache.shape[2]:
                raise IndexError(f"KV cache update of {update.shape[2]} positions at {start} overruns {cache.shape[2]}")
            cache[b, :, start : start + update.shape[2]] = update[b]
        return cache

    return compute


def _attention(attention):
    """Sources and function of an `IAttention`: softmax(q k^T, masked) v; q comes scaled."""
    if attention.norm_op.name != "SOFTMAX" or attention.causal_kind.name != "NONE":
        raise NotImplementedError("attention other than softmax with an explicit mask")
    inputs = [attention.get_input(0), attention.get_input(1), attention.get_input(2)]
    inputs += [attention.mask, attention.key_value_lengths]

    def compute(q, k, v, mask, kv_lengths):
        if mask.dtype not in (torch.bool, q.dtype):
            raise TypeError(f"attention of {q.dtype} with a mask of {mask.dtype}")
        inside = torch.arange(k.shape[2]) < kv_lengths[:, None, None, None]
        if mask.dtype == torch.bool:
            allowed = torch.zeros(mask.shape).masked_fill(~(mask & inside), float("-inf"))
        else:
            allowed = mask.float().masked_fill(~inside, float("-inf"))
        return F.scaled_dot_product_attention(
            q.float(), k.float(), v.float(), attn_mask=allowed, scale=1.0, enable_gqa=True
        ).to(q.dtype)

    return [tensor.name for tensor in inputs], compute


def _torch_dtype(dtype) -> torch.dtype:
    return {
        "FLOAT": torch.float32,
        "HALF": torch.float16,
        "BF16": torch.bfloat16,
        "INT32": torch.int32,
        "INT64": torch.int64,
        "BOOL": torch.bool,
        "INT8": torch.int8,
        "FP8": torch.float8_e4m3fn,
    }[dtype.name]


LAYERS = {
    "SHUFFLE": (_shuffle, "IShuffleLayer"),
    "GATHER": (_gather, "IGatherLayer"),
    "SLICE": (_slice, "ISliceLayer"),
    "ELEMENTWISE": (_elementwise, "IElementWiseLayer"),
    "UNARY": (_unary, "IUnaryLayer"),
    "ACTIVATION": (_activation, "IActivationLayer"),
    "REDUCE": (_reduce, "IReduceLayer"),
    "MATRIX_MULTIPLY": (_matmul, "IMatrixMultiplyLayer"),
    "CAST": (_cast, "ICastLayer"),
    "SELECT": (_select, "ISelectLayer"),
    "QUANTIZE": (_quantize, "IQuantizeLayer"),
    "DEQUANTIZE": (_dequantize, "IDequantizeLayer"),
    "CONCATENATION": (_concatenation, "IConcatenationLayer"),
    "SHAPE": (_shape, "IShapeLayer"),
    "ROTARY_EMBEDDING": (_rotary, "IRotaryEmbeddingLayer"),
    "KV_CACHE_UPDATE": (_kv_cache_update, "IKVCacheUpdateLayer"),
}
