"""The canonical checkpoint: a folder with `config.json`, safetensors under Hugging Face LLaMA names, a tokenizer."""

from pathlib import Path

from trtbuild.checkpoint.lazy import LazyTensor
from trtbuild.checkpoint.safetensors_stream import open_file
from trtbuild.errors import UserError
from trtbuild.files import read_json
from trtbuild.models.families import config_from_hugging_face


class Checkpoint:
    """An open canonical checkpoint; every tensor stays on disk until it is asked for.

    Raises `UserError` for a missing or truncated file, a missing tensor, or a tensor of the wrong shape.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        self.config = config_from_hugging_face(read_json(self.folder / "config.json"), self.folder / "config.json")
        self.files = weight_files(self.folder)
        self.tensors: dict[str, LazyTensor] = {}
        for file in self.files:
            self.tensors |= open_file(file)[0]
        shapes = self.config.tensor_shapes()
        for name in self.tensors.keys() - shapes.keys():
            # Old checkpoints store the rotary frequencies, and tied ones may store their head twice: both are derived.
            if not name.endswith("rotary_emb.inv_freq") and name != "lm_head.weight":
                raise UserError(f"{self.folder}: the tensor {name} is no part of the model that config.json describes")
        for name, shape in shapes.items():
            if name not in self.tensors:
                raise UserError(f"{self.folder}: tensor {name} is missing; config.json asks for it with shape {shape}")
            if self.tensors[name].shape != shape:
                raise UserError(
                    f"{self.folder}: tensor {name} has shape {self.tensors[name].shape}, config.json asks for {shape}"
                )

    def __getitem__(self, name: str) -> LazyTensor:
        return self.tensors[name]


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
