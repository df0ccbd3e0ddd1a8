"""Which results are compared, and what says that two come from the same original model."""

import json
import shutil

import pytest
from outlier_models import write_model

from trtbuild.checkpoint.canonical import Checkpoint
from trtbuild.checkpoint.sources import make_quantized
from trtbuild.datasets import Article
from trtbuild.engine.build import build_engine_dir
from trtbuild.engine.config import BuildLimits
from trtbuild.errors import UserError
from trtbuild.evaluation import stages
from trtbuild.evaluation.gate import gate
from trtbuild.evaluation.provenance import refuse_different, settings
from trtbuild.evaluation.stages import measure_perplexity, rouge_table, score_summaries, summarize_articles
from trtbuild.quantization.quantize import quantize
from trtbuild.quantization.recipe import Quantization

RECIPE = {"dtype": "float32", "weights": {"dtype": "int4", "group_size": 32}}
NEWS = {"name": "trtbuild-news", "split": "evaluation", "samples": 2}
ARTICLES = [Article("1", "The bridge is shut.", "Shut."), Article("2", "Rain fell on Monday.", "It rained.")]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("provenance") / "checkpoint")


@pytest.fixture(scope="module")
def quantized(checkpoint):
    folder = checkpoint.with_name("quantized")
    quantize(checkpoint, folder, Quantization.parse(RECIPE), device="cpu")
    return folder


def engine(weights, folder):
    limits = BuildLimits(max_batch_size=2, max_input_len=48, max_output_len=8)
    build_engine_dir(weights, folder, model="m", recipe={"dtype": "float32"}, limits=limits, engines=["portable"])
    return folder


@pytest.fixture
def few_articles(monkeypatch):
    monkeypatch.setattr(stages, "load_articles", lambda **dataset: ARTICLES[: dataset["samples"]])


# The original model


def test_a_quantized_folder_and_its_engine_tell_their_original(checkpoint, quantized, tmp_path):
    original = Checkpoint(checkpoint)
    assert len(original.source_sha256) == 64
    assert Checkpoint(quantized).source_sha256 == original.source_sha256
    assert Checkpoint(quantized).hashes.keys() == original.hashes.keys()
    assert not Checkpoint(quantized).hashes.items() & original.hashes.items()
    config = json.loads((engine(quantized, tmp_path / "engine") / "config.json").read_text())
    assert config["source_sha256"] == original.source_sha256
    assert config["inputs"] == Checkpoint(quantized).hashes


@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
def test_another_file_is_another_model(checkpoint, tmp_path, file):
    copy = shutil.copytree(checkpoint, tmp_path / "copy")
    assert Checkpoint(copy).source_sha256 == Checkpoint(checkpoint).source_sha256
    other = write_model(tmp_path / "other", rms_norm_eps=1e-5, initializer_range=0.5)
    if file == "model.safetensors":
        from safetensors.torch import load_file, save_file

        weights = load_file(copy / file)
        weights["model.norm.weight"][0] += 1
        save_file(weights, other / file)
    shutil.copyfile(other / file, copy / file)
    assert Checkpoint(copy).source_sha256 != Checkpoint(checkpoint).source_sha256


def test_published_weights_stand_for_the_model_that_they_are_declared_for(checkpoint, quantized, tmp_path):
    foreign = shutil.copytree(quantized, tmp_path / "foreign")
    (foreign / "quantization.json").unlink()
    assert Checkpoint(foreign).source_sha256 != Checkpoint(checkpoint).source_sha256
    for source in (foreign, quantized):
        make_quantized({"local": {"path": str(source)}}, checkpoint, tmp_path / "taken")
        assert Checkpoint(tmp_path / "taken").source_sha256 == Checkpoint(checkpoint).source_sha256
    assert "quantization" in json.loads((tmp_path / "taken/quantization.json").read_text())


def test_weights_that_we_quantized_from_another_model_are_refused(quantized, tmp_path):
    other = write_model(tmp_path / "other", initializer_range=0.5)
    with pytest.raises(UserError, match=r"quantized was quantized from other weights than those in .*other"):
        make_quantized({"local": {"path": str(quantized)}}, other, tmp_path / "taken")
    assert not (tmp_path / "taken").exists()


