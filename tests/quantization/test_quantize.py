"""Folders of quantized weights: the same bytes on every run, every option, and what is refused."""

import json
import shutil
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import numpy as np
import pytest
import torch
from outlier_models import CONFIG, SAMPLES, calibrated, outlier_weights, write_model
from safetensors.torch import save_file

from trtbuild.checkpoint.canonical import Checkpoint
from trtbuild.checkpoint.sources import make_checkpoint
from trtbuild.errors import UserError
from trtbuild.evaluation.hugging_face import HuggingFaceModel
from trtbuild.files import sha256
from trtbuild.quantization.layer import every_projection
from trtbuild.quantization.methods import Gptq, Round
from trtbuild.quantization.quantize import check_weights, quantize
from trtbuild.quantization.recipe import Quantization, Recipe
from trtbuild.tensors.quantized_weight import QuantizedWeight

DATA = Path(__file__).parents[1] / "data"
INT4 = {"dtype": "int4", "group_size": 32}
STATIC = {"dtype": "int8", "per": "tensor", "smoothquant": 0.5}
RECIPES = {
    "int8": {"weights": {"dtype": "int8"}},
    "int4": {"weights": INT4},
    "smoothquant": {"weights": {"dtype": "int8"}, "activations": STATIC},
    "gptq": {"weights": INT4 | {"method": "gptq"}},
    "awq": {"weights": INT4 | {"method": "awq"}},
    "fp8": {"weights": {"dtype": "fp8"}, "activations": {"dtype": "fp8"}},
    "fp8-dynamic": {"weights": {"dtype": "fp8", "per": "channel"}, "activations": {"dtype": "fp8", "per": "token"}},
}
# How far logits may move, in float32: INT8 and FP8 weights and static activations, INT4 in groups of 32.
COSTS = {"int8": 0.03, "int4": 0.3, "smoothquant": 0.1, "gptq": 0.25, "awq": 0.25, "fp8": 0.15, "fp8-dynamic": 0.15}
IDS = list(range(2, 60))
recipes = pytest.mark.parametrize("name", RECIPES)


def quantization(recipe: str | dict, **changes) -> Quantization:
    options = RECIPES[recipe] if isinstance(recipe, str) else recipe
    return Quantization.parse({"dtype": "float16", "calibration": SAMPLES} | options | changes)


def contents(folder: Path) -> dict[str, str]:
    return {str(file.relative_to(folder)): sha256(file) for file in sorted(folder.rglob("*")) if file.is_file()}


def error(folder: Path, original: Path) -> float:
    """Of the logits, in float32."""
    actual, expected = (HuggingFaceModel(x, device="cpu").logits(IDS) for x in (folder, original))
    assert actual.isfinite().all()
    return ((actual - expected).norm() / expected.norm()).item()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("quantize") / "checkpoint")


@pytest.fixture(scope="module")
def ranges(folder):
    return calibrated(folder)


@pytest.fixture(scope="module")
def tied(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("tied") / "checkpoint", tie_word_embeddings=True)


# The folder


@recipes
def test_bit_identical_with_any_number_of_threads(folder, ranges, tmp_path, name):
    """And on a second run: every file of the folder."""
    for run, threads in enumerate((1, 2, 2)):
        torch.set_num_threads(threads)
        quantize(folder, tmp_path / str(run), quantization(name), ranges, "cpu")
        assert torch.get_num_threads() == threads
    first, *others = (contents(tmp_path / str(run)) for run in range(3))
    assert others == [first, first]
    expected = {"model.safetensors", "config.json", "quantization.json", "tokenizer.json", "tokenizer_config.json"}
    expected |= {"smoothing.npz"} if name in ("smoothquant", "awq") else set()
    expected |= {"quantize_config.json"} if name == "gptq" else set()
    assert expected <= first.keys()
    assert {"smoothing.npz", "quantize_config.json"} & first.keys() <= expected


