"""A plan says what an engine holds, to the byte: families, recipes and ranks, and declared models."""

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from published_models import QWEN, TINY, baichuan_config

from trtbuild.decoder.mapping import Mapping
from trtbuild.engine.build import build_portable
from trtbuild.engine.config import BuildLimits
from trtbuild.engine.memory import bytes_per_position
from trtbuild.engine.portable import read_portable
from trtbuild.evaluation.plan import cache_of_rank, checkpoint_bytes, constants_of_rank
from trtbuild.models.families import canonical_config, config_from_hugging_face
from trtbuild.quantization.declared import declared_network
from trtbuild.quantization.kv_cache import cache_of
from trtbuild.quantization.recipe import Recipe
from trtbuild.rehearsal import dummy_weights, small_calibration
from trtbuild.workflow import load_recipes

SIZES = {"hidden_size": 128, "vocab_size": 512, "num_attention_heads": 4}
LLAMA = TINY | SIZES | {"intermediate_size": 256, "head_dim": 32, "num_key_value_heads": 2}
FAMILIES = {
    "llama": LLAMA,
    "llama, tied": LLAMA | {"tie_word_embeddings": True},
    "llama with biases": LLAMA | {"attention_bias": True, "mlp_bias": True},
    "qwen": QWEN | SIZES | {"kv_channels": 32, "intermediate_size": 512, "seq_length": 64},
    "baichuan 13b": baichuan_config("v2_13b", **SIZES, intermediate_size=256),
}
OTHERS = {
    "int8 head": {"weights": {"dtype": "int8"}, "quantize_lm_head": True},
    "awq head": {"weights": {"dtype": "int4", "method": "awq", "group_size": 64}, "quantize_lm_head": True},
    "int4 groups": {"weights": {"dtype": "int4", "group_size": 32, "symmetric": False}},
    "some kept": {"weights": {"dtype": "int8"}, "keep_16bit": ["*.down_proj", "model.layers.0.self_attn.*"]},
}
RECIPES = load_recipes(None) | {
    name: Recipe.parse({"dtype": "float16", **settings}) for name, settings in OTHERS.items()
}
LIMITS = BuildLimits(max_batch_size=3, max_input_len=100, max_output_len=20)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_bytes_of_built_engines(tmp_path, family):
    """All recipes; those that differ in what they quantize on ranks, too."""
    torch.set_num_threads(1)
    version = {"model_version": "v2_13b"} if family.startswith("baichuan") else {}
    published = copy.deepcopy(FAMILIES[family])
    config = config_from_hugging_face(canonical_config(published, "", *version.values()), "")
    for name, recipe in RECIPES.items():
        with dummy_weights({"config": published, **version}, small_calibration(recipe), tmp_path / "x") as (
            weights,
            file,
        ):
            cache = cache_of(recipe, weights, file)
            for mapping in (Mapping(), *Mapping(2, 1).ranks, *Mapping(1, 2).ranks, Mapping(2, 2, 3)):
                engine = tmp_path / "engine.safetensors"
                build_portable(weights, engine, getattr(torch, recipe.dtype), LIMITS, mapping, cache, True)
                network, _ = read_portable(engine)
                stored = {constant: value.nbytes for constant, value in network.constants.items()}
                assert constants_of_rank(config, recipe, mapping, LIMITS.max_length) == stored, (name, mapping)
                declared = declared_network(config, recipe, mapping, LIMITS.max_length)
                assert declared.to_json() == network.to_json(), (name, mapping)
                assert {constant: value.nbytes for constant, value in declared.constants.items()} == stored
                caches = [network.tensors[cache] for cache in network.states]
                sizes = [LIMITS.max_batch_size * x.size(1) * x.size(2) * x.size(3) * x.dtype.itemsize for x in caches]
                assert cache_of_rank(config, recipe, mapping, LIMITS) == sum(sizes), (name, mapping)


def test_bytes_of_published_models():
    """Of declared models, by their authors' numbers of parameters."""
    models = yaml.safe_load((Path(__file__).parents[2] / "config/models.yaml").read_text())
    for name, parameters in {"llama2-70b": 68_976_648_192, "llama2-7b": 6_738_415_616, "qwen7b": 7_721_324_544}.items():
        config = config_from_hugging_face(models[name]["config"], name)
        assert config.parameters == parameters
        assert checkpoint_bytes(config, "float16") == 2 * parameters
    ranks = [constants_of_rank(config, RECIPES["fp16"], mapping, 1152) for mapping in Mapping(4, 1).ranks]
    assert (
        2 * parameters < sum(sum(rank.values()) for rank in ranks) < 2 * parameters * 1.001
    )  # norms are on every rank


def test_networks_of_published_models_hold_what_formulas_say():
    """What rules ask for and what a plan shows: of all recipes, two layers of real width."""
    models = yaml.safe_load((Path(__file__).parents[2] / "config/models.yaml").read_text())
    for name in ("llama2-70b", "qwen7b", "baichuan-v2_13b"):
        version = models[name]["source"]["hub"].get("model_version")
        config = config_from_hugging_face(canonical_config(models[name]["config"], name, version), name)
        config = replace(config, num_hidden_layers=2)
        for recipe in RECIPES.values():
            for mapping in (Mapping(), Mapping(2, 1, 1), Mapping(1, 2, 1)):
                network = declared_network(config, recipe, mapping, LIMITS.max_length)
                stored = {constant: value.nbytes for constant, value in network.constants.items()}
                assert constants_of_rank(config, recipe, mapping, LIMITS.max_length) == stored
                cache = LIMITS.max_batch_size * LIMITS.max_length * bytes_per_position(network)
                assert cache_of_rank(config, recipe, mapping, LIMITS) == cache
