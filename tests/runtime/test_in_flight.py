"""Sequences that come and go while others run: random schedules, after every step of which pages are counted.

Every output equals what its prompt led to alone, in a batch of one with caches of its own.
"""

import sys
from collections import Counter
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

sys.path.append(str(Path(__file__).parents[1] / "decoder"))
from test_ranks import MODELS, networks_of, quantized, scales_of

from trtbuild.decoder.mapping import Mapping
from trtbuild.engine.config import BuildLimits
from trtbuild.engine.portable import PortableEngine
from trtbuild.errors import UserError
from trtbuild.runtime.generation import generate
from trtbuild.runtime.in_flight import InFlight, schedule
from trtbuild.runtime.pages import SCRATCH, Pages, WholePages
from trtbuild.runtime.sampling import SamplingParams
from trtbuild.runtime.scheduler import Scheduler, Sequence
from trtbuild.runtime.session import PortableSession

LIMITS = BuildLimits(max_batch_size=2, max_input_len=2000, max_output_len=24)
LENGTHS = (1, 2, 3, 5, 8, 13, 16, 17, 21, 32, 33, 40, 64, 65, 90, 300)
pytestmark = pytest.mark.usefixtures("one_thread")


@cache
def session_of(name: str, kind: str | None = None, cache_dtype: torch.dtype | None = None) -> PortableSession:
    model = MODELS[name]()
    scales = scales_of(model.config, cache_dtype)
    (network,) = networks_of(
        model.config, quantized(model, kind), torch.float32, scales, [Mapping()], LIMITS.max_length
    )
    return PortableSession(PortableEngine(network, LIMITS, torch.device("cpu")))


@cache
def prompts() -> list[list[int]]:
    """Of all lengths; half of them begin like others."""
    draw = torch.Generator().manual_seed(7)
    beginnings = [torch.randint(320, (70,), generator=draw).tolist() for _ in range(2)]
    found = []
    for length in (*LENGTHS, 2000):
        ids = torch.randint(320, (length,), generator=draw).tolist()
        found += [ids, (beginnings[length % 2] + ids)[:length]]
    return found


@cache
def alone(session: PortableSession, index: int) -> list[int]:
    return generate(session, [prompts()[index]], SamplingParams(24))[0].output_ids


