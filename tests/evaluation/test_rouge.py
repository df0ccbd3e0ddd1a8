"""ROUGE means and intervals against the `rouge_score` package."""

import string
import unicodedata

import numpy as np
import pytest
from rouge_score.rouge_scorer import RougeScorer
from rouge_score.scoring import BootstrapAggregator
from rouge_score.tokenizers import DefaultTokenizer

from trtbuild.errors import UserError
from trtbuild.evaluation.rouge import METRICS, Tokenizer, difference, score, sentences

TEXT = "the council voted to close its old bridges after storms damaged running wards and two markets"
WORDS = TEXT.split(" ")


def random_texts(count, generator):
    """References of two lines, predictions of two sentences that share words with them."""
    pick = lambda n: " ".join(generator.choice(WORDS, n))
    references = [f"{pick(8)}.\n{pick(9)}." for _ in range(count)]
    return [f"{pick(7)}. {pick(9)}." for _ in range(count)], references


@pytest.fixture
def texts():
    return random_texts(40, np.random.default_rng(0))


def test_means_are_those_of_rouge_score(texts):
    predictions, references = texts
    scorer = RougeScorer(METRICS, use_stemmer=True)
    pairs = [scorer.score(r, p.replace(". ", ".\n")) for p, r in zip(predictions, references, strict=True)]
    result = score(predictions, references)
    assert result.keys() == set(METRICS)
    for metric in METRICS:
        expected = 100 * np.mean([pair[metric].fmeasure for pair in pairs])
        assert result[metric]["mean"] == pytest.approx(expected, abs=5.1e-5)  # four decimals
        assert 0 < result[metric]["low"] < result[metric]["mean"] < result[metric]["high"] < 100


def test_interval_is_that_of_rouge_score(texts):
    """`BootstrapAggregator` resamples too, with other draws: the bounds agree to a part of their distance."""
    predictions, references = texts
    np.random.seed(1)
    scorer, aggregator = RougeScorer(METRICS, use_stemmer=True), BootstrapAggregator(n_samples=1000)
    for prediction, reference in zip(predictions, references, strict=True):
        aggregator.add_scores(scorer.score(reference, sentences(prediction)))
    result = score(predictions, references)
    for metric, expected in aggregator.aggregate().items():
        low, high = 100 * expected.low.fmeasure, 100 * expected.high.fmeasure
        assert result[metric]["low"] == pytest.approx(low, abs=0.15 * (high - low))
        assert result[metric]["high"] == pytest.approx(high, abs=0.15 * (high - low))


def test_a_seed_gives_the_same_interval(texts):
    assert score(*texts, seed=3) == score(*texts, seed=3)
    other = score(*texts, seed=4)
    assert other != score(*texts, seed=3)
    assert other["rouge1"]["mean"] == score(*texts, seed=3)["rouge1"]["mean"]


def test_differences_are_paired_by_article():
    """Two words more in each summary, which cost less where it is longer."""
    references = ["a b c d e f g h i j"[: 4 * n] for n in (1, 2, 3, 4)]
    ours, theirs = (score([f"{r}{more}" for r in references], references) for more in ("", " zzz zzz"))
    result = difference(ours, theirs)["rouge1"]
    expected = np.array(ours["rouge1"]["articles"]) - theirs["rouge1"]["articles"]
    assert result["mean"] == pytest.approx(expected.mean(), abs=1e-4)
    assert expected.min() - 1e-4 <= result["low"] < result["mean"] < result["high"] <= expected.max() + 1e-4
    same = difference(ours, ours)
    assert same == {metric: {"mean": 0, "low": 0, "high": 0} for metric in METRICS}


def test_a_paired_interval_is_that_of_the_paired_bootstrap(texts):
    """Against articles drawn one by one, both models' scores together."""
    predictions, references = texts
    ours, theirs = score(predictions, references), score([*predictions[1:], predictions[0]], references)
    pairs = list(zip(*(result["rougeL"]["articles"] for result in (ours, theirs)), strict=True))
    generator = np.random.default_rng(5)
    means = []
    for _ in range(4000):
        drawn = [pairs[i] for i in generator.integers(len(pairs), size=len(pairs))]
        means.append(np.mean([a for a, _ in drawn]) - np.mean([b for _, b in drawn]))
    low, high = np.quantile(means, (0.025, 0.975))
    result = difference(ours, theirs)["rougeL"]
    assert result["mean"] == pytest.approx(ours["rougeL"]["mean"] - theirs["rougeL"]["mean"], abs=2e-4)
    assert (result["low"], result["high"]) == pytest.approx((low, high), abs=0.1 * (high - low))


def test_differences_of_what_is_not_comparable():
    one, two = score(["a"], ["a"]), score(["a", "b"], ["a", "b"])
    with pytest.raises(UserError, match="not comparable: rouge1 is of 1 and of 2 articles"):
        difference(one, two)
    for broken in ([], "x", [None], [[1.0]], 3, [10**400]):
        with pytest.raises(UserError, match="scores by article are not numbers"):
            difference(one, {metric: {"articles": broken} for metric in METRICS})
    assert difference(one, {metric: {"mean": 3.0} for metric in METRICS}) is None  # an older result


