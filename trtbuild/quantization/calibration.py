"""Calibration: the ranges of a model's activations over some text, once a model and text, for every recipe.

The file is an `.npz` (docs/formats.md): the largest magnitude of every channel of every product's input and output, and
of the keys (after rotation) and values that the cache receives.
"""

import json
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from trtbuild.checkpoint.canonical import Checkpoint
from trtbuild.errors import UserError
from trtbuild.files import atomic, refuse_output_over_input, sha256
from trtbuild.linear.dense import DenseLinear
from trtbuild.network import Node
from trtbuild.network.ops.attention import Attention
from trtbuild.progress import item_bar
from trtbuild.quantization.parallel import workers
from trtbuild.quantization.samples import calibration_samples
from trtbuild.quantization.traversal import Traversal
from trtbuild.runtime.open import pick_device

SMOOTHING_FILE = "smoothing.npz"  # of a quantized checkpoint: what its products' input channels were multiplied by


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
        np.savez(
            file,
            origin=np.array(json.dumps(origin, sort_keys=True)),
            **{name: value.numpy() for name, value in ranges.items()},
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


def _observe(node: Node, inputs: list[torch.Tensor], outputs: tuple[torch.Tensor, ...]) -> dict[str, torch.Tensor]:
    """Largest magnitudes by channel, for one batch."""
    if isinstance(node.op, DenseLinear):
        name = node.inputs[1].removesuffix(".weight")
        return {f"{name}.input": _absmax(inputs[0]), f"{name}.output": _absmax(outputs[0])}
    if isinstance(node.op, Attention):
        rotary, *_ = node.op.options(inputs[6:])
        _, keys, values = node.op.heads(inputs[0], rotary)
        layer = node.inputs[1].rpartition(".")[2]  # of the key cache
        names = (f"model.layers.{layer}.self_attn.{kind}" for kind in ("key", "value"))
        return {name: _absmax(x.flatten(1)) for name, x in zip(names, (keys, values), strict=True)}
    return {}


def _absmax(x: torch.Tensor) -> torch.Tensor:
    return torch.maximum(x.amax(0), -x.amin(0))


def read_calibration(path: Path, checkpoint: Checkpoint) -> Calibration:
    """Opens a calibration file and checks that it is of a model of these sizes; raises `UserError` if not."""
    try:
        with np.load(path, allow_pickle=False) as file:
            content = {name: file[name] for name in file.files}
        origin = json.loads(str(content.pop("origin")))
    except FileNotFoundError as error:
        raise UserError(f"the calibration file {path} does not exist; make it with 'trtbuild calibrate'") from error
    except (OSError, ValueError, TypeError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} is no calibration file; make it with 'trtbuild calibrate'") from error
    if origin.get("model") != model_shape(checkpoint):
        raise UserError(
            f"{path} was measured on another model ({origin.get('model')}), {checkpoint.folder} is "
            f"{model_shape(checkpoint)}; calibrate this one"
        )
    return Calibration(path, {name: torch.from_numpy(value) for name, value in content.items()}, origin)


def smoothing_of(checkpoint: Checkpoint) -> str | None:
    """The sha256 of the factors that a quantized checkpoint's channels were smoothed with, if they were."""
    file = checkpoint.folder / SMOOTHING_FILE
    return sha256(file) if file.exists() else None


def model_shape(checkpoint: Checkpoint) -> dict:
    """What tells a model's calibration from another's at a glance."""
    config = checkpoint.config
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    return {name: getattr(config, name) for name in (*names, "vocab_size")}


def refuse_quantized(checkpoint: Checkpoint) -> None:
    """Raises `UserError` for a checkpoint whose weights are quantized already."""
    if checkpoint.quantization:
        raise UserError(
            f"{checkpoint.folder} is quantized already ({checkpoint.quantization}); start from the original model, or "
            "take its weights as they are with a recipe that has no weights"
        )
