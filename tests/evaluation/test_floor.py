"""The least time of a step, beside numbers that are known otherwise: a model's parameters, a GPU's data sheet."""

from pathlib import Path

import pytest
import yaml

from trtbuild.decoder.mapping import Mapping
from trtbuild.evaluation.floor import bytes_per_step, context_floor, decode_floor, operations
from trtbuild.evaluation.gpu_table import GPUS, known
from trtbuild.models.families import config_from_hugging_face
from trtbuild.quantization.declared import declared_network
from trtbuild.workflow import load_recipes

MODELS = yaml.safe_load((Path(__file__).parents[2] / "config/models.yaml").read_text())
SEVEN = config_from_hugging_face(MODELS["llama-7b"]["config"], "llama-7b")
RECIPES = load_recipes(None)
TABLE = 32000 * 4096  # numbers of the embedding, and of the output product
NORMS = (2 * 32 + 1) * 4096
H100, A100 = GPUS["h100-80gb"], GPUS["a100-80gb"]


def stages(recipe: str, mapping: Mapping = Mapping()) -> list:
    return [declared_network(SEVEN, RECIPES[recipe], rank, 1152) for rank in mapping.ranks[:: mapping.tp_size]]


def test_operations_of_a_prompt():
    """Twice its products' parameters a token; of the last layer three of four products for one token a sequence."""
    tokens, batch = 512, 2
    products = SEVEN.parameters - 2 * TABLE - NORMS
    last = 4096 * (4096 + 3 * 11008)
    attention = 32 * batch * tokens * (tokens + 1) // 2 * 4096 * 4
    expected = 2 * batch * (tokens * (products - last) + last + TABLE) + attention
    assert operations(*stages("fp16"), batch, tokens) == {"float16": expected}
    assert operations(*stages("bf16"), batch, tokens) == {"float16": expected}
    assert operations(*stages("int8wo"), batch, tokens) == {"float16": expected}
    assert operations(*stages("fp32"), batch, tokens) == {"float32": expected}
    of_attention = {"float16": attention + 2 * batch * TABLE}
    assert operations(*stages("fp8"), batch, tokens) == of_attention | {"fp8": expected - of_attention["float16"]}
    of_ranks = operations(*stages("fp16", Mapping(4, 1)), batch, tokens)
    assert of_ranks["float16"] == expected / 4


def test_context_floor():
    count = operations(*stages("fp16"), 1, 2048)["float16"]
    assert context_floor(stages("fp16"), H100, 1, 2048) == pytest.approx(count / 989.5e12)
    assert context_floor(stages("fp8"), H100, 1, 2048) < 0.6 * context_floor(stages("fp16"), H100, 1, 2048)
    # A100s have no FP8; what they have of a pipeline works side by side.
    assert context_floor(stages("fp8"), A100, 1, 2048) == context_floor(stages("fp16"), A100, 1, 2048)
    halves = context_floor(stages("fp16", Mapping(1, 2)), H100, 1, 2048)
    assert halves == pytest.approx(context_floor(stages("fp16"), H100, 1, 2048) / 2, rel=0.03)
    # A prompt of a few tokens takes as long as reading the weights.
    assert context_floor(stages("fp16"), H100, 1, 4) == pytest.approx(2 * (SEVEN.parameters - TABLE) / 3350e9, rel=1e-4)


def test_decode_floor():
    weights, position = 2 * (SEVEN.parameters - TABLE), 2 * 32 * 4096 * 2
    read = weights + 3 * (512 + 32) * position
    floor = decode_floor(stages("fp16"), Mapping(), H100, 3, 512, 64)
    assert floor == pytest.approx(read / 3350e9, rel=1e-5)  # RoPE's table is the rest
    assert decode_floor(stages("fp16", Mapping(2, 1)), Mapping(2, 1), H100, 3, 512, 64) == pytest.approx(
        floor / 2, rel=1e-4
    )
    parts = decode_floor(stages("fp16", Mapping(1, 2)), Mapping(1, 2), H100, 3, 512, 64)
    assert parts == pytest.approx((weights + 3 * (512 + 32) * position / 2) / 3350e9, rel=1e-5)
    # Of very many sequences it is what is multiplied.
    batch = 100_000
    many = decode_floor(stages("fp16"), Mapping(), H100, batch, 1, 0)
    assert many == pytest.approx(2 * batch * weights / 2 / 989.5e12, rel=0.01)


def test_bytes_per_step():
    assert bytes_per_step(1000, 10, 4, 100, 8) == 1000 + 4 * 104 * 10
    assert bytes_per_step(1000, 10, 4, 100, 8, parts=2) == 1000 + 2 * 104 * 10


# What rates are products of: multiprocessors, boost clock in MHz with tensor cores at work, float16 operations of each
# in a clock (by its architecture), and float32 units.
CLOCKS = {
    "t4": (40, 1590, 1024, 64),
    "a10": (72, 1695, 1024, 128),
    "a10g": (80, 1710, 512, 128),
    "a100-40gb": (108, 1410, 2048, 64),
    "a100-80gb": (108, 1410, 2048, 64),
    "a100-80gb-pcie": (108, 1410, 2048, 64),
    "l4": (58, 2040, 1024, 128),
    "l40s": (142, 2520, 1024, 128),
    "h100-80gb": (132, 1830, 4096, 128),
    "h200": (132, 1830, 4096, 128),
    "h100-pcie": (114, 1620, 4096, 128),
    "h100-nvl": (132, 1545, 4096, 128),
    "b200": (148, 1850, 8192, 128),
    "rtx3090": (82, 1695, 512, 128),
    "rtx4090": (128, 2520, 512, 128),
    "rtx5090": (170, 2407, 512, 128),
    "rtx6000-ada": (142, 2505, 1024, 128),
}


@pytest.mark.parametrize("name", GPUS)
def test_rates_are_what_multiprocessors_do(name):
    count, megahertz, operations, units = CLOCKS[name]
    assert GPUS[name].rate("float16") == pytest.approx(count * megahertz * 1e6 * operations, rel=0.005)
    # Without tensor cores Hopper and Blackwell run at a higher clock.
    assert 0.99 < GPUS[name].rate("float32") / (count * megahertz * 1e6 * 2 * units) < 1.17


@pytest.mark.parametrize("name", GPUS)
def test_table_of_gpus(name):
    """Units: a slip by a thousand, and rates that are with sparsity, would show."""
    gpu = GPUS[name]
    assert 14e9 < gpu.free < 200e9
    assert 300e9 <= gpu.bandwidth <= 8e12
    assert 60e12 < gpu.rate("float16") <= 2250e12
    assert 1.9 < gpu.rate("int8") / gpu.rate("float16") < 4.1
    assert ("fp8" in gpu.rates) == (name[0] not in "ta" and name != "rtx3090")
    assert gpu.source
    assert known(f"cuda: {gpu.device}") == name
    assert known("cpu: Intel") is None
