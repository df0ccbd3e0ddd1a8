"""`trtbuild.workflow` by itself, the configuration that is shipped, and `snakemake --lint`."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from trtbuild.engine.config import marker
from trtbuild.errors import UserError, one_line
from trtbuild.files import write_json
from trtbuild.quantization.recipe import Recipe
from trtbuild.rehearsal import (
    rehearsal_config,
    rehearsal_models,
    rehearsal_recipes,
    rehearsal_target,
)
from trtbuild.workflow import (
    RECIPES_SCHEMA,
    SCHEMAS,
    SHIPPED_RECIPES,
    check_fp8_of_targets,
    check_layouts_of_targets,
    check_limits,
    check_positions_of_targets,
    check_rehearsal,
    check_targets,
    load_recipes,
    load_table,
    matrix_targets,
    rehearses,
    runs_of_table,
    unknown,
    validate,
)
from trtbuild.yaml_reader import read_yaml

REPOSITORY = Path(__file__).parents[2]


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
    recipes = load_recipes(REPOSITORY / "config" / "recipes.yaml")
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
        ("build", "compute_capabilities", [8.9], "build.compute_capabilities.0: 8.9 is not one of ['7.5', '8.0',"),
        ("build", "compute_capabilities", ["9.0"], "build.compute_capabilities.0: '9.0' is not one of ['7.5', '8.0',"),
        ("evaluation", "device", "tpu", "evaluation.device: 'tpu' is not one of ['auto', 'cpu', 'cuda']"),
        ("evaluation", "prompt", "Summarize", r"evaluation.prompt: 'Summarize' does not match '\\{article\\}'"),
        ("evaluation", "dataset", None, "evaluation.dataset: None is not of type 'object'"),
        ("benchmark", "repeats", 1.5, "benchmark.repeats: 1.5 is not of type 'integer'"),
    ],
)
def test_validate_names_the_key_and_what_it_expects(shipped, refused, section, key, value, reason):
    shipped[section][key] = value
    assert refused(shipped).startswith(f"here.yaml: {reason}")


def test_compute_capabilities_are_those_of_tensorrt():
    trt = pytest.importorskip("tensorrt_rtx")
    names = [name for name in trt.ComputeCapability.__members__ if name.startswith("SM")]
    listed = read_yaml(SCHEMAS / "config.schema.yaml")["properties"]["build"]["properties"]["compute_capabilities"]
    assert listed["oneOf"][1]["items"]["enum"] == [f"{name[2:-1]}.{name[-1]}" for name in names]


def test_validate_says_what_to_write(refused):
    for part, dtype in (("kv_cache", "int8"), ("weights", "int4"), ("activations", "fp8")):
        line = f"here.yaml: mine.{part}: write {part}: {{dtype: {dtype}}}"
        assert refused({"mine": {"dtype": "float16", part: dtype}}, "recipes") == line
    assert "'int3' is not of type 'object'" in refused({"mine": {"dtype": "float16", "weights": "int3"}}, "recipes")


def test_validate_names_missing_and_unknown_keys(shipped, refused):
    unknown = copy.deepcopy(shipped) | {"benchmarks": {}}
    assert refused(unknown) == (
        "here.yaml: the file: Additional properties are not allowed ('benchmarks' was unexpected); "
        "known keys: models, recipes, matrix, build, evaluation, benchmark, lm_eval, rehearse, mpi, container, "
        "local_rules"
    )
    del shipped["benchmark"]["repeats"]
    assert refused(shipped) == "here.yaml: benchmark: 'repeats' is a required property"


@pytest.mark.parametrize("name", ["hf", "checkpoint", "../up", "", ".hidden", "a/b", "fp16@tp2"])
def test_names_that_cannot_be_folders_are_refused(refused, name):
    assert repr(name) in refused({name: {"dtype": "float32"}}, "recipes")


def test_load_table(tmp_path):
    schema, path = SCHEMAS / "recipes.schema.yaml", tmp_path / "recipes.yaml"
    with pytest.raises(UserError, match=r"recipes\.yaml does not exist"):
        load_table(str(path), schema)
    path.write_text("fp16: {dtype: [", encoding="utf-8")
    with pytest.raises(UserError, match=r"recipes.yaml is not valid YAML: .* line 1, column 1") as caught:
        load_table(str(path), schema)
    assert "\n" not in str(caught.value)
    path.write_text("fp16: {dtype: float16}", encoding="utf-8")
    assert load_table(str(path), schema) == {"fp16": {"dtype": "float16"}}


def test_recipes_of_a_project_add_to_the_shipped_ones_or_replace_them(tmp_path):
    shipped, path = load_table(SHIPPED_RECIPES, RECIPES_SCHEMA), tmp_path / "recipes.yaml"
    path.write_text("mine: {dtype: float32}\nfp16: {dtype: bfloat16}", encoding="utf-8")
    recipes = {name: recipe.settings for name, recipe in load_recipes(path).items()}
    assert recipes == shipped | {"mine": {"dtype": "float32"}, "fp16": {"dtype": "bfloat16"}}
    assert shipped["fp16"] == {"dtype": "float16"}
    for nothing in ("# comments alone", "{}"):
        path.write_text(nothing, encoding="utf-8")
        assert load_recipes(path) == load_recipes(None)
        assert load_recipes(None).keys() == shipped.keys()
    with pytest.raises(UserError, match=r"none\.yaml does not exist"):
        load_recipes("none.yaml")


def test_matrix_targets():
    config = {"matrix": [{"model": "a", "recipes": ["x", "y"]}, {"model": "b", "recipes": []}]}
    assert matrix_targets(config) == [
        "results/a/hf/rouge.json",
        "results/a/hf/perplexity.json",
        "results/a/recipes.md",
        "results/a/report.html",
        "results/a/x/rouge.json",
        "results/a/x/perplexity.json",
        "results/a/x/benchmark.json",
        "results/a/y/rouge.json",
        "results/a/y/perplexity.json",
        "results/a/y/benchmark.json",
        "results/b/hf/rouge.json",
        "results/b/hf/perplexity.json",
        "results/b/recipes.md",
        "results/b/report.html",
    ]
    assert matrix_targets({"matrix": []}) == []


def test_runs_of_a_table(tmp_path, monkeypatch):
    """Those of the matrix, then what is there, then what is asked for; no other model's, and nothing undeclared."""
    monkeypatch.chdir(tmp_path)
    there = ("x/gate", "y@tp2/benchmark", "y@tp2/lm_eval/arc", "y@tp2/perplexity", "old/rouge", "y@2/rouge", "hf/rouge")
    for name in (*there, "hf/lm_eval/arc", "y/summaries.meta", "../b/y/rouge"):
        file = tmp_path / f"results/a/{name}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    targets = ("./results/a/z/rouge.json", "results/a/y@tp2/perplexity.json", "results/b/z/rouge.json", "--cores")
    config = {"matrix": [{"model": "a", "recipes": ["x"]}, {"model": "b", "recipes": ["z"]}]}
    assert runs_of_table("a", config, {"x", "y", "z"}, targets) == {
        "hf": ["perplexity", "rouge", "lm_eval/arc"],
        "x": ["perplexity", "gate", "rouge", "benchmark"],
        "y@tp2": ["benchmark", "lm_eval/arc", "perplexity"],
        "z": ["rouge"],
    }
    tasks = config | {"lm_eval": {"tasks": ["mmlu"], "limit": 3}}
    assert runs_of_table("a", tasks, {"x", "y", "z"}, targets) == {
        "hf": ["perplexity", "rouge", "lm_eval/mmlu", "lm_eval/arc"],
        "x": ["perplexity", "gate", "rouge", "benchmark", "lm_eval/mmlu"],
        "y@tp2": ["benchmark", "lm_eval/arc", "perplexity"],
        "z": ["rouge"],
    }
    gate = {"policy": "fail", "above_limit": True}
    write_json(tmp_path / "results/a/x/gate.json", gate)
    assert runs_of_table("a", tasks, {"x"}, [])["x"] == ["perplexity", "gate", "benchmark"]
    write_json(tmp_path / "results/a/x/gate.json", gate | {"policy": "warn"})
    assert "rouge" in runs_of_table("a", config, {"x"}, [])["x"]
    rehearsed = runs_of_table("rehearsal/a", tasks, {"x"}, ["results/rehearsal/a/x/gate.json"])
    assert rehearsed == {"hf": ["perplexity", "rouge"], "x": ["gate"]}


