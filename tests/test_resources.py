"""What rules ask for beside what was measured, and what makes it grow."""

from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from trtbuild import resources
from trtbuild.decoder.mapping import Mapping
from trtbuild.engine.config import BuildLimits
from trtbuild.models.families import config_from_hugging_face
from trtbuild.quantization.recipe import Quantization, Text
from trtbuild.workflow import load_recipes

MODELS = yaml.safe_load((Path(__file__).parents[1] / "config/models.yaml").read_text())
RECIPES = load_recipes(None)
LIMITS, TEXT = BuildLimits(), Text(samples=2, length=64)
GPTQ = Quantization.parse(RECIPES["gptq"].settings | {"calibration": {"samples": 2, "length": 64}})


def model(name: str, layers: int | None = None):
    config = config_from_hugging_face(MODELS[name]["config"], name)
    return replace(config, num_hidden_layers=layers or config.num_hidden_layers)


def mem_mb(needs: resources.Needs) -> int:
    return needs.resources(1)["mem_mb"]


def test_memory_that_was_measured():
    """MB of the largest resident set with LLaMA-7B's shapes, two layers, on a CPU; a tenth more is asked for."""
    seven = model("llama-7b", 2)
    for needs, used in {
        resources.calibration(seven, TEXT, "cpu"): 2375,
        resources.quantization(seven, GPTQ, "cpu"): 6241,
        resources.portable_engine(seven, RECIPES["fp16"], Mapping(), LIMITS): 1592,
        resources.run(seven, RECIPES["fp16"], Mapping(), LIMITS, 1024, 0, "cpu"): 2528,
    }.items():
        assert 1.1 * used < mem_mb(needs) < 2 * used
    rounded = resources.quantization(model("llama2-70b", 2), RECIPES["int8wo"].quantization, "cpu")
    assert 1.1 * 9498 < mem_mb(rounded) < 2 * 9498


def test_another_attempt_asks_for_more():
    needs = resources.Needs(memory=1e9, seconds=3600, disk=5e6)
    assert needs.resources(1) == {"mem_mb": 2074, "runtime": 90, "disk_mb": 5}
    assert needs.resources(2) == {"mem_mb": 4148, "runtime": 180, "disk_mb": 5}


def test_only_what_holds_weights_grows_with_layers_and_shrinks_with_ranks():
    large, small = model("llama2-70b"), model("llama2-70b", 2)
    fp16 = RECIPES["fp16"]
    for of in (
        lambda config: resources.calibration(config, TEXT, "cuda"),
        lambda config: resources.quantization(config, GPTQ, "cuda"),
        lambda config: resources.portable_engine(config, fp16, Mapping(), LIMITS),
    ):
        assert mem_mb(of(large)) == mem_mb(of(small))
    whole, share = (
        mem_mb(resources.tensorrt_engine(large, fp16, mapping, LIMITS)) for mapping in (Mapping(), Mapping(8, 1))
    )
    assert whole == pytest.approx(8 * share, rel=0.03)
    assert mem_mb(resources.baseline(large, "float32", LIMITS, 1, 1, "cuda")) > 4 * large.parameters / 1e6
