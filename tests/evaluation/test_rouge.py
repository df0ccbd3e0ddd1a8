"""ROUGE means and intervals against the `rouge_score` package."""

import numpy as np
import pytest
from rouge_score.rouge_scorer import RougeScorer
from rouge_score.scoring import BootstrapAggregator

from trtbuild.evaluation.rouge import METRICS, score, sentences

TEXT = "the council voted to close its old bridges after storms damaged running wards and two markets"
WORDS = TEXT.split(" ")


def random_texts(count, generator):
    """References of two lines, predictions of two sentences that share words with them."""
    pick = lambda n: " ".join(generator.choice(WORDS, n))  # noqa: E731
    references = [f"{pick(8)}.\n{pick(9)}." for _ in range(count)]
    return [f"{pick(7)}. {pick(9)}." for _ in range(count)], references


@pytest.fixture
def texts():
    return random_texts(40, np.random.default_rng())


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