# What is compared


def result(**changes) -> dict:
    origin = {"source_sha256": "1" * 64, **settings(NEWS, ARTICLES, [[5], [6]], prompt="{article}", chat=False)}
    return {"provenance": origin | changes, "samples": 2, "tokenizer": "words"}


def test_settings_leave_out_what_is_not_said():
    """The command line says `config: None` where the workflow says nothing."""
    assert settings(NEWS | {"config": None, "revision": None}, ARTICLES, []) == settings(NEWS, ARTICLES, [])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"source_sha256": "2" * 64}, r"the original model \(source_sha256\) is 1{12} and 2{12}$"),
        ({"dataset": NEWS | {"samples": 16}}, "dataset is .*'samples': 2.* and .*'samples': 16"),
        (settings(NEWS, ARTICLES[::-1], [[5], [6]]), r"the text of the articles \(articles_sha256\) is "),
        ({"prompt": "News: {article}"}, "prompt is {article} and News: {article}"),
        ({"chat": True}, "chat is False and True"),
        ({"max_input_len": 512}, "max_input_len is None and 512"),
        ({"max_output_len": 8}, "max_output_len is None and 8"),
        (
            settings(NEWS, ARTICLES, [[5], [7]]),
            r"what tokenizer and chat template made of the text \(tokens_sha256\) is",
        ),
    ],
)
def test_what_differs_is_named(changes, message):
    refuse_different([result(), result(), result(device="cuda", dtype="float16", engine="other")])
    with pytest.raises(UserError, match=rf"^the results are not comparable: {message}"):
        refuse_different([result(), result(), result(**changes)])


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [("samples", 1, "the number of texts is 2 and 1"), ("tokenizer", "signs", "ROUGE's tokenizer is words and signs")],
)
def test_what_was_scored(key, value, message):
    with pytest.raises(UserError, match=message):
        refuse_different([result(), result() | {key: value}])


@pytest.mark.parametrize("other", [{}, {"provenance": None}, {"provenance": {"source_sha256": None}}])
def test_a_result_that_does_not_tell(other):
    refuse_different([other])
    with pytest.raises(
        UserError, match=r"does not tell which model it is of \(provenance\.source_sha256\); make it again"
    ):
        refuse_different([result(), other])


@pytest.mark.usefixtures("few_articles")
def test_perplexities_of_a_quantized_engine_and_the_baseline(checkpoint, quantized, tmp_path):
    """Those of one original model are judged; of others, and of other text, not."""
    options = {"checkpoint_dir": checkpoint, "device": "cpu"}
    ours = measure_perplexity(engine_dir=engine(quantized, tmp_path / "engine"), dataset=NEWS, **options)
    theirs = measure_perplexity(dataset=NEWS, max_input_len=48, **options)
    assert gate(ours, theirs, 1000, "fail")["verdict"] == "passed"
    other = write_model(tmp_path / "other", initializer_range=0.5)
    with pytest.raises(UserError, match=r"the original model \(source_sha256\) is"):
        gate(ours, measure_perplexity(checkpoint_dir=other, dataset=NEWS, max_input_len=48, device="cpu"), 1000, "fail")
    with pytest.raises(UserError, match="dataset is"):
        gate(ours, measure_perplexity(dataset=NEWS | {"samples": 1}, max_input_len=48, **options), 1000, "fail")


@pytest.mark.usefixtures("few_articles")
def test_summaries_of_another_prompt(checkpoint, tmp_path):
    scores = []
    for i, prompt in enumerate(("{article}", "{article}", "{article} TL;DR:")):
        path = tmp_path / f"{i}.jsonl"
        options = {"chat": False, "max_output_len": 2, "max_input_len": 48, "device": "cpu"}
        summarize_articles(output=path, checkpoint_dir=checkpoint, dataset=NEWS, prompt=prompt, **options)
        scores.append(score_summaries(path))
    assert len(rouge_table(scores[:2]).splitlines()) == 4  # names, both, and their difference
    with pytest.raises(UserError, match=r"the results are not comparable: prompt is {article} and {article} TL;DR:"):
        rouge_table(scores)
