"""Recipes that quantize: what one run makes, what a change of each key makes again, and the quality gate."""

import json
import math
import re

import numpy as np
import pytest

from trtbuild.evaluation.gate import increase
from trtbuild.files import sha256
from trtbuild.workflow import calibration_name, weights_folder

pytestmark = pytest.mark.slow

PUBLISHED = "published"
RECIPES = ("int8kv", "gptq", "awq", "awq-int8kv", "sq", "fp8", PUBLISHED)
# What `quantized_targets` need of each recipe after its engine's weights.
AFTER = {
    "int8kv": "engine summarize perplexity gate rouge",
    "gptq": "engine perplexity gate",
    "awq": "engine",
    "awq-int8kv": "engine",
    "sq": "engine perplexity gate",
    "fp8": "engine perplexity",
    PUBLISHED: "engine perplexity",
}


def folder_of(workspace, recipe: str):
    """Where a recipe's weights are."""
    return workspace.results / "tiny" / weights_folder(workspace.recipe(recipe))


def read(path) -> dict:
    return json.loads(path.read_text())


def jobs(recipe: str, rules: str) -> set[str]:
    return {f"{rule} tiny/{recipe}" for rule in rules.split()}


# What one run makes


def test_each_kind_of_weights_is_made_once(made_quantized):
    """The calibration is one for all recipes that need it, and two recipes share their weights."""
    workspace, output = made_quantized
    ran = re.findall(r"^localrule (\w+):$", output, re.MULTILINE)
    assert ran.count("calibration") == 1
    assert ran.count("quantize") == len(RECIPES) - 1
    assert ran.count("portable_engine") == len(RECIPES)
    folder = workspace.results / "tiny"
    assert [path.name for path in (folder / "calibration").iterdir()] == [
        f"{calibration_name(workspace.recipe('int8kv'))}.npz"
    ]
    made = {path.name for path in (folder / "quantized").iterdir()}
    assert made == {folder_of(workspace, recipe).name for recipe in RECIPES}
    assert folder_of(workspace, "awq") == folder_of(workspace, "awq-int8kv")


def test_names_say_what_was_done(made_quantized):
    workspace, _ = made_quantized
    names = {recipe: re.sub("[0-9a-f]{8}$", "#", folder_of(workspace, recipe).name) for recipe in RECIPES}
    assert names == {
        "int8kv": "round-int8-#",
        "gptq": "gptq-int4-#",
        "awq": "awq-int4-#",
        "awq-int8kv": "awq-int4-#",
        "sq": "round-int8-#",
        "fp8": "round-fp8-#",
        PUBLISHED: "published-#",
    }
    assert re.fullmatch("trtbuild-news-32x32-[0-9a-f]{8}", calibration_name(workspace.recipe("int8kv")))
    calibration = f"calibration.{calibration_name(workspace.recipe('int8kv'))}"
    stages = {calibration, *(f"quantize.{folder_of(workspace, recipe).name}" for recipe in RECIPES)}
    logs = {f"{stage}.{end}" for stage in stages for end in ("log", "tsv")}
    assert {path.name for path in (workspace.results / "tiny/logs").iterdir()} == logs | {"checkpoint.log"}


def test_calibration_tells_its_text(made_quantized):
    workspace, _ = made_quantized
    (file,) = (workspace.results / "tiny/calibration").iterdir()
    with np.load(file) as content:
        origin = json.loads(str(content["origin"]))
    assert origin["samples"] == 32
    assert origin["tokens"] == 32 * 32
    settings = {"name": "trtbuild-news", "split": "calibration", "seed": 0, "length": 32}
    assert origin["dataset"].items() >= settings.items()