@pytest.mark.parametrize(
    "target",
    [
        "results/a/x/rouge.json",
        "./results/a/x/engine",
        "results/a/hf/rouge.json",
        "results/a/x@tp2/rouge.json",
        "results/a/x@tp1",
        "results/a/x@tp16pp2/engine/rank31.safetensors",
        "results/a/checkpoint",
        "results/report.html",
        "--cores",
        "all",
        "elsewhere/results/b/y",
    ],
)
def test_check_targets_accepts(target):
    check_targets([target], {"a": {}}, {"x": {}})


LAYOUTS_OF_X = (
    "write x@tpN (tensor parallel), x@ppN (pipeline parallel) or x@tpNppM, with numbers of at least 2, or x@tp1 for "
    "one rank"
)


@pytest.mark.parametrize(
    ("target", "reason"),
    [
        ("results/b/x/rouge.json", "unknown model 'b'; known models: a, c"),
        ("./results/b/x/rouge.json", "unknown model 'b'; known models: a, c"),
        ("results/b/checkpoint", "unknown model 'b'; known models: a, c"),
        ("results/a/z/rouge.json", "unknown recipe 'z'; known recipes: w, x"),
        ("results/a/z/", "unknown recipe 'z'; known recipes: w, x"),
        ("results/a/z@tp2/gate.json", "unknown recipe 'z'; known recipes: w, x"),
        ("results/a/hf@tp2/rouge.json", "unknown recipe 'hf'; known recipes: w, x"),
        ("results/a/x@tp2pp1/gate.json", f"'x@tp2pp1' ends in no layout; {LAYOUTS_OF_X}"),
    ],
)
def test_check_targets_refuses(target, reason):
    with pytest.raises(UserError) as caught:
        check_targets(["results/a/x/rouge.json", target], {"c": {}, "a": {}}, {"x": {}, "w": {}})
    assert str(caught.value) == f"{target}: {reason}"


