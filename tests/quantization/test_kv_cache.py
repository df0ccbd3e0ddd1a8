"""Scales of an 8-bit KV cache: from the ranges, apart for keys and values, and what it costs where they are not."""

import numpy as np
import pytest
import torch
from outlier_models import CONFIG, calibrated, outlier_weights, write_model

from trtbuild.checkpoint.canonical import Checkpoint
from trtbuild.decoder.decoder import CacheScales
from trtbuild.errors import UserError
from trtbuild.evaluation.hugging_face import HuggingFaceModel
from trtbuild.quantization.calibration import Calibration, read_calibration
from trtbuild.quantization.kv_cache import cache_of, quantized_cache
from trtbuild.quantization.quantize import quantize
from trtbuild.quantization.recipe import KVCache, Quantization, Recipe

IDS = list(range(2, 60))
LIMITS = {"int8": 127, "fp8": 448}
dtypes = pytest.mark.parametrize("dtype", LIMITS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("kv") / "checkpoint")


@pytest.fixture(scope="module")
def file(folder):
    return calibrated(folder)


def opened(folder) -> tuple[Checkpoint, Calibration]:
    checkpoint = Checkpoint(folder)
    return checkpoint, read_calibration(folder.with_name(f"{folder.name}.npz"), checkpoint)


def error(folder, cache: CacheScales) -> float:
    """Of the logits, for rounding keys and values alone."""
    expected, actual = (HuggingFaceModel(folder, device="cpu", cache=x).logits(IDS) for x in (None, cache))
    return ((actual - expected).norm() / expected.norm()).item()


@dtypes
@pytest.mark.parametrize("per", ["layer", "head"])
def test_scales_are_the_ranges(folder, file, dtype, per):
    """The largest magnitude over 127 or 448, `[layers, kv_heads]`; with "layer" every head has the layer's."""
    cache = quantized_cache(*opened(folder), KVCache(dtype, per))
    with np.load(file) as ranges:
        for kind, scales in (("key", cache.key_scales), ("value", cache.value_scales)):
            heads = np.stack([ranges[f"model.layers.{i}.self_attn.{kind}"].reshape(2, 16).max(1) for i in range(2)])
            expected = heads if per == "head" else np.repeat(heads.max(1, keepdims=True), 2, 1)
            assert scales.dtype == torch.float32
            np.testing.assert_allclose(scales.numpy(), expected / LIMITS[dtype], rtol=1e-6)
    assert cache.dtype == {"int8": torch.int8, "fp8": torch.float8_e4m3fn}[dtype]
    assert not torch.equal(cache.key_scales, cache.value_scales)
    assert not torch.equal(cache.key_scales[0], cache.key_scales[1])


def test_default_is_per_layer(folder, file):
    cache = quantized_cache(*opened(folder), KVCache("int8"))
    assert cache.key_scales.equal(quantized_cache(*opened(folder), KVCache("int8", "layer")).key_scales)


@dtypes
def test_a_head_that_is_never_active(folder, file, dtype):
    """Zeros stay zeros: a scale of 1."""
    checkpoint, calibration = opened(folder)
    calibration.ranges["model.layers.1.self_attn.value"][16:] = 0
    assert quantized_cache(checkpoint, calibration, KVCache(dtype, "head")).value_scales[1, 1] == 1


# Models whose keys are far larger than their values


def large_keys(folder, rows: slice, factor: float = 60.0):
    """Rows of every head's key projection times `factor`, of the queries' by the inverse, and its calibration.

    With all rows it is the same model: the products of queries and keys are what they were.
    """
    weights = outlier_weights(CONFIG)
    for name, heads, by in (("k_proj", 2, factor), ("q_proj", 4, 1 / factor)):
        for i in range(2):
            weights[f"model.layers.{i}.self_attn.{name}.weight"].unflatten(0, (heads, 16))[:, rows] *= by
    calibrated(write_model(folder, weights))
    return folder


def merged(cache: CacheScales) -> CacheScales:
    """One scale for keys and values, the larger, as TensorRT-LLM 0.7 had."""
    scales = torch.maximum(cache.key_scales, cache.value_scales)
    return CacheScales(cache.dtype, scales, scales)


