"""Baichuan and Baichuan2 (arXiv 2309.10305), 7B with RoPE and 13B with ALiBi: LLaMA with q, k and v in one matrix.

Baichuan2's head is a NormHead: its rows are used divided by their norms, which is done here once.
"""

import re
from pathlib import Path
from typing import TYPE_CHECKING

from trtbuild.errors import UserError
from trtbuild.models.config import EXTENSION

if TYPE_CHECKING:
    from trtbuild.tensors.lazy import LazyTensor

DESCRIPTION = "Baichuan and Baichuan2"
VERSIONS = ("v1_7b", "v1_13b", "v2_7b", "v2_13b")
TOKENIZER_FILE = "tokenizer.model"

VOCABULARIES = {64000: "v1", 125696: "v2"}
ROLES = {"v1": ("<reserved_102>", "<reserved_103>"), "v2": ("<reserved_106>", "<reserved_107>")}  # user and assistant
NORM_ROWS = 8192  # normalized at a time, in float32


def canonical_config(config: dict, where: Path | str, model_version: str | None) -> dict:
    """The 7B models as a `LlamaConfig`; the 13B models, which `transformers` has no class for, under their own name."""
    version = _version(config, where, model_version)
    alibi = version.endswith("13b")
    heads = config["num_attention_heads"]
    if config.get("num_key_value_heads", heads) != heads:
        raise UserError(f"{where}: num_key_value_heads is not {heads}, the heads that W_pack has")
    if config.get("tie_word_embeddings", False):
        raise UserError(f"{where}: tie_word_embeddings is true; Baichuan's models have their own head")
    content = {
        "architectures": ["BaichuanForCausalLM" if alibi else "LlamaForCausalLM"],
        "model_type": "baichuan" if alibi else "llama",
        "vocab_size": config["vocab_size"],
        "hidden_size": config["hidden_size"],
        "intermediate_size": config["intermediate_size"],
        "num_hidden_layers": config["num_hidden_layers"],
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "hidden_act": config["hidden_act"],
        "max_position_embeddings": config["model_max_length" if alibi else "max_position_embeddings"],
        "rms_norm_eps": config["rms_norm_eps"],
        "tie_word_embeddings": False,
        "bos_token_id": config["bos_token_id"],
        "eos_token_id": config["eos_token_id"],
        "dtype": config.get("dtype") or config.get("torch_dtype") or "bfloat16",
        EXTENSION: {"family": "baichuan", "version": version},
    }
    if alibi:
        content[EXTENSION]["position_embedding"] = "alibi"
    else:
        content["rope_theta"] = 10000.0
    return content


def _version(config: dict, where: Path | str, given: str | None) -> str:
    """The generation by the vocabulary; the 7B models alone say how many positions their rotation knows."""
    size = "7b" if "max_position_embeddings" in config else "13b"
    generation = VOCABULARIES.get(config["vocab_size"]) or (given or "").partition("_")[0]
    if not generation:
        raise UserError(
            f"{where}: a Baichuan of {config['vocab_size']} words may be of either generation; give model_version, one "
            f"of {', '.join(VERSIONS)}"
        )
    found = f"{generation}_{size}"
    if given not in (None, found):
        raise UserError(f"{where}: model_version is given as {given}, but this is {found}")
    return found


def canonical_tensors(tensors: "dict[str, LazyTensor]", config: dict) -> "dict[str, LazyTensor]":
    """`W_pack` is q, k and v, one after the other."""
    from trtbuild.tensors.lazy import split

    canonical: dict[str, LazyTensor] = {}
    for name, tensor in tensors.items():
        if match := re.fullmatch(r"(.+\.self_attn)\.W_pack\.weight", name):
            canonical |= zip((f"{match[1]}.{part}_proj.weight" for part in "qkv"), split(tensor, 3), strict=True)
        elif name == "lm_head.weight" and config[EXTENSION]["version"].startswith("v2"):
            canonical[name] = _unit_rows(tensor)
        else:
            canonical[name] = tensor
    return canonical


def _unit_rows(tensor: "LazyTensor") -> "LazyTensor":
    import torch
    import torch.nn.functional as F

    from trtbuild.tensors.lazy import LazyTensor

    def load() -> torch.Tensor:
        value = tensor.load()
        result = torch.empty_like(value)
        for rows, unit in zip(value.split(NORM_ROWS), result.split(NORM_ROWS), strict=True):
            unit.copy_(F.normalize(rows.float()))
        return result

    return LazyTensor(tensor.dtype, tensor.shape, load)


def save_tokenizer(file: Path, folder: Path, config: dict) -> None:
    """From a SentencePiece model; those that begin a chat's turns in this generation are special tokens."""
    from trtbuild.tokenizer.fast_tokenizer import save_sentencepiece

    generation = config[EXTENSION]["version"].partition("_")[0]
    save_sentencepiece(file, folder, add_bos=False, special_tokens=ROLES[generation])
