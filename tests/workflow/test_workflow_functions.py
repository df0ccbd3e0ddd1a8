"""`trtbuild.workflow` by itself, the configuration that is shipped, and `snakemake --lint`."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from trtbuild.errors import UserError
from trtbuild.workflow import check_limits, check_targets, load_table, matrix_targets, validate

REPOSITORY = Path(__file__).parents[2]
SCHEMAS = REPOSITORY / "config" / "schemas"


@pytest.fixture
def shipped() -> dict:
    """config/config.yaml as it is shipped."""
    return yaml.safe_load((REPOSITORY / "config" / "config.yaml").read_text())


@pytest.fixture
def refused():
    """The message with which a configuration is refused."""

    def check(config: object, schema: str = "config") -> str:
        with pytest.raises(UserError) as caught:
            validate(config, SCHEMAS / f"{schema}.schema.yaml", "here.yaml")
        assert "\n" not in str(caught.value)
        return str(caught.value)

    return check


def test_shipped_configuration_is_valid(shipped):
    validate(shipped, SCHEMAS / "config.schema.yaml", "config.yaml")
    check_limits(shipped)
    models = load_table(REPOSITORY / "config" / "models.yaml", SCHEMAS / "models.schema.yaml")
    recipes = load_table(REPOSITORY / "config" / "recipes.yaml", SCHEMAS / "recipes.schema.yaml")
    check_targets(matrix_targets(shipped), models, recipes)


@pytest.mark.parametrize(
    ("section", "key", "value", "reason"),
    [
        ("build", "max_batch_size", "8", "build.max_batch_size: '8' is not of type 'integer'"),
        ("build", "max_batch_size", True, "build.max_batch_size: True is not of type 'integer'"),
        ("build", "max_input_len", 0, "build.max_input_len: 0 is less than the minimum of 1"),
        ("build", "engines", ["tensorrt"], "build.engines: ['tensorrt'] lacks 'portable'"),
        ("build", "engines", [], "build.engines: [] lacks 'portable'"),
        ("build", "engines", ["portable", "x"], "build.engines.1: 'x' is not one of ['portable', 'tensorrt']"),
        ("build", "remove_input_padding", "yes", "build.remove_input_padding: 'yes' is not of type 'boolean'"),
        ("build", "compute_capabilities", [8.9], "build.compute_capabilities.0: 8.9 is not of type 'string'"),
        ("evaluation", "device", "tpu", "evaluation.device: 'tpu' is not one of ['auto', 'cpu', 'cuda']"),
        ("evaluation", "prompt", "Summarize", r"evaluation.prompt: 'Summarize' does not match '\\{article\\}'"),
        ("evaluation", "dataset", None, "evaluation.dataset: None is not of type 'object'"),
        ("benchmark", "repeats", 1.5, "benchmark.repeats: 1.5 is not of type 'integer'"),
    ],
)
def test_validate_names_the_key_and_what_it_expects(shipped, refused, section, key, value, reason):
    shipped[section][key] = value
    assert refused(shipped) == f"here.yaml: {reason}"


def test_validate_names_missing_and_unknown_keys(shipped, refused):
    unknown = copy.deepcopy(shipped) | {"benchmarks": {}}
    assert refused(unknown) == (
        "here.yaml: the file: Additional properties are not allowed ('benchmarks' was unexpected); "
        "known keys: models, recipes, matrix, build, evaluation, benchmark"
    )
    del shipped["benchmark"]["repeats"]
    assert refused(shipped) == "here.yaml: benchmark: 'repeats' is a required property"


@pytest.mark.parametrize("name", ["hf", "checkpoint", "../up", "", ".hidden", "a/b"])
def test_names_that_cannot_be_folders_are_refused(refused, name):
    assert repr(name) in refused({name: {"dtype": "float32"}}, "recipes")


def test_load_table(tmp_path):
    schema, path = SCHEMAS / "recipes.schema.yaml", tmp_path / "recipes.yaml"
    with pytest.raises(UserError, match=r"cannot read .*recipes\.yaml: No such file or directory"):
        load_table(str(path), schema)
    path.write_text("fp16: {dtype: [", encoding="utf-8")
    with pytest.raises(UserError, match=r"recipes.yaml is not valid YAML: .* line 1, column 1") as caught:
        load_table(str(path), schema)
    assert "\n" not in str(caught.value)
    path.write_text("fp16: {dtype: float16}", encoding="utf-8")
    assert load_table(str(path), schema) == {"fp16": {"dtype": "float16"}}


def test_matrix_targets():
    config = {"matrix": [{"model": "a", "recipes": ["x", "y"]}, {"model": "b", "recipes": []}]}
    assert matrix_targets(config) == [
        "results/a/hf/rouge.json",
        "results/a/hf/perplexity.json",
        "results/a/recipes.md",
        "results/a/x/rouge.json",
        "results/a/x/perplexity.json",
        "results/a/x/benchmark.json",
        "results/a/y/rouge.json",
        "results/a/y/perplexity.json",
        "results/a/y/benchmark.json",
        "results/b/hf/rouge.json",
        "results/b/hf/perplexity.json",
        "results/b/recipes.md",
    ]
    assert matrix_targets({"matrix": []}) == []


@pytest.mark.parametrize(
    "target",
    [
        "results/a/x/rouge.json",
        "./results/a/x/engine",
        "results/a/hf/rouge.json",
        "results/a/checkpoint",
        "results/report.html",
        "--cores",
        "all",
        "elsewhere/results/b/y",
    ],
)
def test_check_targets_accepts(target):
    check_targets([target], {"a": {}}, {"x": {}})


@pytest.mark.parametrize(
    ("target", "reason"),
    [
        ("results/b/x/rouge.json", "unknown model 'b'; known models: a, c"),
        ("./results/b/x/rouge.json", "unknown model 'b'; known models: a, c"),
        ("results/b/checkpoint", "unknown model 'b'; known models: a, c"),
        ("results/a/z/rouge.json", "unknown recipe 'z'; known recipes: w, x"),
        ("results/a/z/", "unknown recipe 'z'; known recipes: w, x"),
    ],
)
def test_check_targets_refuses(target, reason):
    with pytest.raises(UserError) as caught:
        check_targets(["results/a/x/rouge.json", target], {"c": {}, "a": {}}, {"x": {}, "w": {}})
    assert str(caught.value) == f"{target}: {reason}"


@pytest.mark.parametrize(
    ("section", "key", "limit"),
    [
        ("evaluation", "max_output_len", "max_output_len"),
        ("benchmark", "batch_size", "max_batch_size"),
        ("benchmark", "input_len", "max_input_len"),
        ("benchmark", "output_len", "max_output_len"),
    ],
)
def test_check_limits(shipped, section, key, limit):
    most = shipped["build"][limit]
    shipped[section][key] = most
    check_limits(shipped)
    shipped[section][key] = most + 1
    with pytest.raises(UserError) as caught:
        check_limits(shipped)
    assert str(caught.value) == f"config/config.yaml: {section}.{key} is {most + 1}, more than build.{limit} {most}"


RULE = """
import os, sys
from types import SimpleNamespace
from trtbuild.errors import UserError
from trtbuild.workflow import rule_log
import torch

