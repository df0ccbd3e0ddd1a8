"""Engines that do not fit into a GPU's memory are refused, and what would fit is named."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from trtbuild.checkpoint.dummy import dummy_tensors
from trtbuild.decoder.decoder import decoder
from trtbuild.decoder.mapping import Mapping
from trtbuild.engine.build import build_portable
from trtbuild.engine.config import BuildLimits
from trtbuild.engine.memory import OTHERS, check_memory, held, largest_batch
from trtbuild.engine.memory import needed as memory_needed
from trtbuild.errors import UserError
from trtbuild.models.families import config_from_hugging_face
from trtbuild.quantization.declared import declared_network
from trtbuild.quantization.kv_cache import cache_of
from trtbuild.quantization.recipe import Recipe
from trtbuild.rehearsal import dummy_weights, small_calibration

LIMITS = BuildLimits(max_batch_size=8, max_input_len=96, max_output_len=32)
GPU = 64 << 20  # more than these need, besides what every engine does


@pytest.fixture(scope="module")
def network(tiny_config):
    config = config_from_hugging_face(tiny_config | {"vocab_size": 2048}, "test")
    return decoder(config, dummy_tensors(config, 3, torch.float16).__getitem__, torch.float16, LIMITS.max_length)


def needed(network, limits: BuildLimits) -> int:
    """The least memory in which an engine is not refused."""
    low, high = 0, OTHERS + GPU
    while high - low > 1:
        middle = (low + high) // 2
        try:
            check_memory(network, limits, middle)
            high = middle
        except UserError:
            low = middle
    return high


def test_what_is_needed(network):
    """Weights, caches, and of a step's activations what is held at a time: of tiny layers, their widest two tensors."""
    weights = sum(constant.nbytes for constant in network.constants.values())
    caches = 2 * 2 * 8 * 2 * 128 * 16 * 2  # keys and values, layers, sequences, heads, positions, head size, bytes
    work = (needed(network, LIMITS) - weights - caches - OTHERS) / 2  # as it is, and captured
    hidden, inner, tokens = 64, 96, 8 * 96
    assert work > tokens * (hidden + 2 * inner + inner) * 2
    assert work < tokens * (4 * hidden + 2 * inner + inner) * 2 + 8 * 2048 * 6


def test_enough(network):
    check_memory(network, LIMITS, OTHERS + GPU)


def test_a_smaller_batch_is_named(network):
    free = needed(network, BuildLimits(5, 96, 32))
    with pytest.raises(UserError, match=r"^the engine needs .* GB .* 8 x 128 positions .* --max-batch-size 5$"):
        check_memory(network, LIMITS, free)


def test_a_shorter_prompt_is_named(network):
    free = needed(network, BuildLimits(1, 40, 32))
    with pytest.raises(UserError, match=r"are free; build it with --max-batch-size 1 --max-input-len 40$"):
        check_memory(network, LIMITS, free)


def test_weights_that_do_not_fit(network):
    with pytest.raises(UserError, match=r"and 0\.5 are free; the weights alone need fewer bits or more GPUs$"):
        check_memory(network, LIMITS, OTHERS)


def test_the_largest_batch_is_the_last_that_fits(network):
    limits = BuildLimits(1, 96, 32)
    for batch in (1, 7, 40):
        free = needed(network, BuildLimits(batch, 96, 32))
        assert largest_batch(network, limits, free) == batch
        assert largest_batch(network, limits, free - 1) == batch - 1
        assert largest_batch(network, limits, free, at_most=5) == min(batch, 5)


SIZES = {
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "vocab_size": 1024,
    "max_position_embeddings": 512,
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [{}, {"weights": {"dtype": "int8"}, "kv_cache": {"dtype": "int8"}}, {"weights": {"dtype": "int4"}}],
    ids=str,
)
def test_memory_that_a_run_takes(tmp_path, tiny_config, settings):
    """The largest resident set of a process on a CPU, within 10%; there float16 takes more, as it is widened."""
    recipe = small_calibration(Recipe.parse({"dtype": "float32"} | settings))
    shapes = {"small": tiny_config, "engine": tiny_config | SIZES}
    limits = {"small": BuildLimits(2, 64, 4), "engine": BuildLimits(4, 256, 4)}
    files = {name: tmp_path / f"{name}.safetensors" for name in shapes}
    for name, file in files.items():
        with dummy_weights({"config": shapes[name], "dtype": "float32"}, recipe, file) as (weights, ranges):
            cache = cache_of(recipe, weights, ranges)
            build_portable(weights, file, torch.float32, limits[name], Mapping(), cache)
    script = Path(__file__).parent / "memory_of_runs.py"
    # Else malloc keeps what was freed, up to 32 MB of it.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, script, *files.values()]
    used = int(subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout)

    config = config_from_hugging_face(shapes["engine"], "test")
    network = declared_network(config, recipe, Mapping(), limits["engine"].max_length)
    memory = memory_needed(network, limits["engine"])
    assert memory.weights + memory.caches + held(network, 4, 4 * 256) == pytest.approx(used, rel=0.1)
