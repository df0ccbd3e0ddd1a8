"""Quantization imitated in floating point, in `transformers`' own model: what a quantized engine has to agree with."""

from collections.abc import Callable
from typing import Any

import torch

from trtbuild.checkpoint.canonical import Checkpoint
from trtbuild.decoder.decoder import CacheScales
from trtbuild.tensors.quantized_weight import QuantizedWeight
from trtbuild.tensors.rounding import DTYPES, quantize, scale_for
from trtbuild.tokenizer.damage import refusing


def load_model(checkpoint: Checkpoint, dtype: torch.dtype, **places: Any) -> Any:
    """`transformers`' model of a checkpoint; a quantized one's weights are widened and its activations rounded.

    `places`: on which devices `from_pretrained` shall put what (`device_map`, `max_memory`), if not all on the CPU.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM

    with refusing(f"transformers cannot read {checkpoint.folder / 'config.json'}"):  # it checks more keys than we use
        config = AutoConfig.from_pretrained(checkpoint.folder, local_files_only=True)
    if not checkpoint.quant_method:
        options = {"config": config, "dtype": dtype, "local_files_only": True} | places
        return AutoModelForCausalLM.from_pretrained(checkpoint.folder, **options)
    del config.quantization_config  # this is not a job for its own quantizers
    weights = {name: checkpoint.dequantized(name).load().to(dtype) for name in checkpoint.tensors}
    model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    model = model_class.from_pretrained(None, config=config, state_dict=weights, dtype=dtype, **places)
    for name, module in model.named_modules():
        weight = checkpoint.tensors.get(f"{name}.weight")
        if isinstance(weight, QuantizedWeight) and weight.activations != "16bit":
            module.register_forward_pre_hook(_rounding(weight, model))
    model.rounds_activations = True
    return model


def _rounding(weight: QuantizedWeight, model: Any) -> Callable:
    """A hook that rounds a product's input, while `model.rounds_activations`."""
    dtype = DTYPES[weight.format]
    static = weight.input_scale.load() if weight.input_scale else None

    def hook(module: torch.nn.Module, inputs: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        if not model.rounds_activations:
            return inputs
        wide = inputs[0].float()
        scale = scale_for(wide.abs().amax(-1, keepdim=True), dtype) if static is None else static.to(wide.device)
        return ((quantize(wide, scale, dtype).float() * scale).to(inputs[0].dtype),)

    return hook


def fake_quantized_cache(cache: CacheScales) -> Any:
    """A `transformers` cache that rounds the keys and values it is given, `[batch, kv_heads, tokens, head_dim]`."""
    from transformers import DynamicCache

    class FakeQuantizedCache(DynamicCache):
        def update(
            self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
        ) -> tuple[torch.Tensor, torch.Tensor]:
            both = [
                _round_trip(states, scales[layer_idx].to(states.device), cache.dtype)
                for states, scales in ((key_states, cache.key_scales), (value_states, cache.value_scales))
            ]
            keys, values = both
            return super().update(keys, values, layer_idx, *args, **kwargs)

    return FakeQuantizedCache()


def _round_trip(x: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    scales = scales[:, None, None]
    return (quantize(x.float(), scales, dtype).float() * scales).to(x.dtype)