@pytest.mark.parametrize(
    ("kind", "name", "known", "message"),
    [
        ("model", "v2_13b", ["a", "baichuan-v2_7b", "baichuan-v2_13b"], "closest: baichuan-v2_13b; known models: a, "),
        ("model", "Qwen", ["qwen7b", "qwen14b", "llama"], "closest: qwen14b, qwen7b; known models: llama, "),
        ("model", "lama2-7b", ["llama2-70b", "llama2-7b", "bloom"], "closest: llama2-7b, llama2-70b; known models: "),
        ("recipe", "int9", ["bf16", "fp32"], "known recipes: bf16, fp32"),
    ],
)
def test_unknown_names_the_closest_first(kind, name, known, message):
    beginning = f"unknown {kind} {name!r}; "
    assert unknown(kind, name, known).startswith(beginning + message)
    assert unknown(kind, name, known).endswith(f"known {kind}s: {', '.join(sorted(known))}")


def test_check_targets_of_rehearsals():
    target = "./results/rehearsal/a/x/rouge.json"
    check_targets([target, "results/a/x/rouge.json"], {"a": {}}, {"x": {}})
    check_targets([target, "--cores", "all"], {"a": {}}, {"x": {}}, rehearse=True)
    for real in ("results/a/x/rouge.json", "./results//a/x/rouge.json"):
        with pytest.raises(UserError) as caught:
            check_targets([target, real], {"a": {}}, {"x": {}}, rehearse=True)
        right = "results/rehearsal/a/x/rouge.json"
        assert str(caught.value) == f"{real}: this is no rehearsal; with rehearse=true ask for {right}"
    with pytest.raises(UserError, match=r"unknown model 'b'; known models: a$"):
        check_targets([target.replace("/a/", "/b/")], {"a": {}}, {"x": {}}, rehearse=True)


@pytest.mark.parametrize(
    ("given", "meant"), [("true", True), ("True", True), (True, True), ("false", False), (False, False), ("1", "1")]
)
def test_rehearse_as_the_command_line_gives_it(given, meant):
    config = {"rehearse": given}
    assert rehearses(config) is meant
    assert config == {"rehearse": meant}
    assert rehearses({}) is False


@pytest.mark.parametrize(
    ("target", "mapped"),
    [
        ("results/a/x/rouge.json", "results/rehearsal/a/x/rouge.json"),
        ("./results/a/x/rouge.json", "results/rehearsal/a/x/rouge.json"),
        ("results//a/../b/recipes.md", "results/rehearsal/b/recipes.md"),
        ("results/rehearsal/a/x", "results/rehearsal/a/x"),
        ("results/rehearsals/x", "results/rehearsal/rehearsals/x"),
        ("all", "all"),
        ("elsewhere/results/a/x", "elsewhere/results/a/x"),
    ],
)
def test_rehearsal_target(target, mapped):
    assert rehearsal_target(target) == mapped
    assert rehearsal_target(mapped) == mapped


