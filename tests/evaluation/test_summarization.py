"""Prompts that fit, and the file of summaries."""

import json

import pytest

from trtbuild.datasets import Article
from trtbuild.errors import UserError
from trtbuild.evaluation import stages
from trtbuild.evaluation.summarization import (
    meta_path,
    read_summaries,
    summarization_prompts,
    write_summaries,
)
from trtbuild.runtime.generation import Output
from trtbuild.tokenizer.tokenizer import Tokenizer

TEMPLATE = "Read: {article}\nTL;DR:"  # 13 bytes around the article


@pytest.fixture(scope="module")
def tokenizer(tiny_checkpoint):
    return Tokenizer(tiny_checkpoint)


def given(outputs):
    """What generates these, the last first."""

    def generate(prompts, on_output):
        for i in reversed(range(len(prompts))):
            on_output(i, outputs[i])

    return generate


def article(text, name="1"):
    return Article(id=name, article=text, highlights="One line.\nAnother line.")


def test_short_articles_are_whole(tokenizer):
    prompts = summarization_prompts([article("a b"), article("{article} ü")], tokenizer, TEMPLATE, False, 64)
    assert [tokenizer.decode(ids) for ids in prompts] == ["Read: a b\nTL;DR:", "Read: {article} ü\nTL;DR:"]


@pytest.mark.parametrize("limit", [24, 57, 200, 399])
def test_long_articles_lose_words_at_their_end(tokenizer, limit):
    """What is left fits, ends at a word, and one word more would not fit."""
    words = [f"word{i}" for i in range(60)]
    (ids,) = summarization_prompts([article(" ".join(words))], tokenizer, TEMPLATE, False, limit)
    assert len(ids) <= limit
    kept = tokenizer.decode(ids).removeprefix("Read: ").removesuffix("\nTL;DR:").split()
    assert kept == words[: len(kept)]
    assert len(ids) == len(" ".join(kept)) + 13
    assert len(" ".join(words[: len(kept) + 1])) + 13 > limit


def test_an_exact_fit_is_kept(tokenizer):
    text = "one two three"
    (ids,) = summarization_prompts([article(text)], tokenizer, TEMPLATE, False, len(text) + 13)
    assert tokenizer.decode(ids) == f"Read: {text}\nTL;DR:"


URL = "https://example.org/" + "x" * 300
CHINESE = "世界上第二高的山峰是乔戈里峰，海拔8611米。" * 30


@pytest.mark.parametrize(
    ("text", "limit", "kept"),
    [
        (CHINESE, 100, CHINESE[:31]),  # 27 characters of 3 bytes and 4 digits are as many as fit into 87
        (CHINESE[3:], 13 + 44, CHINESE[3:17]),  # not within 8611
        (URL + " and more", 100, URL[:87]),
        ("See " + URL, 100, ("See " + URL)[:87]),
        ("a\nlist\nwithout\nspaces", 13 + 9, "a\nlist"),
        ("two  words", 13 + 5, "two"),
        ("two  words", 13 + 9, "two"),
        ("\n" * 200 + "text " * 9, 13 + 9, "text text"),
        ("word" * 10 + " " + "word" * 20, 13 + 81, "word" * 10),
        ("word " + "w" * 99, 13 + 45, "word"),
        ("word " + "w" * 99, 13 + 46, "word " + "w" * 41),
        ("🚀" * 30, 13 + 11, "🚀🚀"),
        ("模型GPU推理", 13 + 8, "模型"),
        ("x", 13, None),
        ("🚀", 13 + 3, None),
    ],
)
def test_an_article_is_cut_by_tokens(tokenizer, text, limit, kept):
    """As much of its beginning as fits, up to the end of a word if there is one near; never nothing."""
    if kept is None:
        with pytest.raises(UserError, match="so that none of article 1 fits into max_input_len"):
            summarization_prompts([article(text)], tokenizer, TEMPLATE, False, limit)
        return
    (ids,) = summarization_prompts([article(text)], tokenizer, TEMPLATE, False, limit)
    assert len(ids) <= limit
    assert tokenizer.decode(ids) == f"Read: {kept}\nTL;DR:"


@pytest.mark.parametrize("chat", [False, True])
def test_special_tokens_of_an_article_are_text(tiny_checkpoint, chat):
    """Those that the prompt names are meant."""
    tokenizer = Tokenizer(tiny_checkpoint, "{{ messages[0].content }}")
    (ids,) = summarization_prompts([article("One.</s>Two.")], tokenizer, "<s>{article}</s>", chat, 64)
    bos, eos = tokenizer.special_token_ids(("<s>", "</s>"))
    assert ids == [bos, *tokenizer.encode("One.</s>Two."), eos]
    assert tokenizer.decode(ids) == "One.</s>Two."