def test_values_keep_their_own_scale(folder, file, tmp_path):
    """Keys 60 times larger cost nothing with scales of their own, 0.7% of the logits; with merged ones, 30%."""
    large = large_keys(tmp_path / "large", slice(None))
    plain, cache = (quantized_cache(*opened(x), KVCache("int8")) for x in (folder, large))
    torch.testing.assert_close(cache.key_scales, 60 * plain.key_scales, rtol=1e-4, atol=0)
    torch.testing.assert_close(cache.value_scales, plain.value_scales, rtol=1e-4, atol=0)
    own, shared = error(large, cache), error(large, merged(cache))
    assert own < 0.015
    assert own == pytest.approx(error(folder, plain), rel=0.3)
    assert shared > 0.2
    assert shared > 20 * own


def test_one_large_key_channel(tmp_path):
    """It costs the other channels of its keys their precision, whatever the values' scale; merged scales cost more."""
    large = large_keys(tmp_path / "large", slice(3, 4))
    cache = quantized_cache(*opened(large), KVCache("int8"))
    assert cache.key_scales.min() > 20 * cache.value_scales.max()
    own, shared = error(large, cache), error(large, merged(cache))
    assert own < 0.5 * shared
    assert shared > 0.3


def test_heads_of_one_layer_keep_their_own_scale(tmp_path):
    """One KV head with values 60 times larger, taken back by the output projection: a scale a head saves the other."""
    weights = outlier_weights(CONFIG)
    for i in range(2):
        weights[f"model.layers.{i}.self_attn.v_proj.weight"][:16] *= 60
        weights[f"model.layers.{i}.self_attn.o_proj.weight"][:, :32] /= 60  # query heads 0 and 1
    folder = write_model(tmp_path / "checkpoint", weights)
    calibrated(folder)
    layer, head = (error(folder, quantized_cache(*opened(folder), KVCache("int8", per))) for per in ("layer", "head"))
    assert head < 0.02
    assert layer > 0.1


# Where the weights were smoothed


@pytest.mark.parametrize("per", ["layer", "head"])
def test_smoothed_values(folder, file, tmp_path, per):
    """Their scales are those that calibrating the smoothed model would give; the keys' scales stay."""
    activations = {"dtype": "int8", "per": "tensor", "smoothquant": 0.9}
    recipe = {"dtype": "float32", "weights": {"dtype": "int8"}, "activations": activations}
    quantize(folder, tmp_path / "smoothed", Quantization.parse(recipe), file, "cpu")
    recipe["kv_cache"] = {"dtype": "int8", "per": per}
    plain, smoothed = (cache_of(Recipe.parse(recipe), x, file) for x in (folder, tmp_path / "smoothed"))
    assert smoothed.key_scales.equal(plain.key_scales)
    assert (smoothed.value_scales < 0.9 * plain.value_scales).all()
    ranges = read_calibration(calibrated(tmp_path / "smoothed"), Checkpoint(tmp_path / "smoothed"))
    for kind, scales in (("key", smoothed.key_scales), ("value", smoothed.value_scales)):
        heads = torch.stack([ranges[f"model.layers.{i}.self_attn.{kind}"].view(2, 16).amax(1) for i in range(2)])
        again = heads if per == "head" else heads.amax(1, keepdim=True).expand(2, 2)
        torch.testing.assert_close(scales, again / 127, rtol=0.05, atol=0)  # its weights are INT8


# What is refused


def test_no_kv_cache_in_the_recipe(folder):
    assert cache_of(Recipe.parse({"dtype": "float16"}), folder, None) is None


def test_no_calibration_file(folder):
    with pytest.raises(UserError, match="needs the ranges of keys and values; give the calibration file"):
        cache_of(Recipe.parse({"dtype": "float16", "kv_cache": {"dtype": "int8"}}), folder, None)


def test_another_models_calibration_file(file, tmp_path):
    other = write_model(tmp_path / "other", num_hidden_layers=1)
    with pytest.raises(UserError, match="was measured on another model"):
        cache_of(Recipe.parse({"dtype": "float16", "kv_cache": {"dtype": "int8"}}), other, file)
