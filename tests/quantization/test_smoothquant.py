"""SmoothQuant: the paper's formula, what it does to a model, and static scales of the smoothed activations."""

import shutil

import numpy as np
import pytest
import torch
from outlier_models import CONFIG, calibrated, outlier_weights, write_model

from trtbuild.checkpoint.canonical import Checkpoint
from trtbuild.errors import UserError
from trtbuild.evaluation.hugging_face import HuggingFaceModel
from trtbuild.quantization.calibration import read_calibration, read_smoothing
from trtbuild.quantization.layer import PRODUCTS, LayerWeights
from trtbuild.quantization.quantize import quantize
from trtbuild.quantization.recipe import Quantization
from trtbuild.quantization.smoothquant import smoothing_scales

CPU = torch.device("cpu")
LAYERS = ["model.layers.0", "model.layers.1"]
PROMPT = list(range(2, 42))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("smoothquant") / "checkpoint"
    return Checkpoint(write_model(folder, attention_bias=True, mlp_bias=True))


@pytest.fixture(scope="module")
def ranges(checkpoint):
    return read_calibration(calibrated(checkpoint.folder), checkpoint)


@pytest.fixture(scope="module", params=["tensor", "token"])
def quantized(request, checkpoint, ranges, tmp_path_factory):
    """A folder with static or dynamic activations, smoothed by 0.5."""
    folder = tmp_path_factory.mktemp(request.param) / "quantized"
    activations = {"dtype": "int8", "per": request.param, "smoothquant": 0.5}
    quantization = Quantization.parse({"dtype": "float32", "weights": {"dtype": "int8"}, "activations": activations})
    quantize(checkpoint.folder, folder, quantization, checkpoint.folder.with_name("checkpoint.npz"), "cpu")
    return folder


def numpy_scales(checkpoint, ranges, layer: str, product: str, alpha: float) -> np.ndarray:
    """The formula for one product, from the original weights; of `o_proj` by value head, which two query heads read."""
    weights = [checkpoint[f"{layer}.{part}.weight"].load().numpy() for part in PRODUCTS[product]]
    columns = np.abs(np.concatenate(weights)).max(0)
    inputs = ranges[f"{layer}.{product}.input"].numpy()
    if product == "self_attn.o_proj":
        columns, inputs = (x.reshape(2, 2, 16).max(1).reshape(-1) for x in (columns, inputs))
    return inputs**alpha / columns ** (1 - alpha)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 0.85, 1.0])
def test_formula(alpha):
    activations, weights = torch.rand(200) * 50 + 1e-3, torch.rand(200) + 1e-3
    expected = activations.double().numpy() ** alpha / weights.double().numpy() ** (1 - alpha)
    np.testing.assert_allclose(smoothing_scales(activations, weights, alpha).numpy(), expected, rtol=1e-5)


def test_zero_channels_are_left_alone():
    activations, weights = torch.tensor([0.0, 4.0, 0.0, 9.0]), torch.tensor([2.0, 0.0, 0.0, 4.0])
    assert smoothing_scales(activations, weights, 0.5).tolist() == [1.0, 1.0, 1.0, 1.5]


def test_scales_are_bounded():
    """What cannot be multiplied in 16 bits would only move the overflow."""
    activations, weights = torch.tensor([1e30, 1e-30]), torch.tensor([1e-30, 1e30])
    assert smoothing_scales(activations, weights, 0.5).tolist() == pytest.approx([1e5, 1e-5])


@pytest.mark.parametrize("alpha", [0.2, 0.5, 0.9])
def test_the_float_model_stays_the_same(checkpoint, ranges, tmp_path, alpha):
    """All four products smoothed and nothing rounded: logits to 1e-5; with 0.5, ranges that meet in the middle."""
    weights = {name: tensor.load() for name, tensor in checkpoint.tensors.items()}
    for i, prefix in enumerate(LAYERS):
        layer = LayerWeights(checkpoint, i, CPU)
        for product in PRODUCTS:
            layer.smooth(product, torch.from_numpy(numpy_scales(checkpoint, ranges, prefix, product, alpha)))
        weights |= {f"{prefix}.{name}": x for name, x in layer.vectors.items()}
        for product in PRODUCTS:
            parts = layer.parts(product, layer.weights[product])
            weights |= {f"{prefix}.{part}.weight": x for part, x in parts.items()}
    smoothed = write_model(tmp_path / "smoothed", weights, attention_bias=True, mlp_bias=True)
    expected, actual = (HuggingFaceModel(x, device="cpu").logits(PROMPT) for x in (checkpoint.folder, smoothed))
    assert (actual - expected).norm() / expected.norm() < 1e-5
    after = read_calibration(calibrated(smoothed), checkpoint)
    for prefix in LAYERS:
        for product in ("self_attn.qkv_proj", "mlp.gate_up_proj", "mlp.down_proj"):
            name = f"{prefix}.{product}.input"
            old, new = (x[name] for x in (ranges, after))
            assert (new.max() / new.median()) < (old.max() / old.median())  # outliers are nearer to the rest
            if alpha == 0.5 and product == "mlp.down_proj":  # nothing that is smoothed later changes its weight
                columns = weights[f"{prefix}.mlp.down_proj.weight"].abs().amax(0)
                torch.testing.assert_close(new, columns, rtol=1e-3, atol=0)


