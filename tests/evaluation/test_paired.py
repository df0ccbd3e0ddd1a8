"""Paired differences: quantiles from printed tables, an interval worked out by hand, and how often intervals hold."""

import math

import numpy as np
import pytest

from trtbuild.errors import UserError
from trtbuild.evaluation.paired import Difference, nll_difference, t_quantile


def articles(nll, tokens) -> dict:
    return {"articles": {"nll": list(map(float, nll)), "tokens": list(tokens)}}


@pytest.mark.parametrize(
    ("degrees_of_freedom", "expected"),
    # Two-sided 95% points as tables have them (NIST/SEMATECH e-Handbook, 1.3.6.7.2), and the normal distribution's.
    [(1, 12.706), (2, 4.303), (5, 2.571), (15, 2.131), (30, 2.042), (100, 1.984), (10**6, 1.960)],
)
def test_quantiles_are_those_of_the_tables(degrees_of_freedom, expected):
    assert t_quantile(degrees_of_freedom) == pytest.approx(expected, abs=5.1e-4)


@pytest.mark.parametrize("degrees_of_freedom", [1, 2])
def test_quantiles_that_have_a_formula(degrees_of_freedom):
    """The Cauchy distribution's, and that of two degrees of freedom: p = t / sqrt(2 + t^2)."""
    exact = {1: math.tan(0.95 * math.pi / 2), 2: 0.95 * math.sqrt(2 / (1 - 0.95**2))}
    assert t_quantile(degrees_of_freedom) == pytest.approx(exact[degrees_of_freedom], rel=1e-8)


def test_articles_of_equal_length_have_the_paired_t_interval():
    """Differences a token of 0.01, 0.02, 0.06: mean 0.03, deviation sqrt(0.0014 / 2), t of 2 degrees 4.303."""
    result = nll_difference(articles([101, 202, 306], [100] * 3), articles([100, 200, 300], [100] * 3))
    assert result.mean == pytest.approx(0.03)
    assert result.deviation == pytest.approx(math.sqrt(0.0007))
    width = 4.302653 * math.sqrt(0.0007 / 3)
    assert result.interval == pytest.approx((0.03 - width, 0.03 + width), rel=1e-6)


def test_a_longer_article_counts_for_more():
    """As in the perplexity itself; one without a token is none."""
    result = nll_difference(articles([10, 0, 360], [100, 0, 300]), articles([0, 0, 0], [100, 0, 300]))
    assert result.mean == pytest.approx(370 / 400)
    shares = [(10 - 0.925 * 100) / 200, (360 - 0.925 * 300) / 200]  # over the mean number of tokens
    assert result.deviation == pytest.approx(math.sqrt(sum(share**2 for share in shares)))
    assert result.articles == 2


def test_what_is_hard_for_both_falls_out():
    """Perplexities that scatter by a factor of ten, and differ by 0.5% in every article."""
    generator = np.random.default_rng(0)
    tokens = generator.integers(200, 600, 16)
    theirs = tokens * generator.uniform(1, 4, 16)
    result = nll_difference(articles(theirs + 0.005 * tokens, tokens), articles(theirs, tokens))
    assert result.interval == pytest.approx((0.005, 0.005), abs=1e-12)


@pytest.mark.parametrize("count", [4, 16])
def test_the_interval_holds_as_often_as_it_says(count):
    """Of 2000 samples of articles, of random lengths and skewed differences that grow with them."""
    generator = np.random.default_rng(count)
    held = 0
    for _ in range(2000):
        tokens = generator.integers(200, 600, count)
        ours = tokens * (0.01 + 0.004 * (generator.gamma(8, 1, count) - 8) / math.sqrt(8))
        low, high = nll_difference(articles(ours, tokens), articles(0 * ours, tokens)).interval
        held += low <= 0.01 <= high
    assert 0.925 < held / 2000 < 0.965


def test_how_many_articles_would_tell():
    difference = Difference(mean=0.012, deviation=0.02, articles=16)
    enough = difference.articles_to_tell(0.010)
    assert enough == pytest.approx((1.966 * 0.02 / 0.002) ** 2, abs=2)
    assert difference.half_width(enough) <= 0.002 < difference.half_width(enough - 1)
    assert difference.articles_to_tell(0.2) == 2
    assert difference.articles_to_tell(0.0120001) is None  # more than anybody has
    assert Difference(0.012, math.nan, 1).articles_to_tell(0.01) is None


def test_a_single_article_has_no_interval():
    result = nll_difference(articles([11], [10]), articles([10], [10]))
    assert result.mean == pytest.approx(0.1)
    assert result.interval == (-math.inf, math.inf)


@pytest.mark.parametrize(
    ("ours", "message"),
    [
        (articles([1, 2], [10, 20]), "their articles have other numbers of tokens"),
        (articles([1], [10]), "their articles have other numbers of tokens"),
        ({"articles": {"nll": [1.0, None], "tokens": [10, 30]}}, "articles are not numbers"),
        ({"articles": {"nll": [1.0, "x"], "tokens": [10, 30]}}, "articles are not numbers"),
        ({"articles": {"nll": [1.0, [2]], "tokens": [10, 30]}}, "articles are not numbers"),
        ({"articles": {"nll": [1.0], "tokens": [10, 30]}}, "articles are not numbers"),
        ({"articles": {"nll": 1.0, "tokens": 10}}, "articles are not numbers"),
        ({"articles": {"nll": [10**400, 1], "tokens": [10, 30]}}, "articles are not numbers"),
        (articles([], []), "articles are not numbers"),
        (articles([0, 0], [0, 0]), "articles are not numbers"),
        ({"articles": {"nll": [1]}}, "articles are not numbers"),
    ],
    ids=str,
)
def test_refused(ours, message):
    with pytest.raises(UserError, match=message):
        nll_difference(ours, articles([1, 2], [10, 30]))
