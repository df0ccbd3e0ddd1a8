"""The decoder network, the same for every family."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from trtbuild.decoder.mapping import Mapping
from trtbuild.linear.linear import Weight, linear
from trtbuild.models.alibi import alibi_slopes
from trtbuild.models.config import PRODUCTS, ModelConfig
from trtbuild.network import Network, Tensor, ops
from trtbuild.tensors.lazy import from_tensor

Weights = Callable[[str], Weight]
KINDS = ("key", "value")


@dataclass(frozen=True)
class QuantizedCache:
    """A KV cache in int8 or float8_e4m3fn; keys and values have scales of their own, float32 `[layers, kv_heads]`."""

    dtype: torch.dtype
    key_scales: torch.Tensor
    value_scales: torch.Tensor


@dataclass(frozen=True)
class Step:
    """What every layer of a network reads besides the hidden states.

    `positional`: RoPE's cos and sin, or ALiBi's slopes; `logn`: the queries' factors, where there are such.
    """

    positional: tuple[Tensor, ...]
    logn: Tensor | None
    position_ids: Tensor
    query_starts: Tensor
    past_lengths: Tensor


def decoder(
    config: ModelConfig,
    weights: Weights,
    dtype: torch.dtype,
    max_length: int,
    cache: QuantizedCache | None = None,
    mapping: Mapping = Mapping(),
) -> Network:
    """One rank's network: packed token ids and KV caches in, float32 logits of the chosen rows and new caches out.

    `weights` maps a canonical name to its tensor, quantized or not. Inputs, all int32: `input_ids`, `position_ids`
    `[tokens]`; `query_starts` `[batch + 1]`, the packed rows at which sequences start; `past_lengths` `[batch]`;
    `logits_indices` `[rows]`; where RoPE's base follows a sequence's length `sequence_lengths` `[tokens]`, its prompt's
    `prompt_lengths` `[tokens]`; then `key_cache.i` and `value_cache.i`, `[batch, kv_heads, max_length, head_dim]`.
    Outputs: `logits` `[rows, vocab]`, `present_key.i`, `present_value.i`.
    """
    network = Network()
    hidden, step = embedding(network, config, weights, dtype, max_length)
    logits_indices = network.input("logits_indices", torch.int32, ("rows",))
    presents = []
    for i in range(config.num_hidden_layers):
        hidden, present = decoder_layer(config, weights, i, hidden, step, max_length, cache)
        presents.append(present)
    x = ops.rms_norm(
        ops.select_rows(hidden, logits_indices), _norm(network, weights, "model.norm", dtype), config.rms_norm_eps
    )
    head = config.output_product
    network.mark_output(ops.cast(linear(x, head, [weights(f"{head}.weight")]), torch.float32), "logits")
    for i, (key, value) in enumerate(presents):
        network.mark_output(key, f"present_key.{i}")
        network.mark_output(value, f"present_value.{i}")
    return network


def embedding(
    network: Network, config: ModelConfig, weights: Weights, dtype: torch.dtype, max_length: int
) -> tuple[Tensor, Step]:
    """Declares a step's inputs; the first layer's hidden states, `[tokens, hidden]`, and what all layers share.

    What a model does to sequences longer than `max_length` alone is left out.
    """
    input_ids = network.input("input_ids", torch.int32, ("tokens",))
    position_ids = network.input("position_ids", torch.int32, ("tokens",))
    query_starts = network.input("query_starts", torch.int32, ("starts",))
    past_lengths = network.input("past_lengths", torch.int32, ("batch",))
    positional = _positional(network, config, position_ids, dtype, max_length)
    logn = None
    if 0 < config.logn_length < max_length:
        logn = ops.log_n(position_ids, config.logn_length, dtype)
    step = Step(positional, logn, position_ids, query_starts, past_lengths)
    table = network.constant("model.embed_tokens.weight", weights("model.embed_tokens.weight").to(dtype))
    return ops.embedding(input_ids, table), step


def decoder_layer(
    config: ModelConfig,
    weights: Weights,
    i: int,
    hidden: Tensor,
    step: Step,
    max_length: int,
    cache: QuantizedCache | None = None,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Layer `i`: hidden states `[tokens, hidden]` in and out, and the layer's new caches. Declares its cache inputs."""
    network, dtype = hidden.network, hidden.dtype
    layer = f"model.layers.{i}"

    def project(x: Tensor, product: str, bias: bool) -> Tensor:
        parts = [f"{layer}.{part}" for part in PRODUCTS[product]]
        biases = [weights(f"{part}.bias") for part in parts] if bias else []
        return linear(x, f"{layer}.{product}", [weights(f"{part}.weight") for part in parts], biases)

    cache_shape = ("batch", config.num_key_value_heads, max_length, config.head_dim)
    kv_cache = [network.input(f"{kind}_cache.{i}", cache.dtype if cache else dtype, cache_shape) for kind in KINDS]
    if cache:
        scales = (cache.key_scales[i], cache.value_scales[i])
        kv_cache += [
            network.constant(f"{layer}.self_attn.{kind}_scale", from_tensor(s))
            for kind, s in zip(KINDS, scales, strict=True)
        ]

    x = ops.rms_norm(hidden, _norm(network, weights, f"{layer}.input_layernorm", dtype), config.rms_norm_eps)
    x, *present = ops.attention(
        project(x, "self_attn.qkv_proj", config.attention_bias),
        step.positional,
        kv_cache,
        step.position_ids,
        step.query_starts,
        step.past_lengths,
        config.num_attention_heads,
        config.num_key_value_heads,
        config.head_dim,
        step.logn,
    )
    hidden = ops.add(hidden, project(x, "self_attn.o_proj", config.attention_out_bias))

    x = ops.rms_norm(hidden, _norm(network, weights, f"{layer}.post_attention_layernorm", dtype), config.rms_norm_eps)
    x = ops.swiglu(project(x, "mlp.gate_up_proj", config.mlp_bias))
    return ops.add(hidden, project(x, "mlp.down_proj", config.mlp_bias)), tuple(present)


