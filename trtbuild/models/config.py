"""What the decoder needs to know of a model."""

import math
from dataclasses import dataclass
from pathlib import Path

import torch

from trtbuild.errors import UserError

ROPE_TYPES = ("default", "linear", "dynamic", "llama3")


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding: base and scaling, in the terms of Hugging Face's `rope_parameters`.

    Sources: RoFormer (arXiv 2104.09864); linear: position interpolation (arXiv 2306.15595); dynamic: NTK-aware base
    that grows with the sequence; llama3: frequency-dependent interpolation as released with Llama 3.1.
    """

    theta: float = 10000.0
    type: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 0

    @classmethod
    def from_hugging_face(cls, config: dict, where: Path | str) -> "RopeConfig":
        """Reads both spellings: `rope_parameters` (transformers 5) and `rope_theta` with `rope_scaling`.

        Raises `KeyError` for a missing key, `UserError` for a scaling that is not supported.
        """
        parameters = config.get("rope_parameters") or config.get("rope_scaling") or {}
        kind = parameters.get("rope_type") or parameters.get("type") or "default"
        if kind not in ROPE_TYPES:
            raise UserError(f"{where}: RoPE scaling {kind!r} is not supported; supported are {', '.join(ROPE_TYPES)}")
        limit = config["max_position_embeddings"]
        if kind == "llama3":  # the others, like transformers, know only the model's own limit
            limit = parameters.get("original_max_position_embeddings") or limit
        return cls(
            theta=float(parameters.get("rope_theta") or config.get("rope_theta") or 10000.0),
            type=kind,
            factor=1.0 if kind == "default" else float(parameters["factor"]),
            low_freq_factor=float(parameters.get("low_freq_factor") or 1.0),
            high_freq_factor=float(parameters.get("high_freq_factor") or 4.0),
            original_max_position_embeddings=int(limit),
        )

    def inverse_frequencies(self, head_dim: int) -> torch.Tensor:
        """`[head_dim / 2]` float32, radians per position; for `dynamic`, those of a sequence within the limit."""
        exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
        frequencies = 1.0 / self.theta**exponents
        if self.type == "linear":
            frequencies = frequencies / self.factor
        if self.type == "llama3":
            wavelengths = 2 * math.pi / frequencies
            low = self.original_max_position_embeddings / self.low_freq_factor
            high = self.original_max_position_embeddings / self.high_freq_factor
            smooth = (self.original_max_position_embeddings / wavelengths - self.low_freq_factor) / (
                self.high_freq_factor - self.low_freq_factor
            )
            blended = (1 - smooth) * frequencies / self.factor + smooth * frequencies
            scaled = torch.where(wavelengths > low, frequencies / self.factor, frequencies)
            frequencies = torch.where((wavelengths <= low) & (wavelengths >= high), blended, scaled)
        return frequencies


@dataclass(frozen=True)
class ModelConfig:
    """Sizes and options of one decoder-only model, named as in Hugging Face's LLaMA configuration."""

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope: RopeConfig
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    attention_out_bias: bool = False
    mlp_bias: bool = False

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Canonical name to shape of every tensor the model has, in the order in which they are stored."""
        hidden, inner, vocab = self.hidden_size, self.intermediate_size, self.vocab_size
        queries, keys = self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden)}
        for i in range(self.num_hidden_layers):
            layer = f"model.layers.{i}"
            shapes[f"{layer}.input_layernorm.weight"] = (hidden,)
            for name, size in (("q_proj", queries), ("k_proj", keys), ("v_proj", keys)):
                shapes[f"{layer}.self_attn.{name}.weight"] = (size, hidden)
                if self.attention_bias:
                    shapes[f"{layer}.self_attn.{name}.bias"] = (size,)
            shapes[f"{layer}.self_attn.o_proj.weight"] = (hidden, queries)
            if self.attention_out_bias:
                shapes[f"{layer}.self_attn.o_proj.bias"] = (hidden,)
            shapes[f"{layer}.post_attention_layernorm.weight"] = (hidden,)
            for name, shape in (
                ("gate_proj", (inner, hidden)),
                ("up_proj", (inner, hidden)),
                ("down_proj", (hidden, inner)),
            ):
                shapes[f"{layer}.mlp.{name}.weight"] = shape
                if self.mlp_bias:
                    shapes[f"{layer}.mlp.{name}.bias"] = shape[:1]
        shapes["model.norm.weight"] = (hidden,)
        if not self.tie_word_embeddings:
            shapes["lm_head.weight"] = (vocab, hidden)
        return shapes
