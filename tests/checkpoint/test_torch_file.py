"""Weights that `torch.save` wrote: what is read, without copies, and what is refused, without running anything."""

import os
import pickle
import zipfile
import zlib
from collections import Counter, OrderedDict
from pathlib import Path

import pytest
import torch

from trtbuild.checkpoint.torch_file import open_torch_file
from trtbuild.errors import UserError

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int8, torch.bool]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "pytorch_model.bin"


def refused(path: Path, message: str) -> None:
    """It is refused with exactly this line."""
    with pytest.raises(UserError) as caught:
        open_torch_file(path)
    assert str(caught.value) == message


class Calls:
    """What pickle restores by calling a function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def repickled(content: bytes, old: bytes, new: bytes) -> bytes:
    """The archive with another pickle, as long as the old one, and its checksum in all places."""
    assert len(old) == len(new)
    content = content.replace(old, new)
    return content.replace(zlib.crc32(old).to_bytes(4, "little"), zlib.crc32(new).to_bytes(4, "little"))


class Plain:
    """An object of a class that torch does not know."""


# What is read


@pytest.mark.parametrize("dtype", DTYPES)
def test_values(path, dtype):
    x = torch.arange(-6, 6).reshape(3, 4).to(dtype)
    torch.save({"x": x}, path)
    (read,) = open_torch_file(path).values()
    assert (read.dtype, read.shape, read.nbytes) == (dtype, (3, 4), 12 * dtype.itemsize)
    assert read.load().dtype == dtype
    assert read.load().equal(x)


def test_names_stay_in_order(path):
    names = ["b", "a.weight", "c", ""]
    torch.save(OrderedDict((name, torch.full((2,), i)) for i, name in enumerate(names)), path)
    read = open_torch_file(path)
    assert [(name, x.load().tolist()) for name, x in read.items()] == [(name, [i, i]) for i, name in enumerate(names)]


def test_parts_of_one_storage(path):
    """Transposed and sliced tensors are stored as such, and shared ones once."""
    x = torch.randn(6, 4)
    tensors = {"x": x, "rows": x[2:4], "columns": x[:, 1::2], "transposed": x.T, "again": x}
    torch.save(tensors, path)
    assert path.stat().st_size < 4096
    read = open_torch_file(path)
    assert all(read[name].shape == tuple(y.shape) and read[name].load().equal(y) for name, y in tensors.items())


def test_a_parameter_is_a_tensor(path):
    torch.save(torch.nn.Linear(3, 2).state_dict() | {"p": torch.nn.Parameter(torch.ones(2))}, path)
    read = open_torch_file(path)
    assert {name: x.shape for name, x in read.items()} == {"weight": (2, 3), "bias": (2,), "p": (2,)}
    assert not read["p"].load().requires_grad


def test_the_data_is_mapped(path):
    """Nothing is copied: what is written into the file afterwards is what is read."""
    torch.save({"x": torch.full((1000,), 7, dtype=torch.uint8)}, path)
    x = open_torch_file(path)["x"].load()
    content = path.read_bytes()
    with open(path, "r+b") as file:
        file.seek(content.index(bytes([7] * 1000)))
        file.write(bytes([9] * 1000))
    assert x.unique().tolist() == [9]


# What is refused


def harm(function, path: Path) -> Calls:
    """What creates `path` when it is unpickled."""
    return {
        "open": Calls(open, str(path), "w"),
        "mkdir": Calls(os.mkdir, str(path)),
        "system": Calls(os.system, f"touch '{path}'"),
        "exec": Calls(exec, f"open({str(path)!r}, 'w')"),
        "method": Calls(Path.touch, path),
    }[function]


@pytest.mark.parametrize("function", ["open", "mkdir", "system", "exec", "method"])
@pytest.mark.parametrize("nested", [False, True])
def test_nothing_is_executed(path, tmp_path, function, nested):
    """Unpickled without care, the same file does what it is made for."""
    evil = harm(function, tmp_path / "harm")
    torch.save({"x": torch.ones(2), "y": evil} if nested else evil, path)
    with pytest.raises(UserError, match=f"^{path} holds more than tensors, and is not read: ") as caught:
        open_torch_file(path)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "harm").exists()
    torch.load(path, weights_only=False)
    assert (tmp_path / "harm").exists()


@pytest.mark.parametrize(
    ("content", "name"),
    [
        ({"x": torch.ones(2), "y": Plain()}, f"{__name__}.Plain"),
        (Plain, f"{__name__}.Plain"),
        (torch.nn.Linear(2, 2), "torch.nn.modules.linear.Linear"),
        (Calls(open, "x", "w"), "io.open"),
    ],
    ids=["object", "class", "module", "function"],
)
def test_what_is_more_than_tensors_is_named(path, content, name):
    torch.save(content, path)
    reason = f"Unsupported global: GLOBAL {name} was not an allowed global by default"
    refused(path, f"{path} holds more than tensors, and is not read: {reason}")


def test_a_blocked_function_is_named(path):
    torch.save({"x": Calls(os.system, "true")}, path)
    with pytest.raises(UserError, match=r"posix\.system"):
        open_torch_file(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"x": 5}, "'x' is a int; only named tensors are expected"),
        ({"x": torch.ones(2), "step": 1.5}, "'step' is a float; only named tensors are expected"),
        ({"x": torch.ones(2), "y": None}, "'y' is a NoneType; only named tensors are expected"),
        ({"model": {"x": torch.ones(2)}}, "'model' is a dict; only named tensors are expected"),
        ({"x": [torch.ones(2)]}, "'x' is a list; only named tensors are expected"),
        ({3: torch.ones(2)}, "3 is a Tensor; only named tensors are expected"),
    ],
)
def test_only_named_tensors(path, content, message):
    torch.save(content, path)
    refused(path, f"{path}: {message}")


@pytest.mark.parametrize(
    ("content", "kind"), [([torch.ones(2)], "list"), (torch.ones(2), "Tensor"), (3, "int"), ("text", "str")]
)
def test_not_a_dictionary(path, content, kind):
    torch.save(content, path)
    refused(path, f"{path} holds a {kind}; a dictionary of tensors is expected")


def test_missing(path):
    refused(path, f"missing weights file {path}")
    path.mkdir()
    refused(path, f"{path} is a folder; a file is expected")


NO_ARCHIVE = (
    "{} is truncated, or not in the format of torch 1.6 and later; fetch it again, or load and save it with a newer "
    "torch"
)


@pytest.mark.parametrize("share", [0, 0.01, 0.5, 0.9, 0.9999])
def test_truncated(path, share):
    torch.save({"x": torch.ones(10_000)}, path)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    refused(path, NO_ARCHIVE.format(path))


def test_the_format_before_torch_1_6(path):
    torch.save({"x": torch.ones(2)}, path, _use_new_zipfile_serialization=False)
    refused(path, NO_ARCHIVE.format(path))


def test_another_file(path):
    path.write_bytes(pickle.dumps({"x": 1}))
    refused(path, NO_ARCHIVE.format(path))


def test_another_archive(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("folder/readme.txt", "hello")
    with pytest.raises(UserError, match=f"^{path} is truncated or damaged \\(.*\\); fetch it again$"):
        open_torch_file(path)


def test_a_damaged_pickle_executes_nothing_and_is_refused(path, tmp_path):
    """Each byte of the pickle in turn is another one: what is read then are tensors, or it is refused in one line."""
    torch.save({"x": torch.ones(4), "y": torch.zeros(2)}, path)
    content = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        pickled = archive.read(f"{path.stem}/data.pkl")
    outcomes = Counter()
    for position in range(0, len(pickled), 3):
        changed = bytearray(pickled)
        changed[position] ^= 0x15
        path.write_bytes(repickled(content, pickled, bytes(changed)))
        try:
            outcomes.update(type(x.load()).__name__ for x in open_torch_file(path).values())
        except UserError as error:
            outcomes["\n" in str(error)] += 1
    assert outcomes.keys() == {"Tensor", False}
    assert outcomes[False] > 20


@pytest.mark.parametrize("damage", ["empty stack", "arguments", "disks"])
def test_damage_that_torch_or_zipfile_trip_over(path, damage):
    """Torch's unpickler pops from an empty stack and calls with too few arguments; `zipfile` counts disks."""
    torch.save({"x": torch.ones(4)}, path)
    content = path.read_bytes()
    if damage == "disks":
        at = content.rindex(b"PK\6\7") + 4
        content = content[:at] + b"\7" + content[at + 1 :]
    else:
        with zipfile.ZipFile(path) as archive:
            pickled = archive.read(f"{path.stem}/data.pkl")
        other = b"\x80\x02a." if damage == "empty stack" else b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n)R."
        content = repickled(content, pickled, other.ljust(len(pickled), b"."))
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"^{path} "):
        open_torch_file(path)