def test_rehearsal_of_the_shipped_configuration(shipped):
    before = copy.deepcopy(shipped)
    config = rehearsal_config(shipped)
    assert shipped == before
    assert config["evaluation"]["dataset"].pop("characters") == 64
    validate(config, SCHEMAS / "config.schema.yaml", "here")
    check_limits(config)
    assert config["build"] == shipped["build"]
    assert config["evaluation"]["prompt"] == shipped["evaluation"]["prompt"]
    assert config["evaluation"]["dataset"]["samples"] == 2
    assert config["evaluation"]["max_output_len"] == 8
    assert {entry["model"].split("/")[0] for entry in config["matrix"]} == {"rehearsal"}
    assert all(config["benchmark"][key] <= shipped["benchmark"][key] for key in shipped["benchmark"])


def test_a_rehearsal_never_does_more_than_is_configured(shipped):
    shipped["evaluation"] |= {"max_output_len": 3, "dataset": shipped["evaluation"]["dataset"] | {"samples": 1}}
    shipped["benchmark"] |= {"input_len": 5, "output_len": 2}
    config = rehearsal_config(shipped)
    small = {"baseline_dtype": "bfloat16", "dataset": shipped["evaluation"]["dataset"] | {"characters": 64}}
    assert config["evaluation"] == shipped["evaluation"] | small
    assert (config["benchmark"]["input_len"], config["benchmark"]["output_len"]) == (5, 2)


def test_rehearsal_of_models_and_recipes(tmp_path):
    source = {"hub": {"repo": "a/b", "revision": "c"}}
    models = {"a": {"source": source, "config": {"x": 1}}, "b": {"source": source}}
    models["c"] = models["a"] | {"chat_template": "mine.jinja"}
    models["d"] = {"source": {"local": {"path": "x", "model_version": "v2_7b"}}, "config": {"x": 1}}
    assert rehearsal_models(models)["rehearsal/d"]["source"]["dummy"]["model_version"] == "v2_7b"
    models["d"] = {"source": {"local": {"path": str(tmp_path)}}}
    assert "rehearsal/d" not in rehearsal_models(models)
    (tmp_path / "config.json").write_text("{}")  # a model that lies there need not be declared
    assert rehearsal_models(models)["rehearsal/d"]["source"]["dummy"]["config"] == str(tmp_path / "config.json")
    del models["d"]
    found = rehearsal_models(models)
    assert found.keys() == {"rehearsal/a", "rehearsal/c"}
    assert found["rehearsal/c"]["chat_template"] == "mine.jinja"
    dummy = {"config": {"x": 1}, "num_layers": 2, "dtype": "float16"}
    assert {model["source"]["dummy"] == dummy and len(model["source"]) == 1 for model in found.values()} == {True}
    assert all(marker(name) == {"rehearsal": True} for name in found)
    assert marker("a") == marker("rehearsal-a") == {}

    plain, weights = {"dtype": "float16"}, {"dtype": "float16", "weights": {"dtype": "int8"}}
    cache = plain | {"kv_cache": {"dtype": "int8"}, "calibration": {"seed": 3, "samples": 32, "length": 16}}
    gptq = plain | {"weights": {"dtype": "int4", "method": "gptq", "group_size": 64}}
    small = {"samples": 2, "length": 64}
    hub = plain | {"quant_checkpoint": source}
    recipes = {"plain": plain, "weights": weights, "cache": cache, "gptq": gptq, "hub": hub}
    rehearsed = rehearsal_recipes({name: Recipe.parse(recipe) for name, recipe in recipes.items()})
    assert {name: recipe.settings for name, recipe in rehearsed.items()} == {
        "plain": plain | {"gate": "warn"},
        "weights": weights | {"gate": "warn"},
        "cache": cache | {"gate": "warn", "calibration": {"seed": 3, "samples": 2, "length": 16}},
        "gptq": gptq | {"gate": "warn", "calibration": small},
    }


