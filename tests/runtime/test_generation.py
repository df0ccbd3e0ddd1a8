"""Batched generation against `transformers`, and everything that ends or refuses it."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from trtbuild.errors import UserError
from trtbuild.runtime.generation import generate
from trtbuild.runtime.open import open_engine
from trtbuild.runtime.sampling import SamplingParams
from trtbuild.tokenizer.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def session(tiny_engine):
    return open_engine(tiny_engine, "portable", "cpu").session


@pytest.fixture(scope="module")
def model(tiny_checkpoint):
    return AutoModelForCausalLM.from_pretrained(tiny_checkpoint)


@pytest.fixture(scope="module")
def tokenizer(tiny_checkpoint):
    return Tokenizer(tiny_checkpoint)


@pytest.fixture(autouse=True)
def fixed_prompts():
    """Of fresh ones, one run in some hundreds would hold two best logits within rounding of each other."""
    torch.manual_seed(2024)


def random_prompts(lengths):
    return [torch.randint(2, 258, (n,)).tolist() for n in lengths]


def expected_ids(model, prompt, **options):
    ids = torch.tensor([prompt])
    options = {"max_new_tokens": 16, "do_sample": False, "eos_token_id": None, "pad_token_id": 0} | options
    return model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0, len(prompt) :].tolist()


@pytest.mark.parametrize("lengths", [[1], [32], [5, 5, 5], [1, 32, 7, 12]], ids=str)
def test_greedy_equals_transformers(session, model, lengths):
    prompts = random_prompts(lengths)
    outputs = generate(session, prompts, SamplingParams(16))
    for prompt, output in zip(prompts, outputs, strict=True):
        assert output.output_ids == expected_ids(model, prompt)
        assert output.finish_reason == "length"


def test_repetition_penalty_equals_transformers(session, model):
    prompts = random_prompts([3, 20, 11])
    outputs = generate(session, prompts, SamplingParams(16, repetition_penalty=1.4))
    expected = [expected_ids(model, prompt, repetition_penalty=1.4) for prompt in prompts]
    assert [output.output_ids for output in outputs] == expected
    assert expected != [expected_ids(model, prompt) for prompt in prompts]  # the penalty matters here


def test_what_must_not_come_equals_transformers(session, model):
    """Ends that come later, and words of one to three tokens that a free run says."""
    prompts = random_prompts([3, 20, 11])
    runs = [output.output_ids for output in generate(session, prompts, SamplingParams(16))]
    ends, words = runs[0][2:3], [runs[0][4:5], runs[1][3:6], runs[2][:2]]
    params = SamplingParams(
        16, eos_token_ids=tuple(ends), min_output_len=9, bad_words=tuple(map(tuple, words)), repetition_penalty=1.01
    )
    options = {"eos_token_id": ends, "min_new_tokens": 9, "bad_words_ids": words, "repetition_penalty": 1.01}
    outputs = generate(session, prompts, params)
    for prompt, run, output in zip(prompts, runs, outputs, strict=True):
        assert output.output_ids == expected_ids(model, prompt, **options)
        assert output.output_ids != run


def test_several_outputs_of_a_prompt(session):
    """Neighbours, over the bounds of batches of 4, each drawn with the seed of its number."""
    prompts = random_prompts([3, 20])
    params = {"temperature": 1.0, "top_k": 50}
    outputs = generate(session, prompts, SamplingParams(8, seed=7, num_return_sequences=3, **params))
    for i, output in enumerate(outputs):
        assert generate(session, [prompts[i // 3]], SamplingParams(8, seed=7 + i, **params)) == [output]
    assert len({tuple(output.output_ids) for output in outputs}) == len(outputs) == 6


@pytest.mark.parametrize("word", [(5, 320), (-1,)], ids=str)
def test_bad_words_of_another_vocabulary(session, word):
    with pytest.raises(UserError, match="outside the engine's vocabulary of 320"):
        generate(session, [[5]], SamplingParams(4, bad_words=((5,), word)))


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0, "top_k": 50, "seed": 3}], ids=["greedy", "sampled"])
def test_more_prompts_than_a_batch_holds(session, sampling):
    """Ten prompts in batches of 4, 4 and 2 give what each gives alone (prompt i alone has the seed + i)."""
    prompts = random_prompts([4, 31, 1, 9, 9, 2, 16, 5, 8, 3])
    together = generate(session, prompts, SamplingParams(12, **sampling))
    for i, (prompt, output) in enumerate(zip(prompts, together, strict=True)):
        own = sampling | ({"seed": 3 + i} if sampling else {})
        assert generate(session, [prompt], SamplingParams(12, **own))[0] == output


@pytest.mark.parametrize("count", [1, 5])
def test_end_of_sequence(session, model, count):
    """The token that a greedy run shows first at some step is made an end: the run stops there, others go on."""
    prompts = random_prompts([6, 3, 10, 1, 2][:count])
    runs = [output.output_ids for output in generate(session, prompts, SamplingParams(16))]
    eos = runs[0][5]
    outputs = generate(session, prompts, SamplingParams(16, eos_token_ids=(eos, 9999)))
    for run, output in zip(runs, outputs, strict=True):
        stop = run.index(eos) + 1 if eos in run else 16
        assert output.output_ids == run[:stop]
        assert output.finish_reason == ("eos" if eos in run else "length")
    assert len(outputs[0].output_ids) <= 6


def test_end_of_sequence_at_the_last_token_is_eos(session):
    prompt = random_prompts([4])
    first = generate(session, prompt, SamplingParams(1))[0].output_ids[0]
    output = generate(session, prompt, SamplingParams(1, eos_token_ids=(first,)))[0]
    assert (output.output_ids, output.finish_reason) == ([first], "eos")


def test_stop_word_over_several_tokens(session):
    """Letters for ids make a word of three tokens; only the sequence that says it stops."""
    prompts = random_prompts([6, 3])
    decode = lambda ids: "".join(chr(0x100 + i) for i in ids)
    runs = [output.output_ids for output in generate(session, prompts, SamplingParams(16))]
    word = decode(runs[0][4:7])
    stop = decode(runs[0]).index(word) + 3
    outputs = generate(session, prompts, SamplingParams(16, stop_words=("never", word)), decode)
    assert outputs[0].output_ids == runs[0][:stop]
    assert outputs[0].finish_reason == "stop"
    if word not in decode(runs[1]):
        assert (outputs[1].output_ids, outputs[1].finish_reason) == (runs[1], "length")


def test_stop_word_of_letters_of_several_bytes(session):
    """A token of a byte each: the word is one letter, and three tokens."""
    prompts = random_prompts([6])
    run = generate(session, prompts, SamplingParams(16))[0].output_ids
    assert len(set(run[4:7])) == 3
    code = dict(zip(run[4:7], "\u65e5".encode(), strict=True))
    decode = lambda ids: bytes(code.get(i, 46) for i in ids).decode(errors="replace")
    output = generate(session, prompts, SamplingParams(16, stop_words=("\u65e5",)), decode)[0]
    assert (output.output_ids, output.finish_reason) == (run[: decode(run).index("\u65e5") + 3], "stop")


def test_stop_word_that_begins_with_a_space(session):
    """SentencePiece leaves the space of a text's first token out, so a token more than the word has is decoded."""
    prompts = random_prompts([6])
    run = generate(session, prompts, SamplingParams(16))[0].output_ids
    assert len(set(run[4:7])) == 3
    code = dict(zip(run[4:7], " ab", strict=True))
    decode = lambda ids: "".join(code.get(i, ".") for i in ids).removeprefix(" ")
    output = generate(session, prompts, SamplingParams(16, stop_words=(" ab",)), decode)[0]
    assert (output.output_ids, output.finish_reason) == (run[: decode(run).index(" ab") + 3], "stop")