def test_weights_tell_their_inputs(made_quantized):
    """The calibration file is one only where activations are quantized by their ranges."""
    workspace, _ = made_quantized
    checkpoint = workspace.results / "tiny/checkpoint"
    (calibration,) = (workspace.results / "tiny/calibration").iterdir()
    of_model = {name: sha256(checkpoint / name) for name in ("config.json", "model.safetensors")}
    for recipe in RECIPES[:-1]:
        inputs = read(folder_of(workspace, recipe) / "quantization.json")["inputs"]
        ranges = {calibration.name: sha256(calibration)} if recipe in ("sq", "fp8") else {}
        assert inputs == of_model | ranges, recipe


@pytest.mark.parametrize("recipe", RECIPES)
def test_engine_tells_its_recipe_and_inputs(made_quantized, recipe):
    workspace, _ = made_quantized
    config = read(workspace.results / "tiny" / recipe / "engine/config.json")
    declared = workspace.recipes[recipe]
    assert config["recipe"] == {key: value for key, value in declared.items() if key != "max_perplexity_increase"}
    weights = folder_of(workspace, recipe)
    inputs = {name: sha256(weights / name) for name in ("config.json", "model.safetensors")}
    if "kv_cache" in declared:
        (calibration,) = (workspace.results / "tiny/calibration").iterdir()
        inputs[calibration.name] = sha256(calibration)
    assert config["inputs"] == inputs


@pytest.mark.parametrize("recipe", [recipe for recipe in RECIPES if "perplexity" in AFTER[recipe]])
def test_perplexity_is_close_to_the_baseline(made_quantized, recipe):
    """With random weights, every token is about as likely as before: a wrong layout would show."""
    workspace, _ = made_quantized
    ours, theirs = (read(workspace.results / "tiny" / run / "perplexity.json") for run in (recipe, "hf"))
    assert ours["perplexity"] == pytest.approx(theirs["perplexity"], rel=0.02)
    assert ours["perplexity"] != theirs["perplexity"]
    assert ours["provenance"]["engine"] == "portable"
    assert ours["provenance"]["dtype"] == "float16"
    engine = workspace.results / "tiny" / recipe / "engine/rank0.safetensors"
    assert ours["provenance"]["engine_sha256"] == sha256(engine)


@pytest.mark.parametrize("recipe", [recipe for recipe in RECIPES if "gate" in AFTER[recipe]])
def test_gate_tells_what_it_judged(made_quantized, recipe):
    workspace, _ = made_quantized
    folder = workspace.results / "tiny"
    ours, theirs = (read(folder / run / "perplexity.json")["perplexity"] for run in (recipe, "hf"))
    gate = read(folder / recipe / "gate.json")
    increase, low, high = (gate.pop(key) for key in ("increase_percent", "low", "high"))
    assert increase == pytest.approx(100 * (ours / theirs - 1), abs=1e-9)
    assert low < increase < high < 1000
    assert gate == {
        "baseline": theirs,
        "baseline_engine": "transformers",
        "value": ours,
        "limit_percent": 1000,
        "articles": 2,
        "verdict": "passed",
        "above_limit": False,
        "policy": "fail",
        "engine_sha256": sha256(folder / recipe / "engine/rank0.safetensors"),
    }


def test_rouge_of_a_quantized_engine(made_quantized):
    workspace, _ = made_quantized
    folder = workspace.results / "tiny/int8kv"
    rouge = read(folder / "rouge.json")
    assert rouge["provenance"]["engine_sha256"] == sha256(folder / "engine/rank0.safetensors")
    assert rouge["samples"] == len((folder / "summaries.jsonl").read_text().splitlines()) == 2


# What a change makes again


def change_of(*path):
    """A change of a recipe: the keys, then the value; None removes the key."""
    *keys, last, value = path

    def change(recipe: dict) -> None:
        for key in keys:
            recipe = recipe[key]
        assert recipe.get(last) != value
        if value is None:
            del recipe[last]
        else:
            recipe[last] = value

    return change


