"""The difference of two models on the same articles, and how sure it is: a 95% interval by Student's t over articles.

What makes an article hard makes it hard for both models, so that their difference, article by article, varies far less
than either perplexity (Miller 2024, "Adding Error Bars to Evals", arXiv 2411.00640). Tokens of one article depend on
each other, articles do not: an article is one observation, of as many tokens as it has. So the difference a token is a
ratio of two sums over articles, and its variance that of a ratio estimator (Cochran 1977, "Sampling Techniques",
chapter 6). Student's t knows that the variance, too, is estimated from few articles; the percentiles of a bootstrap do
not, and are too narrow: of 16 by a tenth (sqrt(15 / 16) * 1.96 / 2.13 where all is normal).
"""

import functools
import math
from bisect import bisect_left
from dataclasses import dataclass

import numpy as np

from trtbuild.errors import UserError

CONFIDENCE = 0.95
MOST_ARTICLES = 100_000  # where even more would be needed the difference is the limit, for all that can be known


@dataclass(frozen=True)
class Difference:
    """`mean` a token, in nats; `deviation` of an article's share of it around that, nan of a single article."""

    mean: float
    deviation: float
    articles: int

    def half_width(self, articles: int) -> float:
        """Of the interval around `mean`, if so many articles were like these; infinite of one."""
        if articles < 2:
            return math.inf
        return t_quantile(articles - 1) * self.deviation / math.sqrt(articles)

    @property
    def interval(self) -> tuple[float, float]:
        """Low and high, in nats."""
        width = self.half_width(self.articles)
        return self.mean - width, self.mean + width

    def articles_to_tell(self, limit: float) -> int | None:
        """How many articles would tell whether the mean is above `limit` (nats), if they are like these.

        None where that cannot be known from one article, or would take more than `MOST_ARTICLES`.
        """
        distance = abs(self.mean - limit)
        if self.articles < 2 or self.half_width(MOST_ARTICLES) > distance:
            return None
        return bisect_left(range(MOST_ARTICLES), True, 2, key=lambda n: self.half_width(n) <= distance)


def nll_difference(ours: dict, theirs: dict) -> Difference:
    """Ours less theirs, from the `articles` of two `perplexity.json`: `nll` (nats) and `tokens` of each article.

    Raises `UserError` where they are not numbers of the same articles.
    """
    (ours_nll, tokens), (theirs_nll, theirs_tokens) = map(_articles, (ours, theirs))
    if not np.array_equal(tokens, theirs_tokens):
        raise UserError("the results are not comparable: their articles have other numbers of tokens")
    return per_token(ours_nll - theirs_nll, tokens)


def mean_nll(result: dict) -> Difference:
    """A `perplexity.json`'s own negative log-likelihood: its `nll_difference` from one that is always certain."""
    return per_token(*_articles(result))


def per_token(sums: np.ndarray, tokens: np.ndarray) -> Difference:
    """Of articles' sums over their tokens, `[articles]` each; articles without a token are none."""
    sums, tokens = sums[tokens > 0], tokens[tokens > 0]
    count, mean = len(tokens), sums.sum() / tokens.sum()
    shares = (sums - mean * tokens) / tokens.mean()
    deviation = math.sqrt((shares**2).sum() / (count - 1)) if count > 1 else math.nan
    return Difference(float(mean), deviation, count)


def _articles(result: dict) -> tuple[np.ndarray, np.ndarray]:
    """Negative log-likelihoods and numbers of tokens."""
    nll, tokens = (numbers(result["articles"].get(key)) for key in ("nll", "tokens"))
    if nll.shape != tokens.shape or tokens.min(initial=0) < 0 or not tokens.any():
        raise UserError("a perplexity's articles are not numbers (nll, tokens of each); make it again")
    return nll, tokens


def numbers(values: object) -> np.ndarray:
    """A file's values by article, `[articles]` float64; empty where they are not finite numbers in one row."""
    try:
        found = np.array(values, dtype=float)
    except (TypeError, ValueError, OverflowError):
        return np.array([])
    return found if found.ndim == 1 and np.isfinite(found).all() else np.array([])


@functools.cache
def t_quantile(degrees_of_freedom: int) -> float:
    """Half the width, in standard errors, of an interval that Student's t leaves with `CONFIDENCE`.

    With t = sqrt(df) tan(a), a's density is proportional to cos(a)^(df - 1). Six digits.
    """
    # Where the density is below exp(-100) there is nothing left to sum up: cos(a)^n < exp(-n a^2 / 2).
    end = min(math.pi / 2, math.sqrt(200 / degrees_of_freedom))
    angles = np.linspace(0, end, 100_001)
    density = np.cos(angles) ** (degrees_of_freedom - 1)
    mass = np.concatenate([[0], np.cumsum(density[1:] + density[:-1])])
    return math.sqrt(degrees_of_freedom) * math.tan(np.interp(CONFIDENCE * mass[-1], mass, angles))
