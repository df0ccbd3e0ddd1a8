"""LLaMA (arXiv 2302.13971, 2307.09288, 2407.21783): the family whose names are the canonical ones."""

from pathlib import Path

from trtbuild.errors import UserError
from trtbuild.models.config import ModelConfig, RopeConfig


def model_config(config: dict, where: Path | str) -> ModelConfig:
    """Reads a Hugging Face `LlamaConfig` dictionary; raises `KeyError` for a missing key, `UserError` for a bad one."""
    heads = config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads") or heads
    if heads % kv_heads:
        raise UserError(f"{where}: num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}")
    if config.get("hidden_act", "silu") != "silu":
        raise UserError(f"{where}: hidden_act {config['hidden_act']!r} is not supported; LLaMA uses 'silu'")
    bias = bool(config.get("attention_bias", False))
    return ModelConfig(
        family="llama",
        vocab_size=config["vocab_size"],
        hidden_size=config["hidden_size"],
        intermediate_size=config["intermediate_size"],
        num_hidden_layers=config["num_hidden_layers"],
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=config.get("head_dim") or config["hidden_size"] // heads,
        max_position_embeddings=config["max_position_embeddings"],
        rms_norm_eps=config.get("rms_norm_eps", 1e-6),
        rope=RopeConfig.from_hugging_face(config, where),
        tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
        attention_bias=bias,
        attention_out_bias=bias,
        mlp_bias=bool(config.get("mlp_bias", False)),
    )