CALIBRATE, QUANTIZE, ENGINE = "calibration", "quantize", "portable_engine"
# Recipes that one dry run changes, each on its own, since their jobs are told apart. With the change, either the rules
# that run before those of `AFTER`, which all follow, or a text with all the rules that run.
CHANGES = {
    "what is quantized, and how": {
        "int8kv": (change_of("dtype", "bfloat16"), (QUANTIZE, ENGINE)),
        "gptq": (change_of("weights", "group_size", 64), (QUANTIZE, ENGINE)),
        "awq": (change_of("weights", "symmetric", True), (QUANTIZE, ENGINE)),
        "awq-int8kv": (change_of("keep_16bit", ["*.down_proj"]), (QUANTIZE, ENGINE)),
        "sq": (change_of("activations", "smoothquant", 0.7), (QUANTIZE, ENGINE)),
        "fp8": (change_of("quantize_lm_head", True), (QUANTIZE, ENGINE)),
        PUBLISHED: (change_of("quant_checkpoint", "local", "path", "elsewhere"), (QUANTIZE, ENGINE)),
    },
    "calibration": {
        "int8kv": (change_of("calibration", "samples", 33), (CALIBRATE, ENGINE)),  # of the KV cache alone
        "gptq": (change_of("calibration", "samples", 34), (QUANTIZE, ENGINE)),  # it looks at the text itself
        "awq-int8kv": (change_of("calibration", "length", 33), (CALIBRATE, QUANTIZE, ENGINE)),  # `awq` stays
        "sq": (change_of("calibration", "seed", 1), (CALIBRATE, QUANTIZE, ENGINE)),
    },
    "KV cache": {
        "int8kv": (change_of("kv_cache", "dtype", "fp8"), (ENGINE,)),
        "awq-int8kv": (change_of("kv_cache", "per", "head"), (ENGINE,)),
        "awq": (change_of("kv_cache", {"dtype": "int8"}), (ENGINE,)),
        "fp8": (change_of("kv_cache", None), (ENGINE,)),
        PUBLISHED: (change_of("kv_cache", {"dtype": "int8"}), (CALIBRATE, ENGINE)),  # of the published weights
    },
    "judgement": {
        "int8kv": (change_of("max_perplexity_increase", 5), "gate rouge"),
        "gptq": (change_of("gate", "warn"), "gate"),
        "sq": (change_of("max_perplexity_increase", None), "gate"),
        "fp8": (change_of("max_perplexity_increase", 5), ""),  # its gate was not asked for
    },
    # They change the recipe that an engine records, but not its weights.
    "defaults said aloud": {
        "gptq": (change_of("weights", "symmetric", False), (ENGINE,)),
        "awq": (change_of("quantize_lm_head", False), (ENGINE,)),
        "sq": (change_of("calibration", "seed", 0), (ENGINE,)),
    },
}


@pytest.mark.parametrize("name", CHANGES)
def test_change_of_a_recipe(quantized, made_quantized, quantized_targets, name):
    expected = set()
    for recipe, (change, what) in CHANGES[name].items():
        change(quantized.recipes[recipe])
        if isinstance(what, str):
            expected |= jobs(recipe, what)
            continue
        expected |= jobs(recipe, f"{ENGINE} {AFTER[recipe]}")
        if QUANTIZE in what:
            assert folder_of(quantized, recipe).name != folder_of(made_quantized[0], recipe).name
            expected.add(f"quantize tiny/{folder_of(quantized, recipe).name}")
        if CALIBRATE in what:
            expected.add(f"calibration tiny/{calibration_name(quantized.recipe(recipe))}")
    assert quantized.pending(*quantized_targets) == expected


def test_second_run_has_nothing_to_do(quantized, quantized_targets):
    """Nor has one after recipes were renamed, reordered or added."""
    quantized.recipes = {"new": quantized.recipes["sq"]} | dict(reversed(quantized.recipes.items()))
    assert quantized.pending(*quantized_targets) == set()


