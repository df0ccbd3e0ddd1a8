"""Calibration: the ranges of a model's activations over some text, once a model and text, for every recipe.

The file is an `.npz` (docs/formats.md): the largest magnitude of every channel of every product's input and output, and
of the keys (after rotation) and values that the cache receives.
"""

import json
import os
import struct
import tokenize
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from trtbuild.checkpoint.canonical import ORIGIN_FILE, Checkpoint
from trtbuild.errors import UserError
from trtbuild.files import atomic, check_input, kind_of, parse_json, read_json, refuse_output_over_input, sha256
from trtbuild.linear.dense import DenseLinear
from trtbuild.models.config import PRODUCTS, ModelConfig
from trtbuild.network import Node
from trtbuild.network.ops.attention import Attention
from trtbuild.progress import item_bar
from trtbuild.quantization.parallel import workers
from trtbuild.quantization.samples import calibration_samples
from trtbuild.quantization.traversal import Traversal
from trtbuild.runtime.open import pick_device

SMOOTHING_FILE = "smoothing.npz"  # of a quantized checkpoint: what its products' input channels were multiplied by

# What zipfile and numpy raise for files that are not what they seem.
UNREADABLE: tuple[type[Exception], ...] = (
    *(OSError, ValueError, TypeError, KeyError, EOFError, MemoryError, NotImplementedError, RuntimeError),
    *(SyntaxError, tokenize.TokenError, struct.error, zipfile.BadZipFile, zlib.error),
)


@dataclass(frozen=True)
class Calibration:
    """A calibration file's content: `ranges` by name, float32 a channel; `origin` says what they were measured with."""

    path: Path
    ranges: dict[str, torch.Tensor]
    origin: dict

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self.ranges:
            raise UserError(f"{self.path} lacks the ranges {name}; calibrate again")
        return self.ranges[name]


def calibrate(
    checkpoint_dir: Path, path: Path, *, dataset: dict, samples: int, length: int, seed: int, device: str = "auto"
) -> None:
    """Measures the ranges over `samples` articles of at most `length` tokens and writes them to `path` (`.npz`).

    The file is the same, bit for bit, for the same inputs on a device, with any number of threads.
    """
    refuse_output_over_input(path, checkpoint_dir)
    checkpoint = Checkpoint(checkpoint_dir)
    text = calibration_samples(checkpoint_dir, dataset=dataset, samples=samples, length=length, seed=seed)
    ranges = activation_ranges(checkpoint, text.tokens, pick_device(device))
    origin = {
        "samples": samples,
        "tokens": sum(map(len, text.tokens)),
        "dataset": dataset | {"seed": seed, "length": length, "sha256": text.sha256},
    }
    write_calibration(path, ranges, origin, checkpoint)


def write_calibration(path: Path, ranges: dict[str, torch.Tensor], origin: dict, checkpoint: Checkpoint) -> None:
    """Writes the file that `read_calibration` opens; `origin` says what the ranges were measured with."""
    origin = origin | {"model": model_shape(checkpoint), "smoothed": smoothing_of(checkpoint)}
    with atomic(path) as temporary, open(temporary, "wb") as file:
        arrays = {name: value.numpy() for name, value in ranges.items()}
        np.savez(
            file,
            origin=np.array(json.dumps(origin, sort_keys=True)),
            **arrays,  # type: ignore[arg-type]  # for mypy a name may be `allow_pickle`
        )


def activation_ranges(
    checkpoint: Checkpoint, samples: list[list[int]], device: torch.device
) -> dict[str, torch.Tensor]:
    """Ranges by name, in sorted order. Raises `UserError` where activations are not finite."""
    layers = checkpoint.config.num_hidden_layers
    with workers(device) as map_, item_bar(layers + 1, "calibration", "layer") as bar:
        traversal = Traversal(checkpoint, samples, device, map_, _observe)
        for i in range(layers):
            for _ in traversal.layer(i):
                pass
            bar.update()
        for _ in traversal.head():
            pass
        bar.update()
    for name, value in traversal.observed.items():  # in the order of the data: the first is where it comes from
        if not value.isfinite().all():
            raise UserError(f"calibration: {name} holds NaN or infinite numbers; the checkpoint is damaged")
    return {name: traversal.observed[name].float().cpu() for name in sorted(traversal.observed)}


def _observe(
    layer: str, node: Node, inputs: dict[str, torch.Tensor], outputs: tuple[torch.Tensor, ...]
) -> dict[str, torch.Tensor]:
    """Largest magnitudes by channel, for one batch."""
    if isinstance(node.op, DenseLinear):
        name = node.inputs["weight"].removesuffix(".weight")
        return {f"{name}.input": _absmax(inputs["x"]), f"{name}.output": _absmax(outputs[0])}
    if isinstance(node.op, Attention):
        return {
            f"{layer}.self_attn.key": _absmax(inputs["k"].flatten(1)),
            f"{layer}.self_attn.value": _absmax(inputs["v"].flatten(1)),
        }
    return {}


def _absmax(x: torch.Tensor) -> torch.Tensor:
    return torch.maximum(x.amax(0), -x.amin(0))


