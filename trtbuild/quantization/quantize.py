"""From a checkpoint to a folder of quantized weights, layer by layer, in a published layout."""

import fnmatch
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from trtbuild.checkpoint.canonical import ORIGIN_FILE, Checkpoint
from trtbuild.checkpoint.formats import FORMATS
from trtbuild.checkpoint.source_files import TOKENIZER_FILES
from trtbuild.errors import UserError
from trtbuild.files import atomic, read_json, refuse_output_over_input, sha256, write_json
from trtbuild.linear.int4 import GROUP_SIZES
from trtbuild.models.config import PRODUCTS
from trtbuild.progress import byte_bar
from trtbuild.quantization.calibration import SMOOTHING_FILE, read_calibration, refuse_quantized
from trtbuild.quantization.layer import every_projection
from trtbuild.quantization.methods import METHODS, Layer, Round, Rounded
from trtbuild.quantization.parallel import workers
from trtbuild.quantization.recipe import Quantization, Recipe, Weights
from trtbuild.quantization.samples import calibration_samples
from trtbuild.runtime.open import pick_device
from trtbuild.tensors.lazy import LazyTensor
from trtbuild.tensors.quantized_weight import QuantizedWeight, plain
from trtbuild.tensors.safetensors_stream import write_sharded


def quantize(
    checkpoint_dir: Path,
    folder: Path,
    quantization: Quantization,
    calibration: Path | None = None,
    device: str = "auto",
    samples: list[list[int]] | None = None,
) -> None:
    """Writes a quantized checkpoint, which `build` and other programs can load; it appears only when it is complete.

    `calibration` is the file that `calibrate` wrote, for static or smoothed activations; `samples` token ids that GPTQ
    and AWQ see instead of the recipe's own data set. Bit for bit the same for the same inputs on a device, with any
    number of threads. Raises `UserError` for weights that are not finite or sizes that the group size does not divide.
    """
    refuse_output_over_input(folder, checkpoint_dir)
    checkpoint = Checkpoint(checkpoint_dir)
    refuse_quantized(checkpoint)
    projections = quantized_projections(checkpoint, quantization)
    check_sizes(checkpoint, projections, quantization.weights)
    ranges = None
    if quantization.needs_ranges:
        if calibration is None:
            raise UserError("this recipe quantizes activations by their ranges; give the calibration file")
        ranges = read_calibration(calibration, checkpoint)
        if ranges.origin.get("smoothed"):
            raise UserError(f"{calibration} was measured on smoothed weights; calibrate the original model")
    name = quantization.weights.method
    if name != "round" and samples is None and quantization.text:
        samples = calibration_samples(checkpoint.folder, **quantization.text.settings).tokens
    target = pick_device(device)
    with atomic(folder) as temporary, workers(target) as map_:
        temporary.mkdir()
        method = METHODS[name](checkpoint, quantization, ranges, samples, target, map_)
        errors = _write(temporary, checkpoint, quantization, projections, method)
        inputs = checkpoint.hashes | ({calibration.name: sha256(calibration)} if ranges and calibration else {})
        origin = {"quantization": quantization.settings, "source_sha256": checkpoint.source_sha256, "inputs": inputs}
        origin["relative_errors"] = errors
        if method.smoothing:
            origin["smoothing_sha256"] = sha256(temporary / SMOOTHING_FILE)
        write_json(temporary / ORIGIN_FILE, origin)