MODEL = {"source": {"hub": {"repo": "a/b", "revision": "0f"}}}
DECLARED = (
    {"models": "models.yaml", "matrix": [{"model": "a", "recipes": ["x", "hub"]}, {"model": "b", "recipes": ["x"]}]},
    {"a": MODEL | {"config": {"model_type": "llama"}}, "b": MODEL},
    {
        "x": Recipe.parse({"dtype": "float16"}),
        "hub": Recipe.parse({"dtype": "float16", "quant_checkpoint": {"local": {"path": "x"}}}),
    },
)


NO_CONFIG = "the model b cannot be rehearsed; add its published config.json to models.yaml as 'config'"
NO_DUMMY = r"the recipe hub cannot be rehearsed; its published weights \(quant_checkpoint\) have no dummy"


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["results/rehearsal/b/x/rouge.json"], f"results/rehearsal/b/x/rouge.json: {NO_CONFIG}"),
        (["results/rehearsal/b/checkpoint/config.json"], NO_CONFIG),
        (["results/rehearsal/a/x/rouge.json", "results/rehearsal/a/hub/gate.json"], NO_DUMMY),
        (["--forcerun", "./results/rehearsal/a/hub/engine/config.json"], NO_DUMMY),
        (["results/rehearsal/a/recipes.md"], f"results/rehearsal/a/recipes.md: {NO_DUMMY}"),
    ],
)
def test_what_cannot_be_rehearsed(targets, message):
    with pytest.raises(UserError, match=message):
        check_rehearsal(targets, *DECLARED)


def test_what_can_be_rehearsed():
    rehearsals = ["results/rehearsal/a/x/rouge.json", "results/rehearsal/a/checkpoint", "results/rehearsal/c/x/y"]
    real = ["results/b/x/rouge.json", "results/a/hub/gate.json", "results/a/recipes.md", "all"]
    check_rehearsal([*rehearsals, *real], *DECLARED)


@pytest.mark.parametrize(
    "entry",
    [
        MODEL | {"config": {"model_type": "qwen"}, "chat_template": "qwen"},
        MODEL | {"config": "models/qwen.json", "chat_template": "mine.jinja"},
        {"source": {"hub": MODEL["source"]["hub"] | {"model_version": "v2_13b"}}},
        {"source": {"local": {"path": "x", "model_version": "v2_13b"}}},
        MODEL | {"layout": {"tp_size": 4, "pp_size": 2}},
        MODEL | {"layout": {"pp_size": 1}},
        {"source": {"dummy": {"config": {}, "num_layers": 1, "model_version": "v1_7b"}}},
    ],
    ids=str,
)
def test_models_that_are_accepted(entry):
    validate({"mine": entry}, SCHEMAS / "models.schema.yaml", "here.yaml")


@pytest.mark.parametrize(
    ("name", "entry", "reason"),
    [
        ("rehearsal", MODEL, "the file: 'rehearsal' does not match"),
        ("mine", MODEL | {"config": 1}, "mine.config: 1 is not of type 'string', 'object'"),
        ("mine", MODEL | {"layout": {"tp_size": 0}}, "mine.layout.tp_size: 0 is less than the minimum of 1"),
        ("mine", MODEL | {"layout": {}}, "mine.layout: {} should be non-empty"),
        ("mine", MODEL | {"layout": {"tp": 2}}, "mine.layout: Additional properties are not allowed ('tp' was"),
        ("mine", MODEL | {"chat_template": {}}, "mine.chat_template: {} is not of type 'string'"),
        (
            "mine",
            MODEL | {"template": "qwen"},
            "mine: Additional properties are not allowed ('template' was unexpected); "
            "known keys: config, chat_template, layout, source",
        ),
        (
            "mine",
            {"source": {"gguf": {"path": "x", "model_version": "v2"}}},
            "mine.source.gguf: Additional properties are not allowed ('model_version' was unexpected); "
            "known keys: path, sha256",
        ),
        (
            "mine",
            {"source": {"dummy": {"config": {}, "num_layers": 0}}},
            "mine.source.dummy.num_layers: 0 is less than the minimum of 1",
        ),
        (
            "mine",
            {"source": {"dummy": {"config": {}, "num_layers": "two"}}},
            "mine.source.dummy.num_layers: 'two' is not of type 'integer'",
        ),
    ],
)
def test_models_that_are_refused(refused, name, entry, reason):
    assert refused({name: entry}, "models").startswith(f"here.yaml: {reason}")
    validate({"rehearsals": MODEL}, SCHEMAS / "models.schema.yaml", "here.yaml")


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


