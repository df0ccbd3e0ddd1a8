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
from trtbuild.tensors.quantized_weight import plain

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

    `config`, `weights` and `cache` are the rank's (`sharding.shard`); `weights` maps a canonical name to its tensor,
    quantized or not. The first stage of a pipeline alone reads ids, the last alone gives logits. Inputs: what a step
    reads (`STEP_INPUTS`), of lengths only those by which RoPE's base is chosen; then `key_cache.i` and `value_cache.i`
    of each layer, `[batch, kv_heads, max_length, head_dim]`. Outputs: `logits` `[rows, vocab]`, and `present_key.i` and
    `present_value.i`, the caches' new states.
    """
    network = Network()
    hidden, inputs = embedding(network, config, weights, dtype, max_length, mapping)
    logits_indices = step_input(network, "logits_indices") if mapping.is_last else None
    presents = {}
    for i in mapping.layers(config.num_hidden_layers):
        kv_cache = layer_cache(network, config, i, dtype, max_length, cache)
        rows = logits_indices if i == config.num_hidden_layers - 1 else None
        hidden, presents[i] = decoder_layer(config, weights, i, hidden, inputs, kv_cache, mapping, rows)
    if logits_indices:
        network.mark_output(output(config, weights, hidden, mapping), "logits")
    else:
        ops.send(hidden, mapping.rank + mapping.tp_size)
    for i, present in presents.items():
        for kind, tensor in zip(KINDS, present, strict=True):
            network.mark_output(tensor, f"present_{kind}.{i}")
            network.states[f"{kind}_cache.{i}"] = f"present_{kind}.{i}"
    return network


def embedding(
    network: Network,
    config: ModelConfig,
    weights: Weights,
    dtype: torch.dtype,
    max_length: int,
    mapping: Mapping = Mapping(),
) -> tuple[Tensor, LayerInputs]:
    """Declares a step's inputs; the first layer's hidden states, `[tokens, hidden]`, and what all layers share.

    Hidden states come from the stage before, if there is one. What a model does to sequences longer than `max_length`
    alone is left out.
    """
    input_ids = step_input(network, "input_ids") if mapping.is_first else None
    names = ("position_ids", "query_starts", "past_lengths")
    position_ids, query_starts, past_lengths = (step_input(network, name) for name in names)
    shared = _positional(network, config, position_ids, dtype, max_length, mapping)
    if 0 < config.logn_length < max_length:
        shared["logn"] = ops.log_n(position_ids, config.logn_length, dtype)
    inputs = LayerInputs(position_ids, query_starts, past_lengths, **shared)
    if input_ids is None:
        return ops.receive(position_ids, mapping.rank - mapping.tp_size, dtype, config.hidden_size), inputs
    table = network.constant("model.embed_tokens.weight", plain(weights("model.embed_tokens.weight")).to(dtype))
    words = mapping.words(config.vocab_size)
    if len(words) == config.vocab_size:
        return ops.embedding(input_ids, table), inputs
    return ops.all_reduce(ops.embedding_part(input_ids, table, words.start), mapping.stage), inputs


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
    mapping: Mapping = Mapping(),
    rows: Tensor | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """Layer `i`: hidden states `[tokens, hidden]` in and out, and the layer's new caches.

    `cache` is what `layer_cache` gives; without one the tokens of a step see each other alone. With `rows`, int32
    `[rows]`, only those tokens go on once all have left their keys and values: what is wanted of the last layer.
    """
    network, dtype = hidden.network, hidden.dtype
    layer = f"model.layers.{i}"

    def project(x: Tensor, product: str, bias: bool, ranks: range = range(1)) -> Tensor:
        parts = [f"{layer}.{part}" for part in PRODUCTS[product]]
        biases = [plain(weights(f"{part}.bias")) for part in parts] if bias else []
        return linear(x, f"{layer}.{product}", [weights(f"{part}.weight") for part in parts], biases, ranks)

    x = ops.rms_norm(hidden, _norm(network, weights, f"{layer}.input_layernorm", dtype), config.rms_norm_eps)
    qkv = project(x, "self_attn.qkv_proj", config.attention_bias)
    sizes = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    if inputs.cos and inputs.sin:
        q, k, v = ops.rotate(qkv, inputs.cos, inputs.sin, *sizes)
    else:
        q, k, v = ops.split_heads(qkv, *sizes)
    if inputs.logn:
        q = ops.scale_tokens(q, inputs.logn)
    sequences = inputs.position_ids, inputs.query_starts, inputs.past_lengths
    attended = ops.attention(q, k, v, *sequences, slopes=inputs.slopes, **(cache or {}))
    x, *present = attended if isinstance(attended, tuple) else (attended,)
    if rows:
        x, hidden = (ops.select_rows(all_rows, rows) for all_rows in (x, hidden))
    x = project(x, "self_attn.o_proj", config.attention_out_bias, mapping.stage)
    hidden = ops.add(hidden, ops.all_reduce(x, mapping.stage))

    x = ops.rms_norm(hidden, _norm(network, weights, f"{layer}.post_attention_layernorm", dtype), config.rms_norm_eps)
    x = ops.swiglu(project(x, "mlp.gate_up_proj", config.mlp_bias))
    x = project(x, "mlp.down_proj", config.mlp_bias, mapping.stage)
    return ops.add(hidden, ops.all_reduce(x, mapping.stage)), present


def output(config: ModelConfig, weights: Weights, hidden: Tensor, mapping: Mapping) -> Tensor:
    """Float32 logits `[rows, vocab]` of the last layer's hidden states `[rows, hidden]`."""
    norm = _norm(hidden.network, weights, "model.norm", hidden.dtype)
    head = config.output_product
    x = linear(ops.rms_norm(hidden, norm, config.rms_norm_eps), head, [weights(f"{head}.weight")])
    x = ops.cast(x, torch.float32)
    if len(mapping.words(config.vocab_size)) < config.vocab_size:
        x = ops.all_gather(x, mapping.stage)
    return x


