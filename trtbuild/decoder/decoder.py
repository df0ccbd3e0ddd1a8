"""The decoder network, the same for every family."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from trtbuild.decoder.mapping import Mapping
from trtbuild.linear.linear import Weight, linear
from trtbuild.models.alibi import alibi_slopes
from trtbuild.models.config import PRODUCTS, ModelConfig
from trtbuild.network import Network, Tensor, ops
from trtbuild.network.step import step_input
from trtbuild.tensors.lazy import from_tensor

Weights = Callable[[str], Weight]
KINDS = ("key", "value")


@dataclass(frozen=True)
class CacheScales:
    """Of a cache in int8 or float8_e4m3fn: keys and values have scales of their own, float32 `[layers, kv_heads]`."""

    dtype: torch.dtype
    key_scales: torch.Tensor
    value_scales: torch.Tensor


@dataclass(frozen=True)
class LayerInputs:
    """What every layer of a network reads besides the hidden states.

    RoPE's `cos` and `sin`, or ALiBi's `slopes`; `logn`: the queries' factors, where there are such.
    """

    position_ids: Tensor
    query_starts: Tensor
    past_lengths: Tensor
    cos: Tensor | None = None
    sin: Tensor | None = None
    slopes: Tensor | None = None
    logn: Tensor | None = None


def decoder(
    config: ModelConfig,
    weights: Weights,
    dtype: torch.dtype,
    max_length: int,
    cache: CacheScales | None = None,
    mapping: Mapping = Mapping(),
) -> Network:
    """One rank's network: packed token ids and KV caches in, float32 logits of the chosen rows and new caches out.

    `weights` maps a canonical name to its tensor, quantized or not. Inputs: what a step reads (`STEP_INPUTS`), of
    lengths only those by which RoPE's base is chosen; then `key_cache.i` and `value_cache.i`, `[batch, kv_heads,
    max_length, head_dim]`. Outputs: `logits` `[rows, vocab]`, and `present_key.i` and `present_value.i`, the caches'
    new states.
    """
    network = Network()
    hidden, inputs = embedding(network, config, weights, dtype, max_length)
    logits_indices = step_input(network, "logits_indices")
    presents = []
    for i in range(config.num_hidden_layers):
        kv_cache = layer_cache(network, config, i, dtype, max_length, cache)
        hidden, present = decoder_layer(config, weights, i, hidden, inputs, kv_cache)
        presents.append(present)
    x = ops.rms_norm(
        ops.select_rows(hidden, logits_indices), _norm(network, weights, "model.norm", dtype), config.rms_norm_eps
    )
    head = config.output_product
    network.mark_output(ops.cast(linear(x, head, [weights(f"{head}.weight")]), torch.float32), "logits")
    for i, present in enumerate(presents):
        for kind, tensor in zip(KINDS, present, strict=True):
            network.mark_output(tensor, f"present_{kind}.{i}")
            network.states[f"{kind}_cache.{i}"] = f"present_{kind}.{i}"
    return network


def embedding(
    network: Network, config: ModelConfig, weights: Weights, dtype: torch.dtype, max_length: int
) -> tuple[Tensor, LayerInputs]:
    """Declares a step's inputs; the first layer's hidden states, `[tokens, hidden]`, and what all layers share.

    What a model does to sequences longer than `max_length` alone is left out.
    """
    names = ("input_ids", "position_ids", "query_starts", "past_lengths")
    input_ids, position_ids, query_starts, past_lengths = (step_input(network, name) for name in names)
    shared = _positional(network, config, position_ids, dtype, max_length)
    if 0 < config.logn_length < max_length:
        shared["logn"] = ops.log_n(position_ids, config.logn_length, dtype)
    inputs = LayerInputs(position_ids, query_starts, past_lengths, **shared)
    table = network.constant("model.embed_tokens.weight", weights("model.embed_tokens.weight").to(dtype))
    return ops.embedding(input_ids, table), inputs


def layer_cache(
    network: Network, config: ModelConfig, i: int, dtype: torch.dtype, max_length: int, cache: CacheScales | None
) -> dict[str, Tensor]:
    """Declares layer `i`'s caches, in `dtype` where they have no scales; attention's inputs by name."""
    shape = ("batch", config.num_key_value_heads, max_length, config.head_dim)
    inputs = {
        f"{kind}_cache": network.input(f"{kind}_cache.{i}", cache.dtype if cache else dtype, shape) for kind in KINDS
    }
    if cache:
        for kind, scales in zip(KINDS, (cache.key_scales, cache.value_scales), strict=True):
            name = f"model.layers.{i}.self_attn.{kind}_scale"
            inputs[f"{kind}_scale"] = network.constant(name, from_tensor(scales[i]))
    return inputs


def decoder_layer(
    config: ModelConfig,
    weights: Weights,
    i: int,
    hidden: Tensor,
    inputs: LayerInputs,
    cache: dict[str, Tensor] | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """Layer `i`: hidden states `[tokens, hidden]` in and out, and the layer's new caches.

    `cache` is what `layer_cache` gives; without one the tokens of a step see each other alone.
    """
    network, dtype = hidden.network, hidden.dtype
    layer = f"model.layers.{i}"

    def project(x: Tensor, product: str, bias: bool) -> Tensor:
        parts = [f"{layer}.{part}" for part in PRODUCTS[product]]
        biases = [weights(f"{part}.bias") for part in parts] if bias else []
        return linear(x, f"{layer}.{product}", [weights(f"{part}.weight") for part in parts], biases)

    x = ops.rms_norm(hidden, _norm(network, weights, f"{layer}.input_layernorm", dtype), config.rms_norm_eps)
    qkv = project(x, "self_attn.qkv_proj", config.attention_bias)
    sizes = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    q, k, v = ops.rotate(qkv, inputs.cos, inputs.sin, *sizes) if inputs.cos else ops.split_heads(qkv, *sizes)
    if inputs.logn:
        q = ops.scale_tokens(q, inputs.logn)
    sequences = inputs.position_ids, inputs.query_starts, inputs.past_lengths
    attended = ops.attention(q, k, v, *sequences, slopes=inputs.slopes, **(cache or {}))
    x, *present = attended if cache else (attended,)
    hidden = ops.add(hidden, project(x, "self_attn.o_proj", config.attention_out_bias))

    x = ops.rms_norm(hidden, _norm(network, weights, f"{layer}.post_attention_layernorm", dtype), config.rms_norm_eps)
    x = ops.swiglu(project(x, "mlp.gate_up_proj", config.mlp_bias))
    return ops.add(hidden, project(x, "mlp.down_proj", config.mlp_bias)), present


def cache_of_network(network: Network) -> CacheScales | None:
    """The scales of a network's KV cache, where it is quantized."""
    layers = len(network.states) // len(KINDS)
    names = [[f"model.layers.{i}.self_attn.{kind}_scale" for i in range(layers)] for kind in KINDS]
    if names[0][0] not in network.constants:
        return None
    scales = (torch.stack([network.constants[name].load() for name in kind]) for kind in names)
    return CacheScales(network.tensors["key_cache.0"].dtype, *scales)


def _norm(network: Network, weights: Weights, name: str, dtype: torch.dtype) -> Tensor:
    return network.constant(f"{name}.weight", weights(f"{name}.weight").to(dtype))


def _positional(
    network: Network, config: ModelConfig, position_ids: Tensor, dtype: torch.dtype, max_length: int
) -> dict[str, Tensor]:
    """RoPE's cos and sin, or ALiBi's slopes, by name."""
    rope = config.rope
    if rope is None:
        return {"slopes": network.constant("alibi.slopes", from_tensor(alibi_slopes(config.num_attention_heads)))}

    def frequencies(values: torch.Tensor) -> Tensor:
        return network.constant("rotary.inverse_frequencies", from_tensor(values))

    limit, dynamic = rope.original_max_position_embeddings, ()
    if rope.type == "qwen" and max_length > limit:
        table = frequencies(rope.qwen_frequencies(config.head_dim, max_length))
        inverse_frequencies = ops.prompt_ntk(table, step_input(network, "prompt_lengths"), limit)
    else:
        inverse_frequencies = frequencies(rope.inverse_frequencies(config.head_dim))
        dynamic = (step_input(network, "sequence_lengths"), rope.factor, limit) if rope.type == "dynamic" else ()
    cos, sin = ops.rotary_embedding(position_ids, inverse_frequencies, dtype, *dynamic)
    return {"cos": cos, "sin": sin}
