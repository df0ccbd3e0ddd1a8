"""Tokens come to the host in order, whole, and as soon as their steps have ended; generation cuts what is too much."""

import random

import pytest
import torch

from trtbuild.runtime import token_ring
from trtbuild.runtime.generation import generate
from trtbuild.runtime.open import open_engine
from trtbuild.runtime.sampling import SamplingParams
from trtbuild.runtime.token_ring import TokenRing

AHEADS = (1, 2, 4, 7)


class Event:
    """Of a step that may have ended when it is asked, and has when it is waited for."""

    def record(self):
        self.ended = False

    def query(self):
        self.ended = random.random() < 0.5
        return self.ended

    def synchronize(self):
        self.ended = True


@pytest.fixture(scope="module")
def session(tiny_engine):
    return open_engine(tiny_engine, "portable", "cpu").session


@pytest.fixture(params=AHEADS)
def ahead(request, monkeypatch):
    random.seed(5)
    monkeypatch.setattr(token_ring, "steps_ahead", lambda device: request.param)
    made = TokenRing.__init__

    def with_events(self, *arguments):
        made(self, *arguments)
        self._events = [Event() for _ in range(self.ahead)] if self.ahead > 1 else []

    monkeypatch.setattr(TokenRing, "__init__", with_events)
    return request.param


def test_order_and_places(ahead):
    lengths = [5, 1, 12]
    ring = TokenRing(3, torch.device("cpu"))
    for _ in range(2):  # a second time for other sequences
        ring.start(lengths)
        got, sent = [], 0
        while len(got) < 20:
            while sent < 20 and not ring.full:
                for row, length in enumerate(lengths):
                    ring.buffer[(length + sent) % ahead, row] = 100 * sent + row
                ring.send()
                sent += 1
            got += ring.receive()
        assert got == [[100 * i, 100 * i + 1, 100 * i + 2] for i in range(20)]


def letters(ids):
    return "".join(chr(0x100 + i) for i in ids)


PROMPTS = [[5, 9, 40], [7], [200, 3, 3, 8, 11]]


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0, "top_k": 60, "seed": 3}], ids=["greedy", "drawn"])
@pytest.mark.usefixtures("ahead", "one_thread")
def test_a_stop_word_that_ends_at_any_step(session, sampling):
    """Whatever part of the steps under way has come, the output is that of looking at every step."""
    runs = [output.output_ids for output in generate(session, PROMPTS, SamplingParams(16, **sampling))]
    for end in range(2, 16):
        word = letters(runs[0][end - 2 : end])
        params = SamplingParams(16, stop_words=(word,), **sampling)
        seen = []
        outputs = generate(session, PROMPTS, params, letters, lambda *token: seen.append(token))  # noqa: B023
        for i, (run, output) in enumerate(zip(runs, outputs, strict=True)):
            found = letters(run).find(word)
            assert output.output_ids == (run if found < 0 else run[: found + 2])
            assert output.finish_reason == ("length" if found < 0 else "stop")
            assert [token for prompt, token in seen if prompt == i] == output.output_ids


@pytest.mark.usefixtures("one_thread")
def test_an_end_at_any_step_and_few_steps_for_nothing(session, ahead, monkeypatch):
    run = generate(session, PROMPTS[:1], SamplingParams(16))[0].output_ids
    steps = []
    decode = session._decode
    monkeypatch.setattr(session, "_decode", lambda tokens: steps.append(1) or decode(tokens))
    for length in range(1, 17):
        steps.clear()
        end = run.index(run[length - 1]) + 1
        output = generate(session, PROMPTS[:1], SamplingParams(16, eos_token_ids=(run[length - 1],)))[0]
        assert (output.output_ids, output.finish_reason) == (run[:end], "eos")
        assert end - 1 <= len(steps) <= min(15, end - 1 + ahead - 1)


def test_no_more_steps_than_tokens(session, ahead, monkeypatch):
    steps = []
    decode = session._decode
    monkeypatch.setattr(session, "_decode", lambda tokens: steps.append(1) or decode(tokens))
    for length in (1, 2, 5, 16):
        steps.clear()
        generate(session, PROMPTS, SamplingParams(length))
        assert len(steps) == length - 1