def cache_of_network(network: Network) -> CacheScales | None:
    """The scales of a network's KV cache, where it is quantized."""
    layers = [node.inputs for node in network.nodes if "key_scale" in node.inputs]
    if not layers:
        return None
    names = ([layer[f"{kind}_scale"] for layer in layers] for kind in KINDS)
    scales = (torch.stack([network.constants[name].load() for name in kind]) for kind in names)
    return CacheScales(network.tensors[layers[0]["key_cache"]].dtype, *scales)


def _norm(network: Network, weights: Weights, name: str, dtype: torch.dtype) -> Tensor:
    return network.constant(f"{name}.weight", plain(weights(f"{name}.weight")).to(dtype))


def _positional(
    network: Network, config: ModelConfig, position_ids: Tensor, dtype: torch.dtype, max_length: int, mapping: Mapping
) -> dict[str, Tensor]:
    """RoPE's cos and sin, or ALiBi's slopes, by name."""
    rope = config.rope
    if rope is None:
        slopes = alibi_slopes(config.num_attention_heads * mapping.tp_size).chunk(mapping.tp_size)[mapping.tp_rank]
        return {"slopes": network.constant("alibi.slopes", from_tensor(slopes))}

    def frequencies(values: torch.Tensor) -> Tensor:
        return network.constant("rotary.inverse_frequencies", from_tensor(values))

    limit = rope.original_max_position_embeddings
    dynamic: tuple[Tensor, float, int] | tuple[()] = ()
    if rope.type == "qwen" and max_length > limit:
        table = frequencies(rope.qwen_frequencies(config.head_dim, max_length))
        inverse_frequencies = ops.prompt_ntk(table, step_input(network, "prompt_lengths"), limit)
    else:
        inverse_frequencies = frequencies(rope.inverse_frequencies(config.head_dim))
        if rope.type == "dynamic":
            dynamic = step_input(network, "sequence_lengths"), rope.factor, limit
    cos, sin = ops.rotary_embedding(position_ids, inverse_frequencies, dtype, *dynamic)
    return {"cos": cos, "sin": sin}
