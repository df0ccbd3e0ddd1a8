"""Perplexity of a text: the exponential of the mean negative log-likelihood of its tokens."""

import math
from collections.abc import Callable

import torch

from trtbuild.errors import UserError
from trtbuild.progress import item_bar

MAX_NLL = 700  # nats: the exponential of 710 is infinite


def perplexity(
    texts: list[list[int]],
    logits: Callable[[list[int]], torch.Tensor],
    max_input_len: int,
    watch: Callable[[int, torch.Tensor], None] = lambda text, predictions: None,
) -> dict:
    """Over all tokens but the first of each window of at most `max_input_len` tokens (no overlap between windows).

    `logits` gives `[tokens, vocab]` for one window. Returns perplexity, mean negative log-likelihood (nats), tokens,
    and of each text, an article, under `articles` the sum of its negative log-likelihoods (`nll`) and its `tokens`.
    `watch` is shown the logits that predict a token, of each window and with its text's number. Raises `UserError`
    where there is no such number.
    """
    if max_input_len < 2:
        raise UserError(f"max_input_len is {max_input_len}; a perplexity needs windows of at least 2 tokens")
    nll, tokens = [0.0] * len(texts), [0] * len(texts)
    starts = [(i, j) for i, text in enumerate(texts) for j in range(0, len(text), max_input_len)]
    windows = [(i, texts[i][j : j + max_input_len]) for i, j in starts]
    with item_bar(sum(map(len, texts)), "perplexity", "token") as bar:
        for number, (i, window) in enumerate(windows):
            bar.set_postfix_str(f"article {i + 1} of {len(texts)}", refresh=False)
            if len(window) > 1:
                predictions = logits(window)[:-1].float()
                targets = torch.tensor(window[1:], device=predictions.device)
                loss = torch.nn.functional.cross_entropy(predictions, targets, reduction="none")
                nll[i] += loss.double().sum().item()
                if not math.isfinite(nll[i]):
                    raise UserError(
                        f"logits of window {number} of the text are not finite; where that is float16, use bfloat16"
                    )
                tokens[i] += len(targets)
                watch(i, predictions)
            bar.update(len(window))
    if not any(tokens):
        raise UserError("there is no text to compute a perplexity of; every text has fewer than two tokens")
    mean = math.fsum(nll) / sum(tokens)
    if mean > MAX_NLL:
        raise UserError(f"the mean negative log-likelihood is {mean:.1f} nats: the model computes nothing useful")
    articles = {"nll": nll, "tokens": tokens}
    return {"perplexity": math.exp(mean), "mean_nll": mean, "tokens": sum(tokens), "articles": articles}
