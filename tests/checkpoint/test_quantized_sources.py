"""Published quantized weights as a source: of a recipe, beside the model that they are of, and of a model."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from trtbuild.checkpoint.canonical import Checkpoint
from trtbuild.checkpoint.sources import make_checkpoint, make_quantized
from trtbuild.errors import UserError
from trtbuild.files import MARKER
from trtbuild.tokenizer.tokenizer import Tokenizer

DATA = Path(__file__).parent.parent / "data"
FIXTURES = ["gptqmodel-asym", "autoawq-gemm", "llmcompressor-w8a8-static"]
TOKENIZER = {"tokenizer.json", "tokenizer_config.json"}


def model_config(fixture: str, **changes) -> dict:
    config = json.loads((DATA / fixture / "config.json").read_text())
    del config["quantization_config"]
    return config | changes


def original(fixture: str, folder: Path, **changes) -> Path:
    """The model that a fixture was made of, but for its weights, with a tokenizer."""
    make_checkpoint({"dummy": {"config": model_config(fixture, **changes)}}, folder)
    return folder


def refused(make, message) -> None:
    """It is refused with one line that matches; nothing appears in the folder that `make` is to write to."""
    with pytest.raises(UserError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


def same_weights(folder: Path, fixture: str) -> None:
    checkpoint = Checkpoint(folder)
    for name, expected in load_file(DATA / fixture / "expected.safetensors").items():
        assert checkpoint.dequantized(name).load().equal(expected), name


# Of a recipe: beside the model


@pytest.mark.parametrize("fixture", FIXTURES)
def test_the_model_lends_its_tokenizer(fixture, tmp_path):
    model, folder = original(fixture, tmp_path / "model"), tmp_path / "quantized"
    make_quantized({"local": {"path": str(DATA / fixture)}}, model, folder)
    files = {path.name: path for path in folder.iterdir() if path.name != MARKER}
    assert {"config.json", "model.safetensors"} | TOKENIZER <= files.keys()
    for name in TOKENIZER:
        assert files[name].resolve() == (model / name).resolve()
    for name in ("config.json", "model.safetensors"):
        assert files[name].resolve() == DATA / fixture / name
    assert Checkpoint(folder).quant_method == model_quantization(fixture)
    same_weights(folder, fixture)
    assert Tokenizer(folder).encode("Zürich") == Tokenizer(model).encode("Zürich")


def model_quantization(fixture: str) -> str:
    return json.loads((DATA / fixture / "config.json").read_text())["quantization_config"]["quant_method"]


def test_its_own_tokenizer_is_not_used(tmp_path):
    """The same text must become the same tokens in every recipe of a model."""
    fixture = "gptqmodel-asym"
    model, published = original(fixture, tmp_path / "model"), shutil.copytree(DATA / fixture, tmp_path / "published")
    (published / "tokenizer.json").write_text("{}")
    make_quantized({"local": {"path": str(published)}}, model, tmp_path / "quantized")
    assert (tmp_path / "quantized" / "tokenizer.json").resolve() == (model / "tokenizer.json").resolve()


def test_made_again(tmp_path):
    fixture = "gptqmodel-asym"
    model, before = original(fixture, tmp_path / "model"), (DATA / fixture / "model.safetensors").read_bytes()
    for _ in range(2):
        make_quantized({"local": {"path": str(DATA / fixture)}}, model, tmp_path / "quantized")
    same_weights(tmp_path / "quantized", fixture)
    assert (DATA / fixture / "model.safetensors").read_bytes() == before


def test_a_head_may_be_stored_apart(tmp_path):
    """Quantizers untie an output product that shares the embedding's weights."""
    fixture = "gptqmodel-asym"
    model = original(fixture, tmp_path / "model", tie_word_embeddings=True)
    make_quantized({"local": {"path": str(DATA / fixture)}}, model, tmp_path / "quantized")
    same_weights(tmp_path / "quantized", fixture)