def test_a_tokenizers_files_go_wherever_the_weights_go(folder, tmp_path):
    """From a published folder into the checkpoint, and from there into quantized ones."""
    source = shutil.copytree(folder, tmp_path / "published")
    names = {
        "tokenizer.model",
        "vocab.json",
        "merges.txt",
        "special_tokens_map.json",
        "generation_config.json",
        "x.jinja",
    }
    for name in names:
        (source / name).write_text("{}")
    make_checkpoint({"local": {"path": str(source)}}, tmp_path / "checkpoint")
    quantize(tmp_path / "checkpoint", tmp_path / "quantized", quantization("int8"))
    for made in ("checkpoint", "quantized"):
        assert names | {"tokenizer.json", "tokenizer_config.json"} <= contents(tmp_path / made).keys()


@recipes
def test_the_bits_do_not_depend_on_more_work_than_threads(tmp_path, name):
    """Weights of more rows than one thread takes at a time: 2 x 640 of gate and up."""
    torch.manual_seed(0)
    checkpoint = write_model(tmp_path / "checkpoint", intermediate_size=640, num_hidden_layers=1)
    ranges = calibrated(checkpoint)
    for threads in (1, 2):
        torch.set_num_threads(threads)
        quantize(checkpoint, tmp_path / str(threads), quantization(name), ranges, "cpu")
    assert contents(tmp_path / "1") == contents(tmp_path / "2")


