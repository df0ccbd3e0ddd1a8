"""Prompts from files, and token ids to files, as the TensorRT-LLM 0.7 examples' run.py has them, and JSON lines."""

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from trtbuild.errors import UserError
from trtbuild.files import atomic, check_input, parse_json, read_text

KEYS = ("input_ids", "prompt", "text")  # of an object, in this order


def read_prompts(path: Path, ends: tuple[int, ...] = ()) -> list[tuple[str, str | list[int]]]:
    """Texts or token ids, each with its place, such as `prompts.txt: line 3`, by the file's suffix.

    `.csv`: a row of token ids a line. `.npy`: an integer array `[prompts, length]`, padded on either side with one of
    `ends` or with negative numbers. `.jsonl`: an object a line with `input_ids`, or else `prompt`, or else `text`. Any
    other: a prompt a line. Blank lines are none. Raises `UserError`, which names file and line.
    """
    match path.suffix.lower():
        case ".csv":
            return [*_csv(path)]
        case ".npy":
            return [*_npy(path, ends)]
        case ".jsonl":
            return [*_json_lines(path)]
    return [*_lines(path)]


def padded_rows(sequences: list[list[int]], width: int, end: int) -> np.ndarray:
    """int32 `[sequences, width]`, filled up with `end` behind each."""
    rows = np.full((len(sequences), width), end, dtype=np.int32)
    for row, ids in zip(rows, sequences, strict=True):
        row[: len(ids)] = ids
    return rows


def write_csv(path: Path, rows: np.ndarray) -> None:
    with atomic(path) as temporary:
        np.savetxt(temporary, rows, fmt="%d", delimiter=",")


def write_npy(path: Path, rows: np.ndarray) -> None:
    with atomic(path) as temporary, open(temporary, "wb") as file:  # a name would get a suffix
        np.save(file, rows, allow_pickle=False)


def _lines(path: Path) -> Iterator[tuple[str, str]]:
    """Place and content of each line in which something is."""
    for number, line in enumerate(read_text(path).removeprefix("\ufeff").split("\n"), 1):
        if line.strip():
            yield f"{path}: line {number}", line.removesuffix("\r")


def _csv(path: Path) -> Iterator[tuple[str, list[int]]]:
    for where, line in _lines(path):
        fields = line.split(",")
        for field in fields:
            if not re.fullmatch(r"\s*[0-9]{1,9}\s*", field):
                raise UserError(
                    f"{where} has {field[:40]!r} where a token id is expected; a .csv file holds rows of "
                    "token ids with commas between them, texts go into a .txt or .jsonl file"
                )
        yield where, [int(field) for field in fields]


def _npy(path: Path, ends: tuple[int, ...]) -> Iterator[tuple[str, list[int]]]:
    check_input(path)
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # of a broken header numpy lets through what its parsers raise, MemoryError among them
        raise UserError(f"{path} is no .npy file that can be read: {' '.join(str(error).split())}") from error
    if not isinstance(array, np.ndarray) or array.ndim != 2 or array.dtype.kind not in "iu":
        found = f"{array.dtype} {list(array.shape)}" if isinstance(array, np.ndarray) else "no array"
        raise UserError(f"{path} holds {found}; an array of integers [prompts, length] is expected")
    for number, row in enumerate(array):
        (places,) = np.nonzero(~np.isin(row, ends) & (row >= 0))
        where = f"{path}: row {number}"
        if not len(places):
            raise UserError(f"{where} holds padding alone; a prompt has at least one token")
        yield where, row[places[0] : places[-1] + 1].tolist()


def _json_lines(path: Path) -> Iterator[tuple[str, str | list[int]]]:
    for where, line in _lines(path):
        value = parse_json(line, where)
        key = next((key for key in KEYS if key in value), None) if isinstance(value, dict) else None
        if not isinstance(value, dict) or key is None:
            raise UserError(f"{where} is no object with one of {', '.join(KEYS)}")
        found = value[key]
        if key == "input_ids":
            if not isinstance(found, list) or not found or not all(type(i) is int and i >= 0 for i in found):
                raise UserError(f"{where}: input_ids is {repr(found)[:40]}; a list of token ids is expected")
        elif not isinstance(found, str) or not found:
            raise UserError(f"{where}: {key} is {repr(found)[:40]}; a text is expected")
        yield where, found
