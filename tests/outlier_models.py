"""Small random models with what quantization has to cope with: a few channels far larger than the rest."""

from pathlib import Path

import torch
from published_models import TINY
from safetensors.torch import save_file

from trtbuild.checkpoint.dummy import save_byte_tokenizer
from trtbuild.files import write_json
from trtbuild.models.families import config_from_hugging_face
from trtbuild.quantization.calibration import calibrate

CONFIG = TINY | {"intermediate_size": 128, "bos_token_id": 0, "eos_token_id": 1}
NEWS = {"name": "trtbuild-news", "split": "calibration"}
SAMPLES = {"dataset": NEWS, "samples": 8, "length": 48, "seed": 0}  # a calibration that takes no time


def outlier_weights(config: dict, seed: int = 0) -> dict[str, torch.Tensor]:
    """Weights by name, float32: products keep a normal input's size; every 16th channel of a norm is 12 times larger.

    So is, by 2.4, every 16th row of the value and up projections, which make the inputs of `o_proj` and `down_proj`.
    """
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in config_from_hugging_face(config, "test").tensor_shapes().items():
        x = torch.randn(shape, generator=generator)
        if name.endswith("norm.weight"):
            x = 1 + 0.2 * x
            x[3::16] *= 12
        elif name.endswith("bias"):
            x *= 0.1
        elif "embed" not in name:
            x *= shape[1] ** -0.5
        if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight", "gate_proj.weight", "up_proj.weight")):
            x *= 0.3  # behind a norm that is large
        if name.endswith(("v_proj.weight", "up_proj.weight")):
            x[5::16] *= 2.4
        weights[name] = x
    return weights


def write_model(
    folder: Path,
    weights: dict[str, torch.Tensor] | None = None,
    dtype: torch.dtype = torch.float32,
    **changes,
) -> Path:
    """A canonical checkpoint of `CONFIG | changes` with a byte tokenizer; random `weights` where none are given."""
    config = CONFIG | changes
    weights = weights or outlier_weights(config)
    folder.mkdir(parents=True)
    write_json(folder / "config.json", config | {"dtype": str(dtype).removeprefix("torch.")})
    save_file({name: x.to(dtype).contiguous() for name, x in weights.items()}, folder / "model.safetensors")
    save_byte_tokenizer(folder)
    return folder


def calibrated(checkpoint: Path, **changes) -> Path:
    """The calibration file of a checkpoint, beside it."""
    path = checkpoint.with_name(f"{checkpoint.name}.npz")
    calibrate(checkpoint, path, **SAMPLES | {"device": "cpu"} | changes)
    return path