@recipes
def test_what_the_folder_says(folder, ranges, tmp_path, name):
    """It is a checkpoint with the model's tokenizer and configuration, and records what it was made of."""
    quantize(folder, tmp_path / "out", quantization(name), ranges, "cpu")
    checkpoint = Checkpoint(tmp_path / "out")
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert {key: config[key] for key in CONFIG} == CONFIG
    assert config["dtype"] == "float16"
    assert checkpoint.quant_method == {"gptq": "gptq", "awq": "awq"}.get(name, "compressed-tensors")
    assert len(checkpoint.quantized()) == 14
    assert all(x.dtype == torch.float16 for x in checkpoint.tensors.values() if not isinstance(x, QuantizedWeight))
    assert (tmp_path / "out/tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
    origin = json.loads((tmp_path / "out/quantization.json").read_text())
    assert origin["quantization"] == quantization(name).settings
    inputs = {"config.json": folder / "config.json", "model.safetensors": folder / "model.safetensors"}
    inputs |= {ranges.name: ranges} if name in ("smoothquant", "fp8") else {}
    assert origin["inputs"] == {key: sha256(path) for key, path in inputs.items()}
    check_weights(Recipe.parse({"dtype": "float16", "calibration": SAMPLES} | RECIPES[name]), tmp_path / "out")
    errors, original = origin["relative_errors"], Checkpoint(folder)
    assert errors.keys() == {*every_projection(original.config)}
    if not (tmp_path / "out/smoothing.npz").exists():  # which changes the weights that are rounded
        for projection, error in errors.items():
            weight = original[f"{projection}.weight"].load().double().numpy()
            lost = checkpoint.dequantized(f"{projection}.weight").load().double().numpy() - weight
            assert error == pytest.approx(np.linalg.norm(lost) / np.linalg.norm(weight), rel=1e-3)


@recipes
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_any_dtype_of_the_checkpoint(folder, tmp_path, name, dtype):
    """Weights that come in another dtype than the recipe's: the numbers that they are, rounded once."""
    checkpoint = write_model(tmp_path / "checkpoint", dtype=getattr(torch, dtype))
    ranges = calibrated(checkpoint)
    for target in ("float16", "bfloat16"):
        out = tmp_path / target
        quantize(checkpoint, out, quantization(name, dtype=target), ranges, "cpu")
        assert error(out, checkpoint) < COSTS[name]
        assert Checkpoint(out)["model.norm.weight"].dtype == getattr(torch, target)


def test_int8_numbers(folder, tmp_path):
    """To nearest, by the row's largest magnitude over 127, or the projection's."""
    weights = {name: x.load() for name, x in Checkpoint(folder).tensors.items()}
    for per in ("channel", "tensor"):
        quantize(folder, tmp_path / per, quantization({"weights": {"dtype": "int8", "per": per}}), device="cpu")
        for name, tensor in Checkpoint(tmp_path / per).tensors.items():
            if isinstance(tensor, QuantizedWeight):
                absmax = weights[name].abs().amax(1, keepdim=True)
                scale = (absmax if per == "channel" else absmax.amax().expand_as(absmax)) / 127
                assert tensor.scales.load().equal(scale)
                assert tensor.values.load().equal((weights[name] / scale).round().to(torch.int8))


@pytest.mark.parametrize("per", ["channel", "tensor"])
def test_fp8_numbers(folder, tmp_path, per):
    """As INT8's, over 448; the four significant bits of FP8 are torch's."""
    weights = {name: x.load() for name, x in Checkpoint(folder).tensors.items()}
    activations = {"dtype": "fp8", "per": "token"}
    recipe = {"weights": {"dtype": "fp8", "per": per}, "activations": activations}
    quantize(folder, tmp_path / per, quantization(recipe), device="cpu")
    for weight in Checkpoint(tmp_path / per).quantized():
        assert (weight.activations, weight.input_scale) == ("token", None)
    for name, tensor in Checkpoint(tmp_path / per).tensors.items():
        if isinstance(tensor, QuantizedWeight):
            absmax = weights[name].abs().amax(1, keepdim=True)
            scale = (absmax if per == "channel" else absmax.amax().expand_as(absmax)) / 448
            assert tensor.scales.load().equal(scale)
            assert tensor.values.load().float().equal((weights[name] / scale).to(torch.float8_e4m3fn).float())


def test_fp8_scales_are_those_of_llm_compressor(tmp_path):
    """Of the model in `tests/data`, which it had in bfloat16, scales included."""
    spec = spec_from_file_location("make_fixtures", DATA / "make_fixtures.py")
    fixtures = module_from_spec(spec)
    spec.loader.exec_module(fixtures)
    fixtures.make_base(tmp_path / "base")
    quantize(tmp_path / "base", tmp_path / "out", quantization("fp8-dynamic", dtype="bfloat16"), device="cpu")
    ours, theirs = Checkpoint(tmp_path / "out"), Checkpoint(DATA / "llmcompressor-fp8-dynamic")
    for name, tensor in theirs.tensors.items():
        if isinstance(tensor, QuantizedWeight):
            assert ours[name].kind == tensor.kind
            torch.testing.assert_close(ours[name].scales.load(), tensor.scales.load().float(), rtol=2**-7, atol=0)
            assert len(tensor.scales.load().unique()) > 10


# Which weights


def kept(folder: Path) -> set[str]:
    """Projections that are not quantized."""
    tensors = Checkpoint(folder).tensors.items()
    return {
        name.removesuffix(".weight") for name, x in tensors if "_proj" in name and not isinstance(x, QuantizedWeight)
    }


@recipes
def test_keep_16bit(folder, ranges, tmp_path, name):
    """What is kept is what it was, to float16, except where smoothing another product has divided it."""
    patterns = ["*.down_proj", "model.layers.0.self_attn.*"]
    quantize(folder, tmp_path / "out", quantization(name, keep_16bit=patterns), ranges, "cpu")
    attention = {f"model.layers.0.self_attn.{x}_proj" for x in "qkvo"}
    assert kept(tmp_path / "out") == attention | {f"model.layers.{i}.mlp.down_proj" for i in range(2)}
    for projection in kept(tmp_path / "out"):
        original, actual = (Checkpoint(x)[f"{projection}.weight"].load() for x in (folder, tmp_path / "out"))
        assert actual.equal(original.half())
    assert error(tmp_path / "out", folder) < COSTS[name]


@pytest.mark.parametrize("name", ["smoothquant", "awq"])
def test_kept_weights_take_part_in_smoothing(folder, ranges, tmp_path, name):
    """`v_proj` is kept, and divided by what `o_proj` was multiplied with."""
    patterns = ["*.self_attn.[qkv]_proj"]
    quantize(folder, tmp_path / "out", quantization(name, keep_16bit=patterns), ranges, "cpu")
    assert kept(tmp_path / "out") == {f"model.layers.{i}.self_attn.{x}_proj" for i in range(2) for x in "qkv"}
    original, actual = (
        Checkpoint(x)["model.layers.1.self_attn.v_proj.weight"].load().float() for x in (folder, tmp_path / "out")
    )
    ratio = actual / original
    assert (ratio.std(1) / ratio.mean(1)).max() < 0.02  # one factor a row
    assert ratio.mean(1).std() > 0.05
    assert error(tmp_path / "out", folder) < COSTS[name]


@recipes
@pytest.mark.parametrize("tie", [True, False], ids=["tied", "untied"])
def test_quantize_lm_head(folder, tied, tmp_path, name, tie):
    """A head that shares the embedding's weight gets one of its own, and the embedding stays."""
    source = tied if tie else folder
    quantize(source, tmp_path / "out", quantization(name, quantize_lm_head=True), calibrated(source), "cpu")
    checkpoint = Checkpoint(tmp_path / "out")
    assert isinstance(checkpoint["lm_head.weight"], QuantizedWeight)
    assert not checkpoint.config.tie_word_embeddings
    embedding, head = (Checkpoint(source).tensors.get(f"{x}.weight") for x in ("model.embed_tokens", "lm_head"))
    assert checkpoint["model.embed_tokens.weight"].load().equal(embedding.load().half())
    wide = checkpoint.dequantized("lm_head.weight").load()
    original = (embedding if tie else head).load()
    assert 1e-3 < (wide - original).norm() / original.norm() < 0.2  # GPTQ moves weights further than rounding does
    assert error(tmp_path / "out", source) < 1.5 * COSTS[name]


@pytest.mark.parametrize("tie", [True, False], ids=["tied", "untied"])
def test_the_head_is_left_alone_otherwise(folder, tied, tmp_path, tie):
    source = tied if tie else folder
    quantize(source, tmp_path / "out", quantization("int8"), device="cpu")
    checkpoint = Checkpoint(tmp_path / "out")
    assert checkpoint.config.tie_word_embeddings == tie
    assert ("lm_head.weight" in checkpoint.tensors) != tie


# Channels of zeros


@recipes
def test_channels_of_zeros(tmp_path, name):
    """Outputs that are always zero stay so, inputs that are never active harm nothing, in every projection."""
    weights = outlier_weights(CONFIG)
    for i in range(2):
        layer = f"model.layers.{i}"
        for part in ("q", "k", "v", "o"):
            weights[f"{layer}.self_attn.{part}_proj.weight"][2] = 0
        for part in ("gate", "up", "down"):
            weights[f"{layer}.mlp.{part}_proj.weight"][7] = 0  # and so an input of down_proj
            weights[f"{layer}.mlp.{part}_proj.weight"][:, 9] = 0
        weights[f"{layer}.input_layernorm.weight"][11] = 0  # an input of q, k and v
        weights[f"{layer}.self_attn.v_proj.weight"][5] = 0  # and so two of o_proj
    source = write_model(tmp_path / "checkpoint", weights)
    quantize(source, tmp_path / "out", quantization(name), calibrated(source), "cpu")
    checkpoint = Checkpoint(tmp_path / "out")
    for weight in (x for x in checkpoint.tensors.values() if isinstance(x, QuantizedWeight)):
        assert weight.scales.load().isfinite().all()
        assert (weight.scales.load() > 0).all()
    for projection, row in (("self_attn.o_proj", 2), ("self_attn.v_proj", 5), ("mlp.down_proj", 7)):
        assert checkpoint.dequantized(f"model.layers.1.{projection}.weight").load()[row].eq(0).all()
    assert error(tmp_path / "out", source) < COSTS[name]


@recipes
def test_a_projection_of_zeros(tmp_path, name):
    weights = outlier_weights(CONFIG)
    weights["model.layers.0.self_attn.o_proj.weight"].zero_()
    weights["model.layers.1.mlp.down_proj.weight"].zero_()
    source = write_model(tmp_path / "checkpoint", weights)
    quantize(source, tmp_path / "out", quantization(name), calibrated(source), "cpu")
    assert error(tmp_path / "out", source) < COSTS[name]


# What is refused


def refused(tmp_path: Path, message: str, *arguments) -> None:
    """It says so and leaves nothing."""
    out = tmp_path / "place" / "out"
    out.parent.mkdir()
    with pytest.raises(UserError, match=message):
        quantize(arguments[0], out, *arguments[1:], device="cpu")
    assert list(out.parent.iterdir()) == []


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("*.k_proj", r"keep_16bit matches model\.layers\.0\.self_attn\.k_proj but not all of .*q_proj, .*one product"),
        ("model.layers.1.mlp.up_proj", r"matches model\.layers\.1\.mlp\.up_proj but not all of .*gate_proj"),
        ("*", "keep_16bit matches every weight of the model; nothing is left to quantize"),
    ],
)
def test_patterns_that_do_not_work(folder, tmp_path, pattern, message):
    refused(tmp_path, message, folder, quantization("int8", keep_16bit=[pattern]))