def test_stop_words_need_a_decoder(session):
    with pytest.raises(ValueError, match="stop words need a tokenizer"):
        generate(session, [[5]], SamplingParams(4, stop_words=("x",)))


def test_on_token_sees_every_token_in_order(session):
    prompts = random_prompts([3, 8, 1, 30, 5, 6])
    eos = generate(session, prompts, SamplingParams(16))[1].output_ids[3]
    for count in (4, 6):  # a batch, and more than that
        seen = [[] for _ in prompts[:count]]
        order = []

        def on_token(prompt, token):
            seen[prompt].append(token)  # noqa: B023
            order.append(len(seen[prompt]))  # noqa: B023

        params = SamplingParams(16, eos_token_ids=(eos,))
        outputs = generate(session, prompts[:count], params, on_token=on_token)
        assert seen == [output.output_ids for output in outputs]
        assert order == sorted(order) or count > 4  # step by step


@pytest.mark.parametrize(
    ("prompts", "length", "message"),
    [
        ([[5], []], 4, "prompt 1 is empty"),
        ([[5], [7] * 33], 4, "prompt 1 has 33 tokens, the engine's max_input_len is 32"),
        ([[5]] * 9 + [[7] * 40], 4, "prompt 9 has 40 tokens"),
        ([[5]], 17, "max_output_len 17 is more than the engine's 16"),
    ],
    ids=["empty", "too-long", "too-long-in-a-later-batch", "output"],
)
def test_refused_before_anything_runs(session, prompts, length, message):
    seen = []
    with pytest.raises(UserError, match=message):
        generate(session, prompts, SamplingParams(length), on_token=lambda *token: seen.append(token))
    assert seen == []


