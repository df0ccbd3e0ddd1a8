"""Recipes: how weights, activations and KV cache are represented, composed of independent parts.

`recipes.yaml` holds recipes as mappings, and `schemas/recipes.schema.yaml` says which are valid. Here they become
types: what a mapping leaves out is filled in once, and each stage takes the part that it depends on. Parts that name an
artifact, or go into one, keep their mapping, `settings`.
"""

import fnmatch
import hashlib
import json
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from trtbuild.linear.format import WeightFormat

# Per cent of perplexity, by the weakest part of a recipe: what small models lose where nothing is broken. W8A8 is meant
# with a scale a token; a 135M model with static scales, or with int4 and no groups, loses more (README). "plain" is a
# recipe that quantizes nothing.
MAX_PERPLEXITY_INCREASE = {"plain": 1.0, "int8": 5.0, "fp8": 5.0, "w8a8": 25.0, "int4-groups": 30.0, "int4": 75.0}


@dataclass(frozen=True)
class Text:
    """What a model is calibrated with: `samples` articles of a data set, of `length` tokens at most."""

    dataset: dict[str, str] = field(default_factory=lambda: {"name": "trtbuild-news", "split": "calibration"})
    samples: int = 64
    length: int = 512
    seed: int = 0

    @property
    def settings(self) -> dict:
        """What `calibrate` takes."""
        return asdict(self)

    @property
    def id(self) -> str:
        """Name of a calibration file: `trtbuild-news-64x512-1f3a9c0d`."""
        name = self.dataset["name"].replace("/", "--")
        return f"{name}-{self.samples}x{self.length}-{identity(self.settings)}"


@dataclass(frozen=True)
class Weights:
    """How weights are rounded: 8 bits with a scale `per` channel or tensor, int4 with one a group of input channels.

    Without a `group_size` a group is an output channel.
    """

    dtype: Literal["int8", "int4", "fp8"]
    method: Literal["round", "gptq", "awq"]
    per: Literal["channel", "tensor"] | None = None
    group_size: int | None = None
    symmetric: bool = True


@dataclass(frozen=True)
class Activations:
    """How a product's input is rounded: by a calibrated scale `per` tensor, or one a token; smoothed before, or not."""

    dtype: Literal["int8", "fp8"]
    per: Literal["tensor", "token"] = "tensor"
    smoothquant: float | None = None


@dataclass(frozen=True)
class KVCache:
    """An 8-bit KV cache with calibrated scales, one a layer or one a KV head."""

    dtype: Literal["int8", "fp8"]
    per: Literal["layer", "head"] = "layer"


@dataclass(frozen=True)
class Quantization:
    """The part of a recipe that quantized weights depend on. `settings` is all of it as plain data."""

    settings: dict
    dtype: str
    weights: Weights
    activations: Activations | None
    quantize_lm_head: bool
    keep_16bit: tuple[str, ...]
    text: Text | None

    @classmethod
    def parse(cls, settings: dict) -> "Quantization":
        """From a recipe's mapping that has weights, or from the `settings` of another `Quantization`."""
        weights = dict(settings["weights"])
        weights.setdefault("method", "round")
        if weights["dtype"] == "int4":
            weights.setdefault("symmetric", weights["method"] == "round")
            weights.setdefault("group_size", None)
        else:
            weights.setdefault("per", "tensor" if weights["dtype"] == "fp8" else "channel")
        activations = Activations(**settings["activations"]) if settings.get("activations") else None
        complete = {
            "dtype": settings["dtype"],
            "weights": weights,
            "activations": activations and {"per": "tensor", "smoothquant": None} | settings["activations"],
            "quantize_lm_head": settings.get("quantize_lm_head", False),
            "keep_16bit": settings.get("keep_16bit", []),
        }
        text = None
        if weights["method"] != "round" or _measured(activations):
            text = Text(**settings.get("calibration", {}))
            complete["calibration"] = text.settings
        return cls(
            complete,
            complete["dtype"],
            Weights(**weights),
            activations,
            complete["quantize_lm_head"],
            tuple(complete["keep_16bit"]),
            text,
        )

    @property
    def id(self) -> str:
        """Name of a folder of quantized weights: `gptq-int4-1f3a9c0d`."""
        return f"{self.weights.method}-{self.weights.dtype}-{identity(self.settings)}"

    @property
    def needs_ranges(self) -> bool:
        """Whether quantizing needs a calibration file: for static or smoothed activations."""
        return _measured(self.activations)

    @property
    def rounding(self) -> Literal["16bit", "static", "token"]:
        """What happens to a product's input: see `QuantizedWeight.activations`."""
        if self.activations is None:
            return "16bit"
        return "static" if self.activations.per == "tensor" else "token"

    @property
    def format(self) -> "WeightFormat":
        """The weights' format, with all that is known of it."""
        from trtbuild.linear.linear import weight_format  # it takes torch, and the Snakefile reads recipes without

        return weight_format(self.weights.dtype, self.rounding)

    def keeps(self, name: str) -> bool:
        """Whether a projection, such as `model.layers.0.mlp.down_proj` or `lm_head`, is left in 16 bits."""
        if name == "lm_head" and not self.quantize_lm_head:
            return True
        return any(fnmatch.fnmatchcase(name, pattern) for pattern in self.keep_16bit)


