"""Engines that do not fit into a GPU's memory are refused, and what would fit is named."""

import pytest
import torch

from trtbuild.checkpoint.dummy import dummy_tensors
from trtbuild.decoder.decoder import decoder
from trtbuild.engine.config import BuildLimits
from trtbuild.engine.memory import OTHERS, check_memory
from trtbuild.errors import UserError
from trtbuild.models.families import config_from_hugging_face

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
