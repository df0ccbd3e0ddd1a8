"""What an engine will weigh, from a model's shapes alone: to the byte, before anything is there, and without torch."""

from trtbuild.decoder.mapping import Mapping
from trtbuild.engine.config import BuildLimits
from trtbuild.models.config import PRODUCTS, ModelConfig
from trtbuild.quantization.recipe import Recipe

BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "int8": 1, "fp8": 1, "int4": 0.5}


def constants_of_rank(config: ModelConfig, recipe: Recipe, mapping: Mapping, max_length: int) -> dict[str, int]:
    """Bytes of everything that a rank's engine stores, by its name in there; `config` is the whole model's.

    Weights of a recipe's `quant_checkpoint`, whose bits nobody has seen yet, count as its dtype's.
    """
    size, share = int(BYTES[recipe.dtype]), mapping.share(config)
    words, hidden = len(mapping.words(config.vocab_size)), config.hidden_size
    found = _positions(share, max_length)
    if mapping.is_first:
        found["model.embed_tokens.weight"] = words * hidden * size
    products = {
        "self_attn.qkv_proj": (share.query_size + 2 * share.kv_size, hidden, config.attention_bias),
        "self_attn.o_proj": (hidden, share.query_size, config.attention_out_bias),
        "mlp.gate_up_proj": (2 * share.intermediate_size, hidden, config.mlp_bias),
        "mlp.down_proj": (hidden, share.intermediate_size, config.mlp_bias),
    }
    for i in mapping.layers(config.num_hidden_layers):
        layer = f"model.layers.{i}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            found[f"{layer}.{norm}.weight"] = hidden * size
        if recipe.kv_cache:
            for kind in ("key", "value"):
                found[f"{layer}.self_attn.{kind}_scale"] = share.num_key_value_heads * 4
        for product, (out, width, bias) in products.items():
            kept = not recipe.quantization or recipe.quantization.keeps(f"{layer}.{PRODUCTS[product][0]}")
            for part, count in _product(recipe, out, width, kept).items():
                found[f"{layer}.{product}.{part}"] = count
            if bias:
                found[f"{layer}.{product}.bias"] = out * size
    if mapping.is_last:
        found["model.norm.weight"] = hidden * size
        kept = not recipe.quantization or recipe.quantization.keeps("lm_head")
        name = config.output_product if kept else "lm_head"  # a quantized head is a weight apart
        found |= {f"{name}.{part}": count for part, count in _product(recipe, words, hidden, kept).items()}
    return found


def cache_of_rank(config: ModelConfig, recipe: Recipe, mapping: Mapping, limits: BuildLimits) -> int:
    """Bytes of the KV cache of a rank's engine, at its largest batch."""
    size = int(BYTES[recipe.kv_cache.dtype if recipe.kv_cache else recipe.dtype])
    layers = len(mapping.layers(config.num_hidden_layers))
    return 2 * layers * mapping.share(config).kv_size * limits.max_length * limits.max_batch_size * size


def weights_of_rank(config: ModelConfig, recipe: Recipe, mapping: Mapping, limits: BuildLimits) -> int:
    """Bytes of everything that a rank's engine stores."""
    return sum(constants_of_rank(config, recipe, mapping, limits.max_length).values())


def checkpoint_bytes(config: ModelConfig, dtype: str) -> int:
    """Of a model's tensors, all of them in `dtype`."""
    return int(config.parameters * BYTES[dtype])


def _positions(share: ModelConfig, max_length: int) -> dict[str, int]:
    """RoPE's table of frequencies, or ALiBi's slopes, in float32."""
    rope = share.rope
    if rope is None:
        return {"alibi.slopes": share.num_attention_heads * 4}
    grows = rope.type == "qwen" and max_length > rope.original_max_position_embeddings
    rows = rope.qwen_rows(max_length) if grows else 1
    return {"rotary.inverse_frequencies": rows * share.head_dim // 2 * 4}


def _product(recipe: Recipe, out: int, width: int, kept: bool) -> dict[str, int]:
    """The parts of a weight `[out, width]`: in the recipe's dtype, or as it quantizes (see `linear/`)."""
    quantization = recipe.quantization
    if kept or quantization is None:
        return {"weight": int(out * width * BYTES[recipe.dtype])}
    weights = quantization.weights
    found = {"weight": int(out * width * BYTES[weights.dtype])}
    if weights.dtype != "int4":
        found["scales"] = out * 4
    else:
        groups = width // weights.group_size if weights.group_size else 1
        found["scales"] = int(out * groups * BYTES[recipe.dtype])
        if not weights.symmetric:
            found["zeros"] = out * groups
    if quantization.rounding == "static":
        found["input_scale"] = 4
    return found
