"""docs/reference has what schemas, rules and the command line have."""

import importlib.util
import re
from pathlib import Path

import pytest

from trtbuild.cli import app
from trtbuild.quantization.recipe import Recipe
from trtbuild.workflow import SCHEMAS
from trtbuild.yaml_reader import read_yaml

ROOT = Path(__file__).parents[1]
spec = importlib.util.spec_from_file_location("make_reference", ROOT / "docs" / "reference" / "make.py")
reference = importlib.util.module_from_spec(spec)
spec.loader.exec_module(reference)


@pytest.mark.parametrize("page", reference.PAGES)
def test_pages_are_current(page):
    text = (ROOT / "docs" / "reference" / page).read_text()
    assert text == reference.PAGES[page](), "make reference, or python docs/reference/make.py, writes it anew"


@pytest.mark.parametrize("file", reference.FILES)
def test_every_key_has_a_description(file):
    """Keys are searched for without the page's own walk, which could leave some out."""

    def names(schema: object) -> int:
        if not isinstance(schema, dict):
            return 0
        inner = [*schema.get("properties", {}).values(), schema.get("additionalProperties"), schema.get("items")]
        return len(schema.get("properties", {})) + sum(map(names, inner))

    schema = read_yaml(SCHEMAS / f"{file}.schema.yaml")
    keys = list(reference.keys(schema))
    assert len(keys) == names(schema) > 20
    bare = [path for path, part, _ in keys if not re.search(r"\w.*\.$", part.get("description", ""))]
    assert bare == []


def test_every_command_has_an_example():
    page = (ROOT / "docs" / "reference" / "commands.md").read_text()
    for command in (registered.callback.__name__.replace("_", "-") for registered in app.registered_commands):
        part = page.split(f"## trtbuild {command}\n")[1].split("\n## ")[0]
        assert f"`trtbuild {command}" in part, command


def test_every_target_is_there():
    """The page of targets is written by hand; rules say what they make."""
    rules = "".join(path.read_text() for path in (ROOT / "rules").glob("*.smk"))
    outputs = set(re.findall(r'"(results/[^"]+)"', "".join(re.findall(r"^    output:\n((?: {8}.*\n)+)", rules, re.M))))
    assert len(outputs) > 12
    words = {"{model}": "MODEL", "{recipe}{layout}": "RUN", "{run}": "RUN", "{rank}": "N"}
    words |= {"{calibration}": "ID", "{quantization}": "ID", "{task}": "TASK"}
    for wildcard, word in words.items():
        outputs = {output.replace(wildcard, word) for output in outputs}
    page = (ROOT / "docs" / "reference" / "targets.md").read_text()
    said = re.findall(r"`(results/[^`]+)`", page)
    assert {output for output in outputs if not {output, output.replace("/hf/", "/RUN/")} & {*said}} == set()


def test_defaults_of_recipes_are_those_that_are_filled_in():
    """`default` in the schema is for readers; what a recipe leaves out is decided by `Recipe.parse`."""
    schema = read_yaml(SCHEMAS / "recipes.schema.yaml")
    defaults = {path: part["default"] for path, part, _ in reference.keys(schema) if "default" in part}
    eight_bits = {"dtype": "int8"}
    recipe = Recipe.parse(
        {"dtype": "float16", "weights": eight_bits, "activations": eight_bits, "kv_cache": eight_bits}
    )
    parsed = {
        "NAME.weights.method": recipe.quantization.weights.method,
        "NAME.activations.per": recipe.quantization.activations.per,
        "NAME.kv_cache.per": recipe.kv_cache.per,
        "NAME.quantize_lm_head": recipe.quantization.quantize_lm_head,
        "NAME.calibration.samples": recipe.text.samples,
        "NAME.calibration.length": recipe.text.length,
        "NAME.calibration.seed": recipe.text.seed,
        "NAME.gate": recipe.gate,
    }
    assert parsed == defaults