def test_change_of_a_models_weights(quantized, quantized_targets):
    quantized.models["tiny"]["source"]["dummy"]["seed"] = 7
    calibration = calibration_name(quantized.recipe("sq"))
    expected = {"checkpoint tiny", "perplexity_hf tiny", f"calibration tiny/{calibration}"}
    for recipe in RECIPES:
        expected |= {f"quantize tiny/{folder_of(quantized, recipe).name}"} | jobs(recipe, f"{ENGINE} {AFTER[recipe]}")
    assert quantized.pending(*quantized_targets) == expected


def test_a_recipe_of_other_weights_needs_no_calibration_of_its_own(quantized):
    quantized.recipes["new"] = quantized.recipes["int8kv"] | {"dtype": "bfloat16"}
    assert quantized.pending("results/tiny/new/engine/config.json") == {
        f"quantize tiny/{folder_of(quantized, 'new').name}",
        *jobs("new", f"{ENGINE} engine"),
    }


# The gate


def test_gate(quantized):
    """A perplexity that rose too far stops the scores, until the recipe allows it or only warns."""
    target, folder = "results/tiny/int8kv/rouge.json", quantized.results / "tiny/int8kv"
    baseline = quantized.results / "tiny/hf/perplexity.json"
    better = read(baseline)
    better["perplexity"] /= 2
    articles = better["articles"]
    articles["nll"] = [nll - math.log(2) * n for nll, n in zip(articles["nll"], articles["tokens"], strict=True)]
    baseline.write_text(json.dumps(better))
    quantized.recipes["int8kv"]["max_perplexity_increase"] = 0.25
    kept = {name: (folder / name).read_text() for name in ("summaries.jsonl", "summaries.meta.json", "perplexity.json")}

    output = quantized.fail(target)
    gate = read(folder / "gate.json")
    assert gate["verdict"] == "failed"
    assert gate["limit_percent"] == 0.25
    ours, theirs = gate["value"], gate["baseline"]
    assert (ours, theirs) == (read(folder / "perplexity.json")["perplexity"], better["perplexity"])
    said = (
        f"results/tiny/int8kv/gate.json: failed: perplexity {ours:.3f}, {increase(gate)} over the {theirs:.3f} of the "
        "Hugging Face model; the recipe allows 0.25%"
    )
    line = (folder / "logs/rouge.log").read_text().splitlines()[-1]
    assert line.startswith(f"error: {said}. ")
    assert line in output.splitlines()
    assert not (folder / "rouge.json").exists()
    assert {name: (folder / name).read_text() for name in kept} == kept

    quantized.recipes["int8kv"]["gate"] = "warn"
    quantized.succeed(target)
    assert read(folder / "gate.json") == gate | {"policy": "warn"}
    assert (folder / "logs/rouge.log").read_text().splitlines()[0] == f"warning: {said}"
    assert read(folder / "rouge.json")["samples"] == 2
    assert {name: (folder / name).read_text() for name in kept} == kept
    assert quantized.pending(target) == set()


# Published weights


def test_published_weights_are_taken_as_they_are(made_quantized, published_weights):
    workspace, _ = made_quantized
    folder = folder_of(workspace, PUBLISHED)
    taken = published_weights["tiny"]
    assert sha256(folder / "model.safetensors") == sha256(taken / "model.safetensors")
    assert (folder / "tokenizer.json").resolve() == (workspace.results / "tiny/checkpoint/tokenizer.json").resolve()


def test_published_weights_of_another_model(quantized, published_weights):
    output = quantized.fail("results/tiny/mistaken/perplexity.json")
    folder = folder_of(quantized, "mistaken")
    line = (
        f"error: {published_weights['shallow']} is another model than results/tiny/checkpoint: num_hidden_layers 1 "
        "instead of 2"
    )
    assert (quantized.results / f"tiny/logs/quantize.{folder.name}.log").read_text().splitlines()[-1] == line
    assert line in output.splitlines()
    assert not folder.exists()
    assert not [path for path in folder.parent.iterdir() if path.name.startswith(".")]
