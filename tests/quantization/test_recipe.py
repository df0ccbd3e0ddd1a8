"""What a recipe leaves out, and what each stage depends on."""

import json
from pathlib import Path

import pytest
import yaml

from trtbuild.quantization.recipe import MAX_PERPLEXITY_INCREASE, Quantization, Recipe, Text

RECIPES = yaml.safe_load((Path(__file__).parents[2] / "trtbuild/recipes.yaml").read_text())
AWQ = {"dtype": "float16", "weights": {"dtype": "int4", "method": "awq", "group_size": 64}}
SMOOTH = {
    "dtype": "float16",
    "weights": {"dtype": "int8"},
    "activations": {"dtype": "int8", "per": "token", "smoothquant": 0.5},
}


DEFAULT_CALIBRATION = Text().settings


def id_of(recipe: dict) -> str:
    return Recipe.parse(recipe).quantization.id


def settings_of(recipe: dict) -> dict:
    return Quantization.parse(recipe).settings


# Defaults


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ({"dtype": "int8"}, {"method": "round", "per": "channel"}),
        ({"dtype": "int8", "per": "tensor"}, {"method": "round", "per": "tensor"}),
        ({"dtype": "fp8"}, {"method": "round", "per": "tensor"}),
        ({"dtype": "int4"}, {"method": "round", "symmetric": True, "group_size": None}),
        ({"dtype": "int4", "method": "gptq", "group_size": 64}, {"symmetric": False}),
        ({"dtype": "int4", "method": "awq", "group_size": 64}, {"symmetric": False}),
        ({"dtype": "int4", "method": "gptq", "group_size": 64, "symmetric": True}, {}),
    ],
)
def test_defaults_of_weights(weights, expected):
    recipe = {"dtype": "float16", "weights": weights}
    assert settings_of(recipe)["weights"] == weights | expected
    assert recipe == {"dtype": "float16", "weights": weights}  # and the recipe itself is left alone


def test_defaults_of_the_rest():
    quantization = settings_of({"dtype": "bfloat16", "weights": {"dtype": "int8"}})
    assert quantization == {
        "dtype": "bfloat16",
        "weights": {"dtype": "int8", "method": "round", "per": "channel"},
        "activations": None,
        "quantize_lm_head": False,
        "keep_16bit": [],
    }
    fp8 = settings_of({"dtype": "float16", "weights": {"dtype": "fp8"}, "activations": {"dtype": "fp8"}})
    assert fp8["activations"] == {"dtype": "fp8", "per": "tensor", "smoothquant": None}
    assert fp8["calibration"] == DEFAULT_CALIBRATION
    assert DEFAULT_CALIBRATION["samples"] == 64
    assert DEFAULT_CALIBRATION["length"] == 512


@pytest.mark.parametrize("name", ["fp16", "bf16", "fp32", "fp16-int8kv", "fp16-fp8kv"])
def test_without_weights_nothing_is_quantized(name):
    recipe = Recipe.parse(RECIPES[name])
    assert recipe.quantization is None
    assert recipe.needs_ranges == (recipe.kv_cache is not None)


@pytest.mark.parametrize(
    ("activations", "expected"),
    [
        (None, False),
        ({"dtype": "int8", "per": "token"}, False),
        ({"dtype": "int8", "per": "token", "smoothquant": 0.0}, True),
        ({"dtype": "int8", "per": "tensor"}, True),
        ({"dtype": "int8"}, True),
    ],
)
def test_needs_ranges(activations, expected):
    recipe = {"dtype": "float16", "weights": {"dtype": "int8"}} | ({"activations": activations} if activations else {})
    quantization = Quantization.parse(recipe)
    assert quantization.needs_ranges == Recipe.parse(recipe).needs_ranges == expected
    assert ("calibration" in quantization.settings) == expected


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_methods_that_look_at_samples_depend_on_them(method):
    weights = {"dtype": "int4", "method": method, "group_size": 64}
    recipe = {"dtype": "float16", "weights": weights, "calibration": {"samples": 32}}
    assert settings_of(recipe)["calibration"] == DEFAULT_CALIBRATION | {"samples": 32}
    assert not Recipe.parse(recipe).needs_ranges