@pytest.mark.parametrize("method", ["round", "gptq", "awq"])
@pytest.mark.parametrize(
    ("inner", "group_size", "message"),
    [
        (96, 64, r"group_size 64 does not divide the 96 input channels .* that fit this model: 32$"),
        (128, 256, r"group_size 256 does not divide the 64 input channels .* that fit this model: 32, 64$"),
        (72, 64, r"does not divide the 72 input channels of some weights; no group size fits this model"),
    ],
)
def test_group_size_that_does_not_divide(tmp_path, method, inner, group_size, message):
    source = write_model(tmp_path / "checkpoint", intermediate_size=inner)
    weights = {"dtype": "int4", "method": method, "group_size": group_size}
    refused(tmp_path, message, source, quantization({"weights": weights}))


def test_group_size_matters_for_quantized_weights_alone(tmp_path):
    """Where the projection that it does not divide stays in 16 bits, it fits."""
    source = write_model(tmp_path / "checkpoint", intermediate_size=96)
    weights = {"weights": {"dtype": "int4", "group_size": 64}}
    quantize(source, tmp_path / "out", quantization(weights, keep_16bit=["*.down_proj"]), device="cpu")
    assert error(tmp_path / "out", source) < COSTS["int4"]


@recipes
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite(folder, ranges, tmp_path, name, value):
    """The product is named, before anything is computed from it; ranges may be from before the damage."""
    weights = outlier_weights(CONFIG)
    weights["model.layers.1.mlp.up_proj.weight"][4, 6] = value
    source = write_model(tmp_path / "checkpoint", weights)
    message = r"model\.layers\.1\.mlp\.gate_up_proj holds NaN or infinite numbers; it cannot be quantized"
    refused(tmp_path, message, source, quantization(name), ranges)


