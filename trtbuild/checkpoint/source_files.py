"""The files that a checkpoint is made from, and the state that they are in; the workflow asks at each start."""

import re
from glob import escape
from pathlib import Path

from trtbuild.checkpoint.weight_files import SAFETENSORS, TORCH, has, weight_files
from trtbuild.errors import UserError
from trtbuild.files import state_of, user_path

# What belongs to a tokenizer wherever a checkpoint goes: `tokenizer.json` is what is read here, the others are what
# other programs look for.
TOKENIZER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "generation_config.json",
    "vocab.json",
    "merges.txt",
    "*.jinja",
)
BESIDE_WEIGHTS = ("quant*.json", "smoothing.npz")
OTHERS = ("config.json", "params.json", "added_tokens.json", "*.tiktoken")


def source_state(source: dict) -> str | None:
    """Says whether the files of a `source` (see `make_checkpoint`) are those of another time (`files.state_of`).

    None for what is named by its content: a commit of the hub, a PyPI package with a sha256, a configuration written
    out. Whatever is wrong with the files, making the checkpoint will say so.
    """
    ((kind, options),) = source.items()
    if kind == "local":
        return state_of(_folder_files(user_path(options["path"])))
    if kind == "gguf":
        file = user_path(options["path"])
        return state_of(file.parent.glob(re.sub(r"-\d{5}-of-(\d{5}\.gguf)$", r"-*-of-\1", escape(file.name))))
    if kind == "dummy" and isinstance(options["config"], str):
        return state_of([user_path(options["config"])])
    return None


def _folder_files(folder: Path) -> list[Path]:
    """What is read of a folder in Hugging Face's or Meta's layout."""
    files = [file for pattern in (*TOKENIZER_FILES, *BESIDE_WEIGHTS, *OTHERS) for file in folder.glob(pattern)]
    if not (folder / "config.json").exists():  # Meta's; its models share a tokenizer
        return [*files, *folder.glob("consolidated.*.pth"), folder.parent / "tokenizer.model"]
    try:
        name = SAFETENSORS if has(folder, SAFETENSORS) or not has(folder, TORCH) else TORCH
        files += weight_files(folder, name)
    except UserError:
        return files
    return files if (folder / name).exists() else [*files, folder / f"{name}.index.json"]
