"""The shipped articles, and data sets that cannot be used."""

import hashlib
import json

import pytest

from trtbuild.datasets import ARTICLES, articles_state, load_articles
from trtbuild.errors import UserError

COUNTS = {"evaluation": 16, "calibration": 64}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def records(split):
    return [json.loads(line) for line in (ARTICLES / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("split", COUNTS)
def test_articles_are_of_the_promised_form(split):
    rows = records(split)
    assert len(rows) == COUNTS[split]
    for row in rows:
        assert row.keys() == {"article", "highlights", "id"}
        assert row["id"] == hashlib.sha1(row["article"].encode()).hexdigest()
        assert 250 <= len(row["article"].split()) <= 500
        highlights = row["highlights"].split("\n")
        assert 2 <= len(highlights) <= 4
        assert all(5 <= len(line.split()) <= 30 for line in highlights)


def test_no_article_twice():
    ids = [row["id"] for split in COUNTS for row in records(split)]
    assert len(set(ids)) == 80


@pytest.mark.parametrize(("split", "samples"), [("evaluation", 16), ("calibration", 64), ("evaluation", 3)])
def test_loads_the_first_articles_in_order(split, samples):
    articles = load_articles("trtbuild-news", split, samples)
    assert [vars(article) for article in articles] == records(split)[:samples]


@pytest.mark.parametrize(
    ("split", "samples", "message"),
    [
        ("evaluation", 17, "trtbuild-news has 16 articles in its split 'evaluation'; 17 were asked for"),
        ("calibration", 65, "has 64 articles in its split 'calibration'; 65 were asked for"),
        ("train", 1, "has the splits evaluation and calibration, not 'train'"),
    ],
)
def test_own_articles_refused(split, samples, message):
    with pytest.raises(UserError, match=message):
        load_articles("trtbuild-news", split, samples)


@pytest.fixture
def folder_dataset(tmp_path):
    """A data set that `datasets` loads from a folder, as it would from the hub."""

    def write(**row):
        (tmp_path / "data").mkdir()
        (tmp_path / "data" / "train.jsonl").write_text(json.dumps(row) + "\n")
        return str(tmp_path / "data")

    return write


def test_another_data_set(folder_dataset):
    name = folder_dataset(id="1", article="text", highlights="short", url="ignored")
    assert vars(load_articles(name, "train", 1)[0]) == {"id": "1", "article": "text", "highlights": "short"}


def test_an_id_may_be_a_number(folder_dataset):
    name = folder_dataset(id=17, article="text", highlights="short")
    assert load_articles(name, "train", 1)[0].id == "17"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"article": None}, "its article is None; text is expected"),
        ({"highlights": ["a", "b"]}, r"its highlights is \['a', 'b'\]; text is expected"),
        ({"article": " \n"}, r"its article is ' \\n'; text is expected"),
        ({"highlights": ""}, "its highlights is ''; text is expected"),
        ({"id": 1.5}, r"its id is 1\.5; text is expected"),
    ],
)
def test_rows_without_text(folder_dataset, changes, message):
    name = folder_dataset(**{"id": "1", "article": "text", "highlights": "short"} | changes)
    with pytest.raises(UserError, match=rf"^row 0 of the data set .*data, split 'train': {message}$"):
        load_articles(name, "train", 1)


def test_wrong_columns(folder_dataset):
    name = folder_dataset(document="text", id="1")
    with pytest.raises(UserError, match=r"lacks the columns \['article', 'highlights'\]; it has \['document', 'id'\]"):
        load_articles(name, "train", 1)


def test_unknown_split_of_another_data_set(folder_dataset):
    name = folder_dataset(id="1", article="text", highlights="short")
    with pytest.raises(UserError, match=r"cannot load the data set .*data \(None, test\)"):
        load_articles(name, "test", 1)


def test_a_file_of_json_lines(tmp_path, monkeypatch):
    """In order, without blank lines, and with a seed as the same rows of a data set are drawn."""
    rows = [{"id": str(i), "article": f"text {i}", "highlights": "short", "url": "ignored"} for i in range(5)]
    file = tmp_path / "mine.jsonl"
    file.write_text("\n\n".join(map(json.dumps, rows)) + "\n", encoding="utf-8")
    assert [article.id for article in load_articles(str(file), samples=3)] == ["0", "1", "2"]
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load_articles("~/mine.jsonl", samples=5, seed=3) != load_articles(str(file), samples=5)
    assert [a.article for a in load_articles(str(file), samples=2, characters=4)] == ["text", "text"]
    with pytest.raises(UserError, match=r"mine.jsonl has 5 articles; 6 were asked for"):
        load_articles(str(file), samples=6)
    state = articles_state(str(file))
    file.write_text(json.dumps(rows[0]))
    assert articles_state("~/mine.jsonl", samples=1) != state is not None
    for line, message in (
        ('{"id": "1"}', r"mine.jsonl, line 2 lacks \['article', 'highlights'\]; an article has the keys article, hi"),
        ("[]", "mine.jsonl, line 2 is no object; an article has"),
        ("{", "mine.jsonl, line 2 is not valid JSON"),
    ):
        file.write_text(json.dumps(rows[0]) + "\n" + line)
        with pytest.raises(UserError, match=message):
            load_articles(str(file), samples=1)
    file.write_text(json.dumps(rows[0]) + "\n\n" + json.dumps(rows[1] | {"article": " "}))
    assert len(load_articles(str(file), samples=1)) == 1
    with pytest.raises(UserError, match=r"mine\.jsonl, line 3: its article is ' '; text is expected"):
        load_articles(str(file), samples=2)
    with pytest.raises(UserError, match="the data set cnn_dailymail has splits; give one"):
        load_articles("cnn_dailymail", samples=1)


def test_data_set_out_of_reach():
    with pytest.raises(UserError, match=r"cannot load the data set nobody/none \(3\.0\.0, test\)") as caught:
        load_articles("nobody/none", "test", 1, config="3.0.0")
    assert "\n" not in str(caught.value)


def test_the_state_of_shipped_articles_is_their_text(tmp_path, monkeypatch):
    """A wheel's lie elsewhere than a checkout's."""
    state = articles_state("trtbuild-news", "evaluation")
    monkeypatch.setattr("trtbuild.datasets.ARTICLES", tmp_path)
    assert articles_state("trtbuild-news", "evaluation") is None
    copy = tmp_path / "evaluation.jsonl"
    copy.write_bytes((ARTICLES / "evaluation.jsonl").read_bytes())
    assert articles_state("trtbuild-news", "evaluation") == state
    copy.write_bytes(copy.read_bytes()[:-1])
    assert articles_state("trtbuild-news", "evaluation") != state
