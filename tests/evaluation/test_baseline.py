"""What engines are compared with: `transformers` where it has the model, elsewhere our own engine in float32."""

from functools import cache, partial
from pathlib import Path

import pytest
import torch
from numerics import change_constant
from outlier_models import SAMPLES, calibrated, write_model
from published_models import (
    LLAMA,
    QWEN,
    baichuan_config,
    baichuan_tensors,
    llama_tensors,
    published_again,
    qwen_tensors,
    write_published,
)
from reference_models import baichuan_logits, qwen_logits

from trtbuild.checkpoint.canonical import Checkpoint
from trtbuild.checkpoint.sources import make_checkpoint
from trtbuild.engine.build import build_engine_dir
from trtbuild.engine.config import BuildLimits
from trtbuild.errors import UserError
from trtbuild.evaluation.baseline import PortableBaseline, open_baseline
from trtbuild.evaluation.divergence import OutputProduct
from trtbuild.evaluation.hugging_face import HuggingFaceModel
from trtbuild.evaluation.stages import measure_perplexity, score_summaries, summarize_articles, verify_engine
from trtbuild.evaluation.summarization import read_summaries
from trtbuild.evaluation.verify import TOLERANCE, verify
from trtbuild.files import sha256
from trtbuild.quantization.kv_cache import cache_of
from trtbuild.quantization.quantize import quantize
from trtbuild.quantization.recipe import Recipe
from trtbuild.runtime.open import open_engine
from trtbuild.runtime.sampling import SamplingParams

