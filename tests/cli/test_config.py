"""`--config`: commands by hand do what the workflow does with the same file."""

import inspect
import shutil

import pytest
import yaml
from typer.testing import CliRunner
from workflow_config import CONFIG

from trtbuild.cli import app
from trtbuild.engine.config import BuildLimits
from trtbuild.errors import UserError
from trtbuild.tokenizer import chat_template

# No value is a default of a command's.
BUILD = {
    "engines": ["portable", "tensorrt"],
    "max_batch_size": 3,
    "max_input_len": 40,
    "max_output_len": 17,
    "extrapolate_positions": True,
    "remove_input_padding": False,
    "compute_capabilities": ["8.9", "12.0"],
}
EVALUATION = {
    "runtime": "portable",
    "device": "cpu",
    "baseline_dtype": "bfloat16",
    "dataset": {"name": "somebody/news", "config": "3.0.0", "revision": "main", "split": "test", "samples": 5},
    "prompt": "Tell me: {article}",
    "chat": True,
    "max_output_len": 7,
}
BENCHMARK = {"batch_size": 2, "input_len": 9, "output_len": 5, "repeats": 4}


@pytest.fixture
def here(tmp_path, monkeypatch, tiny_checkpoint):
    """A folder as the workflow has it, and what commands would hand to the stages."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(tiny_checkpoint, tmp_path / "results/mine/checkpoint")
    (tmp_path / "config").mkdir()
    sections = {"build": BUILD, "evaluation": EVALUATION, "benchmark": BENCHMARK}
    (tmp_path / "config/config.yaml").write_text(yaml.safe_dump(CONFIG | sections))
    (tmp_path / "config/recipes.yaml").write_text("own: {dtype: bfloat16}")
    source = {"local": {"path": "somewhere"}}
    models = {"mine": {"source": source, "chat_template": "qwen"}, "plain": {"source": source}}
    (tmp_path / "config/models.yaml").write_text(yaml.safe_dump(models))

    def handed(module, name, *arguments):
        calls = []

        def call(*args, **options):
            calls.append(signature.bind(*args, **options).arguments)
            raise UserError("done")

        function = getattr(__import__(f"trtbuild.{module}", fromlist=[name]), name)
        signature = inspect.signature(function)
        monkeypatch.setattr(f"trtbuild.{module}.{name}", call)
        result = CliRunner().invoke(app, [str(argument) for argument in arguments])
        assert str(result.exception) == "done", result.output
        return calls[0]

    return handed


CHECKPOINT = ("--checkpoint-dir", "results/mine/checkpoint")
TAKEN = ("--config", "config/config.yaml")


def test_summarize(here):
    handed = here("evaluation.stages", "summarize_articles", "summarize", *TAKEN, *CHECKPOINT, "--output", "x.jsonl")
    expected = EVALUATION | {"max_input_len": 40, "chat_template": chat_template.read("qwen")}
    assert handed.items() >= expected.items()


def test_options_that_are_given_hold(here):
    options = ("--samples", 2, "--split", "train", "--no-chat", "--prompt", "{article}", "--max-input-len", 8)
    handed = here(
        "evaluation.stages", "summarize_articles", "summarize", *TAKEN, *CHECKPOINT, "--output", "x.jsonl", *options
    )
    dataset = EVALUATION["dataset"] | {"samples": 2, "split": "train"}
    expected = {"dataset": dataset, "chat": False, "prompt": "{article}", "max_input_len": 8, "chat_template": None}
    assert handed.items() >= expected.items()
    assert handed["max_output_len"] == 7


def test_perplexity(here):
    handed = here("evaluation.stages", "measure_perplexity", "perplexity", *TAKEN, *CHECKPOINT)
    expected = {key: EVALUATION[key] for key in ("runtime", "device", "baseline_dtype", "dataset")}
    assert handed.items() >= (expected | {"max_input_len": 40}).items()


def test_benchmark(here):
    handed = here("evaluation.stages", "run_benchmark", "benchmark", *TAKEN, "--engine-dir", "engine")
    assert handed.items() >= (BENCHMARK | {"runtime": "portable", "device": "cpu"}).items()


@pytest.mark.parametrize("capabilities", [["8.9", "12.0"], "auto"])
def test_build(here, monkeypatch, tmp_path, capabilities):
    monkeypatch.setattr("trtbuild.engine.tensorrt_api.describe_builder", lambda *_: {})
    config = yaml.safe_load((tmp_path / "config/config.yaml").read_text())
    config["build"]["compute_capabilities"] = capabilities
    (tmp_path / "config/config.yaml").write_text(yaml.safe_dump(config))
    arguments = ("build", *TAKEN, *CHECKPOINT, "--output-dir", "x", "--recipe", "own")
    handed = here("engine.build", "build_engine_dir", *arguments)
    expected = {key: BUILD[key] for key in ("engines", "extrapolate_positions", "remove_input_padding")}
    expected |= {"limits": BuildLimits(3, 40, 17), "recipe": {"dtype": "bfloat16"}}
    expected["compute_capabilities"] = None if capabilities == "auto" else capabilities
    assert handed.items() >= expected.items()


def test_what_is_no_configuration(here):
    for text, message in (
        ("build: {}", "wrong.yaml: the file: 'models' is a required property"),
        ("a: [", "not valid"),
    ):
        with open("wrong.yaml", "w") as file:
            file.write(text)
        result = CliRunner().invoke(app, ["perplexity", "--config", "wrong.yaml", *CHECKPOINT])
        assert message in str(result.exception)
