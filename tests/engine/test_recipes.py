"""Every recipe that the project ships, from a checkpoint to logits, against `transformers` in plain floating point."""

from pathlib import Path

import pytest
import torch
import yaml

pytest.importorskip("tensorrt_rtx")

from outlier_models import SAMPLES, calibrated, write_model

from trtbuild.decoder.mapping import Mapping
from trtbuild.engine.build import build_portable
from trtbuild.engine.config import BuildLimits
from trtbuild.engine.portable import PortableEngine, read_portable
from trtbuild.engine.tensorrt import LoweredNetwork
from trtbuild.evaluation.hugging_face import HuggingFaceModel
from trtbuild.quantization.kv_cache import cache_of
from trtbuild.quantization.quantize import quantize
from trtbuild.quantization.recipe import Recipe
from trtbuild.runtime.lowered_session import InterpretedSession
from trtbuild.runtime.session import PortableSession
from trtbuild.tensors.safetensors_stream import open_file

RECIPES = yaml.safe_load((Path(__file__).parents[2] / "trtbuild/recipes.yaml").read_text())
# What the shipped recipes leave out, on a model with biases whose head is the embedding table.
INT8 = {"dtype": "int8"}
OPTIONS = {
    "int8 head": {"weights": INT8, "quantize_lm_head": True},
    "int4 groups and head, cache per head": {
        "weights": {"dtype": "int4", "group_size": 32, "symmetric": False},
        "quantize_lm_head": True,
        "kv_cache": {"dtype": "int8", "per": "head"},
    },
    "gptq but for some": {
        "weights": {"dtype": "int4", "method": "gptq", "group_size": 32},
        "keep_16bit": ["*.down_proj", "model.layers.0.self_attn.*"],
    },
    "awq with its head": {"weights": {"dtype": "int4", "method": "awq", "group_size": 64}, "quantize_lm_head": True},
    "smoothquant but for some": {
        "weights": INT8,
        "activations": {"dtype": "int8", "per": "token", "smoothquant": 0.8},
        "keep_16bit": ["*.o_proj"],
    },
    "smoothquant with a static head and cache": {
        "weights": INT8,
        "activations": {"dtype": "int8", "smoothquant": 0.5},
        "quantize_lm_head": True,
        "kv_cache": {"dtype": "fp8", "per": "head"},
    },
    "fp8 but for some": {
        "weights": {"dtype": "fp8"},
        "activations": {"dtype": "fp8"},
        "keep_16bit": ["model.layers.1.mlp.*"],
    },
}
CPU = torch.device("cpu")
LIMITS = BuildLimits(max_batch_size=3, max_input_len=24, max_output_len=8)

# Norm of the difference over the norm of a sequence's logits: the median of three sequences, and the worst. In float32
# nothing but the order of sums differs (3e-7 measured, with any recipe), unless a number lies between two steps and is
# rounded the other way, and others after it for that reason. That happens to one batch of twenty or so (60 batches
# measured, 5e-3 of all logits at most). In float16 it always happens: the error is then a share of what quantization
# itself costs (5% of these logits with static INT8 activations, 9% in FP8, 2% with the caches), here at most a half.
TOLERANCE = {
    ("weights", "float32"): (1e-5, 1e-5),
    ("cache", "float32"): (1e-5, 3e-2),
    ("activations", "float32"): (1e-5, 3e-2),
    ("weights", "float16"): (3e-3, 3e-3),
    ("cache", "float16"): (1.2e-2, 2.5e-2),
    ("activations", "float16"): (5e-2, 8e-2),
}
# How far the fake-quantized model is from the original: shows that it is one.
COSTS = {"int8": (5e-3, 0.2), "fp8": (2e-2, 0.2), "int4": (2e-2, 0.35), None: (0, 0)}


def rounded_in_steps(recipe: dict) -> str:
    return "activations" if "activations" in recipe else "cache" if "kv_cache" in recipe else "weights"


def adapted(recipe: dict, dtype: str) -> dict:
    """A recipe for the small model: groups of 32, few and short calibration samples."""
    recipe = recipe | {"dtype": dtype, "calibration": SAMPLES}
    if recipe.get("weights", {}).get("group_size"):
        recipe["weights"] = recipe["weights"] | {"group_size": 32}
    return recipe


def logits(session, prompts: list[list[int]], new_tokens: torch.Tensor) -> list[torch.Tensor]:
    """Of every position of every sequence: the prompts, and a decode step for each of the tokens that follow."""
    rows = [[x] for x in session.prefill(prompts, True).split([len(prompt) for prompt in prompts])]
    for tokens in new_tokens:
        for sequence, row in zip(rows, session.decode(tokens).clone(), strict=True):
            sequence.append(row[None])
    return [torch.cat(sequence) for sequence in rows]


