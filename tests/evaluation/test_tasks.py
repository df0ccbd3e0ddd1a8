"""Accuracy tasks: log-likelihoods and texts of an engine beside those of the harness's own adapter of transformers."""

import json
import random
import re
import shutil
from pathlib import Path

import datasets
import evaluate
import pytest
import torch
from lm_eval.api.instance import Instance
from transformers import AutoModelForCausalLM

from trtbuild.errors import UserError
from trtbuild.evaluation.harness_model import SessionLM, TransformersLM
from trtbuild.evaluation.tasks import measure_task, task_table
from trtbuild.runtime.open import open_engine
from trtbuild.tokenizer.tokenizer import published_tokenizer

TASKS = Path(__file__).parents[1] / "data" / "lm_eval"
LENGTH = 48  # positions of the tiny engine: 32 tokens in, 16 out, a batch of 4


@pytest.fixture(scope="module")
def both(tiny_checkpoint, tiny_engine):
    """The engine, and the harness's adapter of the same weights with the engine's lengths."""
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.float32).eval()
    ours = SessionLM(open_engine(tiny_engine, device="cpu").session, published_tokenizer(tiny_checkpoint))
    return ours, TransformersLM(model, published_tokenizer(tiny_checkpoint), 32, 16)


@pytest.fixture
def project(tmp_path, monkeypatch) -> Path:
    """A folder with the task files, and a cache of its own; nothing asks a hub."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    shutil.copytree(TASKS, tmp_path / "tasks")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def requests(kind: str, arguments: list[tuple]) -> list[Instance]:
    return [Instance(kind, {}, one, i) for i, one in enumerate(arguments)]


def words(count: int) -> str:
    return "".join(random.choices("abcdefgh ", k=count))


def test_loglikelihoods_equal_the_harness_own(both):
    """Choices of one token and of several for a context, contexts in pieces, and longer than the engine holds."""
    random.seed(1)
    pairs = []
    for length in (1, 32, 33, 48, 100):
        context = words(length - 1) + "x"
        pairs += [(context, choice) for choice in ("a", "b", "abc", "abd", words(9) + "y", words(36) + "y")]
    pairs += [("", "begin"), ("trailing space ", "word"), ("x", words(44) + "y")]
    random.shuffle(pairs)
    ours, theirs = (lm.loglikelihood(requests("loglikelihood", pairs)) for lm in both)
    for pair, (a, greedy), (b, also_greedy) in zip(pairs, ours, theirs, strict=True):
        assert a == pytest.approx(b, abs=1e-4), pair
        assert greedy == also_greedy, pair


def test_what_is_greedy(both):
    """Of random weights hardly any continuation is; what generation gives is."""
    (text,) = both[0].generate_until(requests("generate_until", [("abc", {"until": [], "max_gen_toks": 3})]))
    ids = both[0].tok_encode("abc")
    answers = both[0]._loglikelihood_tokens(
        [(None, ids, continuation) for continuation in (greedy_ids(both[0], ids, 3), ids)]
    )
    assert [greedy for _, greedy in answers] == [True, False]
    assert isinstance(text, str)


def greedy_ids(lm: SessionLM, ids: list[int], count: int) -> list[int]:
    ids = list(ids)
    for _ in range(count):
        ids.append(lm.session.prefill([ids]).argmax().item())
    return ids[-count:]


def test_contexts_are_run_once(both, monkeypatch):
    """Four choices of one token are one row more than none; those of several share their context."""
    session, steps = both[0].session, []
    step = session.step

    def counted(chunks):
        steps.append([len(chunk.tokens) for chunk in chunks])
        return step(chunks)

    monkeypatch.setattr(session, "step", counted)
    both[0].loglikelihood(requests("loglikelihood", [("abcdefgh", choice) for choice in "abcd"]))
    assert steps == [[7], [1]]
    steps.clear()
    both[0].loglikelihood(
        requests("loglikelihood", [(f"abcdefg{x}", choice) for x in "123456" for choice in ("ab", "cd")])
    )
    assert steps == [[7] * 4, [2] * 4, [2] * 4, [7] * 2, [2] * 2, [2] * 2]


def test_whole_texts_equal_the_harness_own(both):
    texts = [(words(length),) for length in (1, 48, 49, 120)]
    ours, theirs = (lm.loglikelihood_rolling(requests("loglikelihood_rolling", texts)) for lm in both)
    assert ours == pytest.approx(theirs, rel=1e-6, abs=1e-4)


def test_texts_equal_the_harness_own(both):
    """With stops within what would come, and prompts that are cut."""
    options = (
        {"until": ["\n"], "max_gen_toks": 9},
        {"until": [], "max_gen_toks": 16},
        {"until": "e", "max_gen_toks": 12},
    )
    pairs = [(words(length), one) for length in (3, 31, 60) for one in options]
    ours, theirs = (lm.generate_until(requests("generate_until", pairs)) for lm in both)
    assert ours == theirs
    (stop,) = {text[3] for text in ours[1:2]}
    cut = both[0].generate_until(requests("generate_until", [(pairs[1][0], {"until": [stop], "max_gen_toks": 16})]))
    assert cut == [ours[1].split(stop)[0]]


def test_generation_that_samples(both):
    pair = ("abc", {"until": [], "max_gen_toks": 12, "do_sample": True, "temperature": 2.0, "top_k": 50})
    greedy = ("abc", {"until": [], "max_gen_toks": 12})
    drawn, again, likeliest = (
        both[0].generate_until(requests("generate_until", [one])) for one in (pair, pair, greedy)
    )
    assert drawn == again != likeliest


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"until": [], "max_gen_toks": 17},
            "a task generates 17 tokens, and the engine's max_output_len is 16; build with",
        ),
        ({"until": [], "penalty_alpha": 0.6}, "a task generates with penalty_alpha; known are early_stopping, "),
    ],
)
def test_generation_that_there_is_not(both, options, message):
    with pytest.raises(UserError, match=message):
        both[0].generate_until(requests("generate_until", [("abc", options)]))


def test_a_continuation_that_is_too_long(both):
    with pytest.raises(UserError, match=r"a continuation of 60 tokens, and the engine's max_length is 48; build with"):
        both[0].loglikelihood(requests("loglikelihood", [("a", "b" * 60)]))


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        ("loglikelihood", ("", ""), "a task has an empty answer (continuation), after ''; give it text"),
        ("loglikelihood", ("abc", ""), "a task has an empty answer (continuation), after 'abc'; give it text"),
        ("loglikelihood", (" ", "a"), "a task has a context without tokens in (' ', 'a'); give it text that is not"),
        ("loglikelihood", ("", "<s>"), "a task has a continuation without tokens in ('', '<s>'); give it text"),
        (
            "generate_until",
            ("", {"until": []}),
            "a task has an empty prompt, and the tokenizer begins none with a token",
        ),
    ],
)
def test_what_has_no_tokens(both, kind, arguments, message):
    """The harness's own adapter fails as well, without a word; this tokenizer puts nothing before a text."""
    ours, theirs = both
    with pytest.raises(UserError, match=re.escape(message)):
        getattr(ours, kind)(requests(kind, [("abc", arguments[1] or "d"), arguments]))
    with pytest.raises((IndexError, AssertionError, RuntimeError)):
        getattr(theirs, kind)(requests(kind, [arguments]))


