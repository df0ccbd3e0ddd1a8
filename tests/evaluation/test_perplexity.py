"""Perplexity against the loss that `transformers` computes."""

import math

import pytest
import torch
from transformers import AutoModelForCausalLM

from trtbuild.errors import UserError
from trtbuild.evaluation.hugging_face import HuggingFaceModel
from trtbuild.evaluation.perplexity import perplexity
from trtbuild.runtime.open import open_engine


@pytest.fixture(scope="module")
def model(tiny_checkpoint):
    return AutoModelForCausalLM.from_pretrained(tiny_checkpoint)


@pytest.fixture(scope="module", params=["portable engine", "Hugging Face"])
def logits(request, tiny_engine, tiny_checkpoint):
    if request.param == "Hugging Face":
        return HuggingFaceModel(tiny_checkpoint, device="cpu").logits
    session = open_engine(tiny_engine, "portable", "cpu").session
    return lambda ids: session.prefill([ids], all_logits=True)


def random_texts(*lengths):
    return [torch.randint(2, 258, (n,)).tolist() for n in lengths]


@pytest.mark.parametrize("lengths", [[20], [32, 9, 2]], ids=str)
def test_equals_the_loss_of_transformers(model, logits, lengths):
    texts = random_texts(*lengths)
    result = perplexity(texts, logits, 32)
    losses = []
    for text in texts:
        ids = torch.tensor([text])
        with torch.inference_mode():
            losses.append(model(ids, labels=ids).loss.double().item() * (len(text) - 1))
    total, tokens = sum(losses), sum(lengths) - len(lengths)
    assert result["articles"]["nll"] == pytest.approx(losses, rel=1e-4)
    assert result["articles"]["tokens"] == [length - 1 for length in lengths]
    assert result["tokens"] == tokens
    assert result["mean_nll"] == pytest.approx(total / tokens, rel=1e-4)
    assert result["perplexity"] == pytest.approx(math.exp(total / tokens), rel=1e-4)


def test_long_texts_are_cut_into_windows(model, logits):
    """75 tokens in windows of 32, 32 and 11; each loses its first token; a window of one token counts nothing."""
    text, single = random_texts(75, 33)
    result = perplexity([text, single, [5]], logits, 32)
    assert result["tokens"] == 31 + 31 + 10 + 31
    assert result["articles"]["tokens"] == [31 + 31 + 10, 31, 0]
    assert sum(result["articles"]["nll"]) == pytest.approx(103 * result["mean_nll"])
    total = 0.0
    for window in (text[:32], text[32:64], text[64:], single[:32]):
        ids = torch.tensor([window])
        with torch.inference_mode():
            total += model(ids, labels=ids).loss.double().item() * (len(window) - 1)
    assert result["perplexity"] == pytest.approx(math.exp(total / 103), rel=1e-4)


def test_of_uniform_predictions_is_the_vocabulary():
    result = perplexity(random_texts(50), lambda ids: torch.zeros(len(ids), 320), 16)
    assert result["perplexity"] == pytest.approx(320, rel=1e-6)


@pytest.mark.parametrize(
    ("texts", "window", "message"),
    [
        ([], 32, "no text to compute a perplexity of"),
        ([[5], []], 32, "every text has fewer than two tokens"),
        ([[5, 6]], 1, "max_input_len is 1"),
        ([[5, 6]], 0, "max_input_len is 0"),
    ],
)
def test_refused(texts, window, message):
    with pytest.raises(UserError, match=message):
        perplexity(texts, lambda ids: torch.zeros(len(ids), 320), window)
