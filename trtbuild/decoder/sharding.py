"""One rank's share of a model: how many heads and channels, which rows or columns of which weights, which scales."""

from collections.abc import Sequence
from dataclasses import replace

import torch

from trtbuild.decoder.decoder import CacheScales, Weights
from trtbuild.decoder.mapping import Mapping
from trtbuild.errors import UserError
from trtbuild.linear.int4 import GROUP_SIZES
from trtbuild.linear.linear import Weight
from trtbuild.models.config import SHARED_DIMENSIONS, ModelConfig
from trtbuild.tensors.lazy import LazyTensor
from trtbuild.tensors.quantized_weight import QuantizedWeight


def shard(
    config: ModelConfig, weights: Weights, cache: CacheScales | None, mapping: Mapping
) -> tuple[ModelConfig, Weights, CacheScales | None]:
    """What `decoder` takes for one rank of `mapping`, from what it takes for the whole model.

    Heads, and the channels within the MLP, are dealt out in order; KV heads fewer than ranks are had by several. The
    configuration keeps the model's number of layers and size of vocabulary, and layers keep their names: `mapping` says
    which of them a rank has. A bias of outputs that are summed over ranks is rank 0's, and zeros elsewhere.

    Raises `UserError` for sizes that do not divide, naming those that would; of quantized weights when one is asked
    for.
    """
    check_mapping(config, mapping)
    if mapping.tp_size == 1:
        return config, weights, cache
    share = mapping.share(config)
    vocabulary = len(mapping.words(config.vocab_size))
    whole, shapes = config.tensor_shapes(), replace(share, vocab_size=vocabulary).tensor_shapes()

    def part(size: int, length: int) -> tuple[int, int]:
        """Start and length of its `length` of `size`; ranks that have the same KV head have the same start."""
        return mapping.tp_rank * size // mapping.tp_size // length * length, length

    def of_rank(name: str) -> Weight:
        weight, dim = weights(name), _shared_dimension(name)
        if dim is None:
            return weight
        if isinstance(weight, LazyTensor) and dim == len(weight.shape):  # a bias of outputs that are summed
            return weight if mapping.tp_rank == 0 else _zeros(weight)
        if isinstance(weight, QuantizedWeight) and dim == 1:
            _check_columns(config, mapping, name, weight)
        return weight.narrow(dim, *part(whole[name][dim], shapes[name][dim]))

    if cache:
        heads = part(config.num_key_value_heads, share.num_key_value_heads)
        scales = cache.key_scales.narrow(1, *heads), cache.value_scales.narrow(1, *heads)
        cache = replace(cache, key_scales=scales[0], value_scales=scales[1])
    return share, of_rank, cache


def joined_cache(caches: Sequence[CacheScales | None], kv_heads: int, mapping: Mapping) -> CacheScales | None:
    """The whole model's cache scales, from those of all ranks in order, and its number of KV heads."""
    if caches[0] is None:
        return None
    copies = max(1, mapping.tp_size // kv_heads)  # ranks that have the same KV head

    def join(kind: str) -> torch.Tensor:
        stages = [caches[first : first + mapping.tp_size : copies] for first in range(0, len(caches), mapping.tp_size)]
        return torch.cat([torch.cat([getattr(cache, kind) for cache in stage], 1) for stage in stages])

    return CacheScales(caches[0].dtype, join("key_scales"), join("value_scales"))


def tp_sizes(config: ModelConfig) -> list[int]:
    """How many ranks can share a model's layers."""
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    return [
        size
        for size in range(1, heads + 1)
        if not heads % size and not config.intermediate_size % size and (not kv_heads % size or not size % kv_heads)
    ]


def check_mapping(config: ModelConfig, mapping: Mapping, group_size: int | None = None) -> None:
    """Raises `UserError` where ranks cannot share a model's heads, channels or layers, naming numbers that would do.

    `group_size`: of the products' weights, if they have groups of input channels.
    """
    if mapping.tp_size not in (sizes := tp_sizes(config)):
        raise UserError(
            f"tp_size {mapping.tp_size} does not divide {config.num_attention_heads} heads, "
            f"{config.num_key_value_heads} KV heads and an intermediate_size of {config.intermediate_size}; use one of "
            f"{', '.join(map(str, sizes))}"
        )
    if mapping.pp_size > config.num_hidden_layers:
        raise UserError(f"pp_size {mapping.pp_size} is more than the model's {config.num_hidden_layers} layers")
    if group_size and mapping.tp_size > 1:
        widths = config.num_attention_heads * config.head_dim, config.intermediate_size
        for name, width in zip(("self_attn.o_proj", "mlp.down_proj"), widths, strict=True):
            _check_groups(config, mapping, name, width, group_size)


def _check_columns(config: ModelConfig, mapping: Mapping, name: str, weight: QuantizedWeight) -> None:
    """Raises `UserError` unless ranks can share the input channels of a quantized weight."""
    if weight.order is not None:
        raise UserError(
            f"{name}: its groups are of input channels that lie anywhere (desc_act), which ranks cannot share; use "
            "tp_size 1, or weights without desc_act"
        )
    if weight.scales.shape[1] > 1:
        _check_groups(config, mapping, name, weight.values.shape[1], weight.group_size)


def _check_groups(config: ModelConfig, mapping: Mapping, name: str, width: int, group_size: int) -> None:
    """Raises `UserError` unless ranks can share a product's `width` input channels in whole groups."""
    if width // mapping.tp_size % group_size:
        fit = ", ".join(str(size) for size in tp_sizes(config) if width // size % group_size == 0)
        smaller = [size for size in GROUP_SIZES if width // mapping.tp_size % size == 0]
        raise UserError(
            f"{name}: {width} input channels in groups of {group_size} do not divide by tp_size {mapping.tp_size}; use "
            f"one of {fit}" + (f", or weights in groups of {smaller[-1]}" if smaller else "")
        )


def _shared_dimension(name: str) -> int | None:
    """That of a canonical name, such as `model.layers.0.mlp.down_proj.weight`."""
    module = name.rpartition(".")[0]
    return SHARED_DIMENSIONS.get(module.split(".", 3)[3] if module.startswith("model.layers.") else module)


def _zeros(tensor: LazyTensor) -> LazyTensor:
    return LazyTensor(tensor.dtype, tensor.shape, lambda: torch.zeros(tensor.shape, dtype=tensor.dtype))