@pytest.mark.parametrize(("prediction", "expected"), [("a storm closed roads.", 100.0), ("xyz", 0.0), ("", 0.0)])
def test_extremes(prediction, expected):
    result = score([prediction], ["a storm closed roads."])
    assert {m: (v["low"], v["mean"], v["high"]) for m, v in result.items()} == dict.fromkeys(METRICS, (expected,) * 3)


def test_words_are_stemmed():
    assert score(["he was running"], ["he was run"])["rouge1"]["mean"] == 100


def test_sentences_become_lines():
    assert sentences(" One two. Three?  Four! five 3.5 end.\nsix ") == "One two.\nThree?\nFour!\nfive 3.5 end.\nsix"
    # Lines in another order: each is found for rougeLsum, while rougeL sees one sequence.
    result = score(["The bridge is shut. Rain fell."], ["Rain fell.\nThe bridge is shut."])
    assert result["rougeLsum"]["mean"] == 100
    assert result["rougeL"]["mean"] < 70


def test_lengths_must_agree():
    with pytest.raises(ValueError, match="zip"):
        score(["a", "b"], ["a"])


def test_without_cjk_the_tokens_are_those_of_rouge_score():
    """Words, numbers, punctuation and letters of other alphabets, in random order."""
    generator = np.random.default_rng(0)
    pieces = [*string.printable, *"éßµΑя½ﬁ²…“”—\u00a0\u2028", *WORDS, "Running", "co-operate", "U.S.", "3,000.5", "İ"]
    ours, theirs = Tokenizer(), DefaultTokenizer(use_stemmer=True)
    for _ in range(2000):
        text = "".join(generator.choice(pieces, 30))
        assert ours.tokenize(text) == theirs.tokenize(text)


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("今天，天气很好。", "今 天 天 气 很 好"),
        ("在2024年Qwen-7B的running模型", "在 2024 年 qwen 7b 的 run 模 型"),
        ("Ｑｗｅｎ１２３４は", "qwen1234 は"),
        ("データ・センターへ行く時々", "デ ー タ セ ン タ ー へ 行 く 時 々"),
        ("ﾃﾞｰﾀ", "デ ー タ"),
        ("서울에서 KBS 뉴스", "서 울 에 서 kbs 뉴 스"),
        (unicodedata.normalize("NFD", "서울 が"), "서 울 が"),
        ("一。「二」！三（四）", "一 二 三 四"),
        ("𠮷野家", "𠮷 野 家"),
    ],
)
def test_cjk_is_tokenized_by_characters(text, tokens):
    assert Tokenizer().tokenize(text) == tokens.split()


def test_chinese_scores_are_those_of_rouge_score_over_numbered_characters():
    """`rouge_score` is told each character's number as a word; sentences of one to nine pieces, mixed with words."""
    generator = np.random.default_rng(0)
    characters = "今天气很好我们在城市里看见新的桥被雨水冲坏"

    def text():
        pieces = [*characters, " bridge ", "2024"]
        return ["".join(generator.choice(pieces, generator.integers(1, 10))) + "。" for _ in range(4)]

    def numbered(lines):
        return "\n".join("".join(f" {ord(c)} " if c in characters else c for c in line) for line in lines)

    predictions, references = ([text() for _ in range(20)] for _ in range(2))
    scorer = RougeScorer(METRICS, use_stemmer=True)
    pairs = [scorer.score(numbered(r), numbered(p)) for p, r in zip(predictions, references, strict=True)]
    result = score(["".join(p) for p in predictions], ["".join(r) for r in references])
    for metric in METRICS:
        expected = 100 * np.mean([pair[metric].fmeasure for pair in pairs])
        assert result[metric]["mean"] == pytest.approx(expected, abs=5.1e-5)


@pytest.mark.parametrize(
    "text", ["大桥因暴雨关闭。市议会周三表决！", "橋は閉まった。雨が降った", "다리가 닫혔다.\n비가 왔다."]
)
def test_identical_texts_score_100(text):
    assert {m: v["mean"] for m, v in score([text], [text]).items()} == dict.fromkeys(METRICS, 100)


def test_full_width_sentences_become_lines():
    text = "他说：“好。”然后走了！？ 真的（是。）\nＡ。"
    assert sentences(text) == "他说：“好。”\n然后走了！？\n真的（是。）\nＡ。"
    result = score(["桥关闭了。下雨了。"], ["下雨了。桥关闭了。"])
    assert result["rougeLsum"]["mean"] == 100
    assert result["rougeL"]["mean"] < 70


@pytest.mark.parametrize("reference", ["", "...", "Мост закрыт."])
def test_a_reference_that_nothing_can_agree_with(reference):
    with pytest.raises(UserError, match=r"reference 1, .*holds no word that ROUGE can score; it knows a-z, 0-9"):
        score(["a", reference], ["a", reference])
