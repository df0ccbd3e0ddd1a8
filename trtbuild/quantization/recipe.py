"""A recipe: how weights, activations and KV cache are represented, composed of independent parts.

`config/recipes.yaml` holds recipes as mappings, `config/schemas/recipes.schema.yaml` says which are valid; this module
fills in what they leave out, and tells which part of a recipe each stage depends on.
"""

import fnmatch
import hashlib
import json

DEFAULT_CALIBRATION = {
    "dataset": {"name": "trtbuild-news", "split": "calibration"},
    "samples": 64,
    "length": 512,
    "seed": 0,
}
# Per cent of perplexity, by the weakest part of a recipe: what small models lose where nothing is broken. W8A8 is meant
# with a scale a token; a 135M model with static scales, or with int4 and no groups, loses more (README). "plain" is a
# recipe that quantizes nothing.
MAX_PERPLEXITY_INCREASE = {"plain": 1.0, "int8": 5.0, "fp8": 5.0, "w8a8": 25.0, "int4-groups": 30.0, "int4": 75.0}


def quantization_of(recipe: dict) -> dict | None:
    """The part of a recipe that quantized weights depend on, with every default filled in; None without weights."""
    if "weights" not in recipe:
        return None
    weights = dict(recipe["weights"])
    weights.setdefault("method", "round")
    if weights["dtype"] == "int4":
        weights.setdefault("symmetric", weights["method"] == "round")
        weights.setdefault("group_size", None)
    else:
        weights.setdefault("per", "tensor" if weights["dtype"] == "fp8" else "channel")
    activations = recipe.get("activations")
    if activations:
        activations = {"per": "tensor", "smoothquant": None} | activations
    quantization = {
        "dtype": recipe["dtype"],
        "weights": weights,
        "activations": activations,
        "quantize_lm_head": recipe.get("quantize_lm_head", False),
        "keep_16bit": recipe.get("keep_16bit", []),
    }
    if weights["method"] != "round" or needs_ranges(quantization):
        quantization["calibration"] = calibration_of(recipe)
    return quantization


def needs_ranges(quantization: dict | None) -> bool:
    """Whether quantizing needs a calibration file: for static or smoothed activations."""
    activations = quantization and quantization["activations"]
    return bool(activations) and (activations["per"] == "tensor" or activations["smoothquant"] is not None)


def calibration_of(recipe: dict) -> dict:
    """A recipe's calibration settings with the defaults filled in."""
    return DEFAULT_CALIBRATION | recipe.get("calibration", {})


def identity(settings: dict) -> str:
    """Eight hex digits that tell settings apart; part of an artifact's name."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]


def calibration_id(settings: dict) -> str:
    """Name of a calibration file: `trtbuild-news-64x512-1f3a9c0d`."""
    name = settings["dataset"]["name"].replace("/", "--")
    return f"{name}-{settings['samples']}x{settings['length']}-{identity(settings)}"


def quantization_id(quantization: dict) -> str:
    """Name of a folder of quantized weights: `gptq-int4-1f3a9c0d`."""
    weights = quantization["weights"]
    return f"{weights['method']}-{weights['dtype']}-{identity(quantization)}"


def kept_in_16bit(name: str, quantization: dict) -> bool:
    """Whether a projection, such as `model.layers.0.mlp.down_proj` or `lm_head`, is left alone."""
    if name == "lm_head" and not quantization["quantize_lm_head"]:
        return True
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in quantization["keep_16bit"])


def engine_recipe(recipe: dict) -> dict:
    """The part of a recipe that its engine depends on, given its weights: all but how it is judged."""
    return {key: value for key, value in recipe.items() if key not in ("max_perplexity_increase", "gate")}


def gate_limits(recipe: dict) -> dict:
    """`max_increase` of perplexity in per cent, declared or by kind, and `gate`."""
    weights, activations = recipe.get("weights", {}), recipe.get("activations", {})
    kinds = ["plain", *([recipe["kv_cache"]["dtype"]] if "kv_cache" in recipe else [])]
    if activations.get("dtype") == "int8":
        kinds.append("w8a8")
    if "quant_checkpoint" in recipe or weights.get("group_size"):
        kinds.append("int4-groups")
    elif weights:
        kinds.append(weights["dtype"])
    limit = recipe.get("max_perplexity_increase", max(MAX_PERPLEXITY_INCREASE[kind] for kind in kinds))
    return {"max_increase": limit, "gate": recipe.get("gate", "fail")}
