"""Sampling against `transformers`' logits processors, and against the probabilities themselves."""

import math

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    NoBadWordsLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from trtbuild.errors import UserError
from trtbuild.runtime.sampling import Sampler, SamplingParams, filter_logits, gumbel, philox

VOCAB = 300
CPU = torch.device("cpu")


def random_logits(rows=8, vocab=VOCAB):
    return 3 * torch.randn(rows, vocab)


def sampler(rows, first=0, prompts=None, vocab=VOCAB, **params):
    params = SamplingParams(**params)
    return Sampler(params.kind, rows, vocab, CPU).start(params, prompts or [[0]] * rows, first)


def bounded(top_k=0, top_p=1.0):
    return top_k, top_p if top_p < 1 else None


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
    actual = filter_logits(logits / temperature, *bounded(top_k, top_p))
    # The two add probabilities from opposite ends, so a token within rounding of the border may fall on either side.
    differ = (actual.isinf() != expected.isinf()).sum().item()
    assert differ <= 1
    both = actual.isfinite() & expected.isfinite()
    assert actual[both].equal(expected[both])


def test_top_p_keeps_the_token_that_crosses_it():
    logits = torch.tensor([[0.5, 0.3, 0.2]]).log()
    for top_p, kept in ((0.4, 1), (0.6, 2), (0.75, 2), (0.85, 3)):
        assert filter_logits(logits, top_p=top_p).isfinite().sum() == kept


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
        torch.testing.assert_close(sample.processed(logits), expected, rtol=1e-6, atol=0)
        tokens = sample(logits)
        assert tokens.equal(expected.argmax(-1).int())
        for sequence, token in zip(sequences, tokens.tolist(), strict=True):
            sequence.append(token)


def follow(sample, prompts, expected_of, steps=12, vocab=VOCAB):
    """Draws from fresh logits, each time as `expected_of(sequence, prompt length, logits)` has them."""
    sequences = [list(prompt) for prompt in prompts]
    for _ in range(steps):
        logits = random_logits(len(prompts), vocab)
        expected = [expected_of(s, len(p), row) for s, p, row in zip(sequences, prompts, logits, strict=True)]
        before = logits.clone()
        torch.testing.assert_close(sample.processed(logits), torch.stack(expected), rtol=1e-6, atol=1e-6)
        tokens = sample(logits)
        assert logits.equal(before)  # whoever looks at them next must find what the engine gave
        assert tokens.equal(torch.stack(expected).argmax(-1).int())
        for sequence, token in zip(sequences, tokens.tolist(), strict=True):
            sequence.append(token)
    return sequences


def processed_by(process):
    return lambda sequence, _, logits: process(torch.tensor([sequence]), logits[None])[0]


@pytest.mark.parametrize("presence", [0.0, 0.9, -0.4])
@pytest.mark.parametrize("frequency", [0.0, 1.7])
def test_presence_and_frequency_penalty_are_openais(presence, frequency):
    """mu[j] - c[j] * frequency - (c[j] > 0) * presence, c[j] how often j is in the output, a prompt not counted."""
    prompts = [[4] * 9, [5], list(range(8))]

    def expected(sequence, prompt_length, logits):
        counts = torch.bincount(torch.tensor(sequence[prompt_length:], dtype=torch.int64), minlength=8)
        return logits - counts * frequency - (counts > 0).float() * presence

    sample = sampler(3, prompts=prompts, vocab=8, presence_penalty=presence, frequency_penalty=frequency)
    follow(sample, prompts, expected, vocab=8)


@pytest.mark.parametrize("least", [1, 5])
def test_min_output_len_equals_transformers(least):
    """As MinNewTokensLength; one of two ends would come each time, and a third is outside the vocabulary."""
    prompts = [[3], list(range(7))]
    sample = sampler(2, prompts=prompts, min_output_len=least, eos_token_ids=(2, 9, VOCAB + 5))

    def expected(sequence, prompt_length, logits):
        logits[9] = 50
        process = MinNewTokensLengthLogitsProcessor(prompt_length, least, [2, 9])
        return processed_by(process)(sequence, 0, logits)

    for sequence, prompt in zip(follow(sample, prompts, expected), prompts, strict=True):
        assert 9 not in sequence[len(prompt) : len(prompt) + least]
        assert sequence[len(prompt) + least] == 9


BAD = ((3,), (1, 1), (1, 1, 4), (0, 5), (4, 0, 6, 2, 7))