EXACT = 2e-6  # norm of the difference over the norm; 4e-7 measured
TRAINED = 64  # tokens that the small Qwens were trained for
NO_NTK, NO_LOGN = {"use_dynamic_ntk": False}, {"use_logn_attn": False}
ALIBI = "transformers has no ALiBi"
NTK = "transformers has no Qwen's dynamic NTK beyond 64 tokens"
LOGN = "transformers has no log-n attention beyond 64 tokens"
MODELS = {
    "llama": (LLAMA, llama_tensors),
    "qwen": (QWEN | {"seq_length": TRAINED}, qwen_tensors),
    "qwen without ntk": (QWEN | {"seq_length": TRAINED} | NO_NTK, qwen_tensors),
    "qwen without log-n": (QWEN | {"seq_length": TRAINED} | NO_LOGN, qwen_tensors),
    "qwen without either": (QWEN | {"seq_length": TRAINED} | NO_NTK | NO_LOGN, qwen_tensors),
    **{version: (baichuan_config(version), baichuan_tensors) for version in ("v1_7b", "v1_13b", "v2_7b", "v2_13b")},
}
# A scale a tensor, and rounded keys and values.
RECIPE = {
    "dtype": "float32",
    "weights": {"dtype": "int8"},
    "activations": {"dtype": "int8", "smoothquant": 0.5},
    "kv_cache": {"dtype": "int8"},
    "calibration": SAMPLES,
}
OURS = ("qwen", "v1_13b", "v2_13b")

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The canonical checkpoint of a model by its name."""
    place = tmp_path_factory.mktemp("baselines")

    @cache
    def make(name: str) -> Path:
        config, tensors = MODELS[name]
        published = write_published(place / name / "published", config, tensors(config))
        version = name if name in ("v1_7b", "v1_13b", "v2_7b", "v2_13b") else None
        make_checkpoint({"local": {"path": str(published), "model_version": version}}, place / name / "checkpoint")
        return place / name / "checkpoint"

    return make


@pytest.fixture(scope="module")
def quantized(folder):
    """Weights of `RECIPE`, and the scales of its cache."""

    @cache
    def make(name: str):
        ranges = calibrated(folder(name))
        weights = folder(name).with_name("quantized")
        quantize(folder(name), weights, Recipe.parse(RECIPE).quantization, ranges, "cpu")
        return weights, cache_of(Recipe.parse(RECIPE), weights, ranges)

    return make


def oracle(name: str, tensors=None):
    """`(ids, prompt) -> logits`, in float64; of canonical `tensors`, if not of the published ones."""
    config, make = MODELS[name]
    if name.startswith("qwen"):
        return partial(qwen_logits, config, published_again(tensors) if tensors else make(config))
    if not tensors:
        return lambda ids, prompt=None: baichuan_logits(config, make(config), ids, name)
    normalized = name.replace("v2", "v1")  # the head is, already
    return lambda ids, prompt=None: baichuan_logits(config, published_again(tensors), ids, normalized)


def baseline_of(folder: Path, cache=None, max_input_len: int = 300, max_output_len: int = 8):
    return open_baseline(folder, "float32", "cpu", cache, max_input_len, max_output_len)


def error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    assert actual.shape == expected.shape
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()


def tokens(length: int, seed: int = 0) -> list[int]:
    return torch.randint(2, 258, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.mark.parametrize(
    ("name", "max_input_len", "max_output_len", "reason"),
    [
        ("llama", 300, 8, None),
        ("v1_7b", 300, 8, None),
        ("v2_7b", 300, 8, None),
        ("v1_13b", 1, 1, ALIBI),
        ("v2_13b", 300, 8, ALIBI),
        ("qwen", 60, 4, None),
        ("qwen", 60, 5, LOGN),
        ("qwen", 64, 0, None),
        ("qwen", 64, 1, LOGN),
        ("qwen", 65, 0, NTK),
        ("qwen without log-n", 64, 8, None),  # a prompt's base stays
        ("qwen without log-n", 65, 0, NTK),
        ("qwen without ntk", 60, 4, None),
        ("qwen without ntk", 60, 5, LOGN),
        ("qwen without ntk", 65, 0, LOGN),
        ("qwen without either", 300, 8, None),
    ],
)
def test_which_baseline(folder, name, max_input_len, max_output_len, reason):
    baseline = baseline_of(folder(name), None, max_input_len, max_output_len)
    assert type(baseline) is (PortableBaseline if reason else HuggingFaceModel)
    assert getattr(baseline, "reason", None) == reason
    assert not baseline.rounds


@pytest.mark.parametrize("name", [*OURS, "qwen without ntk", "qwen without log-n"])
def test_logits(folder, name):
    """On both sides of each length at which a Qwen changes."""
    baseline, expected = baseline_of(folder(name)), oracle(name)
    for length in (1, 63, 64, 65, 129, 300):
        actual = baseline.logits(tokens(length))
        assert (actual.dtype, actual.device.type) == (torch.float32, "cpu")
        assert error(actual, expected(tokens(length))) < EXACT
        assert baseline.logits(tokens(length), rounded=False).equal(actual)


@pytest.mark.parametrize("name", ["llama", "v2_7b", *OURS])
def test_the_output_product_makes_logits_of_hidden_states(folder, name):
    baseline = baseline_of(folder(name))
    product = OutputProduct(baseline.checkpoint, torch.float32, torch.device("cpu"))
    for length in (1, 65):
        hidden = baseline.hidden_states(tokens(length))
        assert hidden.shape == (length, baseline.checkpoint.config.hidden_size)
        assert error(product(hidden), baseline.logits(tokens(length))) < EXACT


@pytest.mark.parametrize("name", ["qwen", "v1_7b", "v2_7b"])
def test_logits_where_transformers_has_the_model(folder, name):
    baseline, expected = baseline_of(folder(name), max_input_len=60, max_output_len=4), oracle(name)
    assert isinstance(baseline, HuggingFaceModel)
    for length in (1, 60, 64):
        assert error(baseline.logits(tokens(length)), expected(tokens(length))) < EXACT


@pytest.mark.parametrize("prompt_len", [1, 60, 64, 128, 135])
@pytest.mark.parametrize("name", ["qwen", "v2_13b"])
def test_logits_of_a_prompt_and_its_continuation(quantized, folder, name, prompt_len):
    """A Qwen's base is that of the prompt, for all that follows; rounded or not."""
    ids, expected = tokens(135), oracle(name)
    actual = baseline_of(folder(name)).logits(ids, prompt_len=prompt_len)
    assert error(actual, expected(ids, prompt_len)) < EXACT
    if name == "qwen" and prompt_len <= 128:
        assert error(actual, expected(ids, 135)) > 0.02
    weights, scales = quantized(name)
    checkpoint, baseline = Checkpoint(weights), baseline_of(weights, scales)
    expected = oracle(name, {key: checkpoint.dequantized(key).load() for key in checkpoint.tensors})
    plain = baseline.logits(ids, rounded=False, prompt_len=prompt_len)
    assert error(plain, expected(ids, prompt_len)) < EXACT
    assert 5e-3 < error(baseline.logits(ids, prompt_len=prompt_len), plain) < 0.2


