"""Random weights for a configuration: for shapes, speed and wiring, never for quality."""

import hashlib
import math
from functools import partial
from pathlib import Path

import torch

from trtbuild.models.config import ModelConfig
from trtbuild.tensors.lazy import LazyTensor

BYTES = 256
SPECIAL_TOKENS = ("<s>", "</s>")
BLOCK = (1 << 24) - 3  # numbers drawn for one tensor; larger ones repeat them, as drawing is slower than any disk


def dummy_tensors(
    config: ModelConfig, seed: int, dtype: torch.dtype, device: torch.device | str = "cpu"
) -> dict[str, LazyTensor]:
    """Normal weights (deviation 0.02), ones for norms; the same for a seed and device type, in any order of loading."""

    def load(name: str, shape: tuple[int, ...]) -> torch.Tensor:
        if name.endswith("norm.weight"):
            return torch.ones(shape, dtype=dtype, device=device)
        digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
        generator = torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        size = math.prod(shape)
        if size <= BLOCK:
            return torch.randn(shape, generator=generator, device=device, dtype=dtype).mul_(0.02)
        block = torch.randn(BLOCK, generator=generator, device=device, dtype=dtype).mul_(0.02)
        result = torch.empty(size, device=device, dtype=dtype)
        for piece in result.split(BLOCK):
            piece.copy_(block[: len(piece)])
        return result.view(shape)

    return {
        name: LazyTensor(dtype, shape, partial(load, name, shape)) for name, shape in config.tensor_shapes().items()
    }


def save_byte_tokenizer(folder: Path) -> None:
    """Saves a tokenizer of the 256 bytes and two special tokens, so that dummy models can be run with text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*SPECIAL_TOKENS, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    bos, eos = SPECIAL_TOKENS
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos, eos_token=eos).save_pretrained(folder)
