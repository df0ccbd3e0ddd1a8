"""Scales of an 8-bit KV cache, from the ranges of keys and values."""

from pathlib import Path

import torch

from trtbuild.checkpoint.canonical import Checkpoint
from trtbuild.decoder.decoder import CacheScales
from trtbuild.errors import UserError
from trtbuild.quantization.calibration import Calibration, read_calibration, read_smoothing, smoothing_of
from trtbuild.quantization.recipe import KVCache, Recipe
from trtbuild.tensors.rounding import DTYPES, scale_for


def cache_of(recipe: Recipe, checkpoint_dir: Path, calibration: Path | None) -> CacheScales | None:
    """The cache of a recipe's engines: None where it is in the recipe's own dtype.

    Raises `UserError` where the calibration file is missing or of another model.
    """
    if recipe.kv_cache is None:
        return None
    if calibration is None:
        raise UserError("a quantized KV cache needs the ranges of keys and values; give the calibration file")
    checkpoint = Checkpoint(checkpoint_dir)
    return quantized_cache(checkpoint, read_calibration(calibration, checkpoint), recipe.kv_cache)


def quantized_cache(checkpoint: Checkpoint, calibration: Calibration, kv_cache: KVCache) -> CacheScales:
    """Keys and values have scales of their own.

    A quantized checkpoint whose output projection was smoothed has smaller values than the original model, by the
    factors that it records; they count where it was the original that was calibrated.
    """
    config = checkpoint.config
    measured = calibration.origin.get("smoothed")
    if measured and measured != smoothing_of(checkpoint):
        raise UserError(f"{calibration.path} was measured on other, smoothed weights; calibrate the original model")
    smoothing = {} if measured else read_smoothing(checkpoint)
    scales: dict[str, list[torch.Tensor]] = {"key": [], "value": []}
    for i in range(config.num_hidden_layers):
        attention = f"model.layers.{i}.self_attn"
        for kind, known in scales.items():
            absmax = calibration[f"{attention}.{kind}"]
            if kind == "value" and f"{attention}.o_proj" in smoothing:
                absmax = absmax / smoothing[f"{attention}.o_proj"]
            heads = absmax.view(config.num_key_value_heads, config.head_dim).amax(1)
            known.append(heads if kv_cache.per == "head" else heads.amax().expand(len(heads)))
    dtype = DTYPES[kv_cache.dtype]
    keys, values = (scale_for(torch.stack(known), dtype) for known in scales.values())
    return CacheScales(dtype, keys, values)
