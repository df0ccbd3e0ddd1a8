"""Which recipes are refused, with which words, and what of them the rules are made from."""

import pytest
import yaml

from trtbuild.errors import UserError
from trtbuild.linear.int4 import GROUP_SIZES
from trtbuild.quantization.recipe import Recipe
from trtbuild.workflow import (
    RECIPES_SCHEMA,
    calibration_name,
    calibrations,
    check_targets,
    load_table,
    quantizations,
    reserved_names,
    weights_folder,
)
from trtbuild.yaml_reader import read_yaml

INT8, FP8, TOKEN = {"dtype": "int8"}, {"dtype": "fp8"}, {"dtype": "int8", "per": "token"}
GPTQ = {"dtype": "int4", "method": "gptq", "group_size": 64}
PUBLISHED = {"local": {"path": "weights"}}
SETTINGS = {"samples": 32}


@pytest.fixture
def load(tmp_path):
    """Reads a recipe named `mine` as `config/recipes.yaml` is read."""

    def load_recipe(recipe: object) -> dict:
        path = tmp_path / "recipes.yaml"
        path.write_text(yaml.safe_dump({"plain": {"dtype": "float16"}, "mine": recipe}), encoding="utf-8")
        return load_table(str(path), RECIPES_SCHEMA)["mine"]

    return load_recipe


@pytest.fixture
def refused(load):
    """The message with which a recipe is refused, from the recipe's name on."""

    def check(recipe: object) -> str:
        with pytest.raises(UserError) as caught:
            load(recipe)
        message = str(caught.value)
        assert "\n" not in message
        assert "recipes.yaml: mine" in message
        return message.partition("recipes.yaml: ")[2]

    return check


# For each clause of the schema's allOf, in its order: how its description begins, and recipes that it refuses.
CONTRADICTIONS = {
    "activations are quantized together with weights of the same dtype": [
        {"activations": INT8},
        {"activations": FP8, "kv_cache": FP8},
    ],
    "weights int4 keep activations in 16 bits": [
        {"weights": {"dtype": "int4"}, "activations": INT8},
        {"weights": GPTQ, "activations": FP8},
    ],
    "weights int8 go with activations int8 (or none)": [{"weights": INT8, "activations": FP8}],
    "weights fp8 need activations fp8": [{"weights": FP8}, {"weights": FP8, "activations": INT8}],
    "smoothquant is for int8 activations": [{"weights": FP8, "activations": FP8 | {"smoothquant": 0.5}}],
    "methods gptq and awq make weights int4": [
        {"weights": {"dtype": "int8", "method": "gptq"}},
        {"weights": GPTQ | {"dtype": "int8"}},
        {"weights": FP8 | {"method": "awq"}, "activations": FP8},
    ],
    "group_size is for weights int4": [{"weights": INT8 | {"group_size": 64}}],
    "symmetric is an option of weights int4": [
        {"weights": INT8 | {"symmetric": True}},
        {"weights": FP8 | {"symmetric": False}, "activations": FP8},
    ],
    "weights int4 have a scale per group_size input channels": [{"weights": {"dtype": "int4", "per": "channel"}}],
    "gptq and awq need a group_size": [
        {"weights": {"dtype": "int4", "method": "gptq"}},
        {"weights": {"dtype": "int4", "method": "awq", "symmetric": True}},
    ],
    "quantize_lm_head and keep_16bit say which weights to quantize": [
        {"quantize_lm_head": True},
        {"keep_16bit": ["lm_head"], "kv_cache": INT8},
    ],
    "quant_checkpoint brings quantized weights": [
        {"quant_checkpoint": PUBLISHED, "quantize_lm_head": False},
        {"quant_checkpoint": PUBLISHED, "activations": INT8},
        {"quant_checkpoint": PUBLISHED, "weights": INT8},
        {"quant_checkpoint": PUBLISHED, "weights": INT8, "activations": INT8},
    ],
    "nothing in this recipe is calibrated": [
        {"calibration": SETTINGS},
        {"calibration": SETTINGS, "weights": INT8},
        {"calibration": SETTINGS, "weights": {"dtype": "int4", "method": "round"}},
        {"calibration": SETTINGS, "weights": INT8, "activations": TOKEN},
        {"calibration": SETTINGS, "weights": FP8, "activations": FP8 | {"per": "token"}},
        {"calibration": SETTINGS, "quant_checkpoint": PUBLISHED},
    ],
}


def test_every_contradiction_is_tested():
    clauses = yaml.safe_load(RECIPES_SCHEMA.read_text())["additionalProperties"]["allOf"]
    assert len(clauses) == len(CONTRADICTIONS)
    for clause, beginning in zip(clauses, CONTRADICTIONS, strict=True):
        assert clause["description"].startswith(beginning)


