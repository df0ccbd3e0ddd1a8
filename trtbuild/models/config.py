"""What the decoder needs to know of a model."""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from trtbuild.errors import UserError

if TYPE_CHECKING:  # declared models are read by every `snakemake`, for which torch would take seconds
    import torch

ROPE_TYPES = ("default", "linear", "dynamic", "llama3")
EXTENSION = "trtbuild"  # key of config.json with what Hugging Face's LLaMA configuration has no words for
# A layer's products, in the order in which they run, and the projections that each computes at once.
PRODUCTS = {
    "self_attn.qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attn.o_proj": ("self_attn.o_proj",),
    "mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.down_proj": ("mlp.down_proj",),
}
# The dimension of a weight `[out, in]` along which the ranks of tensor parallelism share it (arXiv 1909.08053): 0 with
# its bias, and each computes some of the outputs; 1, and their outputs are summed. What is not here all ranks have.
SHARED_DIMENSIONS = {
    "model.embed_tokens": 0,  # words
    "self_attn.q_proj": 0,
    "self_attn.k_proj": 0,
    "self_attn.v_proj": 0,
    "self_attn.o_proj": 1,
    "mlp.gate_proj": 0,
    "mlp.up_proj": 0,
    "mlp.down_proj": 1,
    "lm_head": 0,
}


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding: base and scaling, in the terms of Hugging Face's `rope_parameters`.

    Sources: RoFormer (arXiv 2104.09864); linear: position interpolation (arXiv 2306.15595); dynamic: NTK-aware base
    that grows with the sequence; llama3: frequency-dependent interpolation as released with Llama 3.1. qwen: the first
    Qwen's dynamic NTK (arXiv 2309.16609), whose base is chosen once a sequence, by the length of its prompt.
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

        Where both are there `rope_scaling` counts, as in transformers.
        Raises `KeyError` for a missing key, `UserError` for a scaling that is not supported.
        """
        parameters = config.get("rope_scaling") or config.get("rope_parameters") or {}
        kind = parameters.get("rope_type", parameters.get("type"))
        if kind is None and "factor" in parameters:
            raise UserError(f"{where}: RoPE scaling has a factor and no rope_type; give {', '.join(ROPE_TYPES[1:])}")
        kind = kind or "default"
        if kind not in ROPE_TYPES:
            raise UserError(f"{where}: RoPE scaling {kind!r} is not supported; supported are {', '.join(ROPE_TYPES)}")
        limit = config["max_position_embeddings"]
        if kind == "llama3":  # the others, like transformers, know only the model's own limit
            limit = parameters.get("original_max_position_embeddings", limit)
        rope = cls(
            theta=float(parameters.get("rope_theta", config.get("rope_theta", 10000.0))),
            type=kind,
            factor=1.0 if kind == "default" else float(parameters["factor"]),
            low_freq_factor=float(parameters["low_freq_factor"]) if kind == "llama3" else 1.0,
            high_freq_factor=float(parameters["high_freq_factor"]) if kind == "llama3" else 4.0,
            original_max_position_embeddings=limit,
        )
        if rope.high_freq_factor <= rope.low_freq_factor:
            raise UserError(f"{where}: high_freq_factor {rope.high_freq_factor} is not above low_freq_factor")
        return rope

    def inverse_frequencies(self, head_dim: int) -> "torch.Tensor":
        """`[head_dim / 2]` float32, radians per position; of `dynamic` and `qwen`, for a sequence within the limit."""
        import torch

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

    def qwen_rows(self, max_length: int) -> int:
        """How many rows of `qwen_frequencies` serve sequences up to `max_length`."""
        return 1 + ((max_length - 1) // self.original_max_position_embeddings).bit_length()

    def qwen_frequencies(self, head_dim: int, max_length: int) -> "torch.Tensor":
        """`[n, head_dim / 2]` float32; row 0 serves prompts up to `original_max_position_embeddings`.

        Row c is for prompts of up to `2**c` times that, with `alpha ** (d / (d - 2))` times the base and `alpha =
        2**(c + 1) - 1`; n rows serve up to `max_length`.
        """
        import torch

        rows = self.qwen_rows(max_length)
        alphas = 2.0 ** torch.arange(1, rows + 1, dtype=torch.float64) - 1
        bases = self.theta * alphas ** (head_dim / (head_dim - 2))
        exponents = torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim
        return (bases[:, None] ** -exponents).float()


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
    rope: RopeConfig | None  # None: ALiBi (arXiv 2108.12409)
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    attention_out_bias: bool = False
    mlp_bias: bool = False
    # Queries at position p >= logn_length are multiplied by log(p + 1) / log(logn_length) (Qwen); 0: never.
    logn_length: int = 0

    @classmethod
    def from_canonical(cls, config: dict, where: Path | str) -> "ModelConfig":
        """Reads a canonical `config.json`: Hugging Face's LLaMA configuration, and what that lacks under `trtbuild`.

        Raises `KeyError` for a missing key and `UserError` for one that is wrong.
        """
        extension = config.get(EXTENSION) or {}
        heads = config["num_attention_heads"]
        kv_heads = config.get("num_key_value_heads") or heads
        if heads % kv_heads:
            raise UserError(f"{where}: num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}")
        if not config.get("head_dim") and config["hidden_size"] % heads:
            raise UserError(f"{where}: hidden_size {config['hidden_size']} is not a multiple of the {heads} heads")
        if config.get("hidden_act", "silu") != "silu":
            raise UserError(f"{where}: hidden_act {config['hidden_act']!r} is not supported; SwiGLU models use 'silu'")
        rope = None
        if extension.get("position_embedding") != "alibi":
            rope = RopeConfig.from_hugging_face(config, where)
        if ntk_length := extension.get("ntk_length"):
            if rope is None:
                raise UserError(f"{where}: ntk_length is of RoPE, and the positions are ALiBi's; leave one out")
            rope = replace(rope, type="qwen", original_max_position_embeddings=ntk_length)
        head_dim = config.get("head_dim") or config["hidden_size"] // heads
        if rope and head_dim % 2:
            raise UserError(f"{where}: the head size {head_dim} is odd; RoPE rotates pairs")
        bias = config.get("attention_bias", False)
        return cls(
            family=extension.get("family", "llama"),
            vocab_size=config["vocab_size"],
            hidden_size=config["hidden_size"],
            intermediate_size=config["intermediate_size"],
            num_hidden_layers=config["num_hidden_layers"],
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=head_dim,
            max_position_embeddings=config["max_position_embeddings"],
            rms_norm_eps=config.get("rms_norm_eps", 1e-6),
            rope=rope,
            tie_word_embeddings=config.get("tie_word_embeddings", False),
            attention_bias=bias,
            attention_out_bias=extension.get("attention_out_bias", bias),
            mlp_bias=config.get("mlp_bias", False),
            logn_length=extension.get("logn_length", 0),
        )

    @property
    def positions(self) -> float:
        """How many positions it was made for; infinite where more are meant to work.

        They are with ALiBi, and where RoPE's base grows with the text (dynamic NTK, Qwen's). Linear scaling multiplies
        them: configurations give the length before it.
        """
        if self.rope is None or self.rope.type in ("dynamic", "qwen"):
            return math.inf
        return self.max_position_embeddings * (self.rope.factor if self.rope.type == "linear" else 1)

    @property
    def query_size(self) -> int:
        """Output channels of `q_proj`."""
        return self.num_attention_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Output channels of `k_proj`, and of `v_proj`."""
        return self.num_key_value_heads * self.head_dim

    @property
    def parameters(self) -> int:
        """How many numbers its tensors hold."""
        return sum(map(math.prod, self.tensor_shapes().values()))

    @property
    def output_product(self) -> str:
        """What makes the logits: a product of its own, or one with the embedding's table."""
        return "model.embed_tokens" if self.tie_word_embeddings else "lm_head"

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Canonical name to shape of every tensor the model has, in the order in which they are stored."""
        hidden, inner, vocab = self.hidden_size, self.intermediate_size, self.vocab_size
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden)}
        for i in range(self.num_hidden_layers):
            layer = f"model.layers.{i}"
            shapes[f"{layer}.input_layernorm.weight"] = (hidden,)
            for name, size in (("q_proj", self.query_size), ("k_proj", self.kv_size), ("v_proj", self.kv_size)):
                shapes[f"{layer}.self_attn.{name}.weight"] = (size, hidden)
                if self.attention_bias:
                    shapes[f"{layer}.self_attn.{name}.bias"] = (size,)
            shapes[f"{layer}.self_attn.o_proj.weight"] = (hidden, self.query_size)
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
