"""Quantization imitated in `transformers`' model: weights widened, activations and caches rounded, nothing else."""

import pytest
import torch
from outlier_models import SAMPLES, calibrated, write_model
from transformers import AutoModelForCausalLM

from trtbuild.checkpoint.canonical import Checkpoint
from trtbuild.decoder.decoder import CacheScales
from trtbuild.evaluation.fake_quantized import fake_quantized_cache, load_model
from trtbuild.evaluation.hugging_face import HuggingFaceModel
from trtbuild.quantization.quantize import quantize
from trtbuild.quantization.recipe import Quantization
from trtbuild.tensors.quantized_weight import QuantizedWeight

FP8 = torch.float8_e4m3fn
IDS = list(range(2, 40))
STATIC = {"dtype": "int8", "per": "tensor"}
RECIPES = {
    "int8": {"weights": {"dtype": "int8"}, "quantize_lm_head": True},
    "int4": {"weights": {"dtype": "int4", "group_size": 32, "symmetric": False}},
    "static": {"weights": {"dtype": "int8"}, "activations": STATIC, "quantize_lm_head": True},
    "token": {"weights": {"dtype": "int8"}, "activations": {"dtype": "int8", "per": "token"}},
    "fp8": {"weights": {"dtype": "fp8"}, "activations": {"dtype": "fp8"}, "keep_16bit": ["*.o_proj"]},
    "fp8 token": {"weights": {"dtype": "fp8", "per": "channel"}, "activations": {"dtype": "fp8", "per": "token"}},
}


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """With biases and a tied head."""
    options = {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}
    return write_model(tmp_path_factory.mktemp("fake") / "checkpoint", **options)


@pytest.fixture(scope="module")
def quantized(folder, tmp_path_factory):
    """Makes the folder of a recipe's weights."""
    ranges, place = calibrated(folder), tmp_path_factory.mktemp("folders")

    def make(name: str):
        if not (place / name).exists():
            recipe = {"dtype": "float16", "calibration": SAMPLES} | RECIPES[name]
            quantize(folder, place / name, Quantization.parse(recipe), ranges, "cpu")
        return place / name

    return make


@torch.inference_mode()
def products(folder) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Inputs (before any rounding) and outputs of every linear module, by its name."""
    checkpoint, seen = Checkpoint(folder), {}
    model = load_model(checkpoint, torch.float32).eval()
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            before = lambda _, x, name=name: seen.update({name: x[0]})
            module.register_forward_pre_hook(before, prepend=True)
            module.register_forward_hook(lambda _, x, y, name=name: seen.update({name: (seen[name], y)}))
    model(torch.tensor([IDS]))
    return seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_plain_checkpoint_is_the_plain_model(folder, dtype):
    model, expected = load_model(Checkpoint(folder), dtype), AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    assert type(model) is type(expected)
    theirs = expected.state_dict()
    assert all(x.dtype == dtype and x.equal(theirs[name]) for name, x in model.state_dict().items())


@pytest.mark.parametrize("name", RECIPES)
def test_weights_are_what_the_numbers_mean(quantized, name):
    """In the names of `transformers`, all of them and exactly; a head of its own where it is quantized."""
    checkpoint = Checkpoint(quantized(name))
    model = load_model(checkpoint, torch.float32)
    assert model.config.tie_word_embeddings == ("quantize_lm_head" not in RECIPES[name])
    state = model.state_dict()
    assert state.keys() - {"lm_head.weight"} == checkpoint.tensors.keys() - {"lm_head.weight"}
    for key, tensor in checkpoint.tensors.items():
        if isinstance(tensor, QuantizedWeight):
            groups = tensor.values.load().float().unflatten(1, (tensor.scales.shape[1], -1))
            zeros = tensor.zeros.load().float() if tensor.zeros else torch.zeros(tensor.scales.shape)
            expected = ((groups - zeros[..., None]) * tensor.scales.load().float()[..., None]).flatten(1)
        else:
            expected = tensor.load().float()
        assert state[key].equal(expected)


@pytest.mark.parametrize("name", RECIPES)
def test_activations_are_rounded_where_the_recipe_says(quantized, name):
    """Every product of a module's inputs, rounded by hand, and its weight; in float64, without the module."""
    checkpoint = Checkpoint(quantized(name))
    for module, (x, y) in products(quantized(name)).items():
        key = f"{module}.weight" if f"{module}.weight" in checkpoint.tensors else "model.embed_tokens.weight"
        weight, wide = checkpoint[key], x[0].double()
        if isinstance(weight, QuantizedWeight) and weight.activations != "16bit":
            limit = 127 if weight.format == "int8" else 448
            static = weight.activations == "static"
            scale = weight.input_scale.load().double() if static else wide.abs().amax(1, keepdim=True) / limit
            levels = (wide / scale).clamp(-limit, limit)
            wide = (levels.round() if weight.format == "int8" else levels.float().to(FP8).double()) * scale
        expected = wide @ checkpoint.dequantized(key).load().double().T
        if bias := checkpoint.tensors.get(f"{module}.bias"):
            expected = expected + bias.load()
        # A number between two levels may be rounded either way in float32: then one step of one input.
        assert (y[0] - expected).norm() / expected.norm() < 2e-3, module


