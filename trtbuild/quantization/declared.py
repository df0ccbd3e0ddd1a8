"""A rank's network from a model's shapes and a recipe alone: what its engine will be, before there are any weights."""

from dataclasses import dataclass, replace

import torch

from trtbuild.decoder.decoder import CacheScales, decoder
from trtbuild.decoder.mapping import Mapping
from trtbuild.decoder.sharding import shard
from trtbuild.models.config import PRODUCTS, ModelConfig
from trtbuild.network import Network
from trtbuild.quantization.recipe import Quantization, Recipe
from trtbuild.tensors.lazy import LazyTensor
from trtbuild.tensors.quantized_weight import QuantizedWeight, Weight
from trtbuild.tensors.rounding import DTYPES

QUANTIZED = (*(part for parts in PRODUCTS.values() for part in parts), "lm_head")


@dataclass(frozen=True)
class _Ones:
    """In the place of values that nobody has made yet."""

    name: str
    shape: tuple[int, ...]

    def __call__(self) -> torch.Tensor:
        return torch.ones(self.shape)


def declared_network(config: ModelConfig, recipe: Recipe, mapping: Mapping, max_length: int) -> Network:
    """The network of a rank's engine, of which nothing but the constants' values is still to come.

    `config` is the whole model's. Weights of a recipe's `quant_checkpoint`, whose bits nobody has seen yet, are taken
    to be of its dtype. Raises `UserError` where ranks cannot share the model, or groups of the recipe's weights.
    """
    dtype, quantization = getattr(torch, recipe.dtype), recipe.quantization
    if quantization and not quantization.keeps("lm_head"):
        config = replace(config, tie_word_embeddings=False)  # a quantized head is a weight apart
    weights: dict[str, Weight] = {}
    for name, shape in config.tensor_shapes().items():
        product = name.removesuffix(".weight")
        if quantization and product.endswith(QUANTIZED) and not quantization.keeps(product):
            weights[name] = _quantized(quantization, name, shape)
        else:
            weights[name] = _declared(name, dtype, *shape)
    cache = None
    if recipe.kv_cache:
        scales = torch.ones(config.num_hidden_layers, config.num_key_value_heads)
        cache = CacheScales(DTYPES[recipe.kv_cache.dtype], scales, scales)
    config, of_rank, cache = shard(config, weights.__getitem__, cache, mapping)
    return decoder(config, of_rank, dtype, max_length, cache, mapping)


def _declared(name: str, dtype: torch.dtype, *shape: int) -> LazyTensor:
    return LazyTensor(dtype, shape, _Ones(name, shape))


def _quantized(quantization: Quantization, name: str, shape: tuple[int, ...]) -> QuantizedWeight:
    """As quantizing makes it of a weight `[out, in]`."""
    (out, width), weights, kind = shape, quantization.weights, quantization.format
    groups = width // weights.group_size if weights.group_size else 1
    has_zeros = kind.groups and not weights.symmetric
    return QuantizedWeight(
        weights.dtype,
        _declared(name, kind.values, out, width),
        _declared(f"{name}.scales", kind.scale_dtype(getattr(torch, quantization.dtype)), out, groups),
        _declared(f"{name}.zeros", torch.int8, out, groups) if has_zeros else None,
        quantization.rounding,
        _declared(f"{name}.input_scale", torch.float32, 1) if quantization.rounding == "static" else None,
    )
