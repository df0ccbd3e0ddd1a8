"""Writes GGUF files of LLaMA models, as llama.cpp's converter would."""

import gguf
import numpy as np
from tokenizers.pre_tokenizers import ByteLevel

NAMES = {  # the format's names, as llama.cpp's converter gives them
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
TOP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def gguf_name(name):
    if name.startswith("model.layers."):
        stem, _, kind = name.rpartition(".")
        _, _, layer, stem = stem.split(".", 3)
        return f"blk.{layer}.{NAMES[stem]}.{kind}"
    return TOP[name.removesuffix(".weight")] + ".weight"


def permute(weights, n_head):
    """Rotary rows as GGUF has them: the halves of each head interleaved, pair after pair."""
    halves = weights.reshape(n_head, 2, -1, *weights.shape[1:])
    pairs = np.empty_like(weights).reshape(n_head, -1, *weights.shape[1:])
    pairs[:, 0::2], pairs[:, 1::2] = halves[:, 0], halves[:, 1]
    return pairs.reshape(weights.shape)


def is_rotary(name):
    return "q_proj" in name or "k_proj" in name


def heads_of(name):
    return 4 if "q_proj" in name else 2


def write_gguf(
    path,
    config,
    tensors,
    kind=gguf.GGMLQuantizationType.F32,
    architecture="llama",
    leave_out=(),
    more=(),
    pre="smollm",
    split_max_tensors=0,
):
    """Norms stay float32, rotary rows are interleaved. `more`: methods of the writer, or keys, and their values."""
    writer = gguf.GGUFWriter(path, architecture, split_max_tensors=split_max_tensors)
    for key, add, value in [
        ("block_count", writer.add_block_count, config.num_hidden_layers),
        ("context_length", writer.add_context_length, config.max_position_embeddings),
        ("embedding_length", writer.add_embedding_length, config.hidden_size),
        ("feed_forward_length", writer.add_feed_forward_length, config.intermediate_size),
        ("head_count", writer.add_head_count, config.num_attention_heads),
        ("head_count_kv", writer.add_head_count_kv, config.num_key_value_heads),
        ("layer_norm_rms_epsilon", writer.add_layer_norm_rms_eps, config.rms_norm_eps),
        ("freq_base", writer.add_rope_freq_base, config.rope_parameters["rope_theta"]),
        ("vocab_size", writer.add_vocab_size, config.vocab_size),
    ]:
        if key not in leave_out:
            add(value)
    for add, value in more:
        if hasattr(writer, add):
            getattr(writer, add)(value)
        else:
            kinds = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, list: writer.add_array}
            kinds[type(value)](f"{architecture}.{add}", value)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(byte_tokens())
    writer.add_token_types([3, 3, *[1] * (config.vocab_size - 2)])
    writer.add_token_merges(["h e", "1 2"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    for name, value in tensors.items():
        value = permute(value, heads_of(name)) if is_rotary(name) else value
        if value.ndim == 1 or kind == gguf.GGMLQuantizationType.F32:
            writer.add_tensor(gguf_name(name), value)
        else:
            writer.add_tensor(gguf_name(name), gguf.quantize(value, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def byte_tokens():
    return ["<s>", "</s>", *sorted(ByteLevel.alphabet()), "he", "12"]
