"""The tokenizer in a GGUF file's metadata to `tokenizer.json` and its configuration.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md; what a missing key means is as in llama.cpp.
"""

import tempfile
from pathlib import Path
from typing import Any

from trtbuild.errors import UserError
from trtbuild.files import write_json
from trtbuild.tokenizer import chat_template
from trtbuild.tokenizer.damage import refusing
from trtbuild.tokenizer.fast_tokenizer import convert_sentencepiece

PREFIX = "tokenizer.ggml."
ENDS = ("eos", "eot", "eom")  # of a text, a turn and a message: generation stops at each


def save_tokenizer(path: Path, metadata: dict, folder: Path) -> None:
    """Writes the tokenizer in a GGUF file's metadata, and its chat template where it has one, into `folder`.

    A missing key, one that does not fit the others, and a kind of tokenizer or a splitting of text that would get
    wrong tokens are a `UserError`.
    """
    kinds = {"llama": _save_sentencepiece, "gpt2": _save_byte_level}
    kind = _get(path, metadata, "model")
    if kind not in kinds:
        raise UserError(f"{path}: a tokenizer of the kind {kind!r} is not supported; {' and '.join(kinds)} are")
    with refusing(f"{path}: the tokenizer's metadata do not fit each other"):
        kinds[kind](path, folder, metadata)
    if ends := [i for name in ENDS if (i := metadata.get(f"{PREFIX}{name}_token_id")) is not None]:
        write_json(folder / "generation_config.json", {"eos_token_id": ends})
    if template := metadata.get("tokenizer.chat_template"):
        chat_template.write(folder, template)


def _get(path: Path, metadata: dict, key: str) -> Any:
    if PREFIX + key not in metadata:
        raise UserError(f"{path}: the metadata key {PREFIX}{key} is missing; use the model's Hugging Face folder")
    return metadata[PREFIX + key]


def _save_sentencepiece(path: Path, folder: Path, metadata: dict) -> None:
    """From a SentencePiece model of the same pieces: their types have the same numbers."""
    from sentencepiece import sentencepiece_model_pb2

    tokens, scores, types = (_get(path, metadata, key) for key in ("tokens", "scores", "token_type"))
    model = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]  # made when imported
    try:
        for piece, score, kind in zip(tokens, scores, types, strict=True):
            model.pieces.add(piece=piece, score=score, type=kind)
    except (TypeError, ValueError) as error:
        raise UserError(f"{path}: the tokens do not fit their scores or types ({error})") from error
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    trainer.model_type = trainer.BPE
    trainer.byte_fallback = model.SentencePiece.BYTE in types
    for name, key, default in (("unk", "unknown", 0), ("bos", "bos", 1), ("eos", "eos", 2), ("pad", "padding", -1)):
        i = metadata.get(f"{PREFIX}{key}_token_id", default)
        if i >= len(tokens):
            raise UserError(f"{path}: {PREFIX}{key}_token_id is {i}; there are {len(tokens)} tokens")
        setattr(trainer, f"{name}_piece", tokens[i] if i >= 0 else "")
    normalizer.add_dummy_prefix = metadata.get(PREFIX + "add_space_prefix", True)
    normalizer.remove_extra_whitespaces = False
    add_bos, add_eos = metadata.get(PREFIX + "add_bos_token", True), metadata.get(PREFIX + "add_eos_token", False)
    convert_sentencepiece(model, path, folder, add_bos=add_bos, add_eos=add_eos)


def _save_byte_level(path: Path, folder: Path, metadata: dict) -> None:
    """By `transformers`, which takes a `tokenizer.json` where one lies beside the file: it is shown a link alone.

    It gives every byte-level BPE the splitting of GPT-2, whatever `tokenizer.ggml.pre` says. SmolLM's also keeps digits
    apart, which is put back here.
    """
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer
    from transformers.utils import logging

    pre = metadata.get(PREFIX + "pre", "")
    if pre not in ("gpt-2", "smollm"):
        raise UserError(
            f"{path}: the tokenizer's splitting {pre!r} is not supported from GGUF (gpt-2 and smollm are); "
            "use the model's Hugging Face folder"
        )
    for key in ("tokens", "merges", "token_type"):
        _get(path, metadata, key)
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as alone:
        (Path(alone) / path.name).symlink_to(path.resolve())
        tokenizer = AutoTokenizer.from_pretrained(alone, gguf_file=path.name)
    if pre == "smollm":
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    tokenizer.save_pretrained(folder)