# Identities


@pytest.mark.parametrize(
    "change",
    [
        {"dtype": "bfloat16"},
        {"weights": AWQ["weights"] | {"group_size": 128}},
        {"weights": AWQ["weights"] | {"symmetric": True}},
        {"weights": AWQ["weights"] | {"method": "gptq"}},
        {"quantize_lm_head": True},
        {"keep_16bit": ["*.down_proj"]},
        {"calibration": {"samples": 32}},
        {"calibration": {"seed": 1}},
    ],
    ids=str,
)
def test_id_changes_with_what_matters(change):
    assert id_of(AWQ | change) != id_of(AWQ)


@pytest.mark.parametrize(
    "change",
    [
        {"max_perplexity_increase": 3},
        {"gate": "warn"},
        {"kv_cache": {"dtype": "int8"}},
        {"weights": AWQ["weights"] | {"symmetric": False}},
        {"quantize_lm_head": False},
        {"calibration": {"samples": 64, "seed": 0}},
        {"calibration": dict(reversed(DEFAULT_CALIBRATION.items()))},
    ],
    ids=str,
)
def test_id_stays_with_what_does_not(change):
    """The gate, the cache, defaults written out, and the order of keys: recipes share a folder of weights."""
    assert id_of(AWQ | change) == id_of(AWQ)


def test_round_does_not_depend_on_samples():
    recipe = {"dtype": "float16", "weights": {"dtype": "int8"}, "kv_cache": {"dtype": "int8"}}
    assert id_of(recipe | {"calibration": {"seed": 3}}) == id_of(recipe)


@pytest.mark.parametrize("change", [{"smoothquant": 0.6}, {"per": "tensor"}])
def test_id_changes_with_activations(change):
    assert id_of(SMOOTH | {"activations": SMOOTH["activations"] | change}) != id_of(SMOOTH)


def test_ids_are_names():
    assert id_of(AWQ).startswith("awq-int4-")
    assert len(id_of(AWQ)) == len("awq-int4-") + 8
    hub = {"dataset": {"name": "abisee/cnn_dailymail", "split": "train"}, "samples": 32, "length": 256}
    assert Text(**hub).id.startswith("abisee--cnn_dailymail-32x256-")
    assert Text().id.startswith("trtbuild-news-64x512-")


def test_shipped_recipes_that_share_weights():
    """`awq` and `awq-int8kv`; `int8wo` and `int8kv`; no others."""
    ids = {name: id_of(recipe) for name, recipe in RECIPES.items() if "weights" in recipe}
    assert ids["awq"] == ids["awq-int8kv"]
    assert ids["int8wo"] == ids["int8kv"]
    assert len(set(ids.values())) == len(ids) - 2


@pytest.mark.parametrize(
    "change", [{"samples": 32}, {"length": 64}, {"seed": 1}, {"dataset": {"name": "trtbuild-news", "split": "other"}}]
)
def test_calibration_id(change):
    assert Text(**change).id != Text().id


def test_engine_recipe_leaves_out_the_gate():
    judged = AWQ | {"kv_cache": {"dtype": "int8"}, "max_perplexity_increase": 3, "gate": "warn"}
    judged["max_mean_kl"] = 0.1
    assert Recipe.parse(judged).engine_settings == AWQ | {"kv_cache": {"dtype": "int8"}}
    assert Recipe.parse(judged).gate_limits == {"max_increase": 3, "policy": "warn", "max_mean_kl": 0.1}


# What stays in 16 bits


