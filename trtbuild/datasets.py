"""Articles to summarize, in cnn_dailymail's columns."""

import json
import random
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from trtbuild.errors import UserError
from trtbuild.files import parse_json, read_text, sha256, state_of, user_path

OWN = "trtbuild-news"
ARTICLES = Path(__file__).parent / "articles"
OWN_SPLITS = ("evaluation", "calibration")
COLUMNS = ("article", "highlights", "id")


@dataclass(frozen=True)
class Article:
    """One article and the reference summary, its highlights a line each."""

    id: str
    article: str
    highlights: str


def load_articles(
    name: str,
    split: str | None = None,
    samples: int = 0,
    config: str | None = None,
    revision: str | None = None,
    seed: int | None = None,
    characters: int | None = None,
) -> list[Article]:
    """The first `samples` articles of a split, in its order, or with a `seed` in one drawn with it.

    Of each, if given, the first `characters`.

    `trtbuild-news` is the set that the project ships (16 to evaluate, 64 to calibrate with); a `name` that ends with
    `.jsonl` is a file, an article a line, without splits; any other one is a data set on the Hugging Face hub, such as
    `cnn_dailymail` with config `3.0.0`, or a folder of that form. Raises `UserError` if there are fewer articles, other
    columns, or a row without text in one of them.
    """
    if samples < 1:
        raise UserError(f"samples is {samples}; it must be at least 1")
    lines: list[str] = []
    if is_file(name):
        (lines, data), place = _lines(user_path(name)), ""
    elif split is None:
        raise UserError(f"the data set {name} has splits; give one, such as split: test")
    else:
        data = _own(split) if name == OWN else _from_hub(name, config, split, revision)
        place = f" in its split {split!r}"
    if len(data) < samples:
        raise UserError(f"the data set {name} has {len(data)} articles{place}; {samples} were asked for")
    order = range(samples) if seed is None else random.Random(seed).sample(range(len(data)), samples)
    articles = [
        _article(data[i], lines[i] if lines else f"row {i} of the data set {name}, split {split!r}") for i in order
    ]
    return [replace(one, article=one.article[:characters]) for one in articles]


def is_file(name: str) -> bool:
    """Whether a data set is one file."""
    return name.endswith(".jsonl")


def articles_state(name: str, split: str | None = None, **_: object) -> str | None:
    """Says whether the files that hold a split are those of another time (`files.state_of`); None on the hub."""
    if name == OWN:
        file = ARTICLES / f"{split}.jsonl"
        return sha256(file)[:16] if file.exists() else None  # wherever the package is
    if is_file(name):
        return state_of([user_path(name)])
    return state_of(Path(name).rglob("*")) if Path(name).exists() else None


def _article(row: dict, where: str) -> Article:
    """A row whose columns hold text; the id may be a number. Raises `UserError` otherwise."""
    values = {column: row[column] for column in COLUMNS}
    if isinstance(values["id"], int):
        values["id"] = str(values["id"])
    for column, value in values.items():
        if not isinstance(value, str) or not value.strip():
            raise UserError(f"{where}: its {column} is {repr(value)[:40]}; text is expected")
    return Article(**values)


def _own(split: str) -> list[dict]:
    if split not in OWN_SPLITS:
        raise UserError(f"the data set {OWN} has the splits {' and '.join(OWN_SPLITS)}, not {split!r}")
    return [json.loads(line) for line in (ARTICLES / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()]


def _lines(path: Path) -> tuple[list[str], list[dict]]:
    """Where each row of a file of JSON lines is, and the rows; blank lines are none."""
    places, rows = [], []
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if line.strip():
            place = f"{path}, line {number}"
            row = parse_json(line, place)
            if not isinstance(row, dict) or (missing := set(COLUMNS) - row.keys()):
                has = f"lacks {sorted(missing)}" if isinstance(row, dict) else "is no object"
                raise UserError(f"{place} {has}; an article has the keys {', '.join(COLUMNS)}")
            places.append(place)
            rows.append(row)
    return places, rows


def _from_hub(name: str, config: str | None, split: str, revision: str | None) -> Any:
    """A `datasets.Dataset` with the columns of an article."""
    import datasets

    datasets.disable_progress_bars()
    try:
        data = datasets.load_dataset(name, config, split=split, revision=revision)
    except (OSError, ValueError, ConnectionError, datasets.exceptions.DatasetsError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"cannot load the data set {name} ({config}, {split}): {reason}") from error
    if missing := set(COLUMNS) - set(data.column_names):
        raise UserError(f"the data set {name} lacks the columns {sorted(missing)}; it has {data.column_names}")
    return data
