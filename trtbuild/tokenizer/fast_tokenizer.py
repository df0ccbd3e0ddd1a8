"""Original tokenizer files, tiktoken's and SentencePiece's, to fast tokenizers that give the same ids.

The functions write `tokenizer.json` and `tokenizer_config.json`, which `trtbuild.tokenizer.tokenizer` opens.
"""

import base64
import binascii
import re
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from trtbuild.errors import UserError
from trtbuild.files import read_bytes, read_json
from trtbuild.tokenizer.sentencepiece_normalizer import SPACE, sentencepiece_normalizer

MAPS = ("nfkc", "nmt_nfkc", "nfkc_cf", "nmt_nfkc_cf")  # SentencePiece's own; other models bring their own rules


def save_tiktoken(
    path: Path,
    folder: Path,
    *,
    pattern: str,
    special_tokens: Sequence[str],
    eos_token: str,
    pad_token: str | None = None,
) -> None:
    """Converts a byte-level BPE in tiktoken's format (https://github.com/openai/tiktoken), such as `qwen.tiktoken`.

    A line is a token in base64, a space and its rank, which is also its id; `special_tokens` take the ids after the
    last. A text is brought to NFC, cut by the regular expression `pattern`, and each part is merged as tiktoken does.
    A missing file, a malformed line, ranks other than 0, 1, 2, ..., a token that is there twice, a missing byte and an
    `eos_token` or `pad_token` that is no special token are a `UserError`.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    tokens = _read_tiktoken(Path(path))
    for token in (eos_token, pad_token):
        if token is not None and token not in special_tokens:
            raise UserError(f"{path}: {token!r} is not one of the special tokens {', '.join(special_tokens)}")
    letters = bytes_to_unicode()
    vocabulary = {"".join(letters[byte] for byte in token): rank for token, rank in tokens.items()}
    # As in tiktoken, a part that is a token is that token, whatever the merges would make of it.
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=_merges([*vocabulary]), ignore_merges=True))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    # `normalized`: looked for after NFC, which may join a token's last character and the text's next.
    tokenizer.add_special_tokens([AddedToken(token, normalized=True, special=True) for token in special_tokens])
    _save(tokenizer, Path(folder), eos_token=eos_token, pad_token=pad_token)


def save_sentencepiece(path: Path, folder: Path, **options: Any) -> None:
    """Converts a SentencePiece BPE model, `tokenizer.model` (https://github.com/google/sentencepiece).

    `options` are those of `convert_sentencepiece`; a `tokenizer_config.json` beside the model decides instead of
    `add_bos` and `add_eos` where it speaks of them. A missing, damaged or other file is a `UserError`, too.
    """
    beside = Path(path).with_name("tokenizer_config.json")
    config = read_json(beside) if beside.exists() else {}
    said = {end: bool(config[f"{end}_token"]) for end in ("add_bos", "add_eos") if f"{end}_token" in config}
    convert_sentencepiece(_read_sentencepiece(Path(path)), path, folder, **options | said)


def convert_sentencepiece(
    model: Any, path: Path, folder: Path, *, add_bos: bool, add_eos: bool = False, special_tokens: Sequence[str] = ()
) -> None:
    """Converts a SentencePiece model as a protocol buffer (`ModelProto`), which comes from `path`.

    The model's control and unknown pieces and those of `special_tokens` that it has become special tokens: where these
    are recognized, which SentencePiece does not do, what stands between them is encoded as SentencePiece encodes a text
    of its own. Decoding gives SentencePiece's text, but where byte tokens in a row are not UTF-8 each is shown as
    U+FFFD, valid characters among them too, and unknown pieces are left out.

    A token for an end of a sequence that the model does not have, and a model that has no exact equivalent (one of
    unigrams, or with a normalization of its own, say) are a `UserError`.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models

    _check_sentencepiece(path, model)
    trainer, normalizer, kind = model.trainer_spec, model.normalizer_spec, model.SentencePiece
    ids = {piece.piece: i for i, piece in enumerate(model.pieces)}
    symbols = {piece.piece for piece in model.pieces if piece.type == kind.USER_DEFINED} - {*special_tokens}
    control = [piece.piece for piece in model.pieces if piece.type in (kind.CONTROL, kind.UNKNOWN)]
    own = (trainer.unk_piece, trainer.bos_piece, trainer.eos_piece, trainer.pad_piece)
    unk, bos, eos, pad = (piece if piece in ids else None for piece in own)
    for wanted, token, end in ((add_bos, bos, "beginning"), (add_eos, eos, "end")):
        if wanted and token is None:
            raise UserError(f"{path} has no token for the {end} of a sequence, so none can be added")

    merges = _sentencepiece_merges(model)

    def bpe(**options: bool) -> models.BPE:
        return models.BPE(
            vocab=ids, merges=merges, unk_token=unk, fuse_unk=True, byte_fallback=trainer.byte_fallback, **options
        )

    tokenizer = Tokenizer(bpe(ignore_merges=bool(symbols)))
    if symbols:
        tokenizer.pre_tokenizer = _apart(symbols, [piece for piece in ids if piece not in symbols], bpe())
    tokenizer.normalizer = sentencepiece_normalizer(path, normalizer, symbols)
    # SentencePiece drops the dummy prefix or, where it removes spaces, one of every piece before the text begins, which
    # is all of them but for pieces that begin with two.
    leading = 2**20 if normalizer.remove_extra_whitespaces else int(normalizer.add_dummy_prefix)
    steps: list[decoders.Decoder] = [decoders.Replace(SPACE, " ")]
    steps += [decoders.ByteFallback()] if trainer.byte_fallback else []
    steps += [decoders.Fuse(), decoders.Strip(" ", leading, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    named = (token for token in special_tokens if token in ids)
    special = dict.fromkeys([*control, *named, *filter(None, (bos, eos, pad))])
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    tokens = {"unk_token": unk, "bos_token": bos, "eos_token": eos, "pad_token": pad}
    _save(tokenizer, Path(folder), **tokens, add_bos_token=add_bos, add_eos_token=add_eos)


def _save(tokenizer: Any, folder: Path, **options: Any) -> None:
    from transformers import PreTrainedTokenizerFast

    for name in ("tokenizer.json", "tokenizer_config.json"):
        if (folder / name).is_symlink():
            (folder / name).unlink()  # else the file that it leads to would be overwritten
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **options).save_pretrained(
        folder
    )


def _read_tiktoken(path: Path) -> dict[bytes, int]:
    """Tokens and their ranks, which are also their ids."""
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(read_bytes(path).splitlines(), start=1):
        try:
            text, rank = line.split()
            token = base64.b64decode(text, validate=True)
            in_order = int(rank) == len(ranks)
        except (ValueError, binascii.Error) as error:
            raise UserError(
                f"{path}, line {number}: {line[:60].decode(errors='replace')!r} is not a token in base64 and its rank"
            ) from error
        if not in_order:
            raise UserError(f"{path}, line {number}: the rank is {rank.decode()}; {len(ranks)} is next")
        if token in ranks or not token:
            there = f"the token {token!r} is also on line {ranks[token] + 1}" if token else "the token is empty"
            raise UserError(f"{path}, line {number}: {there}")
        ranks[token] = len(ranks)
    if missing := [byte for byte in range(256) if bytes([byte]) not in ranks]:
        raise UserError(f"{path} has no token for the byte 0x{missing[0]:02X}; all 256 are needed. Is the file whole?")
    return ranks


def _read_sentencepiece(path: Path) -> Any:
    """The model as a protocol buffer, which SentencePiece itself has checked."""
    from google.protobuf.message import DecodeError
    from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2

    content = read_bytes(path)
    try:
        model = sentencepiece_model_pb2.ModelProto.FromString(content)  # type: ignore[attr-defined]  # made when imported
        SentencePieceProcessor(model_proto=content)
        whole = model.HasField("trainer_spec") and model.HasField("normalizer_spec")
        whole = whole and all(isinstance(piece.piece, str) for piece in model.pieces)  # bytes if they are not UTF-8
    except (DecodeError, UnicodeDecodeError, RuntimeError):
        whole = False
    if not whole:
        raise UserError(f"{path} is not a SentencePiece model, or not all of one; fetch the file again")
    return model


def _check_sentencepiece(path: Path, model: Any) -> None:
    """Raises `UserError` unless a `tokenizers` model can give the same ids."""
    trainer, normalizer, kind = model.trainer_spec, model.normalizer_spec, model.SentencePiece
    if trainer.model_type != trainer.BPE:
        name = trainer.ModelType.Name(trainer.model_type).lower()
        raise UserError(f"{path} is a SentencePiece model of the type {name}; only bpe is supported")
    normal = [piece.piece for piece in model.pieces if piece.type == kind.NORMAL]
    symbols = [piece.piece for piece in model.pieces if piece.type == kind.USER_DEFINED]
    characters = {*normal, *symbols}
    unused = {piece.piece for piece in model.pieces if piece.type == kind.UNUSED}
    joined = _merges([*normal, *unused]) if unused else []
    unsupported = {
        f"the normalization {normalizer.name!r}": normalizer.precompiled_charsmap and normalizer.name not in MAPS,
        "a denormalization": model.denormalizer_spec.precompiled_charsmap,
        "treat_whitespace_as_suffix": trainer.treat_whitespace_as_suffix,
        "no escape_whitespaces": not normalizer.escape_whitespaces,
        "unused pieces that are joined": any(not unused.isdisjoint((*pair, "".join(pair))) for pair in joined),
        "user-defined symbols with spaces": normalizer.remove_extra_whitespaces and any(" " in s for s in symbols),
        "pieces with characters that are no pieces": any(c not in characters for piece in normal for c in piece),
    }
    if found := [name for name, there in unsupported.items() if there]:
        raise UserError(
            f"{path} has {found[0]}, for which there is no exact fast tokenizer; use a folder with tokenizer.json"
        )


def _merges(tokens: Sequence[str]) -> list[tuple[str, str]]:
    """All pairs of tokens that make one of them, in the order of what they make.

    The order of a token's own pairs does not matter: what is joined inside a stretch of text does not depend on the
    text around it, so that a token is always made of one and the same pair, if it is made at all.
    """
    known, lengths = set(tokens), {len(token) for token in tokens}
    cuts = {whole: [cut for cut in sorted(lengths) if whole - cut in lengths] for whole in lengths}
    return [
        (token[:cut], token[cut:])
        for token in tokens
        for cut in cuts[len(token)]  # not every place of a token that is thousands long
        if token[:cut] in known and token[cut:] in known
    ]


def _sentencepiece_merges(model: Any) -> list[tuple[str, str]]:
    """Pairs of pieces that are joined, best score first; user-defined symbols are never joined to anything.

    SentencePiece joins the leftmost of pairs with the same score, `tokenizers` the first in the list, wherever it is.
    Models made by training have no such pairs. Of those that were put in later, such as runs of spaces, the longest
    come first: what a run has begun with is then made as long as it can be before the next begins, as from the left.
    """
    scores = {piece.piece: piece.score for piece in model.pieces if piece.type == model.SentencePiece.NORMAL}
    return _merges(sorted(scores, key=lambda piece: (-scores[piece], -len(piece))))


def _apart(symbols: Collection[str], others: Sequence[str], bpe: Any) -> Any:
    """A pre-tokenizer for a BPE with `ignore_merges`, which makes each user-defined symbol a part, hence a token.

    The symbols are not added tokens: those are cut out before the normalizer sees the text, so that it would add the
    dummy prefix behind each. Another part may by chance be another piece that the merges do not make, such as
    `<0x0A>`: it is cut in two, at a place where they join nothing.
    """
    from tokenizers import Regex
    from tokenizers.pre_tokenizers import Sequence, Split

    def ids(text: str) -> list[int]:
        return [token.id for token in bpe.tokenize(text)]

    def patterns(wrong: set[str]) -> Iterator[str]:
        for piece in sorted(wrong):
            for cut in range(1, len(piece)):
                left, right = piece[:cut], piece[cut:]
                if left not in wrong and right not in wrong and ids(left) + ids(right) == ids(piece):
                    yield rf"{re.escape(left)}(?={re.escape(right)}\z)"
                    break

    longest_first = sorted(symbols, key=len, reverse=True)
    splits = [Split(Regex("|".join(map(re.escape, longest_first))), behavior="isolated")]
    wrong = {piece for piece in others if ids(piece) != [bpe.token_to_id(piece)]}
    if cuts := "|".join(patterns(wrong)):
        splits.append(Split(Regex(rf"\A(?:{cuts})"), behavior="isolated"))
    return Sequence(splits)