def cache_of_network(network: Network) -> QuantizedCache | None:
    """The scales of a network's KV cache, where it is quantized."""
    layers = sum(name.startswith("key_cache.") for name in network.inputs)
    names = [[f"model.layers.{i}.self_attn.{kind}_scale" for i in range(layers)] for kind in KINDS]
    if names[0][0] not in network.constants:
        return None
    scales = (torch.stack([network.constants[name].load() for name in kind]) for kind in names)
    return QuantizedCache(network.tensors["key_cache.0"].dtype, *scales)


def _norm(network: Network, weights: Weights, name: str, dtype: torch.dtype) -> Tensor:
    return network.constant(f"{name}.weight", weights(f"{name}.weight").to(dtype))


def _positional(
    network: Network, config: ModelConfig, position_ids: Tensor, dtype: torch.dtype, max_length: int
) -> tuple[Tensor, ...]:
    """RoPE's cos and sin, or ALiBi's slopes."""
    rope = config.rope
    if rope is None:
        return (network.constant("alibi.slopes", from_tensor(alibi_slopes(config.num_attention_heads))),)

    def frequencies(values: torch.Tensor) -> Tensor:
        return network.constant("rotary.inverse_frequencies", from_tensor(values))

    def lengths(of: str) -> Tensor:
        return network.input(f"{of}_lengths", torch.int32, ("tokens",))

    limit = rope.original_max_position_embeddings
    if rope.type == "qwen" and max_length > limit:
        table = frequencies(rope.qwen_frequencies(config.head_dim, max_length))
        return ops.rotary_embedding(position_ids, ops.prompt_ntk(table, lengths("prompt"), limit), dtype)
    inverse_frequencies = frequencies(rope.inverse_frequencies(config.head_dim))
    if rope.type != "dynamic":
        return ops.rotary_embedding(position_ids, inverse_frequencies, dtype)
    return ops.rotary_embedding(position_ids, inverse_frequencies, dtype, lengths("sequence"), rope.factor, limit)
