"""What SentencePiece does to a text before it cuts it into pieces, as a normalizer of `tokenizers`."""

import re
import unicodedata
from collections import defaultdict
from collections.abc import Collection
from itertools import pairwise
from pathlib import Path
from typing import Any

from trtbuild.errors import UserError

SPACE = "\u2581"  # "▁", SentencePiece's visible space
MARKS = r"[\p{M}\u0E33\u0EB3\u200C\u200D\uFF9E\uFF9F]"  # what extends the character before it, AM of Thai and Lao too
# Noncharacters, which are there for a program's own use: they stand in no text and in no character map.
APART, ALONE, *STAND_INS = map(chr, range(0xFDD0, 0xFDF0))


def sentencepiece_normalizer(path: Path, spec: Any, symbols: Collection[str]) -> Any:
    """The character map, the dummy prefix and what happens to spaces, of a `normalizer_spec`.

    `\\A` and `\\z`, since `^` and `$` also stand for the ends of a line. `symbols` are the user-defined ones; if the
    map would change more of them than there are characters to stand for them, that is a `UserError` about `path`.
    """
    from tokenizers import Regex
    from tokenizers.normalizers import Prepend, Replace, Sequence

    steps = _character_map(path, spec.precompiled_charsmap, symbols) if spec.precompiled_charsmap else []
    if spec.remove_extra_whitespaces:
        steps += [Replace(Regex(r"\A +"), ""), Replace(Regex(" {2,}"), " ")]
    prefix = [Prepend(SPACE)] if spec.add_dummy_prefix else []
    # A text of which the map leaves nothing has a prefix all the same, but where spaces are removed.
    steps = [*steps, *prefix] if spec.remove_extra_whitespaces else [*prefix, *steps]
    steps += [Replace(" ", SPACE)]
    if spec.remove_extra_whitespaces:
        steps += [Replace(Regex(SPACE + r"+\z"), "")]
    return Sequence(steps)


def _character_map(path: Path, charsmap: bytes, symbols: Collection[str]) -> list[Any]:
    """One of SentencePiece's own maps, NFKC and changes to single characters; it leaves user-defined symbols alone.

    `Precompiled` by itself replaces a character and its marks together by what the map says of the first, and knows no
    keys above five bytes. So here it sees characters alone, and NFC joins those that the map joins: neighbours in the
    text and in a decomposition.
    """
    from tokenizers import Regex
    from tokenizers.normalizers import NFC, Precompiled, Replace

    try:
        precompiled = Precompiled(charsmap)
    except Exception as error:  # the library knows no other
        raise UserError(f"{path} has a character map that is damaged; fetch the file again") from error
    changed = [
        symbol for symbol in sorted(symbols, key=len, reverse=True) if precompiled.normalize_str(symbol) != symbol
    ]
    if len(changed) > len(STAND_INS):
        raise UserError(f"{path}: its map changes {len(changed)} user-defined symbols; {len(STAND_INS)} can be spared")
    stand_ins = list(zip(changed, STAND_INS, strict=False))
    after_symbol = "".join(f"|(?<={re.escape(symbol)})" for symbol in sorted(symbols))
    return [
        Replace(Regex(rf"(?!\A)(?={MARKS})(?:(?!{_joined()}){after_symbol})"), APART),
        *(Replace(symbol, stand_in) for symbol, stand_in in stand_ins),
        Replace(Regex(rf"(?!\A)(?={MARKS})|(?<=\r)(?=\n)"), ALONE),
        precompiled,
        Replace(ALONE, ""),
        NFC(),
        *(Replace(stand_in, symbol) for symbol, stand_in in stand_ins),
        Replace(APART, ""),
    ]


def _joined() -> str:
    """A pattern: a mark after a character that NFKC joins with it, both in any of their compatible forms."""
    forms, followers, last = defaultdict(list), defaultdict(set), defaultdict(list)
    for character in map(chr, range(0x30000)):
        if len(composed := unicodedata.normalize("NFKC", character)) == 1:
            forms[composed].append(character)
            for before, after in pairwise(decomposed := unicodedata.normalize("NFD", composed)):
                followers[after].add(before)
            last[decomposed[-1]].append(character)
    characters = lambda groups: "".join(map(re.escape, sorted(set().union(*groups))))
    return "|".join(
        f"(?<=[{characters(last[before] for before in befores)}])[{characters([forms[mark]])}]"
        for mark, befores in sorted(followers.items())
        if unicodedata.category(mark).startswith("M")
    )