@pytest.mark.parametrize(
    ("changes", "differing"),
    [
        ({"rms_norm_eps": 1e-5}, "rms_norm_eps 1e-06 instead of 1e-05"),
        ({"max_position_embeddings": 64}, "max_position_embeddings 128 instead of 64"),
        (
            {"vocab_size": 300, "num_hidden_layers": 3},
            "vocab_size 320 instead of 300, num_hidden_layers 2 instead of 3",
        ),
        (
            {"num_key_value_heads": 4, "head_dim": 16},
            "num_key_value_heads 2 instead of 4, head_dim 32 instead of 16",
        ),
    ],
)
def test_another_model_is_refused(tmp_path, changes, differing):
    """The message names the keys that differ, and no other."""
    fixture = "autoawq-gemm"
    model, source = original(fixture, tmp_path / "model", **changes), {"local": {"path": str(DATA / fixture)}}
    with pytest.raises(UserError) as caught:
        make_quantized(source, model, tmp_path / "quantized")
    message = str(caught.value)
    if "max_position_embeddings" in changes:  # which is also the limit of the rotary embedding
        message = message.partition(", rope")[0]
    assert message == f"{DATA / fixture} is another model than {model}: {differing}"
    assert {path.name for path in tmp_path.iterdir()} == {"model"}


def test_another_rotary_base_is_refused(tmp_path):
    fixture = "autoawq-gemm"
    model = original(fixture, tmp_path / "model", rope_theta=5e5)
    make = lambda: make_quantized({"local": {"path": str(DATA / fixture)}}, model, tmp_path / "x")
    refused(make, r"is another model than .*: rope .*10000\.0.* instead of .*500000\.0")


def test_weights_that_are_not_quantized_are_refused(tmp_path):
    model = original("autoawq-gemm", tmp_path / "model")
    other = original("autoawq-gemm", tmp_path / "other")
    make = lambda: make_quantized({"local": {"path": str(other)}}, model, tmp_path / "x")
    refused(make, f"^{other} is not quantized; declare it as a model in config/models.yaml$")
    assert {path.name for path in tmp_path.iterdir()} == {"model", "other"}


def test_a_folder_that_does_not_exist(tmp_path):
    model = original("autoawq-gemm", tmp_path / "model")
    make = lambda: make_quantized({"local": {"path": str(tmp_path / "none")}}, model, tmp_path / "x")
    refused(make, "the model folder .*/none does not exist")
    assert {path.name for path in tmp_path.iterdir()} == {"model"}


def test_a_layout_that_is_not_supported(tmp_path):
    fixture = "gptqmodel-asym"
    model, published = original(fixture, tmp_path / "model"), shutil.copytree(DATA / fixture, tmp_path / "published")
    config = json.loads((published / "config.json").read_text())
    config["quantization_config"]["bits"] = 3
    (published / "config.json").write_text(json.dumps(config))
    make = lambda: make_quantized({"local": {"path": str(published)}}, model, tmp_path / "x")
    refused(make, "GPTQ with 3 bits is not supported")
    assert {path.name for path in tmp_path.iterdir()} == {"model", "published"}


def test_the_record_of_smoothing_comes_along(tmp_path):
    """It corrects ranges that were measured on the original model."""
    fixture = "gptqmodel-asym"
    model, published = original(fixture, tmp_path / "model"), shutil.copytree(DATA / fixture, tmp_path / "published")
    np.savez(published / "smoothing.npz", **{"model.layers.0.self_attn.o_proj": np.full(64, 2, np.float32)})
    make_quantized({"local": {"path": str(published)}}, model, tmp_path / "quantized")
    assert (tmp_path / "quantized" / "smoothing.npz").read_bytes() == (published / "smoothing.npz").read_bytes()


@pytest.mark.parametrize("inside", [False, True])
def test_the_output_does_not_replace_the_source(tmp_path, inside):
    fixture = "gptqmodel-asym"
    model = original(fixture, tmp_path / "model")
    published = shutil.copytree(DATA / fixture, tmp_path / "out" / "published")
    make = lambda: make_quantized({"local": {"path": str(published)}}, model, published.parent if inside else published)
    refused(make, "would replace its own input")
    same_weights(published, fixture)