@pytest.mark.parametrize("where", ["data.pkl", "data/1", "version"])
def test_a_flipped_bit(path, where):
    """Of a tensor it is found when that is loaded; torch reads on in both cases."""
    torch.save({"x": torch.ones(100), "y": torch.full((100,), 2.0)}, path)
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        (info,) = (info for info in archive.infolist() if info.filename.endswith(f"/{where}"))
        content[content.index(archive.read(info)) + info.file_size // 2] ^= 64
    path.write_bytes(content)
    if where != "data/1":
        with pytest.raises(UserError, match=rf"^{path} is truncated or damaged \(Bad CRC-32 .*\); fetch it again$"):
            open_torch_file(path)
        return
    read = open_torch_file(path)
    assert read["x"].load().equal(torch.ones(100))
    with pytest.raises(UserError, match=rf"^{path} is damaged: the checksum of the tensor y is wrong; fetch it again$"):
        read["y"].load()
    assert not torch.load(path, weights_only=True)["y"].equal(torch.full((100,), 2.0))


def test_a_record_shorter_than_the_pickle_says(path):
    """Torch would take the bytes that follow in the file for the rest of the weights."""
    torch.save({"x": torch.ones(64), "y": torch.zeros(64)}, path)
    content = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        pickled = archive.read(f"{path.stem}/data.pkl")
    longer = pickled.replace(b"K\x40", b"K\x44")  # BININT1 64: the elements of the storages, and of the shapes
    assert longer != pickled
    path.write_bytes(repickled(content, pickled, longer))
    assert torch.load(path, weights_only=True, mmap=True)["x"].shape == (68,)
    refused(path, f"{path} is damaged: its storages are not as large as its pickle says; fetch it again")


def test_a_storage_that_no_tensor_is_of(path):
    torch.save({"x": torch.ones(4)}, path)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr(f"{path.stem}/data/7", b"more")
    refused(path, f"{path} is damaged: its storages are not as large as its pickle says; fetch it again")


def test_compressed_records(path):
    """Torch would map the compressed bytes."""
    torch.save({"x": torch.ones(4096)}, path)
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, record in records.items():
            archive.writestr(name, record)
    with pytest.raises(UserError, match="is compressed"):
        open_torch_file(path)
