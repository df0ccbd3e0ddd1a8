"""The text that a model is calibrated with."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from trtbuild.datasets import load_articles
from trtbuild.errors import UserError
from trtbuild.tokenizer.tokenizer import Tokenizer


@dataclass(frozen=True)
class Samples:
    """Token ids of each sample, and the sha256 of the texts that they come from."""

    tokens: list[list[int]]
    sha256: str


def calibration_samples(checkpoint_dir: Path, *, dataset: dict, samples: int, length: int, seed: int) -> Samples:
    """`samples` articles of a data set in an order drawn with `seed`, each cut to `length` tokens.

    `dataset`: name, split, and config and revision for one on the hub. Raises `UserError` if it has fewer articles than
    asked for, or other columns.
    """
    if length < 2:
        raise UserError(f"length is {length}; a sample needs at least 2 tokens")
    articles = load_articles(**dataset, samples=samples, seed=seed)
    tokenizer = Tokenizer(checkpoint_dir)
    texts = [article.article for article in articles]
    tokens = [tokenizer.encode(text)[:length] for text in texts]
    if empty := [article.id for article, ids in zip(articles, tokens, strict=True) if len(ids) < 2]:
        raise UserError(f"the article {empty[0]} of {dataset['name']} has fewer than two tokens; remove it")
    return Samples(tokens, hashlib.sha256(json.dumps(texts).encode()).hexdigest())