with rule_log(SimpleNamespace(log=["logs/deep/rule.log"], threads=1)):
    assert torch.get_num_threads() == 1
    print("from Python")
    os.write(1, b"from a library\\n")
    os.write(2, b"to the other stream\\n")
    {body}
"""


@pytest.mark.parametrize(
    ("body", "code", "last"),
    [
        ("pass", 0, "from Python"),  # Python's own buffer comes last
        ("raise UserError('no such thing; take another')", 2, "error: no such thing; take another"),
        ("raise RuntimeError('a bug')", 1, "RuntimeError: a bug"),
    ],
)
def test_rule_log(tmp_path, body, code, last):
    result = subprocess.run(
        [sys.executable, "-c", RULE.format(body=body)], cwd=tmp_path, capture_output=True, text=True
    )
    log = (tmp_path / "logs" / "deep" / "rule.log").read_text()
    assert result.returncode == code
    assert result.stderr == log  # the terminal sees what the log holds
    assert {"from Python", "from a library", "to the other stream"} <= set(log.splitlines())
    assert last in log.splitlines() if code == 0 else log.splitlines()[-1] == last
    assert ("Traceback" in log) == (code == 1)


def test_snakemake_lint():
    command = [sys.executable, "-m", "snakemake", "--lint"]
    result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, env=dict(os.environ))
    assert result.returncode == 0, result.stdout + result.stderr
    assert "Congratulations" in result.stdout + result.stderr