@pytest.mark.parametrize("name", OURS)
def test_logits_without_rounding(quantized, name):
    """They are of the numbers that were written: neither activations nor keys and values are rounded."""
    weights, scales = quantized(name)
    baseline, checkpoint = baseline_of(weights, scales), Checkpoint(weights)
    assert isinstance(baseline, PortableBaseline)
    assert baseline.rounds
    expected = oracle(name, {key: checkpoint.dequantized(key).load() for key in checkpoint.tensors})
    original = oracle(name)
    for length in (1, 65, 200):
        ids = tokens(length)
        plain, rounded = baseline.logits(ids, rounded=False), baseline.logits(ids)
        assert error(plain, expected(ids)) < EXACT
        assert 5e-3 < error(plain, original(ids)) < 0.2
        assert 5e-3 < error(rounded, plain) < 0.2
        assert baseline.logits(ids).equal(rounded)


@pytest.mark.parametrize("kind", ["cache", "activations"])
def test_each_rounding_counts(quantized, folder, kind):
    weights, scales = quantized("v2_13b")
    baseline = baseline_of(folder("v2_13b"), scales) if kind == "cache" else baseline_of(weights)
    assert baseline.rounds
    assert error(baseline.logits(tokens(40)), baseline.logits(tokens(40), rounded=False)) > 2e-3


def test_both_baselines_are_alike(tmp_path):
    """A model that both have: the same logits, rounded and not, the same tokens, the same keys of provenance."""
    checkpoint = write_model(tmp_path / "checkpoint")
    ranges, weights = calibrated(checkpoint), tmp_path / "weights"
    recipe = RECIPE | {"activations": {"dtype": "int8", "per": "token"}}
    quantize(checkpoint, weights, Recipe.parse(recipe).quantization, ranges, "cpu")
    scales = cache_of(Recipe.parse(recipe), weights, ranges)
    theirs = baseline_of(weights, scales)
    ours = PortableBaseline(weights, "float32", "cpu", scales, BuildLimits(1, 300, 8), "it is not asked for")
    assert isinstance(theirs, HuggingFaceModel)
    assert ours.rounds is theirs.rounds is True
    prompts = [tokens(n, seed=n) for n in (1, 9, 40)]
    errors = [[error(ours.logits(ids, r), theirs.logits(ids, r)) for r in (False, True)] for ids in prompts]
    assert all(plain < EXACT for plain, _ in errors)
    assert sorted(rounded for _, rounded in errors)[1] < EXACT  # a number between two levels may go either way
    plain = [PortableBaseline(checkpoint, "float32", "cpu", None, BuildLimits(1, 300, 8), ""), baseline_of(checkpoint)]
    for eos in ((), (plain[1].generate(prompts, SamplingParams(8))[1].output_ids[3],)):
        first, second = (baseline.generate(prompts, SamplingParams(8, eos_token_ids=eos)) for baseline in plain)
        assert first == second
    origins = [baseline.provenance("m") for baseline in (ours, theirs)]
    assert origins[0].keys() - origins[1].keys() == {"baseline"}
    different = {key for key in origins[1] if origins[0][key] != origins[1][key]}
    assert different == {"engine"}