def test_a_task_and_where_it_comes_from(project, tiny_checkpoint, tiny_engine):
    options = {"checkpoint_dir": tiny_checkpoint, "include": "tasks", "device": "cpu", "limit": 3, "num_fewshot": 0}
    lengths = {"max_input_len": 32, "max_output_len": 16}
    ours = measure_task(task="opposites", engine_dir=tiny_engine, **options)
    theirs = measure_task(task="opposites", model="tiny", **lengths, **options)
    assert ours["results"] == theirs["results"]
    assert ours["n-samples"] == {"opposites": {"original": 14, "effective": 3}}
    origin = ours["provenance"]
    assert (origin["engine"], origin["limit"], origin["max_input_len"]) == ("portable", 3, LENGTH)
    assert theirs["provenance"]["engine"] == "transformers"
    same = (
        "task",
        "limit",
        "num_fewshot",
        "max_input_len",
        "max_output_len",
        "prompts_sha256",
        "source_sha256",
        "seed",
    )
    assert {key: origin[key] for key in same} == {key: theirs["provenance"][key] for key in same}
    assert origin["versions"]["lm_eval"]
    json.dumps(ours, allow_nan=False)
    assert task_table(ours).split()[:3] == ["opposites", "acc", f"{ours['results']['opposites']['acc,none']:.4f}"]
    more = measure_task(task="opposites", engine_dir=tiny_engine, **options | {"limit": 4})
    assert more["provenance"]["prompts_sha256"] != origin["prompts_sha256"]


def test_examples_before_a_question(project, tiny_checkpoint, tiny_engine):
    """They change what is asked; the same ones each time."""
    options = {"checkpoint_dir": tiny_checkpoint, "engine_dir": tiny_engine, "include": "tasks", "device": "cpu"}
    results = [measure_task(task="opposites", limit=2, num_fewshot=count, **options) for count in (0, 2, 2)]
    none, two, again = (result["provenance"]["prompts_sha256"] for result in results)
    assert none != two == again
    assert results[1]["n-shot"] == {"opposites": 2}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("tasks/opposites.jsonl", "tasks/no.jsonl"), "lm-eval cannot load the task opposites: "),
        (
            ("metric: acc_norm", "metric: squad"),
            "opposites needs the metric 'squad', code of the hub, which is not run",
        ),
        (("metadata:", "unsafe_code: true\nmetadata:"), "the task opposites runs code that the model writes"),
    ],
)
def test_tasks_that_are_refused(project, tiny_checkpoint, tiny_engine, change, message):
    file, load = Path("tasks/opposites.yaml"), evaluate.load
    file.write_text(file.read_text().replace(*change))
    options = {"checkpoint_dir": tiny_checkpoint, "engine_dir": tiny_engine, "device": "cpu"}
    with pytest.raises(UserError, match=message):
        measure_task(task="opposites", include="tasks", **options)
    assert evaluate.load is load


@pytest.mark.slow  # the harness reads all of its tasks' files
def test_tasks_that_are_not_there(project, tiny_checkpoint, tiny_engine):
    options = {"checkpoint_dir": tiny_checkpoint, "engine_dir": tiny_engine, "device": "cpu"}
    with pytest.raises(UserError, match="unknown task 'oposites'; closest: opposites"):
        measure_task(task="oposites", include="tasks", **options)
    with pytest.raises(UserError, match="nowhere is no folder"):
        measure_task(task="opposites", include="nowhere", **options)


def test_without_the_harness(monkeypatch, tiny_checkpoint):
    monkeypatch.setattr("trtbuild.evaluation.tasks.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"not installed; 'pip install trtbuild\[lm-eval\]' brings it"):
        measure_task(task="opposites", checkpoint_dir=tiny_checkpoint)


def test_an_engine_that_is_not_there_is_found_before_the_task_is_looked_for(tmp_path, tiny_checkpoint):
    with pytest.raises(UserError, match="nowhere"):
        measure_task(task="oposites", checkpoint_dir=tiny_checkpoint, engine_dir=tmp_path / "nowhere")
