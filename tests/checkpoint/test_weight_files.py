"""Weights in one file or in shards with an index: both formats, and what does not fit together."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from published_models import LLAMA, QWEN, Tensors, llama_tensors, qwen_tensors, write_published
from safetensors.torch import load_file, save_file

from trtbuild.checkpoint.sources import make_checkpoint
from trtbuild.checkpoint.weight_files import SAFETENSORS, TORCH, has, open_weights, weight_files
from trtbuild.errors import UserError

FORMATS = pytest.mark.parametrize("name", [SAFETENSORS, TORCH], ids=["safetensors", "bin"])
TENSORS = {f"t{i}": torch.full((i + 1, 2), float(i)) for i in range(7)}


def write(folder: Path, name: str, tensors: Tensors = TENSORS, shards: int = 3, config: dict = LLAMA) -> Path:
    return write_published(folder, config, tensors, shards=shards, safetensors=name == SAFETENSORS)


def shard(folder: Path, name: str, number: int) -> Path:
    """The file of shard 1, 2 or 3."""
    stem, _, suffix = name.rpartition(".")
    return folder / f"{stem}-{number:05d}-of-00003.{suffix}"


def change_shard(file: Path, *, add: Tensors | None = None, remove: str | None = None) -> None:
    is_safetensors = file.suffix == ".safetensors"
    tensors = (load_file(file) if is_safetensors else torch.load(file)) | (add or {})
    tensors.pop(remove, None)
    (save_file if is_safetensors else torch.save)(tensors, file)


def change_index(folder: Path, name: str, **entries: str | None) -> Path:
    """Sets entries of the index, or removes those of None."""
    file = folder / f"{name}.index.json"
    index = json.loads(file.read_text())
    weight_map = index["weight_map"] | entries
    file.write_text(json.dumps(index | {"weight_map": {key: x for key, x in weight_map.items() if x is not None}}))
    return file


def refused(folder: Path, name: str, message: str) -> None:
    """It is refused with exactly this line."""
    with pytest.raises(UserError) as caught:
        open_weights(folder, name)
    assert str(caught.value) == message


# What is read


@FORMATS
@pytest.mark.parametrize("shards", [1, 2, 3, 7])
def test_one_file_or_shards(tmp_path, name, shards):
    folder = write(tmp_path / "x", name, shards=shards)
    files = weight_files(folder, name)
    assert len(files) == shards
    assert sorted(file.name for file in files) == sorted(file.name for file in folder.glob(f"*.{name.split('.')[1]}"))
    if shards > 1:
        assert [name for names in files.values() for name in sorted(names)] == list(TENSORS)
    else:
        assert files == {folder / name: None}
    read = open_weights(folder, name)
    assert list(read) == list(TENSORS)
    assert all(read[tensor].load().equal(x) for tensor, x in TENSORS.items())


@FORMATS
def test_has(tmp_path, name):
    other = TORCH if name == SAFETENSORS else SAFETENSORS
    for shards in (1, 3):
        folder = write(tmp_path / str(shards), name, shards=shards)
        assert has(folder, name)
        assert not has(folder, other)


@FORMATS
def test_a_single_file_comes_before_an_index(tmp_path, name):
    """As in transformers: one was saved over an older model's shards."""
    folder = write(tmp_path / "x", name)
    new = {tensor: value + 1 for tensor, value in TENSORS.items()}
    shutil.copy(write(tmp_path / "new", name, new, shards=1) / name, folder)
    assert weight_files(folder, name) == {folder / name: None}
    assert all(value.load().equal(new[tensor]) for tensor, value in open_weights(folder, name).items())


@FORMATS
def test_shards_in_a_folder_below(tmp_path, name):
    folder = write(tmp_path / "x", name)
    (folder / "parts").mkdir()
    index = folder / f"{name}.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    for file in set(weight_map.values()):
        (folder / file).rename(folder / "parts" / file)
    index.write_text(json.dumps({"weight_map": {tensor: f"parts/{file}" for tensor, file in weight_map.items()}}))
    assert has(folder, name)
    assert all(value.load().equal(TENSORS[tensor]) for tensor, value in open_weights(folder, name).items())