def test_scales_in_the_folder_are_the_formulas(checkpoint, ranges, quantized):
    with np.load(quantized / "smoothing.npz", allow_pickle=False) as content:
        scales = {name: content[name] for name in content.files}
    assert list(scales) == [f"{layer}.{product}" for layer in LAYERS for product in PRODUCTS]
    for name, actual in scales.items():
        layer, product = name[:14], name[15:]
        np.testing.assert_allclose(actual, numpy_scales(checkpoint, ranges, layer, product, 0.5), rtol=1e-5)


def test_static_scales_are_of_the_smoothed_inputs(checkpoint, ranges, quantized):
    """Their largest magnitude over 127, one for all the projections of a product; none where tokens have their own."""
    weights = Checkpoint(quantized)
    static = "tensor" in str(quantized)
    for layer in LAYERS:
        for product, parts in PRODUCTS.items():
            scales = numpy_scales(checkpoint, ranges, layer, product, 0.5)
            if product == "self_attn.o_proj":
                scales = np.repeat(scales.reshape(2, 1, 16), 2, 1).reshape(-1)
            expected = (ranges[f"{layer}.{product}.input"].numpy() / scales).max() / 127
            for part in parts:
                weight = weights[f"{layer}.{part}.weight"]
                assert weight.activations == ("static" if static else "token")
                if static:
                    assert weight.input_scale.load().item() == pytest.approx(expected, rel=1e-5)
                else:
                    assert weight.input_scale is None


@pytest.mark.parametrize(
    ("name", "array", "message"),
    [
        ("model.layers.0.self_attn.o_proj", np.zeros(32, "f4"), "holds a factor of 0"),
        ("model.layers.0.self_attn.o_proj", np.full(32, np.nan, "f4"), "negative, infinite or NaN"),
        ("model.layers.0.self_attn.o_proj", np.ones(64, "f4"), r"float32 \[64\]; float32 \[32\] is expected"),
        ("model.layers.0.self_attn.x_proj", np.ones(32, "f4"), "is no part of this model"),
    ],
)
def test_factors_that_cannot_be(quantized, tmp_path, name, array, message):
    shutil.copytree(quantized, tmp_path / "copy")
    (tmp_path / "copy" / "quantization.json").unlink()  # which knows the file's sha256
    with np.load(quantized / "smoothing.npz") as content:
        np.savez(tmp_path / "copy" / "smoothing.npz", **dict(content) | {name: array})
    with pytest.raises(UserError, match=rf"smoothing\.npz: {name} .*{message}|{name} is no part"):
        read_smoothing(Checkpoint(tmp_path / "copy"))
    assert read_smoothing(Checkpoint(quantized)).keys() == {
        f"{layer}.{product}" for layer in LAYERS for product in PRODUCTS
    }


@pytest.mark.parametrize("change", ["removed", "another"])
def test_factors_that_are_not_those_of_the_weights(quantized, tmp_path, change):
    """The cache's scales would be wrong without a word."""
    shutil.copytree(quantized, tmp_path / "copy")
    file = tmp_path / "copy" / "smoothing.npz"
    file.unlink() if change == "removed" else file.write_bytes(b"another")
    with pytest.raises(UserError, match=r"smoothing\.npz is not what was written beside these weights; quantize again"):
        read_smoothing(Checkpoint(tmp_path / "copy"))


def with_outliers() -> dict[str, torch.Tensor]:
    """Weights of a model that computes what it would, with two inputs of a layer's products 100 times larger."""
    weights = outlier_weights(CONFIG)
    for layer in LAYERS:
        for norm, parts in (("input_layernorm", "qkv_proj"), ("post_attention_layernorm", "gate_up_proj")):
            weights[f"{layer}.{norm}.weight"][[7, 40]] *= 100
            for part in PRODUCTS[f"self_attn.{parts}" if parts == "qkv_proj" else f"mlp.{parts}"]:
                weights[f"{layer}.{part}.weight"][:, [7, 40]] /= 100
    return weights


def test_smoothing_helps(tmp_path):
    """Static INT8 activations in which two channels are 100 times larger: 3% error in place of 20% and more."""
    folder = write_model(tmp_path / "checkpoint", with_outliers())
    file, reference = calibrated(folder), HuggingFaceModel(folder, device="cpu").logits(PROMPT)
    errors = {}
    for name, options in {"none": {}, "half": {"smoothquant": 0.5}}.items():
        activations = {"dtype": "int8", "per": "tensor"} | options
        recipe = {"dtype": "float32", "weights": {"dtype": "int8"}, "activations": activations}
        quantize(folder, tmp_path / name, Quantization.parse(recipe), file, "cpu")
        logits = HuggingFaceModel(tmp_path / name, device="cpu").logits(PROMPT)
        errors[name] = ((logits - reference).norm() / reference.norm()).item()
    assert errors["half"] < 0.06
    assert errors["none"] > 0.2