class Audited(InFlight):
    """Counts pages after every step."""

    steps_taken = 0

    def _launch(self):
        launched = super()._launch()
        pages, there = self.scheduler.pages, [*self.scheduler.running, *self.scheduler.entering]
        owners = Counter(page for sequence in there for page in sequence.pages)
        if isinstance(pages, WholePages):
            owners.update(pages._sources.values())
        assert pages.owners == [owners[page] for page in range(pages.count + 1)]
        assert SCRATCH not in owners
        assert pages.free + len(owners) == pages.count  # none is lost
        assert len(there) <= self.scheduler.rows
        if isinstance(pages, WholePages):
            assert len({sequence.pages[0] for sequence in there}) == len(there)
            assert pages._sources.keys() <= {sequence.pages[0] for sequence in self.scheduler.entering}
            there = []
        for sequence in there:
            assert len(sequence.pages) == len({*sequence.pages}) == pages.needed(sequence.positions)
            own = sequence.pages[len(sequence.prompt) // pages.size :]
            assert all(owners[page] == 1 for page in own)  # those that new tokens are written to
            for i, page in enumerate(sequence.pages):
                if owners[page] > 1:
                    shared = [other for other in there if page in other.pages]
                    assert len({tuple(other.prompt[: (i + 1) * pages.size]) for other in shared}) == 1
        self.steps_taken += 1
        return launched


def run(session, requests, params=SamplingParams(24), page_size=16, pages=0, rows=0, budget=0):
    """Outputs of `requests`, pairs of a prompt's index and an output's length, and how many steps it took.

    `page_size` 0: a page holds a sequence.
    """
    sequences = [Sequence(i, prompts()[index], length) for i, (index, length) in enumerate(requests)]
    scheduler = schedule(session, sequences, params, page_size, pages)
    scheduler.rows = min(scheduler.rows, rows or scheduler.rows)
    scheduler.budget = budget or scheduler.budget
    outputs = [[] for _ in requests]

    def take(sequence: Sequence, token: int) -> bool:
        output = outputs[sequence.index]
        assert len(output) < sequence.max_output_len
        output.append(token)
        return token in params.eos_token_ids or len(output) == sequence.max_output_len

    flight = Audited(session, scheduler, params, take)
    flight.run()
    assert scheduler.pages.free == scheduler.pages.count
    assert not any(scheduler.pages.owners)
    return outputs, flight.steps_taken


def expected(session, requests):
    return [alone(session, index)[:length] for index, length in requests]


requests_of = st.lists(st.tuples(st.sampled_from(range(2 * len(LENGTHS))), st.integers(1, 24)), min_size=1, max_size=64)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    requests=requests_of,
    page_size=st.sampled_from([0, 4, 16, 64]),
    spare=st.integers(0, 40),
    rows=st.integers(1, 64),
    budget=st.sampled_from([1, 7, 64, 512]),
    ends=st.integers(0, 3),
)
def test_every_output_is_what_its_prompt_leads_to_alone(one_thread, requests, page_size, spare, rows, budget, ends):
    """With so few pages that sequences wait; with tokens that end a sequence, which are some of those that come."""
    session = session_of("llama")
    needs = [-(-(len(prompts()[index]) + length) // page_size) if page_size else 1 for index, length in requests]
    eos = tuple(sorted({alone(session, index)[5] for index, _ in requests[:ends]}))
    params = SamplingParams(24, eos_token_ids=eos)
    pages = max(needs) + spare if page_size else min(1 + spare, len(requests), 32)
    outputs, _ = run(session, requests, params, page_size, pages, rows, budget)
    for output, whole in zip(outputs, expected(session, requests), strict=True):
        stop = next((i + 1 for i, token in enumerate(whole) if token in eos), len(whole))
        assert output == whole[:stop]


MIXED = [(index, 1 + 5 * index % 24) for index in (3, 30, 31, 12, 13, 0, 1, 29, 28, 31, 30, 31, 8, 9, 20, 21)]


paged = pytest.mark.parametrize(("page_size", "pages"), [(16, 30), (0, 4)], ids=["pages", "whole"])


@pytest.mark.parametrize(
    "name",
    ["llama, 1 KV head", "llama, dynamic NTK", "qwen beyond its length", "baichuan 13b", "yi"],
)
@paged
def test_families(name, page_size, pages):
    """ALiBi, log-n, both NTKs; a short budget, few pages, and sequences that wait."""
    session = session_of(name)
    outputs, steps = run(session, MIXED, page_size=page_size, pages=pages, budget=64, rows=5)
    assert outputs == expected(session, MIXED)
    assert steps > 60


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("name", ["llama", "baichuan 13b"])
@paged
def test_caches_of_8_bits(name, dtype, page_size, pages):
    session = session_of(name, None, dtype)
    outputs, _ = run(session, MIXED, page_size=page_size, pages=pages, budget=64, rows=5)
    assert outputs == expected(session, MIXED)


def test_one_that_copies_a_beginning_waits_for_others_to_enter():
    """Its source is nobody else's meanwhile: it is one of fewer than an eighth of those that run."""
    session = session_of("llama")
    requests = [((9, 11, 13, 17, 23, 25)[i % 6], 3 + 7 * i % 22) for i in range(40)]
    outputs, _ = run(session, requests, page_size=0, pages=16, rows=64, budget=512)
    assert outputs == expected(session, requests)


def test_a_prompt_of_2000_tokens_beside_short_ones():
    session = session_of("llama")
    requests = [(32, 5), (5, 24), (33, 5), (6, 24)]
    outputs, _ = run(session, requests, page_size=64)
    assert outputs == expected(session, requests)


@pytest.mark.parametrize("sampling", [{"temperature": 0.9, "top_p": 0.8}, {"temperature": 1.0, "bad_words": ((3,),)}])
def test_drawn_tokens_depend_on_the_prompts_number_alone(sampling):
    """Penalties, bad words and a least length, too, which know what came before."""
    session = session_of("llama")
    common = {"repetition_penalty": 1.3, "presence_penalty": 0.2, "min_output_len": 3, "eos_token_ids": (7, 8)}
    params = SamplingParams(24, seed=11, **common, **sampling)
    outputs, _ = run(session, MIXED, params, pages=30, budget=64, rows=5)
    for i, (index, length) in enumerate(MIXED):
        own = SamplingParams(24, seed=11 + i, **common, **sampling)
        assert outputs[i] == generate(session, [prompts()[index]], own)[0].output_ids[:length], i


def test_stop_words_and_order_of_results():
    session = session_of("llama")
    decode = lambda ids: "".join(chr(0x100 + i) for i in ids)
    some = prompts()[:20]
    words = tuple(decode(alone(session, index)[4:6]) for index in (0, 7))
    params = SamplingParams(24, stop_words=words)
    seen = [[] for _ in some]
    outputs = generate(session, some, params, decode, lambda index, token: seen[index].append(token))
    assert [output.output_ids for output in outputs] == seen
    for prompt, output in zip(some, outputs, strict=True):
        assert output == generate(session, [prompt], params, decode)[0]
    assert {output.finish_reason for output in outputs} == {"stop", "length"}


@pytest.mark.parametrize(("page_size", "common"), [(16, 64), (0, 70)])
def test_a_common_beginning_is_computed_once(monkeypatch, page_size, common):
    """Of 70 tokens in pages of 16, 64: by counting the tokens that go through the model."""
    session, sent = session_of("llama"), []
    begin_alike = [i for i in range(1, 32, 2) if len(prompts()[i]) > 70 and len(prompts()[i]) % 2 == 0]
    requests = [(index, 8) for index in begin_alike * 4]
    enter = Audited._enter
    monkeypatch.setattr(Audited, "_enter", lambda self, parts: sent.extend(parts) or enter(self, parts))
    outputs, _ = run(session, requests, page_size=page_size)
    assert outputs == expected(session, requests)
    lengths = [len(prompts()[index]) for index, _ in requests]
    assert len(requests) > 4
    assert sum(len(part) for _, part in sent) <= sum(lengths) - common * (len(requests) - 1)


def test_a_batch_of_its_own_follows_and_precedes():
    """The same memory holds caches of a batch; neither sees what the other left."""
    session = session_of("llama")
    many = [prompts()[i] for i in (4, 9, 14, 19, 24)]
    first = generate(session, many, SamplingParams(9))
    pair = generate(session, many[:2], SamplingParams(9))
    again = generate(session, many, SamplingParams(9))
    assert first == again
    assert pair == first[:2]
    session.prefill(many[:2])
    generate(session, many, SamplingParams(9))
    with pytest.raises(RuntimeError, match="begin with prefill"):  # its caches are gone
        session.decode(torch.zeros(2, dtype=torch.int32))


def test_batches_go_on_where_pages_had_no_memory(monkeypatch):
    session, some = session_of("yi"), [prompts()[i] for i in (4, 9, 14)]

    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("there is none")

    with monkeypatch.context() as patch:
        patch.setattr("trtbuild.runtime.session.PagedSteps", full)
        session.paged_steps = None  # of other tests
        with pytest.raises(torch.OutOfMemoryError):
            generate(session, some, SamplingParams(9))
    pair = generate(session, some[:2], SamplingParams(9))
    assert generate(session, some, SamplingParams(9))[:2] == pair


def test_pages_of_long_sequences_are_not_kept_for_short_ones(monkeypatch):
    session = session_of("llama")
    session.paged_steps = None  # of other tests
    monkeypatch.setattr("trtbuild.runtime.session.PAGES_ON_CPU", 4000 * session.bytes_per_position)
    for length, size, at_once in ((1500, 1500, 2), (1400, 1500, 2), (10, 10, 12), (9, 10, 12)):
        scheduler = schedule(session, [Sequence(i, [7] * length, 0) for i in range(12)], SamplingParams(1))
        assert (scheduler.pages.size, min(12, scheduler.pages.count)) == (size, at_once)


def test_too_long_for_the_pool_is_refused_with_its_number():
    session = session_of("llama")
    with pytest.raises(UserError, match="prompt 1 needs 76 positions and the caches have 64; shorten it"):
        run(session, [(0, 4), (24, 12)], pages=4)


def test_the_say_of_how_many_run():
    session, said = session_of("llama"), []
    generate(session, prompts()[:12], SamplingParams(4), say=said.append)
    assert said[-1].startswith("batch 12 of at most ")
    assert said[-1].endswith("GB of caches")


FITTING = [(66, 64), (79, 64), (80, 80), (132, 128), (150, 150), (207, 192), (280, 280)]


@pytest.mark.parametrize(("fit", "at_once"), FITTING)
def test_a_few_more_rows_than_tiles_have_are_not_worth_a_step(fit, at_once):
    """But where no others wait."""
    sequences = [Sequence(i, [7] * 10, 6) for i in range(300)]
    scheduler = Scheduler(sequences, Pages(fit, 16), 512, 4096)
    scheduler.next_chunks()
    assert len(scheduler.running) == at_once
    scheduler.leave(scheduler.running[:5])
    scheduler.next_chunks()
    assert len(scheduler.running) + len(scheduler.entering) == at_once
    all_fit = Scheduler([Sequence(i, [7] * 10, 6) for i in range(fit)], Pages(fit, 16), 512, 4096)
    all_fit.next_chunks()
    assert len(all_fit.running) == fit


def test_sequences_are_admitted_as_steps_need_them():
    """The device does not wait while the host looks at all of them."""
    scheduler = Scheduler([Sequence(i, [7] * 10, 6) for i in range(20)], Pages(40, 16), 20, 30)
    for step in range(6):
        assert [(sequence.index, len(part)) for sequence, part in scheduler.next_chunks()] == [
            (3 * step + i, 10) for i in range(3)
        ]
        assert len(scheduler.waiting) == 17 - 3 * step
    assert len(scheduler.next_chunks()) == 2
    assert not scheduler.next_chunks()
    assert len(scheduler.running) == 20


@pytest.mark.parametrize("params", [SamplingParams(9), SamplingParams(9, temperature=1, top_p=0.9, presence_penalty=1)])
def test_other_sampling_has_pages_and_memory_of_its_own(params):
    session, some = session_of("llama"), [prompts()[i] for i in (4, 9, 14)]
    generate(session, some, SamplingParams(9, repetition_penalty=1.5))
    before = session.paged_steps
    generate(session, some, params)
    assert session.paged_steps is not before
    assert session.paged_steps.sizes.kind == params.kind


def test_pages_refuse_what_does_not_fit_and_give_all_back():
    pages = Pages(4, 8)
    taken, shared = pages.take([1] * 17, 20)
    assert (len(taken), shared, pages.free) == (3, 0, 1)
    assert pages.take([2] * 9, 17) is None
    more, shared = pages.take([1] * 17, 24)
    assert (more[:2], shared, pages.free) == (taken[:2], 16, 0)
    pages.give_back(taken)
    assert pages.free == 1
    pages.give_back(more)
    assert pages.free == 4
    with pytest.raises(AssertionError, match="given back twice"):
        pages.give_back(more)
    assert pages.take([1] * 17, 20)[1] == 0  # nobody has that beginning any more


def test_a_prompt_that_ends_with_a_page_computes_its_last_token():
    pages = Pages(8, 8)
    assert pages.take([1] * 16, 20)[1] == 0
    assert pages.take([1] * 16, 20)[1] == 8


def test_a_page_is_kept_until_what_it_begins_with_is_copied():
    pages = WholePages(3, 24)
    first, past = pages.take([1] * 17, 20)
    assert (len(first), past, pages.take_source(first)) == (1, 0, SCRATCH)
    second, past = pages.take([1] * 9 + [2] * 5, 20)
    assert (len(second), past) == (1, 9)
    pages.give_back(first)
    assert pages.free == 1
    third, past = pages.take([1] * 17, 24)  # the last token is computed
    assert (len(third), past) == (1, 16)
    assert pages.take([3], 4) is None
    assert pages.take_source(second) == pages.take_source(third) == first[0]
    assert pages.free == 1
    assert pages.take([1] * 17, 25) is None  # too long
    assert pages.take([1, 1, 1, 3], 24) == (first, 3)
    assert pages.take_source(first) == second[0]