@FORMATS
@pytest.mark.parametrize("file", ["../elsewhere", "/elsewhere"])
def test_an_index_that_leads_elsewhere(tmp_path, name, file):
    folder = write(tmp_path / "x", name)
    index = change_index(folder, name, t1=file)
    message = f"{index} lists {file}, which is outside its folder; shards must be beside it or below"
    refused(folder, name, message)


@FORMATS
@pytest.mark.parametrize("listed", [False, True])
def test_rotary_frequencies_are_dropped(tmp_path, name, listed):
    """Old checkpoints hold them, and some indexes list ones that are not there."""
    folder = write(tmp_path / "x", name)
    frequencies = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(4) for i in range(2)}
    change_shard(shard(folder, name, 1), add=frequencies)
    if listed:
        files = [shard(folder, name, i).name for i in (1, 2)]  # the second is listed in a shard without it
        change_index(folder, name, **dict(zip(frequencies, files, strict=True)))
    assert list(open_weights(folder, name)) == list(TENSORS)


def test_nothing_but_such_frequencies_is_dropped(tmp_path):
    tensors = {
        "rotary_emb.inv_freq.weight": torch.ones(1),
        "inv_freq": torch.ones(1),
        "a.rotary_emb.inv_freq": torch.ones(1),
    }
    folder = write(tmp_path / "x", TORCH, tensors, shards=1)
    assert list(open_weights(folder, TORCH)) == ["rotary_emb.inv_freq.weight", "inv_freq"]


# What does not fit together


@FORMATS
def test_a_missing_file(tmp_path, name):
    refused(tmp_path, name, f"missing weights file {tmp_path / name}")


@FORMATS
@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_missing_shard(tmp_path, name, number):
    """Named before any shard is opened."""
    folder = write(tmp_path / "x", name)
    file = shard(folder, name, number)
    file.unlink()
    shard(folder, name, 1 if number != 1 else 2).write_bytes(b"damaged")
    refused(folder, name, f"missing weights file {file}")


@FORMATS
def test_a_tensor_is_missing_from_its_shard(tmp_path, name):
    folder = write(tmp_path / "x", name)
    file = shard(folder, name, 2)
    change_shard(file, remove="t4")
    refused(folder, name, f"{file} lacks the tensor t4, which the index lists there; fetch it again")


@FORMATS
def test_a_tensor_that_the_index_does_not_know(tmp_path, name):
    folder = write(tmp_path / "x", name)
    file = shard(folder, name, 2)
    change_shard(file, add={"foo": torch.ones(2)})
    refused(folder, name, f"{file} holds the tensor foo, which the index does not list there")


@FORMATS
def test_a_tensor_in_two_shards(tmp_path, name):
    folder = write(tmp_path / "x", name)
    first, third = shard(folder, name, 1), shard(folder, name, 3)
    change_shard(third, add={"t1": TENSORS["t1"]})
    refused(folder, name, f"{folder}: the tensor t1 is in {first.name} and again in {third.name}")


@FORMATS
def test_a_tensor_in_another_shard(tmp_path, name):
    folder = write(tmp_path / "x", name)
    change_index(folder, name, t1=shard(folder, name, 2).name)
    first = shard(folder, name, 1)
    refused(folder, name, f"{first} holds the tensor t1, which the index does not list there")


@FORMATS
def test_an_index_that_lists_a_tensor_that_is_nowhere(tmp_path, name):
    folder = write(tmp_path / "x", name)
    file = shard(folder, name, 3)
    change_index(folder, name, foo=file.name)
    refused(folder, name, f"{file} lacks the tensor foo, which the index lists there; fetch it again")