@recipes
def test_norms_that_are_not_finite(ranges, tmp_path, name):
    """They go into the folder with what smoothing divided them by, and must not make it look sound."""
    weights = outlier_weights(CONFIG)
    weights["model.layers.1.input_layernorm.weight"][4] = float("nan")
    source = write_model(tmp_path / "checkpoint", weights)
    refused(tmp_path, "NaN or infinite numbers", source, quantization(name), ranges)


@pytest.mark.parametrize("name", ["gptq", "awq"])
def test_activations_that_are_not_finite(tmp_path, name):
    """From an embedding that is damaged: said before anything is computed from it."""
    weights = outlier_weights(CONFIG)
    weights["model.embed_tokens.weight"][:, 4] = float("nan")
    source = write_model(tmp_path / "checkpoint", weights)
    refused(tmp_path, r"model\.embed_tokens\.weight holds NaN or infinite numbers", source, quantization(name))


def test_damaged_head(ranges, tmp_path):
    weights = outlier_weights(CONFIG)
    weights["lm_head.weight"][4, 6] = float("nan")
    source = write_model(tmp_path / "checkpoint", weights)
    message = r"checkpoint: lm_head\.weight holds NaN or infinite numbers; it cannot be quantized"
    refused(tmp_path, message, source, quantization("int8", quantize_lm_head=True), ranges)