@pytest.mark.parametrize("words", [BAD[:1], BAD[1:2], BAD, BAD[3:]], ids=str)
def test_bad_words_equal_transformers(words):
    """Of so few tokens that words nearly come all the time, some of which the prompt has begun."""
    prompts = [[1], [7, 0], [4, 0, 6, 2], [5] * 9]
    process = NoBadWordsLogitsProcessor([list(word) for word in words], eos_token_id=None)
    sample = sampler(4, prompts=prompts, vocab=8, bad_words=words)
    for sequence, prompt in zip(follow(sample, prompts, processed_by(process), 60, 8), prompts, strict=True):
        for end in range(len(prompt) + 1, len(sequence) + 1):
            assert all(tuple(sequence[max(0, end - len(word)) : end]) != word for word in words)


def test_all_at_once_in_the_order_of_transformers():
    prompts = [[1, 2], list(range(3, 30))]
    params = {"repetition_penalty": 1.3, "min_output_len": 4, "bad_words": ((7,), (8, 9)), "eos_token_ids": (2,)}
    sample = sampler(2, prompts=prompts, temperature=0.7, top_k=50, seed=5, **params)
    sequences = [list(prompt) for prompt in prompts]
    for _ in range(8):
        logits = random_logits(2)
        for row, (sequence, prompt) in enumerate(zip(sequences, prompts, strict=True)):
            processors = LogitsProcessorList(
                [
                    RepetitionPenaltyLogitsProcessor(1.3),
                    NoBadWordsLogitsProcessor([[7], [8, 9]], 2),
                    MinNewTokensLengthLogitsProcessor(len(prompt), 4, 2),
                    TemperatureLogitsWarper(0.7),
                    TopKLogitsWarper(50),
                ]
            )
            expected = processors(torch.tensor([sequence]), logits[row : row + 1])[0]
            torch.testing.assert_close(sample.processed(logits)[row], expected, rtol=1e-5, atol=0)
        for sequence, token in zip(sequences, sample(logits).tolist(), strict=True):
            sequence.append(token)


def test_rows_go_on_as_others_of_their_prompt():
    """What a sequence has said goes with it, and beams of one prompt go on from any of them."""
    prompt, rows, least = [4, 0], 6, 9
    params = {"bad_words": BAD, "repetition_penalty": 1.4, "min_output_len": least, "eos_token_ids": (7,)}
    sample = sampler(rows, prompts=[prompt] * rows, vocab=8, **params)
    processors = LogitsProcessorList(
        [
            RepetitionPenaltyLogitsProcessor(1.4),
            NoBadWordsLogitsProcessor([list(word) for word in BAD], 7),
            MinNewTokensLengthLogitsProcessor(len(prompt), least, [7]),
        ]
    )
    sequences = [prompt] * rows
    for _ in range(12):
        logits = random_logits(rows, 8)
        torch.testing.assert_close(sample.processed(logits), processors(torch.tensor(sequences), logits))
        parents, tokens = torch.randint(rows, (rows,)), torch.randint(7, (rows,), dtype=torch.int32)
        sample.follow(parents, tokens)
        pairs = zip(parents.tolist(), tokens.tolist(), strict=True)
        sequences = [[*sequences[parent], token] for parent, token in pairs]


def test_no_end_to_wait_for():
    logits = random_logits()
    assert sampler(8, min_output_len=3).processed(logits).equal(logits)


def test_a_sampler_that_starts_again_knows_nothing_of_before():
    """The same buffers serve the next batch, with other prompts, words and numbers of the same kind."""
    first, second = ([[1, 2, 3], [4]], [[5], [6, 7]])
    options = [
        {"presence_penalty": 1.0, "min_output_len": 2, "eos_token_ids": (5,), "bad_words": ((1,), (2, 3))},
        {"presence_penalty": 0.5, "min_output_len": 4, "eos_token_ids": (6,), "bad_words": ((9, 8), (4,))},
    ]
    used = sampler(2, prompts=first, repetition_penalty=1.1, **options[0])
    for _ in range(3):
        used(random_logits(2))
    params = SamplingParams(repetition_penalty=1.2, **options[1])
    assert params.kind == used.kind
    used.start(params, second)
    fresh = sampler(2, prompts=second, repetition_penalty=1.2, **options[1])
    for _ in range(6):
        logits = random_logits(2)
        assert used.processed(logits).equal(fresh.processed(logits))
        assert used(logits).equal(fresh(logits))


@pytest.mark.parametrize(
    "params", [{}, {"top_k": 3, "top_p": 0.4}, {"temperature": 1.0, "top_k": 1}, {"temperature": 1.0, "top_p": 1e-6}]
)
def test_greedy_is_argmax(params):
    logits = random_logits()
    tokens = sampler(8, **params)(logits)
    assert tokens.dtype == torch.int32
    assert tokens.equal(logits.argmax(-1).int())


