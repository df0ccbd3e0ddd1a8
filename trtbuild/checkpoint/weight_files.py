"""A published model's weights: one file or shards with an index, as safetensors or in PyTorch's old format."""

from pathlib import Path
from typing import TYPE_CHECKING

from trtbuild.errors import UserError
from trtbuild.files import read_json

if TYPE_CHECKING:
    from trtbuild.tensors.lazy import LazyTensor

SAFETENSORS, TORCH = "model.safetensors", "pytorch_model.bin"  # the index of shards has .index.json behind that


def is_derived(name: str) -> bool:
    """Whether a stored tensor follows from the configuration; old checkpoints hold RoPE's frequencies."""
    return name.endswith("rotary_emb.inv_freq")


def _stored_as(folder: Path, name: str) -> str:
    """`name`, or what AutoGPTQ called it: `gptq_model-4bit-128g.safetensors`."""
    if name != SAFETENSORS or (folder / name).exists() or (folder / f"{name}.index.json").exists():
        return name
    files = [file for ending in ("", ".index.json") for file in folder.glob(f"gptq_model-*g.safetensors{ending}")]
    return files[0].name.removesuffix(".index.json") if len(files) == 1 else name


def _has_shards(folder: Path, name: str) -> bool:
    stem, _, suffix = name.rpartition(".")
    return any(folder.glob(f"{stem}-*.{suffix}"))


def has(folder: Path, name: str) -> bool:
    """Whether a folder has weights in a format, `SAFETENSORS` or `TORCH`; an index alone is none."""
    return _has_shards(folder, name) or any(file.exists() for file in weight_files(folder, name))


def weight_files(folder: Path, name: str = SAFETENSORS) -> dict[Path, set[str] | None]:
    """The weight files of a folder, in index order, with the names that the index gives each (None without one).

    One file is preferred to an index, as `transformers` does. Shards may lie in a folder below.
    """
    name = _stored_as(folder, name)
    index = folder / f"{name}.index.json"
    if (folder / name).exists() or not index.exists():
        if _has_shards(folder, name) and not (folder / name).exists():
            raise UserError(f"{folder} has shards of {name} but not their index, {index.name}; fetch it as well")
        return {folder / name: None}
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise UserError(f"{index} has no weight_map from tensors to files; it is not an index of weight files")
    files: dict[Path, set[str]] = {}
    for tensor, file in weight_map.items():
        if Path(file).is_absolute() or ".." in Path(file).parts:
            raise UserError(f"{index} lists {file}, which is outside its folder; shards must be beside it or below")
        files.setdefault(folder / file, set()).add(tensor)
    return {**files}


def open_weights(folder: Path, name: str = SAFETENSORS) -> dict[str, "LazyTensor"]:
    """All tensors by their names, still on disk.

    Raises `UserError` for missing files, and for shards that hold other tensors than the index says or the same twice.
    """
    # Names alone need no torch, which takes seconds to import.
    from trtbuild.checkpoint.torch_file import open_torch_file
    from trtbuild.tensors.safetensors_stream import open_file

    tensors: dict[str, LazyTensor] = {}
    owner: dict[str, Path] = {}
    files = weight_files(folder, name)
    for file in files:
        if not file.exists():
            raise UserError(f"missing weights file {file}")
    for file, listed in files.items():
        found = {
            tensor: value
            for tensor, value in (open_file(file)[0] if name == SAFETENSORS else open_torch_file(file)).items()
            if not is_derived(tensor)
        }
        for tensor in found:
            if tensor in owner:
                raise UserError(f"{folder}: the tensor {tensor} is in {owner[tensor].name} and again in {file.name}")
            if listed is not None and tensor not in listed:
                raise UserError(f"{file} holds the tensor {tensor}, which the index does not list there")
            owner[tensor] = file
        for tensor in sorted(listed or ()):
            if tensor not in found and not is_derived(tensor):
                raise UserError(f"{file} lacks the tensor {tensor}, which the index lists there; fetch it again")
        tensors |= found
    return tensors
