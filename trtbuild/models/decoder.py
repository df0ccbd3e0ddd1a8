"""The decoder network, the same for every family."""

from collections.abc import Callable

import torch

from trtbuild.checkpoint.lazy import LazyTensor, concatenate, from_tensor
from trtbuild.linear.dense import linear
from trtbuild.models.config import ModelConfig
from trtbuild.models.mapping import Mapping
from trtbuild.network import Network, Tensor, ops


def decoder(
    config: ModelConfig,
    weights: Callable[[str], LazyTensor],
    dtype: torch.dtype,
    max_length: int,
    mapping: Mapping = Mapping(),
) -> Network:
    """One rank's network: packed token ids and KV caches in, float32 logits of the chosen rows and new caches out.

    `weights` maps a canonical name to its tensor. Inputs, all int32: `input_ids`, `position_ids` `[tokens]`;
    `query_starts` `[batch + 1]`, the packed rows at which sequences start; `past_lengths` `[batch]`;
    `logits_indices` `[rows]`; with dynamic RoPE `sequence_lengths` `[tokens]`; then `key_cache.i` and `value_cache.i`,
    `[batch, kv_heads, max_length, head_dim]`. Outputs: `logits` `[rows, vocab]`, `present_key.i`, `present_value.i`.
    """
    network = Network()

    def constant(name: str, *parts: str) -> Tensor:
        """A weight, or the fusion of several along their outputs, in the network's dtype."""
        tensors = [weights(part).to(dtype) for part in parts or (name,)]
        return network.constant(name, tensors[0] if len(tensors) == 1 else concatenate(tensors))

    def project(x: Tensor, fused: str, *parts: str, bias: bool) -> Tensor:
        weight = constant(f"{fused}.weight", *(f"{part}.weight" for part in parts))
        return linear(x, weight, constant(f"{fused}.bias", *(f"{part}.bias" for part in parts)) if bias else None)

    input_ids = network.input("input_ids", torch.int32, ("tokens",))
    position_ids = network.input("position_ids", torch.int32, ("tokens",))
    query_starts = network.input("query_starts", torch.int32, ("starts",))
    past_lengths = network.input("past_lengths", torch.int32, ("batch",))
    logits_indices = network.input("logits_indices", torch.int32, ("rows",))

    rotary = _rotary(network, config, position_ids, dtype)
    hidden = ops.embedding(input_ids, constant("model.embed_tokens.weight"))
    presents = []
    for i in range(config.num_hidden_layers):
        layer = f"model.layers.{i}"
        attn, mlp = f"{layer}.self_attn", f"{layer}.mlp"
        cache_shape = ("batch", config.num_key_value_heads, max_length, config.head_dim)
        cache = (
            network.input(f"key_cache.{i}", dtype, cache_shape),
            network.input(f"value_cache.{i}", dtype, cache_shape),
        )

        x = ops.rms_norm(hidden, constant(f"{layer}.input_layernorm.weight"), config.rms_norm_eps)
        qkv_parts = [f"{attn}.{name}_proj" for name in "qkv"]
        qkv = project(x, f"{attn}.qkv_proj", *qkv_parts, bias=config.attention_bias)
        x, *present = ops.attention(
            qkv,
            rotary,
            cache,
            position_ids,
            query_starts,
            past_lengths,
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
        )
        presents.append(present)
        hidden = ops.add(hidden, project(x, f"{attn}.o_proj", bias=config.attention_out_bias))

        x = ops.rms_norm(hidden, constant(f"{layer}.post_attention_layernorm.weight"), config.rms_norm_eps)
        gate_up_parts = [f"{mlp}.{name}_proj" for name in ("gate", "up")]
        x = ops.swiglu(project(x, f"{mlp}.gate_up_proj", *gate_up_parts, bias=config.mlp_bias))
        hidden = ops.add(hidden, project(x, f"{mlp}.down_proj", bias=config.mlp_bias))

    x = ops.rms_norm(ops.select_rows(hidden, logits_indices), constant("model.norm.weight"), config.rms_norm_eps)
    head = "model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"
    logits = ops.cast(linear(x, constant(head)), torch.float32)

    network.mark_output(logits, "logits")
    for i, (key, value) in enumerate(presents):
        network.mark_output(key, f"present_key.{i}")
        network.mark_output(value, f"present_value.{i}")
    return network


def _rotary(network: Network, config: ModelConfig, position_ids: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    frequencies = from_tensor(config.rope.inverse_frequencies(config.head_dim))
    inverse_frequencies = network.constant("rotary.inverse_frequencies", frequencies)
    if config.rope.type != "dynamic":
        return ops.rotary_embedding(position_ids, inverse_frequencies, dtype)
    return ops.rotary_embedding(
        position_ids,
        inverse_frequencies,
        dtype,
        network.input("sequence_lengths", torch.int32, ("tokens",)),
        config.rope.factor,
        config.rope.original_max_position_embeddings,
    )