@pytest.mark.parametrize(
    ("beginning", "recipe"),
    [(beginning, recipe) for beginning, recipes in CONTRADICTIONS.items() for recipe in recipes],
    ids=str,
)
def test_contradiction(refused, beginning, recipe):
    name, _, reason = refused({"dtype": "float16"} | recipe).partition(": ")
    assert name.split(".")[0] == "mine"
    assert reason.startswith(beginning)


@pytest.mark.parametrize(
    "recipe",
    [
        {"weights": INT8},
        {"weights": INT8 | {"method": "round", "per": "tensor"}, "activations": TOKEN},
        {"weights": INT8, "activations": INT8 | {"smoothquant": 0}, "calibration": SETTINGS},
        {"weights": INT8, "activations": TOKEN | {"smoothquant": 1}, "calibration": SETTINGS},
        {"weights": INT8, "kv_cache": FP8 | {"per": "head"}, "calibration": SETTINGS},
        {"weights": FP8 | {"per": "tensor"}, "activations": FP8 | {"per": "tensor"}, "calibration": SETTINGS},
        {"weights": FP8 | {"per": "channel"}, "activations": FP8 | {"per": "token"}},
        {"weights": {"dtype": "int4", "symmetric": False}, "quantize_lm_head": True},
        {"weights": GPTQ, "calibration": SETTINGS, "keep_16bit": ["model.layers.0.*"]},
        {"kv_cache": INT8, "calibration": SETTINGS},
        {"quant_checkpoint": PUBLISHED, "kv_cache": INT8, "calibration": SETTINGS},
        {"max_perplexity_increase": 0.5, "max_mean_kl": 0.01, "gate": "warn"},
    ],
    ids=str,
)
def test_sensible_recipe(load, recipe):
    assert load({"dtype": "bfloat16"} | recipe) == {"dtype": "bfloat16"} | recipe


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (
            {"weight": INT8},
            "mine: Additional properties are not allowed ('weight' was unexpected); known keys: dtype, ",
        ),
        (
            {"weights": INT8 | {"bits": 8}},
            "mine.weights: Additional properties are not allowed ('bits' was unexpected); known keys: dtype, method, ",
        ),
        (
            {"kv_cache": INT8, "calibration": {"sample": 64}},
            "mine.calibration: Additional properties are not allowed ('sample' was unexpected); known keys: dataset, ",
        ),
        (
            {"quant_checkpoint": {"gguf": {"path": "x"}}},
            "mine.quant_checkpoint: Additional properties are not allowed ('gguf' was unexpected); "
            "known keys: hub, local",
        ),
        ({"weights": {"dtype": "int7"}}, "mine.weights.dtype: 'int7' is not one of ['int8', 'int4', 'fp8']"),
        ({"weights": INT8 | {"method": "rtn"}}, "mine.weights.method: 'rtn' is not one of ['round', 'gptq', 'awq']"),
        ({"weights": INT8 | {"per": "row"}}, "mine.weights.per: 'row' is not one of ['channel', 'tensor']"),
        (
            {"weights": GPTQ | {"group_size": 48}},
            "mine.weights.group_size: 48 is not one of [32, 64, 128, 256]",
        ),
        ({"weights": GPTQ | {"symmetric": "yes"}}, "mine.weights.symmetric: 'yes' is not of type 'boolean'"),
        (
            {"weights": INT8, "activations": {"dtype": "int4"}},
            "mine.activations.dtype: 'int4' is not one of ['int8', 'fp8']",
        ),
        (
            {"weights": INT8, "activations": INT8 | {"smoothquant": 1.5}},
            "mine.activations.smoothquant: 1.5 is greater than the maximum of 1",
        ),
        ({"kv_cache": {"dtype": "int4"}}, "mine.kv_cache.dtype: 'int4' is not one of ['int8', 'fp8']"),
        ({"kv_cache": INT8 | {"per": "tensor"}}, "mine.kv_cache.per: 'tensor' is not one of ['layer', 'head']"),
        ({"kv_cache": {}}, "mine.kv_cache: 'dtype' is a required property"),
        ({"weights": {}}, "mine.weights: 'dtype' is a required property"),
        ({"weights": {"method": "gptq", "group_size": 64}}, "mine.weights: 'dtype' is a required property"),
        ({"weights": "int8"}, "mine.weights: write weights: {dtype: int8}"),
        ({"weights": INT8, "activations": {"per": "token"}}, "mine.activations: 'dtype' is a required property"),
        ({"weights": INT8, "keep_16bit": "lm_head"}, "mine.keep_16bit: 'lm_head' is not of type 'array'"),
        (
            {"kv_cache": INT8, "calibration": {"samples": 31}},
            "mine.calibration.samples: 31 is less than the minimum of 32",
        ),
        ({"max_perplexity_increase": 0}, "mine.max_perplexity_increase: 0 is less than or equal to the minimum of 0"),
        ({"gate": "error"}, "mine.gate: 'error' is not one of ['fail', 'warn']"),
        (
            {"quant_checkpoint": {"hub": {"repo": "owner/name"}}},
            "mine.quant_checkpoint.hub: 'revision' is a required property",
        ),
    ],
    ids=str,
)
def test_unknown_keys_and_values(refused, recipe, message):
    assert refused({"dtype": "float16"} | recipe).startswith(message)