def draw(logits, steps, first=0, prompts=None, **params):
    sample = sampler(len(logits), first, prompts, temperature=1.0, **params)
    return torch.stack([sample(logits).clone() for _ in range(steps)], 1)


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


def test_a_token_depends_on_its_place_in_the_sequence_alone():
    """A prompt that ends with what was drawn goes on as the first one did."""
    logits = random_logits(1)
    drawn = draw(logits, 20, seed=4, prompts=[[7, 8]])[0]
    assert draw(logits, 15, seed=4, prompts=[[7, 8, *drawn[:5].tolist()]])[0].equal(drawn[5:])


def test_prompt_i_alone_with_the_seed_plus_i():
    logits = random_logits()
    assert draw(logits[3:4], 20, seed=7)[0].equal(draw(logits, 20, seed=4)[3])


@pytest.mark.parametrize("seed", [-1, 2**63, 2**64 - 2, 2**70 + 5])
def test_any_integer_is_a_seed(seed):
    logits = random_logits(2)
    assert draw(logits, 8, seed=seed).equal(draw(logits, 8, seed=seed % 2**64))


def test_philox_gives_the_published_words():
    """Known answers of Random123 (kat_vectors), philox4x32-10, for counters and keys of zeros and of ones."""
    zero, ones = torch.tensor([0]), torch.tensor([-1])
    assert [int(x) for x in philox(zero, zero, zero)] == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert philox(ones, zero, zero)[0] != philox(ones >> 32 & 0xFFFFFFFF, zero, zero)[0]  # both halves of a key count


def test_noise_is_gumbels():
    """Mean and variance of 800,000, and no two sequences or places that have it in common."""
    noise = gumbel(torch.arange(40), torch.arange(40) % 3, 20_000)
    assert noise.isfinite().all()
    assert noise.mean() == pytest.approx(0.57722, abs=0.008)
    assert noise.var() == pytest.approx(1.64493, abs=0.02)
    uniform = torch.exp(-torch.exp(-noise.double()))
    expected = noise.numel() / 50
    chi_square = ((torch.histc(uniform, 50, 0, 1) - expected).square() / expected).sum()
    assert chi_square < 110  # 49 degrees of freedom, one in 10^6
    assert torch.corrcoef(noise).fill_diagonal_(0).abs().max() < 0.05


def test_rare_tokens_are_drawn_as_often_as_they_should():
    """20,000 of one part in 100,000 each, next to one that has the rest: 60 of 300 draws."""
    logits = torch.zeros(1, 20_001)
    logits[0, 0] = math.log(80_000)
    sample = sampler(1, vocab=20_001, temperature=1.0, seed=3)
    rare = sum(bool(sample(logits) > 0) for _ in range(300))
    assert rare == pytest.approx(60, abs=35)


def test_sequences_of_one_batch_draw_independently():
    tokens = draw(torch.zeros(2, VOCAB), 40)
    assert tokens[0].ne(tokens[1]).sum() >= 35  # equal by chance: 40 / 300


@pytest.mark.parametrize("temperature", [0.7, 1.5])
@pytest.mark.parametrize("filters", [{}, {"top_k": 4}, {"top_p": 0.8}])
def test_frequencies_follow_the_probabilities(temperature, filters):
    """Chi-square over 16000 draws of one fixed distribution; the bound is exceeded once in 10^5 correct samplers."""
    logits = torch.tensor([1.0, 0.5, 0.0, -0.5, -1.0, 0.8, 0.2, -3.0])
    expected = filter_logits(logits[None] / temperature, *bounded(**filters)).softmax(-1)[0].double()
    sample = sampler(800, vocab=8, temperature=temperature, seed=11, **filters)
    draws = torch.cat([sample(logits.expand(800, -1)).clone() for _ in range(20)])
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
        ({"presence_penalty": float("nan")}, "presence_penalty is nan"),
        ({"frequency_penalty": float("inf")}, "frequency_penalty is inf"),
        ({"min_output_len": -1}, "min_output_len is -1"),
        ({"min_output_len": 5, "max_output_len": 4}, "min_output_len is 5; it must be 0 to max_output_len, 4"),
        ({"bad_words": ((1,), ())}, "a bad word is empty"),
        ({"bad_words": ((2,),), "eos_token_ids": (3, 2)}, "a bad word is the end of a sequence"),
        ({"num_return_sequences": 0}, "num_return_sequences is 0"),
        ({"num_return_sequences": 2}, "2 greedy outputs of a prompt would be equal"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_invalid_parameters(params, message):
    with pytest.raises(UserError, match=message):
        SamplingParams(**params)