@pytest.mark.parametrize(
    ("model", "target", "length", "fits"),
    [
        ("llama-7b", "results/llama-7b/fp16/rouge.json", 1920, True),
        ("llama-7b", "results/llama-7b/fp16/rouge.json", 1921, False),
        ("llama-7b", "./results/rehearsal/llama-7b/recipes.md", 1921, False),
        ("llama-7b", "results/llama-7b/hf/rouge.json", 1921, True),  # no engine
        ("llama-7b", "results/llama-7b/checkpoint", 1921, True),
        ("qwen14b", "results/qwen14b/fp16/rouge.json", 30000, True),  # dynamic NTK
        ("qwen72b", "results/qwen72b/fp16/rouge.json", 40000, False),  # plain RoPE
        ("baichuan-v2_13b", "results/baichuan-v2_13b/fp16/rouge.json", 30000, True),  # ALiBi
        ("baichuan-v2_7b", "results/baichuan-v2_7b/fp16/rouge.json", 30000, False),
    ],
)
def test_positions_of_targets(shipped, model, target, length, fits):
    """The shipped models, with 128 tokens of output."""
    models, recipes = load_table(shipped["models"], SCHEMAS / "models.schema.yaml"), load_recipes(shipped["recipes"])
    build = shipped["build"] | {"max_input_len": length}
    if fits:
        check_positions_of_targets([target], models, recipes, build)
        return
    known = models[model]["config"]["max_position_embeddings"]
    with pytest.raises(UserError) as caught:
        check_positions_of_targets(["-n", target], models, recipes, build)
    assert str(caught.value) == (
        f"config/config.yaml: build: for the model {model} max_input_len {length} and max_output_len 128 are more than "
        f"the {known} positions that the model was made for (max_position_embeddings); take less, or give "
        "extrapolate_positions (--extrapolate-positions)"
    )
    check_positions_of_targets([target], models, recipes, build | {"extrapolate_positions": True})


@pytest.mark.parametrize(
    ("target", "reason"),
    [
        (
            "results/qwen7b/fp16@tp3/rouge.json",
            "tp_size 3 does not divide 32 heads, 32 KV heads and an intermediate_size",
        ),
        ("results/yi-34b/fp16@tp8/engine/config.json", None),
        ("results/yi-34b/int8kv@tp5pp2/gate.json", "of 20480; use one of 1, 2, 4, 8"),
        ("results/qwen7b/fp16@pp32/rouge.json", None),
        ("results/qwen7b/fp16@pp33/rouge.json", "pp_size 33 is more than the model's 32 layers"),
        ("results/rehearsal/qwen7b/fp16@pp3/rouge.json", "pp_size 3 is more than the model's 2 layers"),
        ("results/rehearsal/llama-65b/fp16@pp4/rouge.json", None),  # its own layout, so it has as many
        ("results/llama-65b/fp16/rouge.json", "tp_size 7 does not divide 64 heads"),
        ("results/llama-65b/fp16@tp1/rouge.json", None),
        ("results/llama-65b/hf/rouge.json", None),
        (
            "results/smollm2-135m/fp16@tp2/rouge.json",
            "tp_size 2 does not divide 9 heads, 3 KV heads",
        ),
        (
            "results/baichuan-v1_13b/gptq@tp4/rouge.json",
            "mlp.down_proj: 13696 input channels in groups of 64 do not divide by tp_size 4; use one of 1, 2, or "
            "weights in groups of 32",
        ),
        ("results/baichuan-v1_13b/awq@tp2/rouge.json", None),
        ("results/baichuan-v1_13b/gptq@pp2/rouge.json", None),
        ("results/unknown/fp16@tp5/rouge.json", None),  # it does not say what it looks like
        ("elsewhere", None),
    ],
)
def test_layouts_of_targets(shipped, target, reason):
    """The shipped models, one of which has a layout of its own that cannot be."""
    models, recipes = load_table(shipped["models"], SCHEMAS / "models.schema.yaml"), load_recipes(shipped["recipes"])
    models["llama-65b"]["layout"] = {"tp_size": 7, "pp_size": 4}
    models["unknown"] = {"source": {"local": {"path": "x"}}}
    if reason is None:
        check_layouts_of_targets([target], models, recipes)
        return
    with pytest.raises(UserError) as caught:
        check_layouts_of_targets(["-n", target], models, recipes)
    assert str(caught.value).startswith(f"{target}: ")
    assert reason in str(caught.value)


