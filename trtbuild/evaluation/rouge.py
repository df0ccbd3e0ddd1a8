"""ROUGE (Lin 2004) with stemming, and how sure the mean is."""

import re

import numpy as np

METRICS = ("rouge1", "rouge2", "rougeL", "rougeLsum")
RESAMPLES = 1000


def score(predictions: list[str], references: list[str], seed: int = 0) -> dict[str, dict[str, float]]:
    """Mean F1 in per cent and its 95% bootstrap interval for each metric, over (prediction, reference) pairs.

    `rougeLsum` compares line by line; predictions are split into lines at the ends of sentences, as references are.
    """
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(METRICS, use_stemmer=True)
    pairs = [scorer.score(reference, sentences(text)) for text, reference in zip(predictions, references, strict=True)]
    generator = np.random.default_rng(seed)
    draws = generator.integers(len(pairs), size=(RESAMPLES, len(pairs)))
    result = {}
    for metric in METRICS:
        values = np.array([100 * pair[metric].fmeasure for pair in pairs])
        low, high = np.percentile(values[draws].mean(axis=1), (2.5, 97.5))
        result[metric] = {"mean": round(values.mean(), 4), "low": round(low, 4), "high": round(high, 4)}
    return result


def sentences(text: str) -> str:
    """One sentence a line."""
    return re.sub(r"(?<=[.!?])\s+", "\n", text.strip())
