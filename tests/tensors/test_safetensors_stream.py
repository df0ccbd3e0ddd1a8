"""The streaming writer against the safetensors library."""

import gc
import json
import weakref

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from trtbuild.checkpoint.canonical import Checkpoint
from trtbuild.errors import UserError
from trtbuild.files import atomic
from trtbuild.tensors.lazy import LazyTensor, concatenate, from_tensor
from trtbuild.tensors.safetensors_stream import NAMES, open_file, write_file, write_sharded


def random_tensor(dtype, shape):
    return torch.randint(0, 100, shape, dtype=torch.int16).to(dtype)


def header_length(path):
    return int.from_bytes(path.read_bytes()[:8], "little")


@pytest.mark.parametrize("dtype", NAMES, ids=str)
@pytest.mark.parametrize("shape", [(5, 7), (3,), (), (0, 4)], ids=str)
def test_library_reads_what_was_written(tmp_path, dtype, shape):
    path = tmp_path / "x.safetensors"
    tensors = {"a": random_tensor(dtype, shape), "ünïcode": torch.rand(3, 3), "b": random_tensor(dtype, (2, 9)).T}
    write_file(path, {name: from_tensor(t) for name, t in tensors.items()}, {"key": "välue"})
    loaded = load_file(path)
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert loaded[name].shape == tensor.shape
        assert loaded[name].float().equal(tensor.float())
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"key": "välue"}


@pytest.mark.parametrize("dtype", NAMES, ids=str)
def test_reads_what_the_library_wrote(tmp_path, dtype):
    path = tmp_path / "x.safetensors"
    expected = random_tensor(dtype, (4, 6))
    save_file({"a": expected, "other": torch.rand(3)}, path, {"format": "pt"})
    tensors, metadata = open_file(path)
    assert metadata == {"format": "pt"}
    assert (tensors["a"].dtype, tensors["a"].shape, tensors["a"].nbytes) == (dtype, (4, 6), expected.nbytes)
    assert tensors["a"].load().float().equal(expected.float())


@pytest.mark.parametrize("name_length", range(0, 130, 13))
def test_data_starts_at_a_multiple_of_64_bytes(tmp_path, name_length):
    path = tmp_path / "x.safetensors"
    write_file(path, {"n" * (name_length + 1): from_tensor(torch.rand(3))})
    assert (8 + header_length(path)) % 64 == 0
    assert path.stat().st_size == 8 + header_length(path) + 12


def test_one_tensor_is_alive_at_a_time(tmp_path):
    loaded, alive = [], []

    def load():
        gc.collect()
        alive.append(sum(tensor() is not None for tensor in loaded))
        tensor = torch.rand(64, 64)
        loaded.append(weakref.ref(tensor))
        return tensor

    tensors = {str(i): LazyTensor(torch.float32, (64, 64), load) for i in range(6)}
    write_sharded(tmp_path, tensors, max_shard_bytes=40_000)
    assert len(loaded) == 6  # each is loaded once
    assert max(alive) == 0


def test_sharded_files_and_index(tmp_path, tiny_checkpoint):
    """`transformers` loads the shards; they hold what one file does, and none is larger than asked."""
    whole = load_file(tiny_checkpoint / "model.safetensors")
    seen = []
    write_sharded(
        tmp_path, {n: from_tensor(t) for n, t in whole.items()}, max_shard_bytes=100_000, progress=seen.append
    )
    (tmp_path / "config.json").write_bytes((tiny_checkpoint / "config.json").read_bytes())
    total = sum(t.nbytes for t in whole.values())
    assert sum(seen) == total
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == total
    assert index["weight_map"].keys() == whole.keys()
    files = sorted(set(index["weight_map"].values()))
    assert files == [f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))]
    assert len(files) >= total // 100_000
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([*files, "config.json", "model.safetensors.index.json"])
    for name, file in index["weight_map"].items():
        assert load_file(tmp_path / file)[name].equal(whole[name])
    for file in files:
        assert sum(t.nbytes for t in load_file(tmp_path / file).values()) <= 100_000

    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    loaded = model.state_dict()
    assert all(loaded[name].equal(tensor) for name, tensor in whole.items())
    checkpoint = Checkpoint(tmp_path)
    assert all(checkpoint[name].load().equal(tensor) for name, tensor in whole.items())


def test_a_tensor_larger_than_a_shard_gets_its_own(tmp_path):
    tensors = {"small": torch.rand(2), "large": torch.rand(100), "end": torch.rand(2)}
    write_sharded(tmp_path, {n: from_tensor(t) for n, t in tensors.items()}, max_shard_bytes=100)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert [set(load_file(file)) for file in files] == [{"small"}, {"large"}, {"end"}]


@pytest.mark.parametrize("keep", [0, 4, 8, 60, -1, -100])
def test_truncated_file(tmp_path, keep):
    path = tmp_path / "x.safetensors"
    write_file(path, {"a": from_tensor(torch.rand(50))})
    data = path.read_bytes()
    path.write_bytes(data[:keep])
    with pytest.raises(UserError, match=f"{path} is truncated or not a safetensors file"):
        open_file(path)


@pytest.mark.parametrize(
    ("name", "message"),
    [("none", "missing weights file"), ("folder", "/folder is a folder; a file is expected")],
)
def test_missing_file(tmp_path, name, message):
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match=message):
        open_file(tmp_path / name)


def test_unknown_dtype_is_named(tmp_path):
    save_file({"a": torch.rand(4).to(torch.complex64)}, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match="tensor a has the dtype C64"):
        open_file(tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    "wrong",
    [
        LazyTensor(torch.float32, (4, 2), lambda: torch.zeros(4, 2, dtype=torch.float16)),
        LazyTensor(torch.float32, (4, 2), lambda: torch.zeros(2, 4)),
    ],
    ids=["dtype", "shape"],
)
def test_a_tensor_that_is_not_as_announced(tmp_path, wrong):
    with pytest.raises(ValueError, match=r"bad: announced torch\.float32\[4, 2\]"), atomic(tmp_path / "x") as path:
        write_file(path, {"good": from_tensor(torch.zeros(3)), "bad": wrong})
    assert list(tmp_path.iterdir()) == []


def test_lazy_tensors_convert_and_join():
    a, b = torch.randn(3, 5), torch.randn(4, 5)
    joined = concatenate([from_tensor(a), from_tensor(b)]).to(torch.bfloat16)
    assert (joined.shape, joined.dtype, joined.nbytes) == ((7, 5), torch.bfloat16, 70)
    assert joined.load().equal(torch.cat([a, b]).bfloat16())
    calls = []
    lazy = LazyTensor(torch.float32, (1,), lambda: calls.append(1) or torch.zeros(1))
    lazy.to(torch.float16)
    assert calls == []  # converting reads nothing
