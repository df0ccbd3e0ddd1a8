"""Every recipe's perplexity is one number, on however many ranks."""

from functools import cache

import pytest
import torch
from outlier_models import CONFIG, outlier_weights
from test_ranks import Model, networks_of, quantized, scales_of, world

from trtbuild.decoder.mapping import Mapping
from trtbuild.models.families import config_from_hugging_face
from trtbuild.network import lockstep
from trtbuild.network.step import step_tensors, whole_prompts
from trtbuild.tensors.lazy import from_tensor

pytestmark = pytest.mark.usefixtures("one_thread")
TOKENS = 96
WITHIN = 1e-3
# Weights and how activations are rounded, and the cache.
RECIPES = {
    "fp16": (None, None),
    "int8wo": ("int8 16bit", None),
    "int8kv": ("int8 16bit", torch.int8),
    "int4wo": ("int4 rows", None),
    "gptq": ("int4 symmetric", None),
    "awq": ("int4 asymmetric", None),
    "sq-per-token": ("int8 token", None),
    "sq-static": ("int8 static", None),
    "fp8": ("fp8 static", torch.float8_e4m3fn),
    "fp8-dynamic": ("fp8 token", None),
}


@cache
def model() -> Model:
    """Some channels of what is rounded are far larger than others; it is as sure of the next token as a trained one."""
    config = CONFIG | {"num_key_value_heads": 4}
    weights = outlier_weights(config)
    return Model(config_from_hugging_face(config, "test"), {name: from_tensor(x) for name, x in weights.items()})


def log_probabilities(kind: str | None, cache_dtype: torch.dtype | None, dtype: torch.dtype, ranks: list[Mapping]):
    """Of the next token after each of a text, `[tokens, vocab]`."""
    scales = scales_of(model().config, cache_dtype)
    networks = networks_of(model().config, quantized(model(), kind), dtype, scales, ranks, TOKENS)
    text = torch.randint(2, 320, (TOKENS,), generator=torch.Generator().manual_seed(3)).tolist()
    inputs = []
    for network in networks:
        kinds = {name: network.tensors[name] for name in network.states}
        caches = {name: torch.zeros((1, *x.shape[1:]), dtype=x.dtype) for name, x in kinds.items()}
        inputs.append(step_tensors(whole_prompts([text], all_logits=True), network.inputs) | caches)
    logits = lockstep.run(networks, inputs)[-1]["logits"]
    return logits.double().log_softmax(-1)


@cache
def likely() -> torch.Tensor:
    """How often each token would come next, if the model in float32 had written the text."""
    return log_probabilities(None, None, torch.float32, [Mapping()]).exp()


def perplexity(recipe: str, tp_size: int) -> float:
    found = log_probabilities(*RECIPES[recipe], torch.float16, world(tp_size, 1))
    return (-(likely() * found).sum(-1).mean()).exp().item()


@pytest.mark.parametrize("recipe", RECIPES)
def test_perplexity_is_that_of_one_rank(recipe):
    one = perplexity(recipe, 1)
    assert [perplexity(recipe, tp_size) for tp_size in (2, 4)] == pytest.approx([one, one], rel=WITHIN)