def test_from_a_hub(tmp_path, monkeypatch):
    fixture, asked = "llmcompressor-w8a8-static", {}

    def download(repo, **options):
        asked.update(repo=repo, **options)
        return str(DATA / fixture)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    source = {"hub": {"repo": "o/n-w8a8", "revision": "abc"}}
    make_quantized(source, original(fixture, tmp_path / "model"), tmp_path / "quantized")
    assert (asked["repo"], asked["revision"]) == ("o/n-w8a8", "abc")
    same_weights(tmp_path / "quantized", fixture)
    other = original(fixture, tmp_path / "other", vocab_size=300)
    refused(
        lambda: make_quantized(source, other, tmp_path / "x"), "^o/n-w8a8 is another model than .*/other: vocab_size"
    )


# Of a model


@pytest.fixture
def published(tmp_path):
    """A function that copies a fixture and gives it a tokenizer, as a hub has them."""

    def copied(fixture):
        model = original(fixture, tmp_path / "model")
        folder = shutil.copytree(DATA / fixture, tmp_path / "published")
        for name in TOKENIZER:
            shutil.copyfile(model / name, folder / name)
        return folder

    return copied


@pytest.mark.parametrize("fixture", FIXTURES)
def test_a_quantized_checkpoint_is_a_model(fixture, published, tmp_path):
    folder = published(fixture)
    make_checkpoint({"local": {"path": str(folder)}}, tmp_path / "checkpoint")
    files = {path.name: path for path in (tmp_path / "checkpoint").iterdir() if path.name != MARKER}
    assert {"config.json", "model.safetensors"} | TOKENIZER <= files.keys()
    assert all(path.is_symlink() for path in files.values())
    assert Checkpoint(tmp_path / "checkpoint").quant_method == model_quantization(fixture)
    same_weights(tmp_path / "checkpoint", fixture)


def test_old_configurations_beside_it_come_along(published, tmp_path):
    folder = published("gptqmodel-asym")
    quantization = json.loads((folder / "config.json").read_text())["quantization_config"]
    (folder / "config.json").write_text(json.dumps(model_config("gptqmodel-asym")))
    (folder / "quantize_config.json").write_text(json.dumps(quantization))
    make_checkpoint({"local": {"path": str(folder)}}, tmp_path / "checkpoint")
    assert Checkpoint(tmp_path / "checkpoint").quant_method == "gptq"
    same_weights(tmp_path / "checkpoint", "gptqmodel-asym")


@pytest.mark.parametrize("group", ["64", "-1"])
@pytest.mark.parametrize("shards", [1, 2])
def test_autogptqs_names_of_files(published, tmp_path, group, shards):
    folder, name = published("gptqmodel-asym"), f"gptq_model-4bit-{group}g"
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    parts = [f"{name}-{i + 1:05d}-of-{shards:05d}.safetensors" for i in range(shards)]
    if shards == 1:
        parts = [f"{name}.safetensors"]
    for i, file in enumerate(parts):
        save_file({key: tensors[key] for key in list(tensors)[i::shards]}, folder / file)
    if shards > 1:
        weight_map = {key: parts[i % shards] for i, key in enumerate(tensors)}
        (folder / f"{name}.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    make_checkpoint({"local": {"path": str(folder)}}, tmp_path / "checkpoint")
    assert [file.name for file in Checkpoint(tmp_path / "checkpoint").files] == parts
    same_weights(tmp_path / "checkpoint", "gptqmodel-asym")


@pytest.mark.parametrize("other", ["model.safetensors", "gptq_model-4bit-128g.safetensors"])
def test_autogptqs_name_beside_another(published, other):
    """The usual name comes first, and of two that are not usual none."""
    folder = published("gptqmodel-asym")
    usual = (folder / "model.safetensors").rename(folder / "gptq_model-4bit-64g.safetensors")
    shutil.copyfile(usual, folder / other)
    if other == "model.safetensors":
        assert [file.name for file in Checkpoint(folder).files] == [other]
    else:
        refused(lambda: Checkpoint(folder), f"^missing weights file {folder}/model.safetensors$")


def test_a_model_needs_its_tokenizer(tmp_path):
    make = lambda: make_checkpoint({"local": {"path": str(DATA / "autoawq-gemm")}}, tmp_path / "x")
    refused(make, r"autoawq-gemm has neither tokenizer\.json nor tokenizer\.model; fetch its tokenizer")
    assert not any(tmp_path.iterdir())
