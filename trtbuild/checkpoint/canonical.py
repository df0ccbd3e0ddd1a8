"""The canonical checkpoint: a folder with `config.json`, safetensors under Hugging Face LLaMA names, a tokenizer.

Weights may be quantized, in one of the published layouts (`formats/`).
"""

from itertools import pairwise
from pathlib import Path

import torch

from trtbuild.checkpoint.formats import read_quantized
from trtbuild.checkpoint.lazy import LazyTensor
from trtbuild.checkpoint.quantized_weight import QuantizedWeight
from trtbuild.checkpoint.safetensors_stream import open_file
from trtbuild.errors import UserError
from trtbuild.files import read_json
from trtbuild.models.families import config_from_hugging_face

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
FUSED = {"self_attn": ("q_proj", "k_proj", "v_proj"), "mlp": ("gate_proj", "up_proj")}  # one product each


class Checkpoint:
    """An open canonical checkpoint; every tensor stays on disk until it is asked for.

    `quantization` says how its weights are quantized, or is None. Raises `UserError` for a missing or truncated file,
    a missing tensor, or a tensor of the wrong shape.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        config = read_json(self.folder / "config.json")
        self.config = config_from_hugging_face(config, self.folder / "config.json")
        self.files = weight_files(self.folder)
        self.tensors: dict[str, LazyTensor | QuantizedWeight] = {}
        for file in self.files:
            self.tensors |= open_file(file)[0]
        self.quantization: str | None = None
        if quantization := _quantization_config(self.folder, config):
            self.tensors = read_quantized(quantization, self.tensors, str(self.folder))
            self.quantization = str(quantization["quant_method"])
            self._check_fused()
        shapes = self.config.tensor_shapes()
        for name in self.tensors.keys() - shapes.keys():
            # Old checkpoints store the rotary frequencies, and tied ones may store their head twice: both are derived.
            if not name.endswith("rotary_emb.inv_freq") and name != "lm_head.weight":
                raise UserError(f"{self.folder}: the tensor {name} is no part of the model that config.json describes")
        for name, shape in shapes.items():
            if name not in self.tensors:
                raise UserError(f"{self.folder}: tensor {name} is missing; config.json asks for it with shape {shape}")
            tensor = self.tensors[name]
            if isinstance(tensor, LazyTensor) and tensor.dtype not in FLOATS:
                raise UserError(
                    f"{self.folder}: tensor {name} is {str(tensor.dtype).removeprefix('torch.')}, and nothing says how "
                    "it is quantized; a floating-point tensor, or its scales, are expected"
                )
            actual = tensor.values.shape if isinstance(tensor, QuantizedWeight) else tensor.shape
            if actual != shape:
                raise UserError(f"{self.folder}: tensor {name} has shape {actual}, config.json asks for {shape}")

    def __getitem__(self, name: str) -> LazyTensor | QuantizedWeight:
        return self.tensors[name]

    def quantized(self) -> list[QuantizedWeight]:
        """All its quantized weights."""
        return [tensor for tensor in self.tensors.values() if isinstance(tensor, QuantizedWeight)]

    def dequantized(self, name: str) -> LazyTensor:
        """A tensor as plain numbers: float32 where it is quantized."""
        tensor = self.tensors[name]
        return tensor.dequantize() if isinstance(tensor, QuantizedWeight) else tensor

    def _check_fused(self) -> None:
        for i in range(self.config.num_hidden_layers):
            for block, names in FUSED.items():
                products = [f"model.layers.{i}.{block}.{name}" for name in names]
                kinds = [getattr(self.tensors.get(f"{name}.weight"), "kind", None) for name in products]
                for (a, first), (b, second) in pairwise(zip(products, kinds, strict=True)):
                    if first != second:
                        raise UserError(
                            f"{self.folder}: {a} and {b} are computed as one product and must be quantized alike"
                        )


def _quantization_config(folder: Path, config: dict) -> dict | None:
    """What `config.json`, or for old GPTQ and AWQ checkpoints a file beside it, says of quantization."""
    if quantization := config.get("quantization_config"):
        return quantization
    for file, method in (("quantize_config.json", "gptq"), ("quant_config.json", "awq")):
        if (folder / file).exists():
            return {"quant_method": method} | read_json(folder / file)
    return None


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a Hugging Face folder, in index order; each must exist."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict):
            raise UserError(f"{index} has no weight_map; it is not a safetensors index")
        files = [folder / name for name in dict.fromkeys(weight_map.values())]
    else:
        files = [folder / "model.safetensors"]
    for file in files:
        if not file.exists():
            raise UserError(f"missing weights file {file}")
    return files