def read_calibration(path: Path, checkpoint: Checkpoint) -> Calibration:
    """Opens a calibration file and checks that it is of a model of these sizes; raises `UserError` if not."""
    expected = f"{path} is no calibration file; make it with 'trtbuild calibrate'"
    if kind_of(path) is None:
        raise UserError(f"the calibration file {path} does not exist; make it with 'trtbuild calibrate'")
    arrays = _read_npz(path, expected)
    said = arrays.pop("origin", np.array(None))
    if said.dtype.kind != "U" or said.shape:
        raise UserError(f"{expected} (it does not say what it was measured with)")
    origin = parse_json(str(said), f"{path}: origin")
    if not isinstance(origin, dict) or origin.get("model") != model_shape(checkpoint):
        measured = origin.get("model") if isinstance(origin, dict) else origin
        raise UserError(
            f"{path} was measured on another model ({measured}), {checkpoint.folder} is {model_shape(checkpoint)}; "
            "calibrate this one"
        )
    widths = _widths(checkpoint.config)
    if missing := widths.keys() - arrays.keys():
        raise UserError(f"{path} lacks the ranges {min(missing)}; calibrate again")
    return Calibration(path, _checked(arrays, widths, path), origin)


def read_smoothing(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """What a quantized checkpoint's input channels were multiplied by, float32 `[in]` by product; mostly nothing."""
    path, config = checkpoint.folder / SMOOTHING_FILE, checkpoint.config
    if smoothing_of(checkpoint) is None:
        return {}
    widths = {name.removesuffix(".input"): n for name, n in _widths(config).items() if name.endswith(".input")}
    widths = {name: config.kv_size if name.endswith("o_proj") else n for name, n in widths.items()}
    factors = _checked(_read_npz(path, f"{path} holds no smoothing factors; quantize again"), widths, path)
    for name, value in factors.items():
        if not value.all():
            raise UserError(f"{path}: {name} holds a factor of 0; quantize again")
    return factors


def _read_npz(path: Path, expected: str) -> dict[str, np.ndarray]:
    """The arrays of a file that `numpy.savez` wrote; `expected` is the `UserError` for any other file."""
    if kind_of(path) != "file":
        raise UserError(expected)
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            # Nothing is compressed, so that a file cannot hold more than its size.
            if len(set(names)) < len(names) or any(info.compress_type for info in archive.infolist()):
                raise ValueError("names twice, or compressed arrays")
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        if not all(isinstance(array, np.ndarray) for array in arrays.values()):  # numpy gives others' bytes
            raise ValueError("what is no array")
        return arrays
    except UNREADABLE as error:
        raise UserError(expected) from error


def _checked(arrays: dict[str, np.ndarray], widths: dict[str, int], path: Path) -> dict[str, torch.Tensor]:
    """Arrays from outside as tensors: all of known names and sizes, float32, finite and not negative."""
    for name, array in arrays.items():
        if name not in widths:
            raise UserError(f"{path}: {name} is no part of this model; make the file again")
        if array.dtype != np.dtype("=f4") or array.shape != (widths[name],):
            raise UserError(
                f"{path}: {name} is {array.dtype} {list(array.shape)}; float32 [{widths[name]}] is expected, make the "
                "file again"
            )
        if not (np.isfinite(array).all() and (array >= 0).all()):
            raise UserError(f"{path}: {name} holds numbers that are negative, infinite or NaN; make the file again")
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def _widths(config: ModelConfig) -> dict[str, int]:
    """Channels of everything that calibration measures."""
    shapes = config.tensor_shapes()
    widths = {"lm_head.input": config.hidden_size, "lm_head.output": config.vocab_size}
    for i in range(config.num_hidden_layers):
        layer = f"model.layers.{i}"
        for product, parts in PRODUCTS.items():
            weights = [shapes[f"{layer}.{part}.weight"] for part in parts]
            widths[f"{layer}.{product}.input"] = weights[0][1]
            widths[f"{layer}.{product}.output"] = sum(out for out, _ in weights)
        for kind in ("key", "value"):
            widths[f"{layer}.self_attn.{kind}"] = config.kv_size
    return widths


def smoothing_of(checkpoint: Checkpoint) -> str | None:
    """The sha256 of the factors that a quantized checkpoint's channels were smoothed with, if they were.

    Raises `UserError` where they are not those that were written beside its weights.
    """
    file, origin = checkpoint.folder / SMOOTHING_FILE, checkpoint.folder / ORIGIN_FILE
    digest = None
    if os.path.lexists(file):
        check_input(file)
        digest = sha256(file)
    if origin.exists() and read_json(origin).get("smoothing_sha256") != digest:
        raise UserError(f"{file} is not what was written beside these weights; quantize again")
    return digest


def model_shape(checkpoint: Checkpoint) -> dict:
    """What tells a model's calibration from another's at a glance."""
    config = checkpoint.config
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    return {name: getattr(config, name) for name in (*names, "vocab_size")}


def refuse_quantized(checkpoint: Checkpoint) -> None:
    """Raises `UserError` for a checkpoint whose weights are quantized already."""
    if checkpoint.quant_method:
        raise UserError(
            f"{checkpoint.folder} is quantized already ({checkpoint.quant_method}); start from the original model, or "
            "take its weights as they are with a recipe that has no weights"
        )
