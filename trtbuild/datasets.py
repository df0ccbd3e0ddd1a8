"""Articles to summarize, in cnn_dailymail's columns."""

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trtbuild.errors import UserError
from trtbuild.files import state_of

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
    split: str,
    samples: int,
    config: str | None = None,
    revision: str | None = None,
    seed: int | None = None,
) -> list[Article]:
    """The first `samples` articles of a split, in its order, or with a `seed` in one drawn with it.

    `trtbuild-news` is the set that the project ships (16 to evaluate, 64 to calibrate with); any other `name` is a data
    set on the Hugging Face hub, such as `cnn_dailymail` with config `3.0.0`. Raises `UserError` if there are fewer
    articles, other columns, or a row without text in one of them.
    """
    if samples < 1:
        raise UserError(f"samples is {samples}; it must be at least 1")
    data = _own(split) if name == OWN else _from_hub(name, config, split, revision)
    if len(data) < samples:
        raise UserError(
            f"the data set {name} has {len(data)} articles in its split {split!r}; {samples} were asked for"
        )
    order = range(samples) if seed is None else random.Random(seed).sample(range(len(data)), samples)
    return [_article(data[i], f"row {i} of the data set {name}, split {split!r}") for i in order]


def articles_state(name: str, split: str, **_: object) -> str | None:
    """Says whether the files that hold a split are those of another time (`files.state_of`); None on the hub."""
    if name == OWN:
        return state_of([ARTICLES / f"{split}.jsonl"])
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