@FORMATS
@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{}", "{} has no weight_map from tensors to files; it is not an index of weight files"),
        ('{"weight_map": ["t0"]}', "{} has no weight_map from tensors to files; it is not an index of weight files"),
        ("[]", "{} holds a JSON list; an object is expected"),
        ("", "{} is not valid JSON: Expecting value: line 1 column 1 (char 0)"),
    ],
)
def test_an_index_that_is_none(tmp_path, name, content, message):
    folder = write(tmp_path / "x", name)
    file = folder / f"{name}.index.json"
    file.write_text(content)
    refused(folder, name, message.format(file))


@FORMATS
def test_an_index_with_a_file_that_is_no_name(tmp_path, name):
    folder = write(tmp_path / "x", name)
    file = change_index(folder, name, t1=5)
    with pytest.raises(UserError, match=str(file)):
        open_weights(folder, name)


# Through a conversion: nothing is written


def not_converted(folder: Path, message: str) -> None:
    """The folder is refused as a source with exactly this line, and nothing is left beside it."""
    out = folder.parent / "out"
    with pytest.raises(UserError) as caught:
        make_checkpoint({"local": {"path": str(folder)}}, out)
    assert str(caught.value) == message
    assert list(folder.parent.iterdir()) == [folder]


@FORMATS
def test_a_tensor_that_the_model_does_not_have(tmp_path, name):
    for config, make in ((LLAMA, llama_tensors), (QWEN, qwen_tensors)):
        extra = {"transformer.h.0.attn.masked_bias": torch.ones(1)}
        folder = write(tmp_path / config["model_type"] / "x", name, make(config) | extra, config=config)
        not_converted(
            folder,
            f"{folder}: the tensor transformer.h.0.attn.masked_bias is no part of the model that config.json describes",
        )


@FORMATS
@pytest.mark.parametrize(
    ("config", "make", "missing", "canonical", "shape"),
    [
        (LLAMA, llama_tensors, "model.layers.2.mlp.up_proj.weight", "model.layers.2.mlp.up_proj.weight", (80, 48)),
        (QWEN, qwen_tensors, "transformer.h.2.mlp.w2.weight", "model.layers.2.mlp.gate_proj.weight", (80, 48)),
        (QWEN, qwen_tensors, "transformer.h.1.attn.c_attn.bias", "model.layers.1.self_attn.q_proj.bias", (48,)),
        (QWEN, qwen_tensors, "lm_head.weight", "lm_head.weight", (320, 48)),
    ],
)
def test_a_tensor_that_is_in_no_shard(tmp_path, name, config, make, missing, canonical, shape):
    tensors = make(config)
    del tensors[missing]
    folder = write(tmp_path / "x", name, tensors, config=config)
    not_converted(folder, f"{folder}: tensor {canonical} is missing; config.json asks for it with shape {shape}")


@FORMATS
@pytest.mark.parametrize("fault", ["missing shard", "lacking tensor", "twice", "truncated"])
def test_a_fault_of_the_shards(tmp_path, name, fault):
    folder = write(tmp_path / "x", name, qwen_tensors(QWEN), config=QWEN)
    first, second = shard(folder, name, 1), shard(folder, name, 2)
    if fault == "missing shard":
        second.unlink()
        message = f"missing weights file {second}"
    elif fault == "lacking tensor":
        change_shard(second, remove="transformer.h.1.ln_1.weight")
        message = f"{second} lacks the tensor transformer.h.1.ln_1.weight, which the index lists there; fetch it again"
    elif fault == "twice":
        change_shard(second, add={"transformer.wte.weight": torch.ones(320, 48)})
        message = f"{folder}: the tensor transformer.wte.weight is in {first.name} and again in {second.name}"
    else:
        second.write_bytes(second.read_bytes()[:-1000])
        with pytest.raises(UserError) as caught:
            open_weights(folder, name)
        message = str(caught.value)
        assert message.startswith(f"{second} is truncated")
    not_converted(folder, message)