@pytest.mark.parametrize("name", ["static", "token", "fp8", "fp8 token"])
def test_rounding_shows(quantized, name):
    """The inputs of a product are not levels before it, so that imitating has something to do."""
    checkpoint = Checkpoint(quantized(name))
    x, y = products(quantized(name))["model.layers.0.mlp.down_proj"]
    exact = x[0] @ checkpoint.dequantized("model.layers.0.mlp.down_proj.weight").load().T
    exact += checkpoint["model.layers.0.mlp.down_proj.bias"].load()
    assert (y[0] - exact).norm() / exact.norm() > 2e-3


def test_static_activations_saturate(quantized):
    """Beyond what calibration saw: INT8 to -128 and 127."""
    model = load_model(Checkpoint(quantized("static")), torch.float32)
    module = model.model.layers[0].mlp.down_proj
    scale = Checkpoint(quantized("static"))["model.layers.0.mlp.down_proj.weight"].input_scale.load()
    with torch.inference_mode():
        for sign, level in ((1, 127), (-1, -128)):
            x = torch.full((1, 1, 128), 1e4 * sign)
            expected = torch.nn.functional.linear(torch.full_like(x, level) * scale, module.weight, module.bias)
            torch.testing.assert_close(module(x), expected, rtol=1e-5, atol=1e-5)


# The cache


@pytest.mark.parametrize("dtype", [torch.int8, FP8], ids=str)
def test_cache_rounds_what_it_is_given(dtype):
    """By layer and head, keys and values apart, over several steps; and returns all that it holds."""
    key_scales, value_scales = (torch.tensor([[0.01, 0.02], [0.03, 0.5]]) * x for x in (1, 7))
    cache = fake_quantized_cache(CacheScales(dtype, key_scales, value_scales))
    for layer in range(2):
        keys, values = torch.randn(2, 3, 2, 6, 8).unbind()  # [batch, kv_heads, tokens, head_dim]
        for start, stop in ((0, 4), (4, 5), (5, 6)):
            held = cache.update(keys[:, :, start:stop], values[:, :, start:stop], layer)
        for actual, given, scales in zip(held, (keys, values), (key_scales, value_scales), strict=True):
            scale = scales[layer][:, None, None]
            levels = given / scale
            levels = levels.round().clamp(-128, 127) if dtype == torch.int8 else levels.clamp(-448, 448).to(FP8).float()
            assert actual.equal(levels * scale)


def test_cache_keeps_the_models_dtype():
    scales = torch.ones(1, 2) / 16
    cache = fake_quantized_cache(CacheScales(torch.int8, scales, scales))
    keys, _ = cache.update(torch.randn(1, 2, 3, 8).bfloat16(), torch.randn(1, 2, 3, 8).bfloat16(), 0)
    assert keys.dtype == torch.bfloat16


def test_logits_with_a_cache(folder):
    """Fine scales change a little, coarse ones a lot; and a call does not see an earlier call's cache."""
    plain = HuggingFaceModel(folder, device="cpu").logits(IDS)
    errors = []
    for step in (2.0**-4, 2.0**-1):
        scales = torch.full((2, 2), step)
        model = HuggingFaceModel(folder, device="cpu", cache=CacheScales(torch.int8, scales, scales))
        logits = model.logits(IDS)
        assert logits.equal(model.logits(IDS))
        errors.append(((logits - plain).norm() / plain.norm()).item())
    assert 1e-3 < errors[0] < 0.05
    assert errors[1] > 4 * errors[0]


def test_a_prompt_is_treated_alike_in_one_step_or_many(folder):
    """Logits of a token do not depend on what comes after it."""
    scales = torch.full((2, 2), 0.1)
    model = HuggingFaceModel(folder, device="cpu", cache=CacheScales(torch.int8, scales, scales))
    long, short = model.logits(IDS), model.logits(IDS[:17])
    assert (long[:17] - short).norm() / short.norm() < 1e-5
