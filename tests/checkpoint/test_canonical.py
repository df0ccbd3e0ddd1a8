"""What opening a canonical checkpoint refuses, and that it says which tensor or file."""

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from trtbuild.checkpoint.canonical import Checkpoint
from trtbuild.errors import UserError
from trtbuild.tensors.lazy import from_tensor
from trtbuild.tensors.safetensors_stream import write_sharded


@pytest.fixture
def copy(tiny_checkpoint, tmp_path):
    return shutil.copytree(tiny_checkpoint, tmp_path / "copy")


def change_tensors(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def change_config(folder, **values):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_values_are_those_of_the_file(tiny_checkpoint):
    checkpoint = Checkpoint(tiny_checkpoint)
    expected = load_file(tiny_checkpoint / "model.safetensors")
    assert checkpoint.tensors.keys() == expected.keys()
    assert all(checkpoint[name].load().equal(tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight", "lm_head.weight"])
def test_missing_tensor(copy, name):
    change_tensors(copy, lambda tensors: tensors.pop(name))
    with pytest.raises(UserError, match=f"{copy}: tensor {re.escape(name)} is missing"):
        Checkpoint(copy)


@pytest.mark.parametrize(
    ("name", "shape"), [("model.layers.0.self_attn.k_proj.weight", (32, 64)), ("model.norm.weight", (64,))]
)
def test_wrong_shape(copy, name, shape):
    change_tensors(copy, lambda tensors: tensors.update({name: torch.zeros(3, 5)}))
    message = f"tensor {name} has shape (3, 5), config.json asks for {shape}"
    with pytest.raises(UserError, match=re.escape(message)):
        Checkpoint(copy)


def test_a_tied_model_needs_no_head(copy):
    change_tensors(copy, lambda tensors: tensors.pop("lm_head.weight"))
    change_config(copy, tie_word_embeddings=True)
    assert "lm_head.weight" not in Checkpoint(copy).config.tensor_shapes()


def test_missing_shard(copy):
    tensors = load_file(copy / "model.safetensors")
    (copy / "model.safetensors").unlink()
    write_sharded(copy, {n: from_tensor(t) for n, t in tensors.items()}, max_shard_bytes=150_000)
    shard = sorted(copy.glob("model-*"))[1]
    shard.unlink()
    with pytest.raises(UserError, match=f"missing weights file {shard}"):
        Checkpoint(copy)


def test_missing_weights(copy):
    (copy / "model.safetensors").unlink()
    with pytest.raises(UserError, match=f"missing weights file {copy}/model.safetensors"):
        Checkpoint(copy)


def test_truncated_weights(copy):
    file = copy / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(UserError, match=f"{file} is truncated"):
        Checkpoint(copy)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model_type": "gpt2"}, "model_type 'gpt2' is not supported; supported are baichuan"),
        ({"num_key_value_heads": 3}, "num_attention_heads 4 is not a multiple of num_key_value_heads 3"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "RoPE scaling 'yarn' is not supported"),
    ],
)
def test_configuration_that_cannot_be_served(copy, values, message):
    change_config(copy, **values)
    with pytest.raises(UserError, match=f"{copy}/config.json: {message}"):
        Checkpoint(copy)


def test_no_configuration(copy):
    (copy / "config.json").unlink()
    with pytest.raises(UserError, match=f"{copy}/config.json does not exist"):
        Checkpoint(copy)


def test_a_tensor_that_the_configuration_does_not_know_is_refused(copy):
    """A bias that would silently be left out, say."""
    name = "model.layers.0.self_attn.q_proj.bias"
    change_tensors(copy, lambda tensors: tensors.update({name: torch.ones(64)}))
    with pytest.raises(UserError, match=f"the tensor {name} is no part of the model"):
        Checkpoint(copy)