def quantized_projections(checkpoint: Checkpoint, quantization: Quantization) -> list[str]:
    """The projections to quantize, with their layers' names. Raises `UserError` for a pattern that splits a product."""
    every = every_projection(checkpoint.config)
    for pattern in quantization.keep_16bit:
        if not fnmatch.filter([*every, "lm_head"], pattern):
            raise UserError(f"keep_16bit: {pattern!r} matches nothing; names are like {every[0]} or *.down_proj")
        if quantization.quantize_lm_head and fnmatch.fnmatchcase("lm_head", pattern):
            raise UserError(f"keep_16bit: {pattern!r} keeps lm_head, which quantize_lm_head quantizes; remove one")
    names = []
    for i in range(checkpoint.config.num_hidden_layers):
        for product in PRODUCTS.values():
            parts = [f"model.layers.{i}.{part}" for part in product]
            kept = [part for part in parts if quantization.keeps(part)]
            if kept and len(kept) < len(parts):
                raise UserError(
                    f"keep_16bit matches {kept[0]} but not all of {', '.join(parts)}, which are one product; keep all "
                    "of them or none"
                )
            names += [] if kept else parts
    names += [] if quantization.keeps("lm_head") else ["lm_head"]
    if not names:
        raise UserError("keep_16bit matches every weight of the model; nothing is left to quantize")
    return names


def check_sizes(checkpoint: Checkpoint, projections: list[str], weights: Weights) -> None:
    """Raises `UserError` for int4 weights whose sizes do not fit, naming the group sizes that would."""
    if weights.dtype != "int4":
        return
    group_size = weights.group_size
    shapes = replace(checkpoint.config, tie_word_embeddings=False).tensor_shapes()  # a quantized head is a weight apart
    widths = {shapes[f"{name}.weight"][1] for name in projections}
    for name in projections:
        out = shapes[f"{name}.weight"][0]
        if out % 8:
            raise UserError(
                f"{name} has {out} output channels; int4 layouts pack 8 in a word. Leave it in 16 bits (keep_16bit, "
                "quantize_lm_head: false)"
            )
    bad = sorted(width for width in widths if group_size and width % group_size)
    if bad:
        fit = [str(size) for size in GROUP_SIZES if all(width % size == 0 for width in widths)]
        raise UserError(
            f"group_size {group_size} does not divide the {bad[0]} input channels of some weights; "
            + (f"group sizes that fit this model: {', '.join(fit)}" if fit else "no group size fits this model")
        )


def check_weights(recipe: Recipe, folder: Path) -> None:
    """Raises `UserError` unless a checkpoint's weights are quantized as a recipe says."""
    if recipe.quant_checkpoint and not Checkpoint(folder).quant_method:
        raise UserError(f"{folder} is not quantized; the recipe wants the published weights of its quant_checkpoint")
    if recipe.quantization is None:
        return
    made = read_json(folder / ORIGIN_FILE).get("quantization") if (folder / ORIGIN_FILE).exists() else None
    if made != recipe.quantization.settings:
        state = "is not quantized" if made is None else "was quantized by another recipe"
        raise UserError(f"{folder} {state}; make the recipe's weights with 'trtbuild quantize' and build from those")


class _Streamed:
    """Layers' numbers, each made when the writer first asks for one of them and forgotten with the next layer.

    `errors` has the `relative_error` of what was made, by projection.
    """

    def __init__(self, method: Round, layers: int) -> None:
        self.method, self.layers = method, layers
        self.errors: dict[str, float] = {}
        self.at: int | None = None
        self.made: Layer = {}

    def rounded(self, i: int, name: str) -> Rounded:
        """A projection's numbers."""
        found = self._get(i, name)
        if not isinstance(found, Rounded):
            raise TypeError(f"{name} of layer {i} was not rounded")
        return found

    def plain(self, i: int, name: str) -> torch.Tensor:
        """A tensor that stays in 16 bits."""
        found = self._get(i, name)
        if isinstance(found, Rounded):
            raise TypeError(f"{name} of layer {i} was rounded")
        return found

    def _get(self, i: int, name: str) -> Rounded | torch.Tensor:
        if i != self.at:
            self.made = {}  # before the next one is made
            self.made = self.method.layer(i) if i < self.layers else {"lm_head": self.method.head()}
            prefix = f"model.layers.{i}." if i < self.layers else ""
            self.errors |= {prefix + key: x.error for key, x in self.made.items() if isinstance(x, Rounded)}
            self.at = i
        return self.made[name]


