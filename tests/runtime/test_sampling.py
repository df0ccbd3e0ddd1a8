"""Sampling against `transformers`' logits processors, and against the probabilities themselves."""

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from trtbuild.errors import UserError
from trtbuild.runtime.sampling import Sampler, SamplingParams, filter_logits

VOCAB = 300
CPU = torch.device("cpu")


def random_logits(rows=8):
    return 3 * torch.randn(rows, VOCAB)


def sampler(rows, first=0, prompts=None, **params):
    return Sampler(SamplingParams(**params), prompts or [[0]] * rows, first, CPU)


@pytest.mark.parametrize("top_k", [0, 1, 5, VOCAB, VOCAB + 7])
@pytest.mark.parametrize("top_p", [1.0, 0.95, 0.5, 0.01])
@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.0])
def test_filter_equals_transformers(temperature, top_k, top_p):
    logits = random_logits()
    warpers = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
    if top_k:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        warpers.append(TopPLogitsWarper(top_p))
    expected = warpers(None, logits)
    actual = filter_logits(logits / temperature, SamplingParams(top_k=top_k, top_p=top_p))
    # The two add probabilities from opposite ends, so a token within rounding of the border may fall on either side.
    differ = (actual.isinf() != expected.isinf()).sum().item()
    assert differ <= 1
    both = actual.isfinite() & expected.isfinite()
    assert actual[both].equal(expected[both])


def test_top_p_keeps_the_token_that_crosses_it():
    logits = torch.tensor([[0.5, 0.3, 0.2]]).log()
    for top_p, kept in ((0.4, 1), (0.6, 2), (0.75, 2), (0.85, 3)):
        assert filter_logits(logits, SamplingParams(top_p=top_p)).isfinite().sum() == kept


@pytest.mark.parametrize("penalty", [1.3, 0.7])
def test_repetition_penalty_equals_transformers(penalty):
    """Over ragged prompts and three generated tokens; positive logits are divided, negative ones multiplied."""
    prompts = [torch.randint(VOCAB, (n,)).tolist() for n in (1, 4, 9)]
    sample = sampler(3, prompts=prompts, repetition_penalty=penalty)
    sequences = [list(prompt) for prompt in prompts]
    process = RepetitionPenaltyLogitsProcessor(penalty)
    for _ in range(4):
        logits = random_logits(3)
        expected = torch.cat([process(torch.tensor([s]), row[None]) for s, row in zip(sequences, logits, strict=True)])
        torch.testing.assert_close(sample._penalized(logits), expected, rtol=1e-6, atol=0)
        tokens = sample(logits)
        assert tokens.equal(expected.argmax(-1).int())
        for sequence, token in zip(sequences, tokens.tolist(), strict=True):
            sequence.append(token)


@pytest.mark.parametrize(
    "params", [{}, {"top_k": 3, "top_p": 0.4}, {"temperature": 1.0, "top_k": 1}, {"temperature": 1.0, "top_p": 1e-6}]
)
def test_greedy_is_argmax(params):
    logits = random_logits()
    tokens = sampler(8, **params)(logits)
    assert tokens.dtype == torch.int32
    assert tokens.equal(logits.argmax(-1).int())


def draw(logits, steps, first=0, **params):
    sample = sampler(len(logits), first, temperature=1.0, **params)
    return torch.stack([sample(logits) for _ in range(steps)], 1)


def test_a_seed_gives_the_same_tokens_again():
    logits = random_logits()
    assert draw(logits, 20, seed=4).equal(draw(logits, 20, seed=4))
    assert draw(logits, 20, seed=4).ne(draw(logits, 20, seed=5)).any(1).all()


def test_tokens_do_not_depend_on_the_batch():
    """Prompt 5 alone, in a batch of 8, and in the second batch of 4 draws the same."""
    logits = random_logits()
    together = draw(logits, 20, seed=4)
    assert draw(logits[5:6], 20, first=5, seed=4)[0].equal(together[5])
    assert draw(logits[4:8], 20, first=4, seed=4).equal(together[4:])


def test_sequences_of_one_batch_draw_independently():
    tokens = draw(torch.zeros(2, VOCAB), 40)
    assert tokens[0].ne(tokens[1]).sum() >= 35  # equal by chance: 40 / 300


@pytest.mark.parametrize("temperature", [0.7, 1.5])
@pytest.mark.parametrize("filters", [{}, {"top_k": 4}, {"top_p": 0.8}])
def test_frequencies_follow_the_probabilities(temperature, filters):
    """Chi-square over 16000 draws of one fixed distribution; the bound is exceeded once in 10^5 correct samplers."""
    logits = torch.tensor([1.0, 0.5, 0.0, -0.5, -1.0, 0.8, 0.2, -3.0])
    expected = filter_logits(logits[None] / temperature, SamplingParams(**filters)).softmax(-1)[0].double()
    sample = sampler(800, temperature=temperature, seed=11, **filters)
    draws = torch.cat([sample(logits.expand(800, -1)) for _ in range(20)])
    counts = torch.bincount(draws, minlength=8).double()
    kept = expected > 0
    assert counts[~kept].sum() == 0
    chi_square = ((counts - 16000 * expected).square()[kept] / (16000 * expected[kept])).sum().item()
    assert chi_square < 36.0  # 7 degrees of freedom or fewer


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"max_output_len": 0}, "max_output_len is 0"),
        ({"temperature": -0.1}, "temperature is -0.1"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_k": -1}, "top_k is -1"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_p": 1.01}, "top_p is 1.01"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0"),
        ({"stop_words": ("a", "")}, "a stop word is empty"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_invalid_parameters(params, message):
    with pytest.raises(UserError, match=message):
        SamplingParams(**params)