def test_no_prompts_no_outputs(session):
    assert generate(session, [], SamplingParams(4)) == []


@pytest.mark.parametrize("count", [0, 5])
def test_prefill_refuses_a_batch_of_the_wrong_size(session, count):
    with pytest.raises(UserError, match=f"{count} prompts in one batch; the engine's max_batch_size is 4"):
        session.prefill([[5]] * count)


def test_decode_up_to_the_cache_and_no_further(session, model):
    """Position 48 is the last; its logits are right, and one more is refused."""
    prompt = random_prompts([32])[0]
    logits = session.prefill([prompt])
    sequence = list(prompt)
    for _ in range(16):
        sequence.append(int(logits.argmax()))
        logits = session.decode(torch.tensor(sequence[-1:], dtype=torch.int32))
    with torch.inference_mode():
        expected = model(torch.tensor([sequence])).logits[0, -1]
    assert (logits[0] - expected).norm() / expected.norm() < 1e-4
    with pytest.raises(UserError, match="max_length 48"):
        session.decode(torch.tensor([5], dtype=torch.int32))


def test_all_logits_are_those_of_transformers(session, model):
    prompts = random_prompts([7, 1, 32])
    packed = session.prefill(prompts, all_logits=True)
    for prompt, rows in zip(prompts, packed.split([7, 1, 32]), strict=True):
        with torch.inference_mode():
            expected = model(torch.tensor([prompt])).logits[0]
        assert (rows - expected).norm() / expected.norm() < 1e-4
    last = packed[[6, 7, 39]]  # of fewer rows, which another kernel may multiply
    assert (session.prefill(prompts) - last).norm() / last.norm() < 1e-6


def test_text_of_a_generation(session, model, tokenizer):
    prompt = tokenizer.encode("One small step")
    output = generate(session, [prompt], SamplingParams(8))[0]
    assert tokenizer.text(output.output_ids) == tokenizer.decode(expected_ids(model, prompt, max_new_tokens=8))


@pytest.mark.parametrize("rows", [1, 7, 12, 30])
def test_long_steps_go_in_pieces(session, model, monkeypatch, rows):
    """Which end within prompts and between them; generation goes on from all of them."""
    prompts = random_prompts([5, 12, 1, 17])
    whole = session.prefill(prompts, all_logits=True).clone()
    last = session.prefill(prompts).clone()
    monkeypatch.setattr("trtbuild.runtime.session.LAUNCHED_ROWS", rows)
    torch.testing.assert_close(session.prefill(prompts, all_logits=True), whole)
    torch.testing.assert_close(session.prefill(prompts), last)
    for prompt, output in zip(prompts, generate(session, prompts, SamplingParams(8)), strict=True):
        assert output.output_ids == expected_ids(model, prompt, max_new_tokens=8)
