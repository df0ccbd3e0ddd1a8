"""Qwen, the first generation (arXiv 2309.16609; `QWenLMHeadModel`): its weights are those of a Qwen2 under other names.

What Qwen2 dropped is kept: a RoPE base that is chosen by the prompt's length (dynamic NTK), and queries that grow with
the logarithm of their position (log-n).
"""

import re
from pathlib import Path
from typing import TYPE_CHECKING

from trtbuild.errors import UserError
from trtbuild.files import write_json
from trtbuild.models.config import EXTENSION

if TYPE_CHECKING:
    from trtbuild.tensors.lazy import LazyTensor

DESCRIPTION = "the first Qwen, QWenLMHeadModel"
VERSIONS: tuple[str, ...] = ()
TOKENIZER_FILE = "qwen.tiktoken"

NAMES = {
    "transformer.wte": "model.embed_tokens",
    "transformer.ln_f": "model.norm",
    "lm_head": "lm_head",
    "ln_1": "input_layernorm",
    "attn.c_proj": "self_attn.o_proj",
    "ln_2": "post_attention_layernorm",
    "mlp.w2": "mlp.gate_proj",  # the one that goes through SiLU
    "mlp.w1": "mlp.up_proj",
    "mlp.c_proj": "mlp.down_proj",
}
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
END_OF_TEXT, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
SPECIAL_TOKENS = [END_OF_TEXT, IM_START, IM_END, *(f"<|extra_{i}|>" for i in range(205))]


def canonical_config(config: dict, where: Path | str, model_version: str | None) -> dict:
    """A `QWenConfig` as the `Qwen2Config` of the same network, NTK and log-n apart."""
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    if config["kv_channels"] * heads != hidden:
        raise UserError(f"{where}: kv_channels {config['kv_channels']} times {heads} heads is not hidden_size {hidden}")
    for key, expected in (("rotary_pct", 1.0), ("no_bias", True), ("scale_attn_weights", True)):
        if config.get(key, expected) != expected:
            raise UserError(f"{where}: {key} {config[key]} is not supported; Qwen's models have {expected}")
    for key in ("seq_length", "intermediate_size"):
        if config[key] < 2:
            raise UserError(f"{where}: {key} has the wrong type or value: {config[key]!r}; use an integer above 1")
    if config["intermediate_size"] % 2:
        raise UserError(f"{where}: intermediate_size {config['intermediate_size']} is odd; Qwen's counts w1 and w2")
    extension: dict[str, object] = {"family": "qwen", "attention_out_bias": False}
    if config["use_dynamic_ntk"]:
        extension["ntk_length"] = config["seq_length"]
    if config["use_logn_attn"]:
        extension["logn_length"] = config["seq_length"]
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "vocab_size": config["vocab_size"],
        "hidden_size": hidden,
        "intermediate_size": config["intermediate_size"] // 2,  # Qwen counts w1 and w2
        "num_hidden_layers": config["num_hidden_layers"],
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "hidden_act": "silu",
        "max_position_embeddings": max(config["max_position_embeddings"], config["seq_length"]),
        "rms_norm_eps": config["layer_norm_epsilon"],
        "rope_theta": float(config["rotary_emb_base"]),
        "use_sliding_window": False,
        "attention_bias": True,
        "tie_word_embeddings": config.get("tie_word_embeddings", False),
        "dtype": config.get("dtype") or config.get("torch_dtype") or "bfloat16",
        EXTENSION: extension,
    }


def canonical_tensors(tensors: "dict[str, LazyTensor]", config: dict) -> "dict[str, LazyTensor]":
    """`c_attn` is q, k and v, one after the other."""
    from trtbuild.tensors.lazy import split

    canonical: dict[str, LazyTensor] = {}
    for published, tensor in tensors.items():
        layer, name = "", published
        if match := re.fullmatch(r"transformer\.h\.(\d+)\.(.+)", published):
            layer, name = f"model.layers.{match[1]}.", match[2]
        stem, _, kind = name.rpartition(".")
        if stem == "attn.c_attn":
            parts = (f"{layer}self_attn.{part}_proj.{kind}" for part in "qkv")
            canonical |= zip(parts, split(tensor, 3), strict=True)
        elif stem in NAMES:
            canonical[f"{layer}{NAMES[stem]}.{kind}"] = tensor
        else:
            canonical[published] = tensor
    return canonical


def save_tokenizer(file: Path, folder: Path, config: dict) -> None:
    """From a tiktoken vocabulary. A chat's turn ends with `<|im_end|>`, any text with `<|endoftext|>`."""
    from tokenizers import Tokenizer

    from trtbuild.tokenizer.fast_tokenizer import save_tiktoken

    save_tiktoken(file, folder, pattern=PATTERN, special_tokens=SPECIAL_TOKENS, eos_token=END_OF_TEXT)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    ends = [tokenizer.token_to_id(token) for token in (END_OF_TEXT, IM_END)]
    write_json(folder / "generation_config.json", {"eos_token_id": ends})
