"""Articles to summarize, in cnn_dailymail's columns."""

from dataclasses import dataclass
from pathlib import Path

from trtbuild.errors import UserError

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
    name: str, split: str, samples: int, config: str | None = None, revision: str | None = None
) -> list[Article]:
    """The first `samples` articles of a split, in order.

    `trtbuild-news` is the set that the project ships (16 to evaluate, 8 to calibrate with); any other `name` is a data
    set on the Hugging Face hub, such as `cnn_dailymail` with config `3.0.0`. Raises `UserError` if there are fewer
    articles, or other columns.
    """
    import datasets

    datasets.disable_progress_bars()
    if name == "trtbuild-news":
        if split not in OWN_SPLITS:
            raise UserError(f"the data set trtbuild-news has the splits {' and '.join(OWN_SPLITS)}, not {split!r}")
        data = datasets.load_dataset("json", data_files=str(ARTICLES / f"{split}.jsonl"), split="train")
    else:
        try:
            data = datasets.load_dataset(name, config, split=split, revision=revision)
        except (OSError, ValueError, ConnectionError, datasets.exceptions.DatasetsError) as error:
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"cannot load the data set {name} ({config}, {split}): {reason}") from error
    if missing := set(COLUMNS) - set(data.column_names):
        raise UserError(f"the data set {name} lacks the columns {sorted(missing)}; it has {data.column_names}")
    if len(data) < samples:
        raise UserError(
            f"the data set {name} has {len(data)} articles in its split {split!r}; {samples} were asked for"
        )
    return [Article(**{column: row[column] for column in COLUMNS}) for row in data.select(range(samples))]