@dataclass(frozen=True)
class Recipe:
    """A recipe with everything that it leaves out. `settings` is its mapping, as declared.

    `text` is what its ranges, if it needs any, are measured with; `quant_checkpoint` the source of published weights.
    """

    settings: dict
    dtype: str
    quantization: Quantization | None
    kv_cache: KVCache | None
    quant_checkpoint: dict | None
    text: Text
    gate: Literal["fail", "warn"]

    @classmethod
    def parse(cls, settings: dict) -> "Recipe":
        """From a mapping that the schema has accepted."""
        return cls(
            settings,
            settings["dtype"],
            Quantization.parse(settings) if "weights" in settings else None,
            KVCache(**settings["kv_cache"]) if "kv_cache" in settings else None,
            settings.get("quant_checkpoint"),
            Text(**settings.get("calibration", {})),
            settings.get("gate", "fail"),
        )

    @property
    def needs_ranges(self) -> bool:
        """Whether a stage reads a calibration file: for the weights' activations, or the KV cache."""
        return self.kv_cache is not None or (self.quantization is not None and self.quantization.needs_ranges)

    @property
    def fp8(self) -> bool:
        """Whether there is FP8 in its engines, as far as is declared: published weights say it themselves."""
        parts = (self.settings.get(part, {}) for part in ("weights", "activations", "kv_cache"))
        return any(part.get("dtype") == "fp8" for part in parts)

    @property
    def engine_settings(self) -> dict:
        """The part that an engine depends on, given its weights: all but how it is judged."""
        judged = ("max_perplexity_increase", "max_mean_kl", "gate")
        return {key: value for key, value in self.settings.items() if key not in judged}

    @property
    def max_perplexity_increase(self) -> float:
        """In per cent: as declared, or by what is quantized."""
        kinds = ["plain", *([self.kv_cache.dtype] if self.kv_cache else [])]
        if self.quant_checkpoint:
            kinds.append("int4-groups")
        if self.quantization:
            weights, activations = self.quantization.weights, self.quantization.activations
            kinds.append("int4-groups" if weights.group_size else weights.dtype)
            kinds += ["w8a8"] if activations and activations.dtype == "int8" else []
        return self.settings.get("max_perplexity_increase", max(MAX_PERPLEXITY_INCREASE[kind] for kind in kinds))

    @property
    def group_size(self) -> int | None:
        """Of all the products' weights that it quantizes, if they have groups of input channels."""
        quantization = self.quantization
        return quantization.weights.group_size if quantization and not quantization.keep_16bit else None

    @property
    def gate_limits(self) -> dict:
        """What `evaluation.gate` compares with: `max_increase` of perplexity in per cent, `policy`, and where it is
        declared `max_mean_kl`.
        """
        limits = {"max_increase": self.max_perplexity_increase, "policy": self.gate}
        return limits | {key: self.settings[key] for key in ("max_mean_kl",) if key in self.settings}


def identity(settings: dict) -> str:
    """Eight hex digits that tell settings apart; part of an artifact's name."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]


def _measured(activations: Activations | None) -> bool:
    return activations is not None and (activations.per == "tensor" or activations.smoothquant is not None)