def _write(
    folder: Path, checkpoint: Checkpoint, quantization: Quantization, projections: list[str], method: Round
) -> dict[str, float]:
    """Weights, config.json and tokenizer. Returns the projections' relative errors."""
    weights = quantization.weights
    layout = {"gptq": "gptq", "awq": "awq", "round": "compressed-tensors"}[weights.method]
    quantized = set(projections)
    quantizes_head = "lm_head" in quantized
    streamed = _Streamed(method, checkpoint.config.num_hidden_layers)
    tensors, example = _tensors(checkpoint, quantization, quantized, layout, streamed)
    with byte_bar(sum(tensor.nbytes for tensor in tensors.values()), f"{weights.method} {weights.dtype}") as bar:
        write_sharded(folder, tensors, progress=bar.update)
    if method.smoothing:
        with atomic(folder / SMOOTHING_FILE) as temporary, open(temporary, "wb") as stream:
            scales = {name: scales.numpy() for name, scales in method.smoothing.items()}
            np.savez(stream, **scales)  # type: ignore[arg-type]  # for mypy a name may be `allow_pickle`
    kept = [name for name in every_projection(checkpoint.config) if name not in quantized]
    description = FORMATS[layout].describe(example, kept, quantizes_head)
    config = read_json(checkpoint.folder / "config.json")
    config |= {"dtype": quantization.dtype, "quantization_config": description}
    config.pop("torch_dtype", None)
    config["tie_word_embeddings"] = checkpoint.config.tie_word_embeddings and not quantizes_head
    write_json(folder / "config.json", config)
    if layout == "gptq":
        write_json(folder / "quantize_config.json", description)
    for pattern in TOKENIZER_FILES:
        for file in checkpoint.folder.glob(pattern):
            shutil.copyfile(file, folder / file.name)
    return streamed.errors


def _tensors(
    checkpoint: Checkpoint, quantization: Quantization, projections: set[str], layout: str, streamed: _Streamed
) -> tuple[dict[str, LazyTensor], QuantizedWeight]:
    """What the folder's weights file holds, in layer order, and one of the quantized weights."""
    config, dtype = checkpoint.config, getattr(torch, quantization.dtype)
    if "lm_head" in projections:
        config = replace(config, tie_word_embeddings=False)
    tensors: dict[str, LazyTensor] = {}
    examples: list[QuantizedWeight] = []
    for name, shape in config.tensor_shapes().items():
        parts = name.split(".")
        layer = int(parts[2]) if parts[1] == "layers" else config.num_hidden_layers
        inside = ".".join(parts[3:]) if parts[1] == "layers" else name
        projection = name.removesuffix(".weight")
        if projection in projections:
            make = partial(streamed.rounded, layer, inside.removesuffix(".weight"))
            examples.append(_announced(shape, quantization, make))
            tensors |= FORMATS[layout].write(projection, examples[-1])
        elif parts[1] == "layers":
            tensors[name] = LazyTensor(dtype, shape, partial(streamed.plain, layer, inside))
        else:
            tensors[name] = plain(checkpoint[name]).fitting(dtype, name)
    # One group may be all that a narrow weight has.
    return tensors, max(examples, key=lambda weight: weight.scales.shape[1])


def _announced(shape: tuple[int, ...], quantization: Quantization, make: Callable[[], Rounded]) -> QuantizedWeight:
    """A projection's weight before its numbers are made."""
    known, weights = quantization.format, quantization.weights
    out, width = shape
    groups = width // (weights.group_size or width)
    scale_dtype = known.scale_dtype(getattr(torch, quantization.dtype))
    static = known.activations == "static"
    return QuantizedWeight(
        known.dtype,
        LazyTensor(known.values, shape, lambda: make().values),
        LazyTensor(scale_dtype, (out, groups), lambda: make().scales),
        None if weights.symmetric else LazyTensor(torch.int8, (out, groups), lambda: _given(make().zeros)),
        known.activations,
        LazyTensor(torch.float32, (1,), lambda: _given(make().input_scale)) if static else None,
    )


def _given(value: torch.Tensor | None) -> torch.Tensor:
    if value is None:
        raise ValueError("a method left out what was announced")
    return value