def error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    assert actual.shape == expected.shape
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Checkpoints and their calibration files: a plain one, and one with biases and a tied head in three layers."""
    folder = tmp_path_factory.mktemp("recipes")
    biases = {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True, "num_hidden_layers": 3}
    checkpoints = {"plain": write_model(folder / "plain"), "biases": write_model(folder / "biases", **biases)}
    return {name: (checkpoint, calibrated(checkpoint)) for name, checkpoint in checkpoints.items()}


def check(models, kind: str, recipe: dict, folder: Path) -> None:
    """Both engines against `transformers` on a ragged batch and four more tokens for each sequence."""
    torch.manual_seed(0)
    checkpoint, ranges = models[kind]
    weights = checkpoint
    if quantization := Recipe.parse(recipe).quantization:
        weights = folder / "weights"
        quantize(checkpoint, weights, quantization, ranges, "cpu")
    cache = cache_of(Recipe.parse(recipe), weights, ranges)
    build_portable(weights, folder / "engine", getattr(torch, recipe["dtype"]), LIMITS, Mapping(), cache)
    network, _ = read_portable(folder / "engine")
    prompts = [torch.randint(2, 258, (n,)).tolist() for n in (7, 1, 20)]
    new_tokens = torch.randint(2, 258, (4, 3), dtype=torch.int32)
    sequences = [prompt + new_tokens[:, i].tolist() for i, prompt in enumerate(prompts)]
    expected, original = (
        [model.logits(sequence) for sequence in sequences]
        for model in (HuggingFaceModel(weights, device="cpu", cache=cache), HuggingFaceModel(checkpoint, device="cpu"))
    )
    sessions = PortableSession(PortableEngine(network, LIMITS, CPU)), InterpretedSession(network, LIMITS)
    for session in sessions:
        errors = sorted(map(error, logits(session, prompts, new_tokens), expected))
        median, worst = TOLERANCE[rounded_in_steps(recipe), recipe["dtype"]]
        assert errors[1] < median
        assert errors[2] < worst
    formats = [recipe[part]["dtype"] for part in ("weights", "kv_cache") if part in recipe] or [None]
    low, high = COSTS[formats[0]]
    assert low <= error(torch.cat(expected), torch.cat(original)) <= high


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("name", RECIPES)
def test_recipe(models, tmp_path, name, dtype):
    check(models, "plain", adapted(RECIPES[name], dtype), tmp_path)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("name", OPTIONS)
def test_option(models, tmp_path, name, dtype):
    check(models, "biases", OPTIONS[name] | {"dtype": dtype, "calibration": SAMPLES}, tmp_path)


# Sizes

WIDTHS = 1024, 2048  # of smaller ones TensorRT widens what its last layer has for a row a sequence
WEIGHTS = {
    "fp16": (None, 16),
    "int8": ({"dtype": "int8"}, 8),
    "int4": ({"dtype": "int4"}, 4),
    "int4 in groups": ({"dtype": "int4", "group_size": 128, "symmetric": False}, 4 + 24 / 128),  # scale and zero
}


def linear_weights(width: int) -> int:
    """Of one layer of `wide`: q and o, k and v, gate, up and down."""
    return (2 * 1 + 2 * 1 // 2 + 3 * 2) * width**2


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """Checkpoints of one layer in two widths, so that what an engine always has can be told from its weights."""
    folder = tmp_path_factory.mktemp("wide")
    return {
        width: write_model(
            folder / f"{width}",
            hidden_size=width,
            intermediate_size=2 * width,
            head_dim=width // 4,
            num_hidden_layers=1,
        )
        for width in WIDTHS
    }


def built(checkpoint: Path, recipe: dict, folder: Path) -> Path:
    """The portable engine file of a recipe whose weights need no calibration."""
    if quantization := Recipe.parse(recipe).quantization:
        quantize(checkpoint, folder / "weights", quantization, device="cpu")
        checkpoint = folder / "weights"
    build_portable(checkpoint, folder / "engine", getattr(torch, recipe["dtype"]), LIMITS, Mapping())
    return folder / "engine"


def bytes_in_memory(file: Path) -> int:
    return sum(value.nbytes for value in PortableEngine.load(file)._values if value is not None)


@pytest.mark.slow
@pytest.mark.parametrize("name", WEIGHTS)
def test_sizes(wide, tmp_path, name):
    """INT8 halves the linear weights, INT4 quarters them: in the file, in memory, and in TensorRT's engine."""
    weights, bits = WEIGHTS[name]
    recipe = {"dtype": "float16"} | ({"weights": weights} if weights else {})
    engines = []
    for width, checkpoint in wide.items():
        file = built(checkpoint, recipe, tmp_path / str(width))
        sizes = {name: tensor.nbytes for name, tensor in open_file(file)[0].items()}
        linear = linear_weights(width) * bits / 8
        assert linear <= sum(size for name, size in sizes.items() if "_proj." in name) < 1.02 * linear
        assert bytes_in_memory(file) == sum(sizes.values())
        engines.append(LoweredNetwork(read_portable(file)[0], True).build(LIMITS, ["8.9"]).nbytes)
    tables = 2 * 2 * 320 * (WIDTHS[1] - WIDTHS[0])  # the embedding and the head
    more = (linear_weights(WIDTHS[1]) - linear_weights(WIDTHS[0])) * bits / 8 + tables
    assert engines[1] - engines[0] == pytest.approx(more, rel=0.06)


def test_memory_of_int4_in_bfloat16(wide, tmp_path):
    """There the CPU kernel wants the weights in its own order and a second number beside each scale; no more."""
    file = built(wide[WIDTHS[0]], {"dtype": "bfloat16", "weights": {"dtype": "int4", "group_size": 32}}, tmp_path)
    in_file = sum(tensor.nbytes for tensor in open_file(file)[0].values())
    assert bytes_in_memory(file) == in_file + linear_weights(WIDTHS[0]) // 32 * 2
