"""ROUGE (Lin 2004), and how sure the mean is: English by stemmed words, Chinese, Japanese and Korean by characters."""

import re
import unicodedata

import numpy as np

from trtbuild.errors import UserError
from trtbuild.evaluation.paired import numbers

METRICS = ("rouge1", "rouge2", "rougeL", "rougeLsum")
# Of a rouge.json, what is read.
SHAPE: dict[str, dict[str, type]] = dict.fromkeys(METRICS, dict.fromkeys(("mean", "low", "high"), float))
SHAPE |= {"provenance": {"engine": str, "dtype": str}}
RESAMPLES = 1000
TOKENIZER = "rouge-score, stemmed; Chinese, Japanese and Korean by characters"
# Kana, Hangul's letters, compatibility ideographs, half and full-width forms: several ways to write one character.
VARIANTS = re.compile("[\u1100-\u11ff\u3040-\u30ff\uf900-\ufaff\uff00-\uffef]+")
# Han with its iteration marks, kana, Hangul; no punctuation.
CHARACTER = re.compile(
    "([\u3005-\u3007\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U000323af"
    "\u3041-\u3096\u309d-\u309f\u30a1-\u30fa\u30fc-\u30ff\u31f0-\u31ff"
    "\u1100-\u11ff\u3131-\u318e\uac00-\ud7a3])"
)


class Tokenizer:
    """`rouge_score`'s tokenizer, to which all but `[a-z0-9]` is white space, with a token for each CJK character.

    Full-width letters and digits are what they stand for. A text without any of these gets `rouge_score`'s tokens.
    """

    def __init__(self) -> None:
        from rouge_score.tokenizers import DefaultTokenizer

        self.words = DefaultTokenizer(use_stemmer=True)

    def tokenize(self, text: str) -> list[str]:
        parts = CHARACTER.split(VARIANTS.sub(lambda run: unicodedata.normalize("NFKC", run[0]), text))
        tokens = self.words.tokenize(parts[0])
        for character, words in zip(parts[1::2], parts[2::2], strict=True):
            tokens += [character, *(self.words.tokenize(words) if words else ())]
        return tokens


def check_references(references: list[str]) -> None:
    """Raises `UserError` for a reference without a token, which nothing could agree with; best before the work."""
    tokenizer = Tokenizer()
    for i, reference in enumerate(references):
        if not tokenizer.tokenize(reference):
            raise UserError(
                f"reference {i}, {reference[:40]!r}, holds no word that ROUGE can score; it knows a-z, 0-9, and "
                "Chinese, Japanese and Korean characters"
            )


def score(predictions: list[str], references: list[str], seed: int = 0) -> dict[str, dict]:
    """Mean F1 in per cent and its 95% bootstrap interval for each metric, over (prediction, reference) pairs.

    And, under `articles`, the F1 of each pair.

    `rougeLsum` compares line by line; predictions are split into lines at the ends of sentences, as references are.
    Raises `UserError` as `check_references` does.
    """
    from rouge_score.rouge_scorer import RougeScorer

    check_references(references)
    scorer = RougeScorer(METRICS, tokenizer=Tokenizer())
    pairs = [
        scorer.score(full_width_sentences(reference), sentences(text))
        for text, reference in zip(predictions, references, strict=True)
    ]
    values = {metric: np.array([100 * pair[metric].fmeasure for pair in pairs]) for metric in METRICS}
    return {m: _interval(x, seed) | {"articles": x.round(4).tolist()} for m, x in values.items()}


def difference(ours: dict, theirs: dict, seed: int = 0) -> dict[str, dict[str, float]] | None:
    """Of two `rouge.json` of the same articles: the mean of ours less theirs for each metric, and its 95% interval.

    By paired bootstrap (Koehn 2004, "Statistical Significance Tests for Machine Translation Evaluation"): what is drawn
    is an article, with both models' summaries of it. None where a result has no scores by article, as older ones have
    not. Raises `UserError` where these are not numbers of as many articles.
    """
    if not all("articles" in result[metric] for result in (ours, theirs) for metric in METRICS):
        return None
    differences = {}
    for metric in METRICS:
        a, b = (_articles(result[metric]["articles"]) for result in (ours, theirs))
        if len(a) != len(b):
            raise UserError(f"the results are not comparable: {metric} is of {len(a)} and of {len(b)} articles")
        differences[metric] = _interval(a - b, seed)
    return differences


def _articles(scores: object) -> np.ndarray:
    values = numbers(scores)
    if not len(values):
        raise UserError("ROUGE's scores by article are not numbers; make rouge.json again")
    return values


def _interval(values: np.ndarray, seed: int) -> dict[str, float]:
    """The mean of values by article, and the percentiles of means of as many drawn from them."""
    draws = np.random.default_rng(seed).integers(len(values), size=(RESAMPLES, len(values)))
    low, high = np.percentile(values[draws].mean(axis=1), (2.5, 97.5))
    return {"mean": round(values.mean(), 4), "low": round(low, 4), "high": round(high, 4)}


def sentences(text: str) -> str:
    """One sentence a line."""
    return full_width_sentences(re.sub(r"(?<=[.!?])\s+", "\n", text.strip()))


def full_width_sentences(text: str) -> str:
    """One sentence a line of those that end in `。！？`, which no space follows, and in the quotes after that."""
    return re.sub(r"([。！？｡]++[”’」』）]*+)\s*+(?=\S)", r"\1\n", text)
