"""One decoder layer's weights while they are smoothed and rounded."""

from collections.abc import Callable

import torch

from trtbuild.checkpoint.canonical import Checkpoint
from trtbuild.errors import UserError
from trtbuild.models.config import PRODUCTS, ModelConfig
from trtbuild.tensors.lazy import concatenate

PROJECTIONS = [part for parts in PRODUCTS.values() for part in parts]
NORMS = {"self_attn.qkv_proj": "input_layernorm", "mlp.gate_up_proj": "post_attention_layernorm"}


def every_projection(config: ModelConfig) -> list[str]:
    """Names of all layers' projections, in order."""
    return [f"model.layers.{i}.{part}" for i in range(config.num_hidden_layers) for part in PROJECTIONS]


class LayerWeights:
    """Layer `i` in float32 on a device: `weights` `[out, in]` by product, and `vectors`, biases and norms, by tensor.

    Names are relative to the layer. Raises `UserError` for weights that are not finite.
    """

    def __init__(self, checkpoint: Checkpoint, i: int, device: torch.device) -> None:
        self.config = checkpoint.config
        prefix = f"model.layers.{i}."
        self.weights: dict[str, torch.Tensor] = {}
        for product, parts in PRODUCTS.items():
            fused = concatenate([checkpoint.dequantized(f"{prefix}{part}.weight") for part in parts])
            self.weights[product] = finite(fused.load().to(device).float(), f"{prefix}{product}", checkpoint)
        names = [name.removeprefix(prefix) for name in checkpoint.config.tensor_shapes() if name.startswith(prefix)]
        vectors = [name for name in names if name.endswith(("norm.weight", ".bias"))]
        self.vectors = {
            name: finite(checkpoint.dequantized(prefix + name).load().to(device).float(), prefix + name, checkpoint)
            for name in vectors
        }

    def reduce(self, product: str, x: torch.Tensor, how: Callable[..., torch.Tensor] = torch.amax) -> torch.Tensor:
        """`[in]` of a product to the channels of what makes its input.

        They are the same but for `o_proj`, whose grouped query heads all read the channels of one value head.
        """
        if product != "self_attn.o_proj":
            return x
        config = self.config
        return how(x.view(config.num_key_value_heads, -1, config.head_dim), dim=1).flatten()

    def expand(self, product: str, x: torch.Tensor) -> torch.Tensor:
        """The inverse of `reduce`, each value head's channels repeated."""
        if product != "self_attn.o_proj":
            return x
        config = self.config
        group = config.num_attention_heads // config.num_key_value_heads
        heads = x.view(config.num_key_value_heads, 1, config.head_dim)
        return heads.expand(-1, group, -1).flatten()

    def smooth(self, product: str, scales: torch.Tensor) -> None:
        """Multiplies a product's input channels by `scales` (as `reduce` gives them) and what makes them by 1 / scales.

        The layer computes what it did: the makers are a norm's weights, the value projection, or the up projection
        (SwiGLU is linear in it).
        """
        self.weights[product] = self.weights[product] * self.expand(product, scales)
        if norm := NORMS.get(product):
            self.vectors[f"{norm}.weight"] = self.vectors[f"{norm}.weight"] / scales
            return
        maker, bias = {
            "self_attn.o_proj": ("self_attn.qkv_proj", "self_attn.v_proj.bias"),
            "mlp.down_proj": ("mlp.gate_up_proj", "mlp.up_proj.bias"),
        }[product]
        self.weights[maker][-len(scales) :] /= scales[:, None]  # v and up are the last rows
        if bias in self.vectors:
            self.vectors[bias] = self.vectors[bias] / scales

    def parts(self, product: str, values: torch.Tensor) -> dict[str, torch.Tensor]:
        """Rows `[out, ...]` of a product by projection."""
        config = self.config
        sizes = {
            "self_attn.qkv_proj": [config.query_size, config.kv_size, config.kv_size],
            "mlp.gate_up_proj": [config.intermediate_size] * 2,
        }.get(product, [len(values)])
        return dict(zip(PRODUCTS[product], values.split(sizes), strict=True))


def finite(weight: torch.Tensor, name: str, checkpoint: Checkpoint) -> torch.Tensor:
    """`weight`, after checking it; `UserError` names what holds NaN or infinite numbers."""
    if not weight.isfinite().all():
        raise UserError(f"{checkpoint.folder}: {name} holds NaN or infinite numbers; it cannot be quantized")
    return weight
