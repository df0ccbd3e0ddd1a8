"""Tensors that are read ahead arrive whole, in any order, and no more of them than the window takes."""

import pytest
import torch

from trtbuild.errors import UserError
from trtbuild.tensors import upload
from trtbuild.tensors.lazy import LazyTensor, concatenate, from_tensor
from trtbuild.tensors.safetensors_stream import open_file, write_file
from trtbuild.tensors.upload import Upload

CPU = torch.device("cpu")


class Stage:
    """In the place of page-locked memory and a stream."""

    def __init__(self, device):
        pass

    def send(self, read, start, target, free):
        buffer = torch.empty_like(target)
        read(start, buffer.numpy().data)
        target.copy_(buffer)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(upload, "CHUNK", 1000)
    monkeypatch.setattr(upload, "WINDOW", 5000)


@pytest.fixture
def tensors():
    return {
        "a": torch.randn(30, 50),
        "one": torch.tensor(2.5),
        "none": torch.zeros(0, 4),
        "bytes": torch.randint(256, (999,), dtype=torch.uint8),
        "narrow": torch.randn(7, 9).to(torch.float8_e4m3fn),
        "chunk": torch.randn(250),
        "b": torch.randn(4001).half(),
        "last": torch.randint(2, (3, 3)).bool(),
    }


@pytest.fixture
def stored(tensors, tmp_path):
    write_file(tmp_path / "x.safetensors", {name: from_tensor(x) for name, x in tensors.items()})
    return open_file(tmp_path / "x.safetensors")[0]


def equal(x, y):
    return x.dtype == y.dtype and x.shape == y.shape and x.float().equal(y.float())


@pytest.mark.parametrize("order", [list, lambda names: list(names)[::-1], lambda names: sorted(names)])
def test_every_tensor_in_any_order(tensors, stored, order):
    """Also in another order than was said, and a second time."""
    names = list(tensors)
    coming = Upload(stored, names, CPU, Stage)
    for name in [*order(names), *names]:
        assert equal(coming.take(name), tensors[name])
    coming.close()


def test_computed_ones_among_them(tensors, stored):
    both = stored | {"sum": concatenate([stored["a"], stored["a"]]), "half": stored["a"].to(torch.float16)}
    coming = Upload(both, list(both), CPU, Stage)
    assert equal(coming.take("a"), tensors["a"])
    assert equal(coming.take("sum"), torch.cat([tensors["a"]] * 2))
    assert equal(coming.take("half"), tensors["a"].half())
    assert equal(coming.take("b"), tensors["b"])
    coming.close()


def test_no_more_than_a_window_ahead(stored, monkeypatch):
    """Memory of what was not asked for: the window, and the tensor that reached beyond it."""
    names = list(stored)
    largest = max(tensor.nbytes for tensor in stored.values())
    coming = Upload(stored, names, CPU, Stage)
    for name in names:
        coming.take(name)
        assert coming._bytes_ahead < upload.WINDOW + largest
        assert coming._bytes_ahead == sum(memory.nbytes for memory, _ in coming._coming.values())
    assert coming._bytes_ahead == 0
    coming.close()


def test_a_file_that_became_shorter(stored, tmp_path):
    path = tmp_path / "x.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[: len(data) - 4000])
    coming = Upload(stored, list(stored), CPU, Stage)
    coming.take("a")
    with pytest.raises(UserError, match=r"x\.safetensors is shorter than it was"):
        coming.take("b")
    coming.close()


def test_an_error_of_a_computed_one(stored):
    def fail():
        raise UserError("damaged")

    coming = Upload(stored | {"bad": LazyTensor(torch.float32, (1,), fail)}, [*stored, "bad"], CPU, Stage)
    with pytest.raises(UserError, match="damaged"):
        coming.take("bad")
    coming.close()
