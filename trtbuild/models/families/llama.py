"""LLaMA (arXiv 2302.13971, 2307.09288, 2407.21783), CodeLlama and Yi: the family whose names are the canonical ones."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trtbuild.tensors.lazy import LazyTensor

DESCRIPTION = "LLaMA, CodeLlama, Yi"
VERSIONS: tuple[str, ...] = ()
TOKENIZER_FILE = "tokenizer.model"


def canonical_config(config: dict, where: Path | str, model_version: str | None) -> dict:
    """A Hugging Face `LlamaConfig` is canonical as it is."""
    return config


def canonical_tensors(tensors: "dict[str, LazyTensor]", config: dict) -> "dict[str, LazyTensor]":
    """Names are canonical as they are."""
    return tensors


def save_tokenizer(file: Path, folder: Path, config: dict) -> None:
    """From a SentencePiece model; LLaMA begins every text with its beginning-of-sequence token."""
    from trtbuild.tokenizer.fast_tokenizer import save_sentencepiece

    save_sentencepiece(file, folder, add_bos=True)
