"""What calibration and quantization say of a model's layers, one by one: where a recipe loses what it loses."""

from pathlib import Path

import torch

from trtbuild.checkpoint.canonical import ORIGIN_FILE, Checkpoint
from trtbuild.files import read_json
from trtbuild.models.config import PRODUCTS
from trtbuild.quantization.calibration import read_calibration, read_smoothing
from trtbuild.quantization.recipe import Quantization

# The largest share of a tensor's range that its one scale rounds to 0: half of INT8's step, of E4M3's smallest number.
ZERO = {"int8": 0.5 / 127, "fp8": 2**-10 / 448}


def ranges(path: Path, checkpoint: Checkpoint) -> dict:
    """Of a calibration file: `origin`, and of products' inputs, keys and values each layer's `max` and `median`.

    The median is of its channels' largest magnitudes: a range far above it is that of a few outliers.
    """
    calibration = read_calibration(path, checkpoint)
    names = {f"{product}": f"{product}.input" for product in PRODUCTS}
    names |= {"keys": "self_attn.key", "values": "self_attn.value"}
    found = {
        key: _channels([calibration[f"model.layers.{i}.{name}"] for i in range(checkpoint.config.num_hidden_layers)])
        for key, name in names.items()
    }
    return {"origin": calibration.origin, "ranges": found}


def quantized(weights: Path, calibration: Path | None, original: Checkpoint | None) -> dict:
    """Of a folder of quantized weights, by layer; nothing of published ones, or where the files are gone.

    `relative_errors` of projections' weights, None where they are kept; of activations with one scale a tensor
    `zeroed_percent` by product: how many of its input's channels are rounded to 0 altogether.
    """
    origin = read_json(weights / ORIGIN_FILE) if (weights / ORIGIN_FILE).exists() else {}
    if "quantization" not in origin:
        return {}
    found = {}
    if errors := origin.get("relative_errors"):
        layers = range(1 + max(int(name.split(".")[2]) for name in errors if "." in name))
        parts = [part for parts in PRODUCTS.values() for part in parts]
        found["relative_errors"] = {
            part: [_short(errors[name]) if (name := f"model.layers.{i}.{part}") in errors else None for i in layers]
            for part in parts
        }
    quantization = Quantization.parse(origin["quantization"])
    if quantization.rounding == "static" and calibration and calibration.exists() and original:
        assert quantization.activations
        limit = ZERO[quantization.activations.dtype]
        found["zeroed_percent"] = {
            product: [100 * (x <= limit * x.amax()).double().mean().item() for x in inputs]
            for product, inputs in _smoothed_inputs(weights, calibration, original).items()
        }
    return found


def _smoothed_inputs(weights: Path, calibration: Path, checkpoint: Checkpoint) -> dict[str, list[torch.Tensor]]:
    """Channels' largest magnitudes by product, layer by layer, as they are rounded."""
    smoothing = read_smoothing(Checkpoint(weights))
    config, measured = checkpoint.config, read_calibration(calibration, checkpoint)
    found: dict[str, list[torch.Tensor]] = {product: [] for product in PRODUCTS}
    for product, inputs in found.items():
        for i in range(config.num_hidden_layers):
            name = f"model.layers.{i}.{product}"
            x = measured[f"{name}.input"]
            if (factors := smoothing.get(name)) is not None:
                if product == "self_attn.o_proj":  # all query heads of a group read the channels of one value head
                    groups = config.num_attention_heads // config.num_key_value_heads
                    factors = factors.view(-1, 1, config.head_dim).expand(-1, groups, -1).flatten()
                x = x / factors
            inputs.append(x)
    return found


def _channels(layers: list[torch.Tensor]) -> dict[str, list[float]]:
    return {
        "max": [_short(x.amax().item()) for x in layers],
        "median": [_short(x.median().item()) for x in layers],
    }


def _short(value: float) -> float:
    """Four digits."""
    return float(f"{value:.4g}")