@pytest.mark.parametrize("name", OURS)
def test_generate(folder, name):
    """The oracle's best token, one after the other. A Qwen keeps its prompt's base: 62 tokens become 68."""
    logits, prompts = oracle(name), [tokens(n, seed=n) for n in (62, 1, 130)]
    expected = []
    for prompt in prompts:
        sequence = list(prompt)
        for _ in range(6):
            sequence.append(logits(sequence, len(prompt))[-1].argmax().item())
        expected.append(sequence[len(prompt) :])
    baseline = baseline_of(folder(name))
    outputs = baseline.generate(prompts, SamplingParams(6))
    assert [output.output_ids for output in outputs] == expected
    assert {output.finish_reason for output in outputs} == {"length"}
    eos = expected[0][2]
    (stopped,) = baseline.generate(prompts[:1], SamplingParams(6, eos_token_ids=(eos,)))
    assert stopped.output_ids == expected[0][: expected[0].index(eos) + 1]
    assert stopped.finish_reason == "eos"


def test_refused(folder):
    baseline = baseline_of(folder("v2_13b"), None, 16, 4)
    with pytest.raises(UserError, match="prompt 1 is empty"):
        baseline.generate([[5], []], SamplingParams(2))
    with pytest.raises(UserError, match="max_output_len 5 is more"):
        baseline.generate([[5]], SamplingParams(5))
    with pytest.raises(UserError, match="prompt 0 has 17 tokens"):
        baseline.generate([tokens(17)], SamplingParams(2))


@pytest.mark.parametrize(("name", "reason"), [("qwen", NTK), ("v2_13b", ALIBI)])
def test_provenance(folder, name, reason):
    origin = baseline_of(folder(name)).provenance("small")
    assert origin.pop("versions").keys() >= {"trtbuild", "torch", "transformers"}
    assert origin.pop("device").startswith("cpu")
    assert origin == {
        "engine": "portable",
        "baseline": reason,
        "model": "small",
        "dtype": "float32",
        "engine_sha256": sha256(folder(name) / "model.safetensors"),
        "source_sha256": Checkpoint(folder(name)).source_sha256,
        "threads": 1,
    }


# What it is for


@pytest.fixture(scope="module")
def engine(folder, quantized, tmp_path_factory):
    """Engine folders: in float32, and of `RECIPE`."""

    @cache
    def make(name: str, recipe: str = "fp32", max_input_len: int = 80) -> Path:
        weights, scales = quantized(name) if recipe == "w8a8" else (folder(name), None)
        target = tmp_path_factory.mktemp("engines") / "engine"
        build_engine_dir(
            weights,
            target,
            model=name,
            recipe=RECIPE if recipe == "w8a8" else {"dtype": "float32"},
            limits=BuildLimits(max_batch_size=3, max_input_len=max_input_len, max_output_len=8),
            engines=["portable"],
            cache=scales,
        )
        return target

    return make


def lengthened(length: int) -> str:
    return "The capital of France is Paris, and that of the United Kingdom is London; Italy's has been Rome."[:length]


@pytest.mark.parametrize("name", OURS)
def test_verify(folder, engine, name):
    """A right engine agrees; not one whose positions weigh twice as much."""
    baseline, session = baseline_of(folder(name)), open_engine(engine(name), "portable", "cpu").session
    prompts = [tokens(n, seed=n) for n in (3, 1, 70)]
    result = verify("x", session, TOLERANCE["float32"], baseline, prompts, 6)
    assert result.agrees
    assert result.relative_error < EXACT
    assert result.equal_tokens == result.tokens == 18
    constant = "rotary.inverse_frequencies" if name == "qwen" else "alibi.slopes"
    change_constant(session, constant, lambda x: 2 * x)
    assert not verify("x", session, TOLERANCE["float32"], baseline, prompts, 6).agrees