def test_a_recipe_needs_a_dtype(refused):
    assert refused({"weights": INT8}) == "mine: 'dtype' is a required property"


@pytest.mark.parametrize("name", sorted(reserved_names()))
def test_folders_of_a_model_are_no_recipe_names(tmp_path, name):
    (tmp_path / "recipes.yaml").write_text(f"{name}: {{dtype: float16}}")
    with pytest.raises(UserError, match=f"recipes.yaml: the file: '{name}'"):
        load_table(str(tmp_path / "recipes.yaml"), RECIPES_SCHEMA)
    check_targets([f"results/model/{name}/file"], {"model": {}}, {"mine": {}})


# What the rules are made from


def test_one_folder_for_equal_weights():
    """KV cache, judgement and what is left to its default do not tell weights apart."""
    base = {"dtype": "float16", "weights": GPTQ}
    equal = [
        base | {"kv_cache": INT8},
        base | {"max_perplexity_increase": 3, "gate": "warn"},
        base | {"weights": GPTQ | {"symmetric": False}, "quantize_lm_head": False, "keep_16bit": []},
        base | {"calibration": {"samples": 64, "length": 512, "seed": 0}},
    ]
    other = [
        base | {"dtype": "bfloat16"},
        base | {"weights": GPTQ | {"symmetric": True}},
        base | {"weights": GPTQ | {"group_size": 128}},
        base | {"quantize_lm_head": True},
        base | {"keep_16bit": ["lm_head"]},
        base | {"calibration": {"samples": 32}},
    ]
    folder = weights_folder(Recipe.parse(base))
    assert folder.startswith("quantized/gptq-int4-")
    assert {weights_folder(Recipe.parse(recipe)) for recipe in equal} == {folder}
    assert len({weights_folder(Recipe.parse(recipe)) for recipe in [base, *other]}) == len(other) + 1
    names = {weights_folder(Recipe.parse(recipe)).removeprefix("quantized/") for recipe in [base, *other]}
    assert quantizations(dict(enumerate(map(Recipe.parse, [base, *equal, *other])))).keys() == names


def test_weights_that_are_not_quantized_here():
    declared = {"dtype": "float16", "quant_checkpoint": PUBLISHED}
    plain, published = Recipe.parse({"dtype": "float16", "kv_cache": INT8}), Recipe.parse(declared)
    assert weights_folder(plain) == "checkpoint"
    folder = weights_folder(published)
    assert folder.startswith("quantized/published-")
    assert weights_folder(Recipe.parse(declared | {"kv_cache": INT8})) == folder
    found = quantizations({"plain": plain, "published": published})
    assert found == {folder.removeprefix("quantized/"): {"source": PUBLISHED}}


def test_calibrations_are_those_that_recipes_read():
    published = {"dtype": "float16", "quant_checkpoint": PUBLISHED}
    recipes = {
        "plain": {"dtype": "float16"},
        "rounded": {"dtype": "float16", "weights": INT8},
        "by samples": {"dtype": "float16", "weights": GPTQ},
        "by token": {"dtype": "float16", "weights": INT8, "activations": TOKEN},
        "published": published,
    }
    assert calibrations({name: Recipe.parse(recipe) for name, recipe in recipes.items()}) == {}
    static = {"dtype": "float16", "weights": INT8, "activations": INT8}
    smooth = {"dtype": "bfloat16", "weights": INT8, "activations": TOKEN | {"smoothquant": 0.5}}
    cache = {"dtype": "float16", "kv_cache": INT8, "calibration": {"seed": 0}}
    measured = [Recipe.parse(recipe) for recipe in (static, smooth, cache)]
    (name,) = calibrations(dict(enumerate(measured)))
    assert {calibration_name(recipe) for recipe in measured} == {name}
    assert name.startswith("trtbuild-news-64x512-")


def test_published_weights_are_calibrated_themselves():
    declared = {"dtype": "float16", "kv_cache": INT8}
    original, published = Recipe.parse(declared), Recipe.parse(declared | {"quant_checkpoint": PUBLISHED})
    found = calibrations({"original": original, "published": published})
    assert found[calibration_name(original)]["weights"] is None
    assert found[calibration_name(published)]["weights"] == weights_folder(published)
    assert len(found) == 2
    settings = [calibration["settings"] for calibration in found.values()]
    assert settings[0] == settings[1]


def test_the_schema_has_the_group_sizes_of_int4():
    weights = read_yaml(RECIPES_SCHEMA)["additionalProperties"]["properties"]["weights"]["properties"]
    assert weights["group_size"]["enum"] == list(GROUP_SIZES)
