"""GGUF files of LLaMA models to canonical checkpoints.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The `gguf` package maps the file and dequantizes;
this module knows names, the configuration, and that GGUF stores rotary projections with interleaved halves.
"""

from pathlib import Path

import numpy as np
import torch

from trtbuild.checkpoint.lazy import LazyTensor, half_rotary
from trtbuild.errors import UserError

NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def read_gguf(path: Path) -> tuple[dict, dict[str, LazyTensor]]:
    """The Hugging Face configuration and the float32 tensors (dequantized on `load()`) of a GGUF file.

    Raises `UserError` if the file is missing, truncated, not GGUF, not LLaMA, or uses a RoPE scaling other than linear.
    """
    import gguf

    if not path.is_file():
        raise UserError(f"{path} does not exist")
    try:
        reader = gguf.GGUFReader(path)
    except (ValueError, IndexError, KeyError) as error:
        raise UserError(f"{path} is truncated or not a GGUF file ({error})") from error
    fields = {name: field.contents() for name, field in reader.fields.items()}
    architecture = fields.get("general.architecture")
    if architecture != "llama":
        raise UserError(
            f"{path} holds a model of the architecture {architecture!r}; only 'llama' is supported from GGUF"
        )
    config = _config(path, fields, {tensor.name for tensor in reader.tensors})
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}

    tensors = {}
    for tensor in reader.tensors:
        *prefix, stem, kind = tensor.name.split(".")
        if stem not in NAMES:
            raise UserError(f"{path}: the tensor {tensor.name} is not part of a LLaMA model that trtbuild knows")
        name = ".".join([*(["model.layers", prefix[1]] if prefix else []), NAMES[stem], kind])
        shape = tuple(int(n) for n in reversed(tensor.shape))

        def load(tensor=tensor) -> torch.Tensor:
            value = gguf.dequantize(tensor.data, tensor.tensor_type)
            return torch.from_numpy(np.require(value, requirements=["C", "W"]))  # unquantized data is a read-only map

        tensors[name] = LazyTensor(torch.float32, shape, load)
        if stem in heads:
            tensors[name] = half_rotary(tensors[name], heads[stem])
    return config, tensors


def _config(path: Path, fields: dict, tensor_names: set[str]) -> dict:
    try:
        get = lambda key: fields[f"llama.{key}"]  # noqa: E731
        heads = get("attention.head_count")
        head_dim = fields.get("llama.attention.key_length") or get("embedding_length") // heads
        config = {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": fields.get("llama.vocab_size") or len(fields["tokenizer.ggml.tokens"]),
            "hidden_size": get("embedding_length"),
            "intermediate_size": get("feed_forward_length"),
            "num_hidden_layers": get("block_count"),
            "num_attention_heads": heads,
            "num_key_value_heads": fields.get("llama.attention.head_count_kv") or heads,
            "head_dim": head_dim,
            "hidden_act": "silu",
            "max_position_embeddings": get("context_length"),
            # A float32 in the file; its shortest decimal is what the model's author wrote.
            "rms_norm_eps": float(str(np.float32(get("attention.layer_norm_rms_epsilon")))),
            "rope_theta": float(fields.get("llama.rope.freq_base") or 10000.0),
            "tie_word_embeddings": "output.weight" not in tensor_names,
            "attention_bias": "blk.0.attn_q.bias" in tensor_names,
            "mlp_bias": "blk.0.ffn_gate.bias" in tensor_names,
            "dtype": "float32",
        }
        scaling = fields.get("llama.rope.scaling.type", "none")
        if scaling == "linear":
            config["rope_scaling"] = {"rope_type": "linear", "factor": float(get("rope.scaling.factor"))}
    except KeyError as error:
        raise UserError(f"{path}: the metadata key {error} is missing") from error
    if scaling not in ("none", "linear") or "rope_freqs.weight" in tensor_names:
        kind = scaling if scaling not in ("none", "linear") else "rope_freqs.weight"
        raise UserError(f"{path}: RoPE scaling {kind!r} in GGUF is not supported; use the model's Hugging Face folder")
    for name in ("bos", "eos"):
        if (token := fields.get(f"tokenizer.ggml.{name}_token_id")) is not None:
            config[f"{name}_token_id"] = token
    return config


def save_tokenizer(path: Path, folder: Path) -> None:
    """Reads a GGUF file's tokenizer with `transformers` and saves it as `tokenizer.json` and its configuration.

    `transformers` gives every byte-level BPE the splitting of GPT-2, whatever `tokenizer.ggml.pre` says. SmolLM's also
    keeps digits apart, which is put back here; another splitting is a `UserError`, since it would give wrong tokens.
    """
    import gguf
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer
    from transformers.utils import logging

    reader = gguf.GGUFReader(path)
    fields = (reader.get_field(f"tokenizer.ggml.{key}") for key in ("model", "pre"))
    model, pre = (field.contents() if field is not None else "" for field in fields)
    if model == "gpt2" and pre not in ("gpt-2", "smollm"):
        raise UserError(
            f"{path}: the tokenizer's splitting {pre!r} is not supported from GGUF (gpt-2 and smollm are); "
            "use the model's Hugging Face folder"
        )
    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(str(path.parent), gguf_file=path.name)
    if pre == "smollm":
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    tokenizer.save_pretrained(folder)