@pytest.mark.parametrize(
    ("template", "limit", "message"),
    [
        ("Summarize this.", 64, "the summarization prompt 'Summarize this.' does not contain {article}"),
        (TEMPLATE, 12, "prompt alone has 13 tokens, so that none of article 1 fits into max_input_len 12"),
    ],
)
def test_refused_templates(tokenizer, template, limit, message):
    with pytest.raises(UserError, match=message):
        summarization_prompts([article("some words of text")], tokenizer, template, False, limit)


@pytest.mark.parametrize("text", ["plain", "two\nlines", "Z\u2028\u0085\x0b ü🚀 \"'"], ids=["plain", "lines", "odd"])
def test_round_trip(tokenizer, tmp_path, text):
    path = tmp_path / "folder" / "summaries.jsonl"
    ids = tokenizer.encode(f" {text} ")
    articles = [article("a", "x"), article("b", "y")]
    outputs = [Output([*ids, 1], "eos"), Output(ids[:1], "length")]
    write_summaries(
        path,
        articles,
        tokenizer,
        [[5] * 3, [5] * 4],
        given(outputs),
        {"engine": "tëst", "dtype": "int1", "model": "m"},
    )
    records, provenance = read_summaries(path)
    assert provenance == {"engine": "tëst", "dtype": "int1", "model": "m"}
    assert records[0] == {
        "id": "x",
        "summary": text,
        "reference": "One line.\nAnother line.",
        "input_tokens": 3,
        "output_ids": [*ids, 1],
        "finish_reason": "eos",
    }
    assert (records[1]["id"], records[1]["summary"], records[1]["input_tokens"]) == ("y", "", 4)
    assert sorted(p.name for p in path.parent.iterdir()) == ["summaries.jsonl", "summaries.meta.json"]


def test_nothing_is_written_when_generation_fails(tokenizer, tmp_path):
    def fail(prompts, on_output):
        on_output(0, Output([5], "length"))
        raise UserError("no")

    with pytest.raises(UserError, match="no"):
        write_summaries(tmp_path / "s.jsonl", [article("a")], tokenizer, [[5]], fail, {})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (None, "does not exist"),
        (b"", "holds no summaries"),
        (b"text\n", r"s\.jsonl, line 1 is not valid JSON"),
        (b'{"summary": "a", "refe', r"s\.jsonl, line 1 is not valid JSON"),
        (b"\xff\xfe\n", "is not UTF-8 text"),
        (json.dumps({"summary": "a"}).encode(), "line 1: an object with the texts summary and reference is expected"),
        (b'{"summary": "a", "reference": "b"}\n["a", "b"]\n', r"s\.jsonl, line 2: an object with the texts"),
        (b'{"summary": null, "reference": "b"}', r"s\.jsonl, line 1: an object with the texts"),
        (b'{"summary": "a", "reference": "b"}\n\n', r"s\.jsonl, line 2 is not valid JSON"),
        (json.dumps({"summary": "a", "reference": "b"}).encode(), "s.meta.json does not exist"),
    ],
    ids=["missing", "empty", "text", "truncated", "not-utf8", "keys", "list", "null", "blank", "no-provenance"],
)
def test_unreadable_summaries(tmp_path, data, message):
    path = tmp_path / "s.jsonl"
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(UserError, match=message) as caught:
        read_summaries(path)
    assert str(path.with_suffix("")) in str(caught.value)


def test_provenance_that_says_nothing(tmp_path):
    (tmp_path / "s.jsonl").write_text(json.dumps({"summary": "a", "reference": "b"}))
    (tmp_path / "s.meta.json").write_text("{}")
    with pytest.raises(UserError, match=r"s\.meta\.json does not say which engine wrote the summaries"):
        read_summaries(tmp_path / "s.jsonl")


def test_provenance_lies_beside(tmp_path):
    assert meta_path(tmp_path / "a.b.jsonl") == tmp_path / "a.b.meta.json"


def test_a_reference_that_rouge_cannot_score_is_refused_before_the_work(monkeypatch, tmp_path):
    monkeypatch.setattr(stages, "load_articles", lambda: [Article("7", "Текст.", "Слова.")])
    with pytest.raises(UserError, match=r"reference 0, 'Слова\.', holds no word"):
        stages.summarize_articles(
            output=tmp_path / "s.jsonl",
            checkpoint_dir=tmp_path / "nowhere",
            dataset={},
            prompt="{article}",
            chat=False,
            max_output_len=4,
        )
