"""Beam search on CUDA, against the CPU's. Run by hand: `pytest -m gpu tests/gpu`."""

import pytest
import torch
from published_models import llama_tensors

from trtbuild.decoder.decoder import CacheScales, decoder
from trtbuild.engine.config import BuildLimits
from trtbuild.engine.portable import PortableEngine
from trtbuild.models.families import config_from_hugging_face
from trtbuild.runtime.generation import generate
from trtbuild.runtime.sampling import SamplingParams
from trtbuild.runtime.session import PortableSession
from trtbuild.tensors.lazy import from_tensor

pytestmark = pytest.mark.gpu

LIMITS = BuildLimits(max_batch_size=16, max_input_len=300, max_output_len=40)
PROMPTS = [[5, 9, 40], [7], list(range(2, 290))]
ENDS = tuple(range(2, 302, 10))


def session(published, device, cache=None):
    config = config_from_hugging_face(published, "test")
    scales = None
    if cache:
        shape = config.num_hidden_layers, config.num_key_value_heads
        scales = CacheScales(cache, torch.full(shape, 0.03), torch.full(shape, 0.02))
    tensors = llama_tensors(published)
    tensors["lm_head.weight"] *= 4  # likely tokens and unlikely ones, as a trained model has
    lazy = {name: from_tensor(x) for name, x in tensors.items()}
    network = decoder(config, lazy.__getitem__, torch.float32, LIMITS.max_length, scales)
    return PortableSession(PortableEngine(network, LIMITS, torch.device(device)))


@pytest.mark.parametrize("cache", [None, torch.int8, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize(
    "options",
    [{}, {"eos_token_ids": ENDS}, {"eos_token_ids": ENDS, "early_stopping": True, "repetition_penalty": 1.3}],
    ids=["no ends", "ends", "early"],
)
def test_equals_the_cpus(tiny_config, cache, options):
    """Over two batches, with graphs that the first one captured; a cache in 8 bits may round a value otherwise."""
    params = SamplingParams(30, num_beams=8, num_return_sequences=4, **options)
    expected, actual = (generate(session(tiny_config, device, cache), PROMPTS, params) for device in ("cpu", "cuda"))
    differ = 0
    for one, other in zip(expected, actual, strict=True):
        assert other.score == pytest.approx(one.score, rel=1e-2 if cache else 1e-4)
        differ += one.output_ids != other.output_ids
    assert differ <= (6 if cache else 1)


def test_the_same_again(tiny_config):
    beams = session(tiny_config, "cuda")
    params = SamplingParams(30, num_beams=4, eos_token_ids=ENDS, presence_penalty=0.4, bad_words=((5, 6), (7,)))
    assert generate(beams, PROMPTS, params) == generate(beams, PROMPTS, params)