@pytest.mark.parametrize("length", [60, 64])
@pytest.mark.parametrize("name", ["qwen", "qwen without log-n"])
def test_verify_where_generation_passes_the_training_length(folder, engine, name, length):
    """The engine keeps the prompt's base, and so does the baseline; that of Qwen2 has no other."""
    baseline = baseline_of(folder(name), None, 64, 8)
    assert isinstance(baseline, PortableBaseline if name == "qwen" else HuggingFaceModel)
    session = open_engine(engine(name), "portable", "cpu").session
    result = verify("x", session, TOLERANCE["float32"], baseline, [tokens(length)], 8)
    assert result.agrees
    assert result.relative_error < EXACT


def test_verify_with_the_longest_prompt(folder, engine):
    """A baseline of the engine's own limits holds whatever the engine does."""
    baseline = baseline_of(folder("v2_13b"), None, 80, 8)
    session = open_engine(engine("v2_13b"), "portable", "cpu").session
    assert verify("x", session, TOLERANCE["float32"], baseline, [tokens(80)], 8).agrees


@pytest.mark.parametrize("recipe", ["fp32", "w8a8"])
@pytest.mark.parametrize("name", OURS)
def test_verify_engine(folder, quantized, engine, name, recipe):
    pytest.importorskip("tensorrt_rtx")
    weights = quantized(name)[0] if recipe == "w8a8" else folder(name)
    texts = ["Water", lengthened(60), lengthened(80)]
    for result in verify_engine(engine(name, recipe), weights, texts, 6, ["portable", "interpreted"]):
        assert result.agrees
        assert result.relative_error < (1e-5 if recipe == "fp32" else 3e-2)
        assert result.tokens == 18


NEWS = {"name": "trtbuild-news", "split": "evaluation", "samples": 2}


@pytest.mark.parametrize(("name", "reason"), [("qwen", NTK), ("v2_13b", ALIBI), ("v2_7b", None)])
def test_baseline_and_engine_write_the_same_summaries(folder, engine, tmp_path, name, reason):
    common = {"dataset": NEWS, "prompt": "{article} TL;DR:", "chat": False, "max_output_len": 6, "device": "cpu"}
    for file, options in (("engine", {"engine_dir": engine(name)}), ("hf", {"max_input_len": 80, "model": name})):
        summarize_articles(output=tmp_path / file, checkpoint_dir=folder(name), **common, **options)
    summaries, _ = read_summaries(tmp_path / "engine")
    baseline, origin = read_summaries(tmp_path / "hf")
    assert summaries == baseline
    assert all(TRAINED < record["input_tokens"] <= 80 for record in baseline)
    assert origin.get("baseline") == reason
    assert (origin["engine"], origin["dtype"]) == ("portable" if reason else "transformers", "float32")
    assert score_summaries(tmp_path / "hf")["provenance"] == origin


@pytest.mark.parametrize(("name", "reason"), [("qwen", NTK), ("v2_13b", ALIBI), ("v2_7b", None)])
def test_baseline_and_engine_have_the_same_perplexity(folder, engine, tmp_path, name, reason):
    """And the same distributions, which the engine's are compared with by the baseline's hidden states."""
    states = tmp_path / "hidden_states.safetensors"
    options = {"checkpoint_dir": folder(name), "dataset": NEWS, "device": "cpu", "hidden_states": states}
    theirs = measure_perplexity(max_input_len=80, model=name, **options)
    ours = measure_perplexity(engine_dir=engine(name), **options)
    assert abs(ours["divergence"]["mean_kl"]) < 1e-8
    assert ours["divergence"]["top1_percent"] > 99.9
    assert ours["tokens"] == theirs["tokens"] > 500
    assert ours["perplexity"] == pytest.approx(theirs["perplexity"], rel=1e-5)
    assert theirs["provenance"].get("baseline") == reason
    assert theirs["provenance"]["engine"] == ("portable" if reason else "transformers")