@pytest.mark.parametrize("name", ["smoothquant", "fp8"])
def test_no_calibration_file(folder, tmp_path, name):
    refused(tmp_path, "quantizes activations by their ranges; give the calibration file", folder, quantization(name))


def test_another_models_calibration_file(ranges, tmp_path):
    other = write_model(tmp_path / "checkpoint", intermediate_size=96)
    refused(tmp_path, "was measured on another model", other, quantization("smoothquant"), ranges)


@recipes
def test_a_checkpoint_that_is_quantized_already(folder, ranges, tmp_path, name):
    quantize(folder, tmp_path / "int8", quantization("int8"), device="cpu")
    message = r"int8 is quantized already \(compressed-tensors\); start from the original model"
    refused(tmp_path, message, tmp_path / "int8", quantization(name), ranges)


def test_the_output_is_not_the_input(folder):
    before = contents(folder)
    with pytest.raises(UserError, match="would replace its own input"):
        quantize(folder, folder, quantization("int8"))
    assert contents(folder) == before


@pytest.mark.parametrize(("name", "method"), [("int8", Round), ("gptq", Gptq)])
def test_an_interrupted_run_leaves_nothing(folder, tmp_path, monkeypatch, name, method):
    """Neither a folder nor a temporary one; and what an earlier run made stays as it was."""
    whole = method.layer

    def broken(self, i):
        if i == 1:
            raise RuntimeError("interrupted")
        return whole(self, i)

    out = tmp_path / "place" / "out"
    monkeypatch.setattr(method, "layer", broken)
    with pytest.raises(RuntimeError, match="interrupted"):
        quantize(folder, out, quantization(name), device="cpu")
    assert list(out.parent.iterdir()) == []
    monkeypatch.undo()
    quantize(folder, out, quantization(name), device="cpu")
    before = contents(out)
    monkeypatch.setattr(method, "layer", broken)
    with pytest.raises(RuntimeError, match="interrupted"):
        quantize(folder, out, quantization(name), device="cpu")
    assert [path.name for path in out.parent.iterdir()] == ["out"]
    assert contents(out) == before


# Recipes and folders


def test_weights_of_another_recipe(folder, tmp_path):
    quantize(folder, tmp_path / "out", quantization("int8"), device="cpu")
    recipe = {"dtype": "float16", "weights": {"dtype": "int8"}}
    check_weights(Recipe.parse(recipe | {"gate": "warn", "kv_cache": {"dtype": "int8"}}), tmp_path / "out")
    check_weights(Recipe.parse({"dtype": "float16"}), folder)
    with pytest.raises(UserError, match="out was quantized by another recipe"):
        check_weights(Recipe.parse(recipe | {"weights": {"dtype": "int4"}}), tmp_path / "out")
    with pytest.raises(UserError, match=r"checkpoint is not quantized; make .* with 'trtbuild quantize'"):
        check_weights(Recipe.parse(recipe), folder)


def test_sharded_checkpoints(folder, ranges, tmp_path):
    """Weights in several files give the same numbers."""
    source = shutil.copytree(folder, tmp_path / "checkpoint")
    tensors = {name: x.load().clone() for name, x in Checkpoint(source).tensors.items()}
    (source / "model.safetensors").unlink()
    names, index = list(tensors), {}
    for shard, part in (("a.safetensors", names[::2]), ("b.safetensors", names[1::2])):
        save_file({name: tensors[name] for name in part}, source / shard)
        index |= dict.fromkeys(part, shard)
    (source / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    quantize(folder, tmp_path / "one", quantization("awq"), ranges, "cpu")
    quantize(source, tmp_path / "two", quantization("awq"), ranges, "cpu")
    assert sha256(tmp_path / "one/model.safetensors") == sha256(tmp_path / "two/model.safetensors")