@pytest.mark.parametrize(
    ("name", "head", "patterns", "expected"),
    [
        ("model.layers.0.mlp.down_proj", False, [], False),
        ("model.layers.0.mlp.down_proj", False, ["*.down_proj"], True),
        ("model.layers.10.mlp.down_proj", False, ["model.layers.1.*"], False),
        ("model.layers.1.mlp.down_proj", False, ["*.o_proj", "model.layers.1.*"], True),
        ("model.layers.1.mlp.down_proj", False, ["*.DOWN_proj"], False),
        ("lm_head", False, [], True),
        ("lm_head", True, [], False),
        ("lm_head", True, ["lm_*"], True),
    ],
)
def test_kept_in_16bit(name, head, patterns, expected):
    recipe = {"dtype": "float16", "weights": {"dtype": "int8"}, "quantize_lm_head": head, "keep_16bit": patterns}
    assert Quantization.parse(recipe).keeps(name) == expected


# As types


@pytest.mark.parametrize("name", [name for name, recipe in RECIPES.items() if "weights" in recipe])
def test_settings_are_all_of_a_quantization(name):
    """What a rule is given, and what a folder records, is the same quantization, with the same name."""
    quantization = Quantization.parse(RECIPES[name])
    again = Quantization.parse(json.loads(json.dumps(quantization.settings)))
    assert again == quantization
    assert again.id == quantization.id


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("int8wo", "16bit"),
        ("gptq", "16bit"),
        ("sq-static", "static"),
        ("sq-per-token", "token"),
        ("sq-per-token-per-channel", "token"),
        ("fp8", "static"),
        ("fp8-dynamic", "token"),
    ],
)
def test_rounding_of_activations(name, expected):
    assert Recipe.parse(RECIPES[name]).quantization.rounding == expected


def test_names_of_artifacts_do_not_change():
    """Folders that were made with earlier versions are found again."""
    assert id_of(RECIPES["gptq"]) == "gptq-int4-699976a4"
    assert id_of(RECIPES["sq-static"]) == "round-int8-03e1b984"
    assert Text().id == "trtbuild-news-64x512-b08b7331"


# The gate


@pytest.mark.parametrize(
    ("recipe", "kind"),
    [
        ({"dtype": "float16"}, "plain"),
        ({"weights": {"dtype": "int8"}}, "int8"),
        ({"kv_cache": {"dtype": "int8"}}, "int8"),
        ({"kv_cache": {"dtype": "fp8"}}, "fp8"),
        ({"weights": {"dtype": "int8"}, "kv_cache": {"dtype": "fp8"}}, "fp8"),
        ({"weights": {"dtype": "fp8"}, "activations": {"dtype": "fp8"}}, "fp8"),
        ({"weights": {"dtype": "fp8", "per": "channel"}, "activations": {"dtype": "fp8", "per": "token"}}, "fp8"),
        ({"weights": {"dtype": "int8"}, "activations": {"dtype": "int8"}}, "w8a8"),
        ({"weights": {"dtype": "int4", "group_size": 64}, "kv_cache": {"dtype": "int8"}}, "int4-groups"),
        ({"weights": {"dtype": "int4"}}, "int4"),
        ({"quant_checkpoint": {"local": {"path": "x"}}}, "int4-groups"),
    ],
    ids=str,
)
def test_gate_by_the_weakest_part(recipe, kind):
    expected = {"max_increase": MAX_PERPLEXITY_INCREASE[kind], "policy": "fail"}
    assert Recipe.parse({"dtype": "float16"} | recipe).gate_limits == expected


def test_a_declared_limit_wins():
    declared = {"dtype": "float16", "weights": {"dtype": "int4"}, "max_perplexity_increase": 2, "gate": "warn"}
    assert Recipe.parse(declared).gate_limits == {"max_increase": 2, "policy": "warn"}
    plain = {"dtype": "float16", "max_perplexity_increase": 0.5}
    assert Recipe.parse(plain).gate_limits == {"max_increase": 0.5, "policy": "fail"}