@pytest.mark.parametrize(
    ("target", "build", "run"),
    [
        ("results/smollm2-135m/fp8/rouge.json", {}, "fp8"),
        ("results/llama2-70b/fp16-fp8kv@tp2/engine/config.json", {}, "fp16-fp8kv@tp2"),
        ("results/rehearsal/qwen7b/fp8-dynamic/gate.json", {}, "fp8-dynamic"),
        ("results/smollm2-135m/report.html", {}, "fp16-fp8kv"),  # the first of the matrix that has FP8
        ("results/smollm2-135m/fp8/rouge.json", {"engines": ["portable"]}, None),
        ("results/smollm2-135m/fp8/rouge.json", {"compute_capabilities": "auto"}, None),
        ("results/smollm2-135m/fp8/rouge.json", {"compute_capabilities": ["8.9"]}, None),
        ("results/smollm2-135m/int8kv/rouge.json", {}, None),
        ("results/smollm2-135m/hf/rouge.json", {}, None),
        ("results/llama2-70b/report.html", {}, None),  # not in the matrix
        ("elsewhere", {}, None),
    ],
)
def test_fp8_of_targets(shipped, target, build, run):
    recipes = load_recipes(shipped["recipes"])
    shipped["build"] |= {"compute_capabilities": ["7.5", "8.9", "8.6"]} | build
    if run is None:
        check_fp8_of_targets([target], shipped, recipes)
        return
    with pytest.raises(UserError) as caught:
        check_fp8_of_targets(["-n", target], shipped, recipes)
    assert str(caught.value) == (
        f"config/config.yaml: build.compute_capabilities: {target} needs {run}, which has FP8: GPUs of compute "
        "capability 7.5, 8.6 have no FP8; build for 8.9, 12.0"
    )


RULE = """
import os, signal, sys, time
from types import SimpleNamespace
from trtbuild.errors import UserError
from trtbuild.workflow import rule_log
import torch

job = SimpleNamespace(log=["logs/deep/rule.log"], threads=1, output=["x.json"])
job.resources, job.params = dict(gpu=1), dict(ranks=2)
with rule_log(job):
    assert torch.get_num_threads() == 1
    print("from Python")
    os.write(1, b"from a library\\n")
    os.write(2, b"to the other stream\\n")
    os.write(2, b"\\rfile:  50%\\rfile: 100%\\n")
    {body}
"""


@pytest.mark.parametrize(
    ("body", "code", "last"),
    [
        ("pass", 0, "from Python"),  # Python's own buffer comes last
        ("raise UserError('no such thing; take another')", 2, "error: no such thing; take another"),
        ("raise RuntimeError('a bug')", 1, "RuntimeError: a bug"),
        ("open('missing/x')", 2, "error: missing/x: No such file or directory"),
        ("raise MemoryError", 2, f"error: {one_line(MemoryError())}"),
        ("os.killpg(0, signal.SIGINT); time.sleep(5)", 130, "interrupted"),  # as Ctrl-C does: the log outlives it
    ],
)
def test_rule_log(tmp_path, body, code, last):
    result = subprocess.run(
        [sys.executable, "-c", RULE.format(body=body)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        start_new_session=True,
    )
    log = (tmp_path / "logs" / "deep" / "rule.log").read_text()
    assert result.returncode == code
    assert result.stderr == log  # the terminal sees what the log holds
    assert {"from Python", "from a library", "to the other stream", "file:  50%"} <= set(log.splitlines())
    assert b"\r" not in (tmp_path / "logs" / "deep" / "rule.log").read_bytes()
    assert last in log.splitlines() if code == 0 else log.splitlines()[-1] == last
    assert ("Traceback" in log) == (code == 1)


def test_rule_log_refuses_an_output_before_work(tmp_path):
    os.mkfifo(tmp_path / "x.json")
    result = subprocess.run(
        [sys.executable, "-c", RULE.format(body="pass")], cwd=tmp_path, capture_output=True, text=True
    )
    assert (result.returncode, result.stderr) == (
        2,
        "error: x.json is a pipe; an output is a file or a folder, choose another\n",
    )


def test_snakemake_lint():
    command = [sys.executable, "-m", "snakemake", "--lint"]
    result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, env=dict(os.environ))
    assert result.returncode == 0, result.stdout + result.stderr
    assert "Congratulations" in result.stdout + result.stderr
